"""The kernels of ``mamba_ssm`` and ``causal_conv1d`` in plain operations, with those packages' signatures.

They compute what the public kernels compute, in float32 or wider and position by position, on any device, and
insist on the types that those accept. ``modeling_with_kernels`` imports transformers' definition of a model a
second time with these packages in place, so that transformers' own fused path runs on a CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

CALLS: Counter[str] = Counter()
"""How often each kernel was called since it was last cleared."""

Tensor = torch.Tensor


def _counted(function: Any) -> Any:
    @functools.wraps(function)  # transformers reads the signature
    def counting(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return counting


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _silu(x: Tensor, activation: str | None) -> Tensor:
    assert activation in (None, "silu", "swish"), activation
    return x if activation is None else F.silu(x)


@_counted
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``x [b, d, l]``, ``weight [d, w]``: each channel's sum over its last w positions."""
    assert seq_idx is None and initial_states is None and not return_final_states
    width = weight.shape[1]
    padded = F.pad(_wide(x), (width - 1, 0))
    out = sum(padded[..., i : i + x.shape[-1]] * _wide(weight)[:, i, None] for i in range(width)) + (
        0 if bias is None else _wide(bias)[:, None]
    )
    return _silu(out, activation).to(x.dtype)


@_counted
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """``x [b, d]`` or ``[b, d, 1]`` behind ``conv_state [b, d, s]``, which moves on by it."""
    assert cache_seqlens is None and conv_state_indices is None
    new = x[..., None] if x.dim() == 2 else x
    assert new.shape[-1] == 1
    seen = torch.cat([conv_state, new.to(conv_state.dtype)], dim=-1)
    conv_state.copy_(seen[..., 1:])
    out = (_wide(seen)[..., -weight.shape[1] :] * _wide(weight)).sum(-1, keepdim=True)
    out = out + (0 if bias is None else _wide(bias)[:, None])
    return _silu(out, activation).to(x.dtype).view_as(x)


def _check_scan_types(
    u: Tensor, A: Tensor, same: dict[str, Tensor | None], wide: dict[str, Tensor | None]
) -> None:
    """As the compiled kernel does: inputs of one type, weights and biases in float32."""
    assert A.dtype in (torch.float32, torch.float64), A.dtype
    for name, tensor in same.items():
        assert tensor is None or tensor.dtype == u.dtype, (name, tensor.dtype, u.dtype)
    for name, tensor in wide.items():
        assert tensor is None or tensor.dtype == A.dtype, (name, tensor.dtype)


@_counted
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """``u, delta, z [b, d, l]``, ``A [d, n]``, ``B, C [b, n, l]``, ``D, delta_bias [d]``."""
    _check_scan_types(u, A, {"delta": delta, "B": B, "C": C, "z": z}, {"D": D, "delta_bias": delta_bias})
    step = _wide(delta) + (0 if delta_bias is None else delta_bias[:, None])
    step = F.softplus(step) if delta_softplus else step
    x, state, outs = _wide(u), A.new_zeros(*u.shape[:2], A.shape[1]), []
    for i in range(u.shape[-1]):
        into = (step * x)[..., i, None] * _wide(B)[:, None, :, i]
        state = torch.exp(step[..., i, None] * A) * state + into
        outs.append((state * _wide(C)[:, None, :, i]).sum(-1))
    out = torch.stack(outs, dim=-1) + (0 if D is None else x * D[:, None])
    out = (out if z is None else out * F.silu(_wide(z))).to(u.dtype)
    return (out, state) if return_last_state else out


@_counted
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Everything between ``in_proj`` and the residual, with the projections' bare weights.

    The norm of the time step stands behind its projection, as in the public kernel (mamba_ssm 2.2 and later).
    """
    assert B is None and C is None and B_proj_bias is None and C_proj_bias is None
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, size = delta_proj_weight.shape[1], A.shape[1]
    step, to_state, from_state = F.linear(x.transpose(1, 2), x_proj_weight).split([rank, size, size], -1)
    step = F.linear(step, delta_proj_weight)
    step, to_state, from_state = (
        part if weight is None else F.rms_norm(part, part.shape[-1:], weight.to(part.dtype), b_c_dt_rms_eps)
        for part, weight in zip(
            (step, to_state, from_state), (dt_rms_weight, b_rms_weight, c_rms_weight), strict=True
        )
    )
    out = selective_scan_fn(
        x,
        step.transpose(1, 2),
        A,
        to_state.transpose(1, 2),
        from_state.transpose(1, 2),
        D,
        z,
        delta_bias,
        delta_softplus,
    )
    return F.linear(out.transpose(1, 2), out_proj_weight, out_proj_bias)


@_counted
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One position: ``x [b, (h,) d]``, ``A [(h,) d, n]``, ``B, C [b, (g,) n]``; ``state`` moves on."""
    assert state_batch_indices is None
    step = _wide(dt) + (0 if dt_bias is None else _wide(dt_bias))
    step = F.softplus(step) if dt_softplus else step
    heads = x.shape[1] if x.dim() == 3 else 1
    to_state, from_state = (
        _wide(t).repeat_interleave(heads // t.shape[1], 1)[:, :, None] if x.dim() == 3 else _wide(t)[:, None]
        for t in (B, C)
    )
    into = (step * _wide(x))[..., None] * to_state
    moved = torch.exp(step[..., None] * _wide(A)) * _wide(state) + into
    state.copy_(moved.to(state.dtype))
    out = (moved * from_state).sum(-1) + (0 if D is None else _wide(x) * _wide(D))
    return (out if z is None else out * F.silu(_wide(z))).to(x.dtype)


@_counted
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """``x [b, l, h, p]``, ``dt [b, l, h]``, ``A, D, dt_bias [h]``, ``B, C [b, l, g, n]``."""
    assert seq_idx is None and cu_seqlens is None
    step = _wide(dt) + (0 if dt_bias is None else _wide(dt_bias))
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    heads = x.shape[2]
    to_state, from_state = (_wide(t).repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state = _wide(x).new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    state = state if initial_states is None else _wide(initial_states)
    outs = []
    for i in range(x.shape[1]):
        into = (step[:, i, :, None] * _wide(x)[:, i])[..., None] * to_state[:, i, :, None]
        state = torch.exp(step[:, i] * A)[..., None, None] * state + into
        outs.append((state * from_state[:, i, :, None]).sum(-1))
    out = torch.stack(outs, dim=1) + (0 if D is None else _wide(x) * _wide(D)[:, None])
    out = (out if z is None else out * F.silu(_wide(z))).to(x.dtype)
    return (out, state) if return_final_states else out


@_counted
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Everything between Mamba-2's ``in_proj`` and the residual, with ``out_proj``'s bare weight."""
    assert not return_final_states and not norm_before_gate and headdim is not None
    heads = D.shape[0]
    inner, size = heads * headdim, (conv1d_weight.shape[0] - heads * headdim) // (2 * ngroups)
    z, mixed, dt = zxbcdt.split([inner, conv1d_weight.shape[0], heads], dim=-1)
    mixed = causal_conv1d_fn(mixed.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation)
    x, to_state, from_state = mixed.transpose(1, 2).split([inner, ngroups * size, ngroups * size], dim=-1)
    out = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        to_state.unflatten(-1, (ngroups, size)),
        from_state.unflatten(-1, (ngroups, size)),
        chunk_size,
        D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
    ).flatten(-2)
    if rmsnorm_weight is not None:
        gated = (_wide(out) * F.silu(_wide(z))).unflatten(-1, (ngroups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=rmsnorm_eps).flatten(-2)
        out = (normed * _wide(rmsnorm_weight)).to(out.dtype)
    return out if outproj_weight is None else F.linear(out, outproj_weight, outproj_bias)


PACKAGES = {
    "causal_conv1d": (causal_conv1d_fn, causal_conv1d_update),
    "mamba_ssm": (
        selective_scan_fn,
        mamba_inner_fn,
        selective_state_update,
        mamba_chunk_scan_combined,
        mamba_split_conv1d_scan_combined,
    ),
}


def modeling_with_kernels(kind: str) -> ModuleType:
    """transformers' ``modeling_KIND`` as it defines itself where both packages are installed.

    A second copy beside the one already imported, which stays as it is.
    """
    package = f"transformers.models.{kind}"
    name = f"{package}.modeling_{kind}_with_kernels"
    if name in sys.modules:
        return sys.modules[name]
    source = importlib.util.find_spec(f"{package}.modeling_{kind}")
    assert source is not None and source.origin is not None
    spec = importlib.util.spec_from_file_location(name, source.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {package: sys.modules.get(package) for package in PACKAGES}
    for package, functions in PACKAGES.items():
        sys.modules[package] = ModuleType(package)
        vars(sys.modules[package]).update({function.__name__: function for function in functions})
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for package, own in before.items():
            if own is None:
                del sys.modules[package]
            else:
                sys.modules[package] = own
    return module
