"""The shape of a model that plans are made from, for every kind of model that is trained here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers.modeling_utils import PreTrainedModel

from dsmixer.model.shape import model_shape
from dsmixer.placement.plan import make_plan
from dsmixer.placement.request import Cluster, PlanRequest, Pool, StageShape

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


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
def test_the_shape_of_a_state_space_model_has_its_scan(
    tiny: Callable[..., PreTrainedModel], kind: str
) -> None:
    model = tiny(kind)
    shape = model_shape(model, ["in", "out"])
    assert shape.num_weights == sum(p.numel() for p in model.parameters())
    layer, scan = shape.layer, shape.layer.state_space
    assert (layer.hidden, layer.layers, layer.vocabulary, layer.mlp, layer.query) == (32, 2, 60, 0, 0)
    assert scan is not None and (scan.inner, scan.state) == (64, 8)
    if kind == "mamba2":
        assert (scan.channels, scan.heads, scan.chunk, scan.selected) == (64 + 2 * 2 * 8, 8, 4, 0)
    else:
        assert (scan.channels, scan.heads, scan.chunk, scan.selected) == (64, 0, 0, 4 + 2 * 8)
    assert layer.wide_residual and layer.wide_logits


def test_a_plan_says_how_a_scan_is_counted_and_proposes_no_shared_router_where_no_input_is_shared(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    stage = StageShape("stage2", 1, 16, 1, trains_experts=True, trains_routers=True, top_k=2)
    pool, notes = Pool((8,) * 16, (1.0,) * 16), {}
    for kind, targets in (("mamba", ["in", "x", "dt", "out"]), ("llama", ["q", "k"])):
        shape = model_shape(tiny(kind), targets)
        notes[kind] = " ".join(make_plan(PlanRequest(shape, pool, Cluster(1), (stage,))).notes)
    assert "transformers' plain scan" in notes["mamba"] and "per_block" not in notes["mamba"]
    assert "scan" not in notes["llama"] and "per_block is worth it" in notes["llama"]
