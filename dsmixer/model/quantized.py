"""A base whose linear layers are stored in 4 bits by bitsandbytes: how it is asked for, kept and undone.

bitsandbytes 0.50.2 and transformers 5.23. A packed weight stands in storage of the compute dtype, so that
whatever moves or cuts floating-point weights, ZeRO-3 above all, takes it along bit for bit; its scales stay
whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dsmixer.config.errors import UserError
from dsmixer.config.schema import BaseConfig

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit

QUANTIZATIONS = ("nf4", "fp4")
FIX_INSTALLATION = (
    "reinstall it (pip install --force-reinstall bitsandbytes), or write base.quantization: none"
)


def loading_config(kind: str, double: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What ``from_pretrained`` is told, for a base in 4 bits.

    Args:
        kind: nf4 or fp4.
        double: whether the scales are quantised too.
        dtype: of products, and of the storage of packed weights.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def check_packing_works(kind: str, device: torch.device) -> None:
    """Pack a few weights on the device that will hold the base, before minutes of loading.

    Args:
        kind: none, nf4 or fp4.
        device: of the base.

    Raises:
        UserError: bitsandbytes is not there, or does not work on this device.
    """
    if kind == "none":
        return
    where = f"base.quantization: {kind}"
    try:
        import bitsandbytes.functional as packing
        from bitsandbytes import matmul_4bit

        weights_OD = torch.linspace(-1, 1, 128 * 64, device=device).view(128, 64)
        packed, state = packing.quantize_4bit(weights_OD, quant_type=kind)
        back_OD = packing.dequantize_4bit(packed, state)
        x_TD = torch.linspace(-1, 1, 2 * 64, device=device).view(2, 64)
        apart = (matmul_4bit(x_TD, packed, state) - x_TD @ back_OD.T).abs().max()
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        problem = f"bitsandbytes, which packs the base, can't be used on {device.type}: {reason}"
        raise UserError(problem, where=where, fix=FIX_INSTALLATION) from error
    if not bool((weights_OD - back_OD).abs().max() < 0.2 and apart < 0.05):
        problem = f"bitsandbytes, which packs the base, computes nonsense on {device.type}"
        raise UserError(problem, where=where, fix=FIX_INSTALLATION)


def check_stored_form(config: Any, base: BaseConfig) -> None:
    """Refuse a base whose weights are quantised already, unless they are in the recipe's own 4 bits.

    Args:
        config: transformers' configuration of the base.
        base: the recipe's section.

    Raises:
        UserError: says which form the weights have.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    values = stored if isinstance(stored, dict) else stored.to_dict()
    where, unquantised = f"base.model: {base.model}", "choose its unquantised weights"
    method = str(values.get("quant_method", "another method"))
    if values.get("load_in_8bit"):
        problem = (
            "its weights are quantised already, to 8 bits; those can't be trained on here, and ZeRO-3 would "
            "cut them wrongly (bitsandbytes#1451)"
        )
        raise UserError(
            problem, where=where, fix=f"{unquantised}, with base.quantization: nf4 for a small base"
        )
    if not values.get("load_in_4bit"):
        problem = (
            f"its weights are quantised already, by {method}; only bitsandbytes' 4 bits can be trained on"
        )
        raise UserError(
            problem, where=where, fix=f"{unquantised}, with base.quantization: nf4 for a small base"
        )
    kind = str(values.get("bnb_4bit_quant_type", "fp4"))
    double = bool(values.get("bnb_4bit_use_double_quant", False))
    if (base.quantization, base.double_quantization) != (kind, double):
        own = f"{kind} with double_quantization: {str(double).lower()}"
        problem = f"its weights are quantised already, to {own}"
        fix = f"write base.quantization: {kind} and base.double_quantization: {str(double).lower()}"
        raise UserError(problem, where=where, fix=f"{fix}, or {unquantised}")


def quantization_of(model: nn.Module) -> tuple[str, bool] | None:
    """``nf4`` or ``fp4`` and whether the scales are quantised too, of a loaded model; None: not in 4 bits."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if not getattr(config, "load_in_4bit", False):
        return None
    return str(config.bnb_4bit_quant_type), bool(config.bnb_4bit_use_double_quant)


def packed_weights(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The weights of an unquantised model that 4-bit loading packs: all linear layers but the output head.

    Args:
        model: may lie on the meta device.
    """
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            yield weight


def packed_layers(model: nn.Module) -> list[tuple[str, Linear4bit]]:
    """Names and modules of the layers of a loaded model that are in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def freeze_packed(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the packed layers of a model just loaded into ``frozen_linear`` ones that store in ``dtype``.

    Weights that came packed from the disk may stand in storage of another type; their bits stay.
    """
    layers = packed_layers(model)
    assert layers, "no linear layer was packed"
    for _, layer in layers:
        weight: Any = layer.weight
        if weight.dtype != dtype:
            weight.data = weight.data.contiguous().view(-1).view(dtype).view(-1, 1)
            weight.quant_storage = layer.quant_storage = dtype
        weight.quant_state.dtype = layer.compute_dtype = dtype
        layer.compute_type_is_set = True
        layer.__class__ = frozen_linear()


@cache
def frozen_linear() -> type[Linear4bit]:
    """The class of a linear layer in 4 bits that nothing changes.

    bitsandbytes' own packs a weight anew, in place and with rounded scales, when it evaluates on a CPU with
    bfloat16 instructions; and it holds on to the gathered weight from the forward to the backward pass, by
    which all layers would be whole on every rank under ZeRO-3. This one does neither: the backward pass asks
    the layer for its weight, which DeepSpeed has gathered again by then.
    """
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    class _Product(torch.autograd.Function):
        """``x W^T + b`` with W unpacked on the way; W has no gradient."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, layer: Linear4bit) -> torch.Tensor:
            ctx.layer = layer
            bias = None if layer.bias is None else layer.bias.to(layer.compute_dtype)
            weight: Any = layer.weight
            y = matmul_4bit(x.to(layer.compute_dtype), weight, weight.quant_state, bias=bias)
            return y.to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, None]:
            weight = ctx.layer.weight
            assert weight.numel() > 0, "ZeRO-3 has not gathered the weight for the backward pass"
            weight_OD = dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
            return torch.matmul(grad_y.to(weight_OD.dtype), weight_OD).to(grad_y.dtype), None

    class FrozenLinear4bit(Linear4bit):
        """See ``frozen_linear``."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """``[..., D]`` to ``[..., O]``, in the type of ``x``."""
            return _Product.apply(x, self)

    return FrozenLinear4bit
