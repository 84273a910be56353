"""What a recipe asks of an encoder-decoder base that it cannot do, found before its weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import write_recipe

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe
from dsmixer.model.load import load_tokenizer
from dsmixer.training.data import stage_data
from dsmixer.training.preflight import read_inputs
from dsmixer.training.world import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of T5, without its weights."""
    path = write_recipe(tmp_path_factory.mktemp("t5"), "t5")
    (path.parent / "t5" / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize(
    ("overrides", "where", "problem"),
    [
        ([], "data.packing", "see each other"),
        (["data.packing=false", "data.loss=all"], "data.loss", "predicts nothing"),
    ],
)
def test_packing_and_a_loss_on_prompts_are_refused(
    recipe: Path, overrides: list[str], where: str, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as found:
        read_inputs(load_recipe(recipe, overrides), None, CPU)
    assert where in str(found.value) and "write" in str(found.value)


def test_a_recipe_that_fits_is_read_and_its_examples_have_two_sides(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["data.packing=false"])
    data, _ = read_inputs(loaded, None, CPU)
    tokenizer = load_tokenizer(loaded.recipe.base.model)
    names = data.expert_names(loaded.recipe)
    stage = stage_data(loaded, 1, data, names, tokenizer, World(0, 1, CPU))
    assert stage.store.decoder_start == 0
    batch = stage.batch(0)
    assert 0 < batch.encoder_tokens < batch.real_tokens
    assert all(micro.encoder is not None for micro in batch.micro_batches)
