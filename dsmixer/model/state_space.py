"""State-space mixers that call each of their projections, so that experts on them act.

In training, transformers' Mamba mixers hand the weights of ``x_proj``, ``dt_proj`` and ``out_proj`` to one
fused kernel where the packages that have it are installed, and everywhere they multiply by ``dt_proj.weight``
themselves: what stands beside those weights is passed over, forward and backward. Here every projection is
called as a module, and the convolution and the scan between them stay what transformers found, fused kernels
or plain operations: they take no projection's weights. Where no such projection carries a mixer,
transformers' own forward pass stays.

Shapes: n rows, L positions, I inner width, N state size, R rank of the time step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache

from dsmixer.config.errors import UserError
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.placement.groups import read_outside

KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d")
"""Where transformers finds fused kernels for convolution and scan."""

_KERNELS = ("causal_conv1d_fn", "causal_conv1d_update", "apply_mask_to_padding_states")
_SELECTIVE_KERNELS = (*_KERNELS, "mamba_selective_scan", "mamba_selective_state_update")
_CACHE = ("get_conv_state", "get_recurrent_state", "is_recording_past")
_STEP_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")


def is_state_space(module: nn.Module) -> bool:
    """Whether it is a mixer of the Mamba kind: a decay A, a skip D, and projections around them."""
    return all(hasattr(module, name) for name in ("A_log", "D", "in_proj", "out_proj"))


def knows_mixer(module: nn.Module) -> bool:
    """Whether experts on all projections of this state-space mixer can be made to act."""
    return type(module).__name__ in _FORWARDS


def call_projections(model: nn.Module) -> None:
    """See to it that the state-space mixers of ``model`` call the projections that carry experts.

    Paths and parameters stay. A mixer whose only experts are on ``in_proj``, which transformers calls as a
    module, keeps transformers' forward pass, with two exceptions: with weights in 4 bits a product must
    not be written out, and Falcon-Mamba's fused kernel takes the norm of the time step behind ``dt_proj``,
    the plain path, which decodes, before it.
    """
    for module in model.modules():
        if not is_state_space(module) or not knows_mixer(module):
            continue
        if _must_call(module):
            _check_parts(module)
            _replace_forward(module, _FORWARDS[type(module).__name__])
            if hasattr(module, "dt_proj"):
                _replace_forward(_linear(module.dt_proj), _product_alone)
        read_outside(module, _read_uncalled(module))


def _replace_forward(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    # accelerate's hooks, where a model is spread over devices, stand around the forward pass they found
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    setattr(module, name, MethodType(forward, module))


def _linear(projection: Any) -> nn.Module:
    return projection.base if isinstance(projection, MixedLinear) else projection


def _must_call(mixer: nn.Module) -> bool:
    handed = [getattr(mixer, name) for name in ("x_proj", "dt_proj", "out_proj") if hasattr(mixer, name)]
    packed = any(getattr(projection.weight, "quant_state", None) is not None for projection in handed)
    return packed or hasattr(mixer, "dt_layernorm") or any(isinstance(p, MixedLinear) for p in handed)


def _read_uncalled(mixer: Any) -> list[nn.Parameter]:
    """What a mixer reads of its children without calling them; transformers' own path, of all of them."""
    children = [mixer.conv1d]
    if not _must_call(mixer):
        children += [mixer.out_proj, *(getattr(mixer, n) for n in ("x_proj", "dt_proj") if hasattr(mixer, n))]
    read = [parameter for child in children for parameter in child.parameters(recurse=False)]
    if _must_call(mixer) and hasattr(mixer, "dt_proj") and mixer.dt_proj.bias is not None:
        read.append(mixer.dt_proj.bias)
    return read


def _check_parts(mixer: nn.Module) -> None:
    """Another version of transformers may name its parts otherwise: told here, not computed wrongly."""
    if not hasattr(mixer, "dt_proj"):
        return
    missing = [name for name in _SELECTIVE_KERNELS if not hasattr(_defined_in(mixer), name)]
    missing += [name for name in _CACHE if not hasattr(DynamicCache, name)]
    if missing:
        problem = f"transformers {transformers.__version__} has no {', '.join(missing)}"
        fix = "use a version from 5.21 on that has them, or targets: [in]"
        raise UserError(problem, where=type(mixer).__name__, fix=fix)


def _defined_in(mixer: nn.Module) -> Any:
    """The module of transformers that defines the mixer, where its kernels are looked up."""
    return sys.modules[type(mixer).__module__]


def _selective_forward(
    self: Any,
    hidden_states: torch.Tensor,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Mamba, Falcon-Mamba: ``[n, L, H]`` to ``[n, L, H]``, with transformers' cache of both states.

    Follows Mamba (arXiv 2312.00752, algorithm 2), with Falcon-Mamba's norms of B, C and the time step.
    """
    mask = _defined_in(self).apply_mask_to_padding_states
    projected = self.in_proj(mask(hidden_states, attention_mask)).transpose(1, 2)
    inner, gate = projected.chunk(2, dim=1)
    inner = mask(_convolve(self, inner, cache_params, kwargs).transpose(1, 2), attention_mask)
    widths = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
    selected = self.x_proj(inner).split(widths, dim=-1)
    if hasattr(self, "dt_layernorm"):
        selected = [getattr(self, norm)(part) for norm, part in zip(_STEP_NORMS, selected, strict=True)]
    time_step, B, C = selected
    time_step, bias = self.dt_proj(time_step).transpose(1, 2), self.dt_proj.bias
    bias = None if bias is None else bias.float()
    out = _scan(self, inner.transpose(1, 2), time_step, B, C, gate, bias, cache_params)
    return self.out_proj(out.transpose(1, 2).to(hidden_states.dtype))


def _product_alone(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a ``dt_proj`` without its bias, which the scan adds in float32.

    Added here, in bfloat16, it would round a time step near 0.001 by a per cent. It is put aside inside the
    forward pass alone: ZeRO-3, which looks around it, has to find the same parameters always.
    """
    bias, self.bias = self.bias, None
    try:
        return type(self).forward(self, x)
    finally:
        self.bias = bias


def _convolve(mixer: Any, inner: torch.Tensor, cache: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The causal convolution of ``[n, I, L]``, in its cached form for one position behind a state."""
    kernels, layer, length = _defined_in(mixer), mixer.layer_idx, inner.shape[-1]
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    state = None if cache is None else cache.get_conv_state(layer, state_idx=0)
    if state is not None and length == 1 and not cache.is_recording_past(layer):
        return kernels.causal_conv1d_update(inner, state, weight, bias, activation=mixer.activation)
    if cache is not None:
        inner = cache.update_conv_state(inner, layer, conv_kernel_size=mixer.conv_kernel_size)
    out: torch.Tensor = kernels.causal_conv1d_fn(inner, weight, bias, activation=mixer.activation, **kwargs)
    return out[:, :, -length:]


def _scan(
    mixer: Any,
    inner: torch.Tensor,
    time_step: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    cache: Any,
) -> torch.Tensor:
    """The selective scan of ``[n, I, L]`` over states ``[n, I, N]``, gated."""
    kernels, layer = _defined_in(mixer), mixer.layer_idx
    A = -torch.exp(mixer.A_log.float())
    state = None if cache is None else cache.get_recurrent_state(layer, state_idx=0)
    if state is not None and inner.shape[-1] == 1:
        out: torch.Tensor = kernels.mamba_selective_state_update(
            state,
            inner[..., 0],
            time_step[..., 0],
            A,
            B[:, 0],
            C[:, 0],
            mixer.D,
            z=gate[..., 0],
            dt_bias=bias,
            dt_softplus=True,
        )
        return out.unsqueeze(-1)
    scanned = kernels.mamba_selective_scan(
        inner,
        time_step,
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=mixer.D.float(),
        z=gate,
        delta_bias=bias,
        delta_softplus=True,
        return_last_state=cache is not None,
        use_mambapy=mixer.use_mambapy,
        use_associative_scan=mixer.use_associative_scan,
    )
    if cache is None:
        return scanned
    out, last = scanned
    cache.update_recurrent_state(last, layer)
    return out


def _unfused_forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Mamba-2: transformers' own forward pass as it runs outside training, where it calls both projections.

    In training it would hand ``out_proj.weight`` to ``mamba_split_conv1d_scan_combined``. The flag of the
    mixer itself decides only that; its children keep theirs, and with them the experts' dropout.
    """
    before, self.training = self.training, False
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        self.training = before


_FORWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "MambaMixer": _selective_forward,
    "FalconMambaMixer": _selective_forward,
    "Mamba2Mixer": _unfused_forward,
}
"""How each class of mixer is made to call its projections, by reading transformers 5.23."""
