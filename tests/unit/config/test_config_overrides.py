"""Overrides on the command line stand over the recipe, and their mistakes are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsmixer.config.errors import UserError
from dsmixer.config.overrides import apply_overrides
from dsmixer.config.recipe import LoadedRecipe

Load = Callable[..., LoadedRecipe]


def test_an_override_stands_over_the_recipe_and_the_last_one_wins(load: Load) -> None:
    loaded = load(
        "stage1: {epochs: 2, clip: 1.0}\n", "stage1.epochs=3", "stage1.epochs=4", "stage1.clip=null"
    )
    assert (loaded.recipe.stage1.epochs, loaded.recipe.stage1.clip) == (4, None)
    assert loaded.where("stage1.epochs") == "command line: stage1.epochs=4"


def test_values_are_yaml(load: Load) -> None:
    recipe = load(
        "", "stage1.learning_rate=1e-4", "mixer.targets=[q, v]", "run.name='2024'", "data.packing=false"
    ).recipe
    assert recipe.stage1.learning_rate == 1e-4
    assert recipe.mixer.targets == ("q", "v")
    assert (recipe.run.name, recipe.data.packing) == ("2024", False)


def test_a_value_may_hold_an_equals_sign(load: Load) -> None:
    assert load("", "base.model=./a=b").recipe.base.model == "./a=b"


def test_lists_are_addressed_by_position_and_extended_at_the_end(load: Load) -> None:
    recipe = load(
        "", "data.domains.1.train=new.jsonl", "data.domains.2.name=go", "data.domains.2.train=go.jsonl"
    ).recipe
    assert [domain.name for domain in recipe.data.domains] == ["law", "chess", "go"]
    assert [domain.train for domain in recipe.data.domains][1:] == ["new.jsonl", "go.jsonl"]
    assert load("", "mixer.experts.0.name=law").recipe.mixer.experts[0].name == "law"


def test_a_mapping_is_laid_over_the_one_there(load: Load) -> None:
    stage = load("stage1: {epochs: 2}\n", "stage1={micro_batch_size: 3, clip: 2}").recipe.stage1
    assert (stage.epochs, stage.micro_batch_size, stage.clip) == (2, 3, 2)


def test_what_an_alias_shares_in_the_file_is_overridden_in_one_place_only(load: Load) -> None:
    more = "stage1: &s {epochs: 2}\nstage2: *s\n"
    recipe = load(more, "stage1.epochs=5").recipe
    assert (recipe.stage1.epochs, recipe.stage2.epochs) == (5, 2)


@pytest.mark.parametrize(
    ("override", "problem", "fix"),
    [
        ("stage1.epochs", "without '='", "section.key=value"),
        ("=3", "not a dotted key", "section.key=value"),
        ("stage1..epochs=3", "not a dotted key", "section.key=value"),
        ("stage1.epochs=[1", "malformed YAML", "correct the YAML"),
        ("stage1.epochz=1", "unknown key 'epochz'", "stage1.epochs"),
        ("stge1.epochs=1", "unknown key 'stge1'", "stage1"),
        ("data.domains.0.wieght=1", "unknown key 'wieght'", "data.domains.0.weight"),
        ("stage1.epochs=two", "'two' (text) is not a whole number", "at least 1"),
        ("stage1=3", "3 (a whole number) is not a mapping", "enabled, learning_rate"),
        ("data.domains.7.train=x", "'7' is not a position in data.domains, which has 2 entries", "0 to 2"),
        ("data.domains.chess.train=x", "'chess' is not a position", "data.domains.1"),
        ("base.model.name=x", "base.model is a value and has no key 'name'", "base.model="),
    ],
)
def test_a_bad_override_is_named_as_it_was_typed(load: Load, override: str, problem: str, fix: str) -> None:
    with pytest.raises(UserError) as error:
        load("", override)
    assert str(error.value.where).startswith(f"command line: {override}")
    assert problem in error.value.problem
    assert fix in str(error.value.fix)


def test_the_values_given_are_left_alone() -> None:
    raw = {"a": {"b": [1]}}
    merged, _ = apply_overrides(raw, ["a.b.0=2", "a.c=3"])
    assert raw == {"a": {"b": [1]}}
    assert merged == {"a": {"b": [2], "c": 3}}
