"""The shape of a model that plans are made from, for every kind of model that is trained here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers.modeling_utils import PreTrainedModel

from dsmixer.model.shape import model_shape

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")


@pytest.mark.parametrize("kind", [*GATED, "gpt_neox", "gpt2", "mpt", "codegen"])
def test_shape_counts_the_models_own_parameters_and_widths(
    tiny: Callable[..., PreTrainedModel], kind: str
) -> None:
    model = tiny(kind)
    targets = ["qkv", "o"] if kind in ("mpt", "codegen") else list("qkvo")
    if kind == "codegen":
        targets = ["qkv_proj", "out_proj"]
    elif kind == "mpt":
        targets = ["Wqkv", "out_proj"]
    shape = model_shape(model, targets)
    assert shape.num_weights == sum(p.numel() for p in model.parameters())
    assert shape.layer.hidden == 32 and shape.layer.layers == 2 and shape.layer.vocabulary == 60
    assert shape.layer.gated == (kind in GATED)
    assert shape.layer.eager
    packed = sum(numel * count for numel, count in shape.quantizable)
    assert shape.num_weights / 2 < packed < shape.num_weights


def test_tied_embeddings_count_once_and_the_head_stays_unpacked(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    tied, apart = tiny("llama", tie_word_embeddings=True), tiny("llama", tie_word_embeddings=False)
    assert model_shape(apart, "q").num_weights - model_shape(tied, "q").num_weights == 60 * 32
    assert model_shape(apart, "q").quantizable == model_shape(tied, "q").quantizable
