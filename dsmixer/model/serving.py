"""A trained mixture made ready to answer: nothing of it trains any more."""

from __future__ import annotations

import torch
from torch import nn

from dsmixer.model.inject import Mixture, mixture_of
from dsmixer.model.mixed_linear import MixedLinear


@torch.no_grad()
def ready_to_serve(model: nn.Module) -> nn.Module:
    """Hold experts and routers in the dtype that their products run in, the base's.

    The outputs stay what they were: the products ran in that dtype before, on weights that were cast anew for
    every token. Kernels for the CPU, which under a bf16 base read float32 weights as they were, now read them
    rounded as all other forms did. With a bf16 base this halves the memory of experts and routers and what a
    token reads of them. To train on or to save, load the mixture again: the float32 weights are gone.

    Args:
        model: a model with mixers, changed in place.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        UserError: it has no mixers.
    """
    mixture = mixture_of(model)
    for path, mixer in mixture.mixers.items():
        dtype = _compute_dtype(mixture, mixer)
        held = [mixer.bank.lora_A, mixer.bank.lora_B]
        if path in mixture.routers:
            held.append(mixture.routers[path].weight)
        for parameter in held:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _compute_dtype(mixture: Mixture, mixer: MixedLinear) -> torch.dtype:
    """Of the projection's weight; of the model where that is packed."""
    weight = mixer.base.weight
    assert isinstance(weight, torch.Tensor)
    if weight.is_floating_point():
        return weight.dtype
    dtype = getattr(mixture.model, "dtype", None)
    assert isinstance(dtype, torch.dtype), dtype
    return dtype
