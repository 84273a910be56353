"""The frozen base, and weights of experts and routers that are the same in every system.

Everything is drawn by name, so that it depends neither on the order in which a library makes its modules nor
on the version of transformers. Two systems that compute the same sum then begin with the same loss.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.case import TARGETS, Case

EXPERT_STD, ROUTER_STD, BASE_STD = 0.02, 0.02, 0.02
SCALING = 2.0
"""PEFT's alpha / r of every adapter."""


def random_llama(case: Case) -> LlamaForCausalLM:
    """A Llama in the base's dtype on the case's device, in evaluation mode, frozen."""
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=max(4096, 2 * case.sequence),
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if case.dtype == "float32" else torch.bfloat16)
    with torch.device(case.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            draw_into(parameter, name, BASE_STD)
    if case.dtype == "nf4":
        _pack(model, case)
    return model.requires_grad_(False).eval()


def _pack(model: nn.Module, case: Case) -> None:
    from tests.bench.low_memory import four_bit

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        if name != "lm_head":
            model.set_submodule(name, four_bit(linear, torch.device(case.device)))


@torch.no_grad()
def draw_into(tensor: torch.Tensor, name: str, std: float) -> None:
    """Normal values that depend on the name and the tensor's shape, dtype and device alone."""
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    tensor.normal_(0.0, std, generator=generator)


def expert_pair(case: Case, layer: int, role: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[R, D]`` and B ``[O, R]`` of one expert, float32 on the case's device; B is not zero."""
    D, O = case.projections[role]
    a_RD = torch.empty(case.rank, D, device=case.device)
    b_OR = torch.empty(O, case.rank, device=case.device)
    draw_into(a_RD, f"layers.{layer}.{role}.{expert}.A", EXPERT_STD)
    draw_into(b_OR, f"layers.{layer}.{role}.{expert}.B", EXPERT_STD)
    return a_RD, b_OR


def router_weight(case: Case, layer: int, role: str) -> torch.Tensor:
    """``[E, D]``, float32."""
    weight_ED = torch.empty(case.experts, case.projections[role][0], device=case.device)
    draw_into(weight_ED, f"layers.{layer}.{role}.router", ROUTER_STD)
    return weight_ED


def place_of(path: str) -> tuple[int, str]:
    """Layer and role of a projection, from its path in a Llama."""
    parts = path.split(".")
    return int(parts[parts.index("layers") + 1]), parts[-1].removesuffix("_proj")


def is_target(path: str) -> bool:
    return path.split(".")[-1] in {f"{role}_proj" for role in TARGETS}


def step_ids(case: Case, step: int) -> torch.Tensor:
    """The tokens of a training step, int64 ``[B, S]``."""
    draw = torch.Generator().manual_seed(step + 1)
    shape = (case.rows, case.sequence)
    return torch.randint(case.vocabulary, shape, generator=draw).to(case.device)


def autocast(case: Case) -> torch.autocast:
    """For adapters that PEFT keeps in float32 over a base that is not."""
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype != "float32")
