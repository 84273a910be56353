"""The file of a comparison: its scales, overrides, and errors that name file, line and key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsmixer.compare.plan import check_plan, make_plan
from dsmixer.config.comparison import load_comparison
from dsmixer.config.errors import UserError

File = Callable[..., Path]


def test_a_scale_is_merged_deep_over_mappings_and_replaces_lists(comparison_file: File) -> None:
    path = comparison_file()
    full, small = load_comparison(path), load_comparison(path, "small")
    assert full.comparison.seeds == (0, 1) and small.comparison.seeds == (7,)
    assert small.raw["mixer"] == {"rank": 4, "alpha": 16}
    assert [domain["name"] for domain in small.raw["data"]["domains"]] == ["code", "chess"]
    assert "test" not in small.raw["data"]["domains"][0]
    assert full.raw["mixer"]["rank"] == 8 and "scales" not in full.raw and "comparison" not in full.raw
    assert [variant.name for variant in small.comparison.variants] == ["RSL", "GMoE"]


def test_the_place_of_a_key_is_the_line_that_decided_it(comparison_file: File) -> None:
    path = comparison_file()
    lines = path.read_text().splitlines()
    of_scale = 1 + next(i for i, line in enumerate(lines) if "rank: 4" in line)
    of_file = 1 + next(i for i, line in enumerate(lines) if "rank: 8" in line)
    small = load_comparison(path, "small", ["mixer.alpha=9"])
    assert small.where("mixer.rank") == f"{path}:{of_scale}: mixer.rank"
    assert load_comparison(path).where("mixer.rank") == f"{path}:{of_file}: mixer.rank"
    assert small.where("mixer.alpha") == "command line: mixer.alpha=9"
    assert small.raw["mixer"]["alpha"] == 9


@pytest.mark.parametrize(
    ("replaced", "said", "fix"),
    [
        (("seeds: [0, 1]", "seed: [0, 1]"), "comparison.seed: unknown key 'seed'", "write seeds"),
        (("  title: Losses on the routers\n", ""), "comparison.title: missing", "add title"),
        (("seeds: [0, 1]", "seeds: 3"), "comparison.seeds: 3 (a whole number) is not a list", "list"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "0 stands there twice", "keep one"),
        (("name: GMoE", "name: RSL"), "comparison.variants.1: 'RSL' stands there twice", "keep one"),
        (
            ("name: GMoE", "name: own"),
            "comparison.variants.1.name: the table has another row 'own'",
            "rename it",
        ),
        (
            ("methods: [own", "axes: [{name: a, key: stage2.top_p, values: [0.5, '0.5']}]\n  methods: [own"),
            "comparison.axes.0.values: a value stands there twice",
            "keep one",
        ),
        (("methods: [own", "plots: [score]\n  methods: [own"), "comparison.plots.0: 'score'", "write scores"),
        (
            ("stage2.rsl.alpha: 0.2", "run.seed: 3"),
            "run.seed is not a variant's to change",
            "comparison.seeds",
        ),
        (("run: {", "run: {seed: 1, "), "run.seed: the seeds of a comparison are a list", "--seeds"),
        (
            ("methods: [own", "method_settings: {mol: {a: 1}}\n  methods: [own"),
            "method_settings.mol: settings for 'mol'",
            "comparison.methods",
        ),
    ],
)
def test_a_mistake_names_its_line_and_what_to_write(
    comparison_file: File, replaced: tuple[str, str], said: str, fix: str
) -> None:
    path = comparison_file(replaced)
    with pytest.raises(UserError) as caught:
        load_comparison(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:") and said in message and fix in message.split("Fix:")[1]


def test_an_unknown_scale_names_the_near_one(comparison_file: File) -> None:
    with pytest.raises(UserError, match="no scale is called 'smal'.*\n.*write small"):
        load_comparison(comparison_file(), "smal")


def test_a_recipe_alone_is_told_from_a_comparison(comparison_file: File) -> None:
    path = comparison_file(("comparison:", "comparison_of_losses:"))
    with pytest.raises(UserError, match="no section called comparison"):
        load_comparison(path)


@pytest.mark.parametrize(
    ("replaced", "line_with", "said"),
    [
        (("stage2.routing_loss: gmoe", "stage2.routing_los: gmoe"), "routing_los:", "unknown key"),
        (("stage2.routing_loss: gmoe", "stage2.top_k: 5"), "top_k: 5", "5 experts a token, of 2"),
        (("stage2.routing_loss: gmoe", "base.dtype: float16"), "base.dtype", "float16"),
    ],
)
def test_a_mistake_in_a_late_variant_shows_before_anything_runs_with_its_line(
    comparison_file: File, replaced: tuple[str, str], line_with: str, said: str
) -> None:
    path = comparison_file(replaced)
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if line_with in text)
    with pytest.raises(UserError) as caught:
        check_plan(make_plan(load_comparison(path)))
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ") and "variant 'GMoE'" in message and said in message


def test_a_mistake_of_a_scale_names_the_scales_line(comparison_file: File) -> None:
    path = comparison_file()
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if "rankk" in text)
    with pytest.raises(UserError, match=rf"{path}:{line}: mixer.rankk: .*unknown key"):
        make_plan(load_comparison(path, "broken"))


def test_a_key_that_variants_set_can_t_be_set_by_the_command_line(comparison_file: File) -> None:
    with pytest.raises(UserError, match=r"command line: stage2.routing_loss=switch: .* sets this key itself"):
        load_comparison(comparison_file(), None, ["stage2.routing_loss=switch"])
    loaded = load_comparison(comparison_file(), None, ["stage2.rsl.ramp=0.1"])
    assert make_plan(loaded).whole[0].loaded.recipe.stage2.rsl.ramp == 0.1


def test_what_is_scored_is_not_a_variants_to_change(comparison_file: Callable[..., Path]) -> None:
    path = comparison_file(("stage2.routing_loss: gmoe", "evaluation.max_examples: 3"))
    with pytest.raises(UserError, match="evaluation.max_examples is not a variant's to change"):
        load_comparison(path)
    assert load_comparison(comparison_file(), None, ["evaluation.max_examples=3"]).overrides == (
        "evaluation.max_examples=3",
    )
