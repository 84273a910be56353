"""The router's examples: disjoint from stage one's, deterministic, proportional, within the caps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmixer.config.errors import UserError
from dsmixer.config.schema import Recipe, RouterDataConfig
from dsmixer.data.domains import Domain, domain_ids
from dsmixer.data.holdout import UNLABELLED, held_out_counts, hold_out_router_examples
from dsmixer.data.records import Example
from dsmixer.training.data import load_run_data


def domain(name: str, size: int) -> Domain:
    train = [Example(f"{name} {i}", " x", name, location=f"{name}:{i}") for i in range(size)]
    return Domain(name, name, 1.0, train, [])


DOMAINS = [domain("a", 100), domain("b", 50), domain("c", 2)]


def test_held_out_examples_are_gone_from_stage_one_and_nothing_is_lost() -> None:
    rest, router, skipped = hold_out_router_examples(DOMAINS, RouterDataConfig(max_examples=15), 0)
    kept = [example for d in rest for example in d.train]
    assert not set(kept) & set(router) and skipped == 0
    assert sorted(e.location for e in kept + router) == sorted(e.location for d in DOMAINS for e in d.train)
    assert [sum(e.domain == name for e in router) for name in "abc"] == [9, 5, 1]  # 9.87, 4.93, 0.20


def test_which_are_held_out_depends_on_the_seed_and_the_domains_name_alone() -> None:
    data = RouterDataConfig(max_examples=30)
    first = hold_out_router_examples(DOMAINS, data, 0)
    assert hold_out_router_examples(DOMAINS, data, 0) == first
    assert hold_out_router_examples(DOMAINS, data, 1)[1] != first[1]
    turned = hold_out_router_examples(DOMAINS[::-1], data, 0)[1]
    assert sorted(e.location for e in turned) == sorted(e.location for e in first[1])


@given(
    sizes=st.lists(st.integers(2, 500), min_size=1, max_size=8),
    wanted=st.integers(1, 600),
    share=st.floats(0.01, 0.99),
)
def test_counts_keep_every_bound_and_stay_within_one_of_proportional(
    sizes: list[int], wanted: int, share: float
) -> None:
    counts = held_out_counts(sizes, wanted, share)
    caps = [max(1, int(share * size)) for size in sizes]
    assert all(1 <= count <= cap < size for count, cap, size in zip(counts, caps, sizes, strict=True))
    for count, cap, size in zip(counts, caps, sizes, strict=True):
        share_of_wanted = wanted * size / sum(sizes)
        assert min(cap, share_of_wanted) - 1 < count < max(1, share_of_wanted) + 1


def test_counts_add_up_where_no_cap_binds() -> None:
    assert held_out_counts([1000, 2000, 3000], 100, 0.2) == [17, 33, 50]
    assert held_out_counts([10, 10], 1000, 0.2) == [2, 2]


def test_a_domain_with_one_example_has_none_to_spare() -> None:
    with pytest.raises(UserError, match=r"data\.domains: d: 1 training example, none to spare"):
        hold_out_router_examples([*DOMAINS, domain("d", 1)], RouterDataConfig(), 0)


def test_a_source_of_its_own_leaves_the_domains_whole_and_needs_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "mixed.csv"
    path.write_text("prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(20)))
    data = RouterDataConfig(source=str(path), max_examples=5)
    rest, router, skipped = hold_out_router_examples(DOMAINS, data, 0)
    assert (
        rest == DOMAINS and len(router) == 5 and skipped == 0 and {e.domain for e in router} == {UNLABELLED}
    )
    assert domain_ids(router, ["a", "b", "c"]).tolist() == [3] * 5
    path.write_text("prompt,completion\n")
    with pytest.raises(UserError, match="no example in it"):
        hold_out_router_examples(DOMAINS, data, 0)


BROKEN = '{"prompt": "p", "completion": " c"}\n{"prompt": "half\n{"completion": " c"}\n'


def test_a_bad_record_of_the_routers_source_stops_unless_it_is_to_be_skipped(tmp_path: Path) -> None:
    source, quarantine = tmp_path / "router.jsonl", tmp_path / "run" / "quarantine.jsonl"
    source.write_text(BROKEN)
    data = RouterDataConfig(source=str(source))
    with pytest.raises(UserError, match=r"router\.jsonl:2"):
        hold_out_router_examples(DOMAINS, data, 0)
    _, router, skipped = hold_out_router_examples(
        DOMAINS, data, 0, on_bad_record="skip", quarantine=quarantine
    )
    assert ([e.prompt for e in router], skipped) == (["p"], 2)
    assert locations(quarantine) == [f"{source}:2", f"{source}:3"]


def test_skipped_records_of_domains_and_routers_end_in_one_file_however_often_they_are_read(
    tmp_path: Path,
) -> None:
    own, source, quarantine = (tmp_path / name for name in ("law.jsonl", "router.jsonl", "q.jsonl"))
    own.write_text(BROKEN)
    source.write_text(BROKEN)
    recipe = Recipe.model_validate(
        {
            "base": {"model": "unused"},
            "data": {"on_bad_record": "skip", "domains": [{"name": "law", "train": str(own)}]},
            "stage2": {"data": {"source": str(source)}},
        }
    )
    for _ in range(2):
        assert load_run_data(recipe, quarantine).num_skipped == 4
        assert locations(quarantine) == [f"{file}:{line}" for file in (own, source) for line in (2, 3)]
    assert load_run_data(recipe, None).num_skipped == 4


def locations(quarantine: Path) -> list[str]:
    return [json.loads(line)["location"] for line in quarantine.read_text().splitlines()]


def drawn_by_hand(name: str, size: int, count: int, seed: int) -> set[str]:
    """Locations of the examples that a domain of ``size`` gives, as they have been drawn from the beginning:
    without replacement, by a generator of the seed, the purpose and the domain's name."""
    digest = hashlib.sha256(repr((seed, "router examples", name)).encode()).digest()
    places = np.random.default_rng(int.from_bytes(digest[:16], "little")).choice(size, count, replace=False)
    return {f"{name}:{i}" for i in places}


def locations_of(examples: list[Example]) -> list[str]:
    return [example.location for example in examples]


@pytest.mark.parametrize("seed", [0, 7])
def test_without_held_out_the_rows_are_those_of_every_run_before_it(seed: int) -> None:
    rest, router, _ = hold_out_router_examples(DOMAINS, RouterDataConfig(max_examples=15), seed)
    by_hand: set[str] = set()
    for name, size, count in (("a", 100, 9), ("b", 50, 5), ("c", 2, 1)):
        by_hand |= drawn_by_hand(name, size, count, seed)
    assert set(locations_of(router)) == by_hand and len(router) == 15
    assert all(by_hand.isdisjoint(locations_of(d.train)) for d in rest)
    in_source_order = [e.location for d in DOMAINS for e in d.train if e.location in by_hand]
    assert locations_of(router) == in_source_order


def test_held_out_alone_decides_what_stage_one_has_left() -> None:
    of = {
        n: hold_out_router_examples(DOMAINS, RouterDataConfig(held_out=24, max_examples=n), 3)
        for n in (1, 10, 24)
    }
    plain = hold_out_router_examples(DOMAINS, RouterDataConfig(max_examples=24), 3)
    assert of[24] == plain, "as many as are held out are all of them"
    assert [rest for rest, _, _ in of.values()] == [plain[0]] * 3
    assert [len(router) for _, router, _ in of.values()] == [1, 10, 24]


@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    wanted=st.integers(1, 25),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_a_smaller_router_set_lies_in_every_larger_one_and_keeps_the_proportions(
    sizes: list[int], wanted: int, seed: int
) -> None:
    domains = [domain(f"d{i}", size) for i, size in enumerate(sizes)]
    before: set[str] = set()
    _, whole, _ = hold_out_router_examples(
        domains, RouterDataConfig(max_examples=wanted, max_share=0.5), seed
    )
    held = [sum(e.domain == d.name for e in whole) for d in domains]
    for n in range(1, wanted + 1):
        data = RouterDataConfig(held_out=wanted, max_examples=n, max_share=0.5)
        router = locations_of(hold_out_router_examples(domains, data, seed)[1])
        if n < wanted:
            assert len(router) == min(n, len(whole))
        assert before <= set(router) <= set(locations_of(whole))
        counts = [sum(place.startswith(f"{d.name}:") for place in router) for d in domains]
        # no domain is ahead of another by more than the one example that is next
        shares = list(zip(counts, held, strict=True))
        assert all((c - 1) / h <= other / of + 1e-12 for c, h in shares for other, of in shares)
        before = set(router)


def recipe_of(tmp_path: Path, **stage2: object) -> Recipe:
    own = tmp_path / "law.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": " c"}) + "\n" for i in range(20)))
    domains = [{"name": "law", "train": str(own)}]
    sections = {"base": {"model": "unused"}, "data": {"domains": domains}, "stage2": stage2}
    return Recipe.model_validate(sections)


def test_what_is_held_out_is_kept_from_stage_one_also_where_stage_two_is_not_enabled(tmp_path: Path) -> None:
    data = {"held_out": 4, "max_examples": 3, "max_share": 0.5}
    with_stage_two = load_run_data(recipe_of(tmp_path, data=data), None)
    without = load_run_data(recipe_of(tmp_path, enabled=False, data=data), None)
    assert without == with_stage_two
    assert len(without.domains[0].train) == 16 and len(without.router_examples) == 3
    unsaid = load_run_data(recipe_of(tmp_path, enabled=False, data={"max_examples": 4}), None)
    assert len(unsaid.domains[0].train) == 20 and unsaid.router_examples == []
