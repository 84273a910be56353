"""Which modules of a transformers model play which role: attention, state space, feed-forward.

Known architectures are named in ``ARCHITECTURES``. Any other is read by its structure: modules that look like
attention, a state-space mixer or a feed-forward part, and own linear layers whose names say what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from dsmixer.config.errors import UserError
from dsmixer.model.state_space import is_state_space, knows_mixer

ATTENTION = ("q", "k", "v", "o")
STATE_SPACE = ("in", "x", "dt", "out")
FEED_FORWARD = ("gate", "up", "down")
ROLES = (*ATTENTION, *STATE_SPACE, *FEED_FORWARD)

Names = Mapping[str, tuple[str, ...]]
"""Name of a linear layer inside its parent -> the roles it plays there; a fused one plays several."""


@dataclass(frozen=True)
class Architecture:
    """The projections of one ``model_type``, by the names of its own class definitions.

    Attributes:
        attention: those of modules whose class is called attention.
        feed_forward: those outside attention and state-space mixers.
        state_space: those of state-space mixers.
    """

    attention: Names = field(default_factory=dict)
    feed_forward: Names = field(default_factory=dict)
    state_space: Names = field(default_factory=dict)


_Q_K_V: Names = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}
_SEPARATE: Names = {**_Q_K_V, "o_proj": ("o",)}
_SEPARATE_OUT: Names = {**_Q_K_V, "out_proj": ("o",)}
_FUSED = ("q", "k", "v")
_GATED: Names = {"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}
_H_TO_4H: Names = {"dense_h_to_4h": ("up",), "dense_4h_to_h": ("down",)}
_C_FC: Names = {"c_fc": ("up",), "c_proj": ("down",)}
_FC_1_2: Names = {"fc1": ("up",), "fc2": ("down",)}
_T5_ATTENTION: Names = {"q": ("q",), "k": ("k",), "v": ("v",), "o": ("o",)}
_T5_FEED_FORWARD: Names = {"wi": ("up",), "wi_0": ("gate",), "wi_1": ("up",), "wo": ("down",)}
_MAMBA: Names = {"in_proj": ("in",), "x_proj": ("x",), "dt_proj": ("dt",), "out_proj": ("out",)}
_MAMBA_2: Names = {"in_proj": ("in",), "out_proj": ("out",)}

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text")
        + ("cohere", "olmo", "olmo2", "granite", "smollm3", "stablelm"),
        Architecture(_SEPARATE, _GATED),
    ),
    "mixtral": Architecture(_SEPARATE),
    "starcoder2": Architecture(_SEPARATE, _C_FC),
    "opt": Architecture(_SEPARATE_OUT, _FC_1_2),
    "gptj": Architecture(_SEPARATE_OUT, {"fc_in": ("up",), "fc_out": ("down",)}),
    "gpt_neo": Architecture(_SEPARATE_OUT, _C_FC),
    "phi": Architecture({**_Q_K_V, "dense": ("o",)}, _FC_1_2),
    "phi3": Architecture(
        {"qkv_proj": _FUSED, "o_proj": ("o",)}, {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
    ),
    **dict.fromkeys(
        ("gpt_neox", "bloom", "falcon"),
        Architecture({"query_key_value": _FUSED, "dense": ("o",)}, _H_TO_4H),
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), Architecture({"c_attn": _FUSED, "c_proj": ("o",)}, _C_FC)),
    **dict.fromkeys(("t5", "mt5"), Architecture(_T5_ATTENTION, _T5_FEED_FORWARD)),
    **dict.fromkeys(("mamba", "falcon_mamba"), Architecture(state_space=_MAMBA)),
    "mamba2": Architecture(state_space=_MAMBA_2),
}

PACKABLE = frozenset(
    ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2")
    + ("gemma3_text", "cohere", "olmo", "olmo2", "granite", "smollm3", "starcoder2", "stablelm")
    + ("gptj", "gpt_neo", "phi", "phi3", "gpt_neox", "gpt2", "gpt_bigcode")
)
"""Types that keep the examples of one row apart by restarted position ids, tried with eager and sdpa.

That a model takes ``position_ids`` does not say so: OPT and Falcon take them and leak.
"""

_ATTENTION_LIKE = {
    _FUSED: re.compile(r"(?i)^(qkv|qkv_proj|query_key_value|c_attn|w_?qkv|attn_qkv|in_proj_qkv)$"),
    ("q",): re.compile(r"(?i)^(q|wq|q_proj|q_lin|query|query_proj|to_q)$"),
    ("k",): re.compile(r"(?i)^(k|wk|k_proj|k_lin|key|key_proj|to_k)$"),
    ("v",): re.compile(r"(?i)^(v|wv|v_proj|v_lin|value|value_proj|to_v)$"),
    ("o",): re.compile(r"(?i)^(o|wo|o_proj|out_proj|out_lin|dense|c_proj|to_out)$"),
}
_FEED_FORWARD_LIKE = {
    ("gate", "up"): re.compile(r"^(gate_up_proj|up_gate_proj)$"),
    ("gate",): re.compile(r"^(gate_proj|wi_0)$"),
    ("up",): re.compile(r"^(up_proj|wi|wi_1|fc1|fc_in|c_fc|lin1|dense_h_to_4h)$"),
    ("down",): re.compile(r"^(down_proj|wo|fc2|fc_out|lin2|dense_4h_to_h)$"),
}
_FEED_FORWARD_CLASS = re.compile(r"(?i)mlp|feed_?forward|ffn")
_CROSS_ATTENTION = re.compile(r"(?i)encdec|encoder_attn|cross")


@dataclass(frozen=True)
class Target:
    """One projection that gets a mixer.

    Attributes:
        path: its module path in the model.
        roles: the roles it plays, such as ``("q",)``, or ``("q", "k", "v")`` for a fused one; for a layer
            that plays none, its own name.
        block: what it shares its input with: projections of equal ``block`` read the same tensor.
        in_features: D.
        out_features: O.
    """

    path: str
    roles: tuple[str, ...]
    block: str
    in_features: int
    out_features: int

    @property
    def shares_input(self) -> bool:
        """Whether other projections of the model may read what it reads."""
        return self.block != self.path


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
        targets: roles (``q``, ``k``, ``v``, ``o``; ``in``, ``x``, ``dt``, ``out``; ``gate``, ``up``,
            ``down``) and names of linear modules (``up_proj``, ``self_attn.q_proj``), which match whole
            trailing parts of a module path.

    Raises:
        UserError: a target matched nothing, a part of a fused projection was asked for, or one that a
            state-space mixer of an unknown kind may never call.
    """
    linear = {name: module for name, module in model.named_modules() if is_projection(module)}
    by_role = {path: roles for path in linear if (roles := _roles(model, path))}
    wanted_roles = {target for target in targets if target in ROLES}
    wanted_names = [target for target in targets if target not in ROLES]
    found: list[Target] = []
    matched: set[str] = set()
    for path, module in linear.items():
        roles = by_role.get(path, ())
        hit = set(roles) & wanted_roles
        names = [name for name in wanted_names if path == name or path.endswith("." + name)]
        if hit and hit != set(roles) and not names:
            _refuse_part(path, roles, hit)
        if hit or names:
            _refuse_uncalled(model, path)
            matched |= hit | set(names)
            found.append(_target(path, roles, module))
    missing = [target for target in targets if target not in matched]
    if missing:
        _refuse_missing(missing, by_role, linear)
    return found


def _target(path: str, roles: tuple[str, ...], module: nn.Module) -> Target:
    width_in, width_out = projection_widths(module)
    parent, _, name = path.rpartition(".")
    return Target(path, roles or (name,), _block(path, parent, roles), width_in, width_out)


def _block(path: str, parent: str, roles: tuple[str, ...]) -> str:
    """What names the input: attention across two streams reads one with q and the other with k and v."""
    if roles and set(roles) <= {"q", "k", "v"}:
        if not _CROSS_ATTENTION.search(parent.rpartition(".")[2]):
            return f"{parent}.qkv"
        return f"{parent}.kv" if set(roles) <= {"k", "v"} else path
    return f"{parent}.gate_up" if roles and set(roles) <= {"gate", "up"} else path


def _roles(model: nn.Module, path: str) -> tuple[str, ...]:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = ARCHITECTURES.get(str(model_type))
    class_name = type(parent).__name__
    if is_state_space(parent):
        return (known.state_space if known else _MAMBA).get(name, ())
    if "attention" in class_name.lower():
        return known.attention.get(name, ()) if known else _match(_ATTENTION_LIKE, name)
    if known is not None:
        return known.feed_forward.get(name, ())
    if name == "c_proj":
        return ("down",) if _FEED_FORWARD_CLASS.search(class_name) else ()
    return _match(_FEED_FORWARD_LIKE, name)


def _match(like: Mapping[tuple[str, ...], re.Pattern[str]], name: str) -> tuple[str, ...]:
    return next((roles for roles, pattern in like.items() if pattern.match(name)), ())


def _refuse_uncalled(model: nn.Module, path: str) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if is_state_space(parent) and not knows_mixer(parent) and name != "in_proj":
        raise UserError(
            f"{path} belongs to a {type(parent).__name__}, which may hand its weight to a fused kernel "
            "instead of calling it: an expert on it would not act",
            where="mixer.targets",
            fix="choose in, or the projections of other layers",
        )


def _refuse_part(path: str, roles: Sequence[str], asked: Iterable[str]) -> None:
    raise UserError(
        f"{path} is one fused projection for {', '.join(roles)}, and only {', '.join(sorted(asked))} was "
        "asked for; an expert on a part of it would act on all of it",
        where="mixer.targets",
        fix=f"name all of {', '.join(roles)}, or none of them",
    )


def _refuse_missing(
    missing: list[str], by_role: Mapping[str, tuple[str, ...]], linear: Mapping[str, nn.Module]
) -> None:
    roles = sorted({role for played in by_role.values() for role in played}, key=ROLES.index)
    names = sorted({path.rsplit(".", 1)[-1] for path in linear})
    raise UserError(
        f"target {', '.join(missing)} matches no projection of this model",
        where="mixer.targets",
        fix=f"choose from the roles {', '.join(roles) or '(none found)'} and the linear layers "
        f"{', '.join(names)}",
    )
