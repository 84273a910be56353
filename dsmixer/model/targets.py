"""Which modules of a transformers model are its q, k, v and o projections.

Known architectures are named in ``ARCHITECTURES``. Any other is read by its structure: modules that look
like attention and own linear layers whose names say what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from dsmixer.config.errors import UserError

ROLES = ("q", "k", "v", "o")

_SEPARATE = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_SEPARATE_OUT = {**_SEPARATE, "o": "out_proj"}

# model_type -> role letters -> name of the projection inside the attention module
ARCHITECTURES: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2")
        + ("gemma3_text", "cohere", "olmo", "olmo2", "granite", "smollm3", "starcoder2", "stablelm"),
        _SEPARATE,
    ),
    **dict.fromkeys(("opt", "gptj", "gpt_neo"), _SEPARATE_OUT),
    "phi": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense"},
    "phi3": {"qkv": "qkv_proj", "o": "o_proj"},
    "gpt_neox": {"qkv": "query_key_value", "o": "dense"},
    "bloom": {"qkv": "query_key_value", "o": "dense"},
    "falcon": {"qkv": "query_key_value", "o": "dense"},
    "gpt2": {"qkv": "c_attn", "o": "c_proj"},
    "gpt_bigcode": {"qkv": "c_attn", "o": "c_proj"},
}

PACKABLE = frozenset(
    ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2")
    + ("gemma3_text", "cohere", "olmo", "olmo2", "granite", "smollm3", "starcoder2", "stablelm")
    + ("gptj", "gpt_neo", "phi", "phi3", "gpt_neox", "gpt2", "gpt_bigcode")
)
"""Types that keep the examples of one row apart by restarted position ids, tried with eager and sdpa.

That a model takes ``position_ids`` does not say so: OPT and Falcon take them and leak.
"""

_STRUCTURE = {
    "qkv": re.compile(r"(?i)^(qkv|qkv_proj|query_key_value|c_attn|w_?qkv|attn_qkv|in_proj_qkv)$"),
    "q": re.compile(r"(?i)^(q|wq|q_proj|q_lin|query|query_proj|to_q)$"),
    "k": re.compile(r"(?i)^(k|wk|k_proj|k_lin|key|key_proj|to_k)$"),
    "v": re.compile(r"(?i)^(v|wv|v_proj|v_lin|value|value_proj|to_v)$"),
    "o": re.compile(r"(?i)^(o|wo|o_proj|out_proj|out_lin|dense|c_proj|to_out)$"),
}


@dataclass(frozen=True)
class Target:
    """One projection that gets a mixer.

    Attributes:
        path: its module path in the model.
        roles: the roles it plays, such as ``q``, or ``qkv`` for a fused one, or its own name.
        block: what it shares its input with: projections of equal ``block`` read the same tensor.
        in_features: D.
        out_features: O.
    """

    path: str
    roles: str
    block: str
    in_features: int
    out_features: int


def is_projection(module: nn.Module) -> bool:
    """A linear layer as transformers has them: ``nn.Linear`` and its quantised children, ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D)


def projection_widths(module: nn.Module) -> tuple[int, int]:
    """D and O of a projection."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[Target]:
    """The projections that ``targets`` names, in the order of the model's modules.

    Args:
        model: a transformers model; weights may be on the meta device.
        targets: role letters (``q``, ``k``, ``v``, ``o``) and names of linear modules (``up_proj``,
            ``self_attn.q_proj``), which match whole trailing parts of a module path.

    Raises:
        UserError: a target matched nothing, or a part of a fused projection was asked for.
    """
    linear = {name: module for name, module in model.named_modules() if is_projection(module)}
    by_role = {path: role for path, role in _projection_roles(model, linear)}
    wanted_roles = {target for target in targets if target in ROLES}
    wanted_names = [target for target in targets if target not in ROLES]
    found: list[Target] = []
    matched: set[str] = set()
    for path, module in linear.items():
        roles = by_role.get(path, "")
        hit = set(roles) & wanted_roles
        names = [name for name in wanted_names if path == name or path.endswith("." + name)]
        if hit and hit != set(roles) and not names:
            _refuse_part(path, roles, wanted_roles)
        if hit or names:
            matched |= hit | set(names)
            found.append(_target(path, roles or path.rsplit(".", 1)[-1], module))
    missing = [target for target in targets if target not in matched]
    if missing:
        _refuse_missing(missing, by_role, linear)
    return found


def _target(path: str, roles: str, module: nn.Module) -> Target:
    width_in, width_out = projection_widths(module)
    parent = path.rsplit(".", 1)[0]
    block = f"{parent}.qkv" if set(roles) <= set("qkv") else path
    return Target(path, roles, block, width_in, width_out)


def _projection_roles(model: nn.Module, linear: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = ARCHITECTURES.get(str(model_type))
    for path in linear:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if "attention" not in type(parent).__name__.lower():
            continue
        if known is not None:
            yield from ((path, role) for role, own in known.items() if own == name)
        else:
            yield from ((path, role) for role, like in _STRUCTURE.items() if like.match(name))


def _refuse_part(path: str, roles: str, wanted: set[str]) -> None:
    asked = ", ".join(sorted(wanted & set(roles)))
    raise UserError(
        f"{path} is one fused projection for {', '.join(roles)}, and only {asked} was asked for; "
        "an expert on a part of it would act on all of it",
        where="mixer.targets",
        fix=f"name all of {', '.join(roles)}, or none of them",
    )


def _refuse_missing(missing: list[str], by_role: dict[str, str], linear: dict[str, nn.Module]) -> None:
    roles = sorted({letter for role in by_role.values() for letter in role}, key="qkvo".index)
    names = sorted({path.rsplit(".", 1)[-1] for path in linear})
    raise UserError(
        f"target {', '.join(missing)} matches no projection of this model",
        where="mixer.targets",
        fix=f"choose from the roles {', '.join(roles) or '(none found)'} and the linear layers "
        f"{', '.join(names)}",
    )
