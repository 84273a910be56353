"""The router's examples: disjoint from stage one's, deterministic, proportional, within the caps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
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
