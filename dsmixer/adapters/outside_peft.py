"""What PEFT can't apply: projections that state-space models do not call, or that PEFT refuses.

transformers' Mamba mixers multiply by the weights of some projections without calling them, and an adapter is
added where a projection is called. dsmixer sees to the call; PEFT's LoRA passes the adapter over in silence.
PEFT 0.21 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsmixer.config.errors import UserError

REFUSED = {"out_proj": ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")}
"""Names of projections that PEFT refuses to put LoRA on, and in which kinds of models."""

PASSED_OVER = {
    "dt_proj": "is multiplied with and never called, so LoRA there does nothing",
    "x_proj": "is not called where the fused kernels are installed, so LoRA there does nothing",
}
"""Names that only state-space mixers have."""


def not_applied_by_peft(model_type: str | None, paths: Iterable[str]) -> dict[str, str]:
    """Why PEFT can't apply LoRA to some projections, by their names; empty where it can to all.

    Args:
        model_type: transformers' name of the kind of model; None: not known.
        paths: of the projections that carry an expert.
    """
    found: dict[str, str] = {}
    for path in paths:
        name = path.rpartition(".")[2]
        if model_type in REFUSED.get(name, ()):
            found[name] = f"is refused by PEFT in a {model_type} model"
        elif name in PASSED_OVER:
            found[name] = PASSED_OVER[name]
    return found


def check_applied_by_peft(model_type: str | None, paths: Iterable[str], where: str) -> None:
    """Refuse to write a plain adapter that PEFT would not load, or would apply in part.

    Raises:
        UserError: says which projections, and why.
    """
    found = not_applied_by_peft(model_type, paths)
    if found:
        reasons = "; ".join(f"{name} {reason}" for name, reason in found.items())
        raise UserError(
            f"PEFT can't apply the experts as a plain adapter: {reasons}",
            where=where,
            fix="serve the mixture itself: dsmixer.load_mixture, or PEFT after import dsmixer.peft",
        )
