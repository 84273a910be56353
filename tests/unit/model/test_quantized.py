"""A base in 4 bits against bitsandbytes' own layers, and what loads as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from support.oracles import plain_base
from support.tiny import byte_tokenizer
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_utils import PreTrainedModel

from dsmixer.config.errors import UserError
from dsmixer.config.schema import BaseConfig
from dsmixer.model.count import count_weights
from dsmixer.model.inject import attach_mixers
from dsmixer.model.load import bare_base, load_base
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.quantized import frozen_linear, packed_layers, packed_weights, quantization_of
from dsmixer.model.shape import model_shape
from dsmixer.placement.request import SCALE_BYTES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Bits = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., str]:
    """A model of random weights on the disk; widths that bitsandbytes' CPU packing takes."""

    def write(kind: str = "llama", **changes: object) -> str:
        wide = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
        tiny(kind, **{**wide, **changes}).save_pretrained(tmp_path / kind)
        byte_tokenizer().save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return write


def bits(model: torch.nn.Module) -> Bits:
    """Every tensor of a model, scales of packed weights included, byte for byte."""
    return {key: tensor.clone().reshape(-1).view(torch.uint8) for key, tensor in model.state_dict().items()}


def same(one: Bits, two: Bits) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quantization", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_a_frozen_layer_computes_forward_and_backward_what_bitsandbytes_does(
    dtype: str, quantization: str, double: bool
) -> None:
    """In training, bit for bit; with a bias and unequal widths."""
    torch.manual_seed(1)
    theirs = Linear4bit(
        64, 128, True, DTYPES[dtype], double, quantization, quant_storage=DTYPES[dtype], device="cpu"
    ).to(DTYPES[dtype])
    theirs = theirs.to("cpu").train()
    x = torch.randn(3, 5, 64, dtype=DTYPES[dtype])
    grad = torch.randn(3, 5, 128, dtype=DTYPES[dtype])
    results = []
    for kind in (Linear4bit, frozen_linear()):
        theirs.__class__ = kind
        inputs = x.clone().requires_grad_()
        y = theirs(inputs)
        y.backward(grad)
        results.append((y.detach(), inputs.grad))
    (y, grad_x), (own_y, own_grad_x) = results
    assert y.shape == (3, 5, 128) and bool(y.abs().sum() > 0)
    assert torch.equal(y, own_y) and torch.equal(grad_x, own_grad_x)


def test_between_forward_and_backward_nothing_holds_on_to_a_gathered_weight() -> None:
    """ZeRO-3 takes it away after the forward pass, and brings it back for the backward pass."""
    layer: Any = Linear4bit(64, 128, False, torch.float32, quant_storage=torch.float32).to("cpu")
    layer.__class__ = frozen_linear()
    x = torch.randn(2, 64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    kept = layer.weight.data.clone()
    gathered = StorageWeakRef(layer.weight.untyped_storage())
    y = layer(x).sum()
    layer.weight.data = torch.empty(0)
    assert gathered.expired()
    layer.weight.data = kept
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluating_leaves_every_bit_and_answers_as_training_does(
    folder: Callable[..., str], dtype: str
) -> None:
    """Where the processor has bfloat16 instructions, bitsandbytes' own layer packs its weight anew here."""
    base = BaseConfig(model=folder(), dtype=dtype, quantization="nf4")
    model: Any = load_base(base).model
    before = bits(model)
    ids = torch.arange(12)[None]
    trained = model.train()(input_ids=ids).logits
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids).logits
    assert torch.equal(trained, evaluated)
    assert same(bits(model), before)
    assert same(before, bits(plain_base(base))), "and they are those that bitsandbytes makes"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_layers_that_are_packed_are_those_that_the_plan_counts(
    folder: Callable[..., str], kind: str, tied: bool
) -> None:
    path = folder(kind, tie_word_embeddings=tied)
    bare = bare_base(BaseConfig(model=path))
    model = load_base(BaseConfig(model=path, quantization="nf4")).model
    found = sorted(layer.weight.quant_state.shape.numel() for _, layer in packed_layers(model))  # type: ignore[union-attr]
    assert found == sorted(weight.numel() for weight in packed_weights(bare)) and len(found) >= 8
    assert quantization_of(model) == ("nf4", True) and quantization_of(bare) is None
    shape = model_shape(bare, [found_target(kind)])
    config = MixerConfig([found_target(kind)], ["a"], rank=2)
    assert count_weights(attach_mixers(model, config)).base == shape.num_weights


def found_target(kind: str) -> str:
    return {"llama": "q", "gpt2": "c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj"}[kind]


def test_a_checkpoint_packed_before_is_loaded_with_its_own_bits(
    folder: Callable[..., str], tmp_path: Path
) -> None:
    """As others publish them, stored as bytes: here in storage of the compute type, with the same results."""
    base = BaseConfig(model=folder(), quantization="nf4", double_quantization=False)
    packed = plain_base(base)
    bytewise = tmp_path / "packed"
    config = packed.config.quantization_config
    config.bnb_4bit_quant_storage = torch.uint8
    for _, layer in packed_layers(packed):
        layer.weight.data = layer.weight.data.view(-1).view(torch.uint8).view(-1, 1)  # type: ignore[operator]
    packed.save_pretrained(bytewise)
    byte_tokenizer().save_pretrained(bytewise)
    model: Any = load_base(base.model_copy(update={"model": str(bytewise)})).model
    fresh: Any = load_base(base).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same(bits(model), bits(fresh))
    ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits)
    with pytest.raises(UserError, match="quantised already, to nf4 with double_quantization: false"):
        load_base(base.model_copy(update={"model": str(bytewise), "quantization": "fp4"}))


def test_scales_take_the_bytes_that_the_plan_reckons_with(folder: Callable[..., str]) -> None:
    """One a block of 64 weights: 4 bytes, or one and 4 for 256 of them."""
    path = folder(hidden_size=512, intermediate_size=1024)
    for double in (True, False):
        model = load_base(BaseConfig(model=path, quantization="nf4", double_quantization=double)).model
        for _, layer in packed_layers(model):
            state: Any = layer.weight.quant_state
            absmax = [state.absmax, *([state.state2.absmax] if double else [])]
            found = sum(tensor.numel() * tensor.element_size() for tensor in absmax)
            assert found == pytest.approx(SCALE_BYTES[double] * state.shape.numel(), rel=0.01)
