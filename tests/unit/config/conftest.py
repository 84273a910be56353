"""A recipe on disk with two domains whose files exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsmixer.config.recipe import LoadedRecipe, load_recipe

MINIMAL = """\
base:
  model: {model}
data:
  domains:
    - {{name: law, train: {data}}}
    - name: chess
      train: {data}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the minimal recipe, with more YAML below it, and returns its path."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    model.mkdir()
    data.write_text('{"prompt": "a", "completion": "b"}\n')

    def write(more: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(MINIMAL.format(model=model, data=data) + more)
        return path

    return write


@pytest.fixture
def load(recipe_file: Callable[..., Path]) -> Callable[..., LoadedRecipe]:
    """Loads the minimal recipe with more YAML below it, and with overrides."""
    return lambda more="", *overrides: load_recipe(recipe_file(more), overrides)
