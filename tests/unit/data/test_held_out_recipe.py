"""``stage2.data.held_out`` in a recipe: what goes with it, and that a run does not change it unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmixer.config.changes import recipe_changes
from dsmixer.config.checks import check_recipe
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, load_recipe

RECIPE = """\
base: {model: base}
data:
  domains:
    - {name: law, train: law.jsonl}
    - {name: chess, train: law.jsonl}
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The recipe with overrides, in a folder that has what it names."""
    (tmp_path / "base").mkdir()
    (tmp_path / "law.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: load_recipe("recipe.yaml", overrides)


def kept(loaded: LoadedRecipe) -> tuple[int | None, int]:
    data = loaded.recipe.stage2.data
    return data.held_out, data.max_examples


def test_unwritten_max_examples_are_at_most_what_is_held_out(load) -> None:
    assert kept(load()) == (None, 2000)
    assert kept(load("stage2.data.held_out=500")) == (500, 500)
    assert kept(load("stage2.data.held_out=10000")) == (10000, 2000)
    check_recipe(load("stage2.data.held_out=500"))
    check_recipe(load("stage2.data.held_out=500", "stage2.data.max_examples=500"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage2.data.held_out=500", "stage2.data.max_examples=501"], ["501 examples", "500 are kept"]),
        (["stage2.data.held_out=9", "stage2.data.source=law.jsonl"], ["law.jsonl instead", "source: null"]),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(load, overrides, words) -> None:
    with pytest.raises(UserError) as refused:
        check_recipe(load(*overrides))
    assert all(word in str(refused.value) for word in (*words, "stage2.data.held_out"))


def test_another_number_held_out_is_other_mathematics_and_other_methods_scored_are_not(load) -> None:
    saved = dump_recipe(load("stage2.data.held_out=500").recipe)
    asked = load("stage2.data.held_out=600", "stage2.data.max_examples=500", "evaluation.methods=[base]")
    changes = recipe_changes(saved, asked, None, 1)
    assert changes.mathematics == ("stage2.data.held_out: 500 there, 600 here",)
    assert changes.layout == ("evaluation.methods: null there, ['base'] here",)


def test_a_run_saved_before_the_key_was_there_goes_on_unasked(load) -> None:
    lines = dump_recipe(load().recipe).splitlines()
    saved = "\n".join(line for line in lines if "held_out:" not in line)
    assert len(lines) == len(saved.splitlines()) + 1
    assert recipe_changes(saved, load(), None, 1).mathematics == ()
