"""From what a recipe says of the routers' loss to its terms."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from dsmixer.config.errors import UserError
from dsmixer.config.stages import RslConfig, Stage2Config
from dsmixer.losses.balance import routing_losses
from dsmixer.losses.interface import RoutingLoss
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.losses.terms import RoutingTerms, published

KEY = "stage2.routing_loss"
ABOVE_ZERO = ("smooth_temperature", "epsilon", "width", "rate", "margin", "own")


def routing_terms(stage: Stage2Config) -> RoutingTerms:
    """The losses on the routers of stage two.

    Learned parameters of losses stay at their first values: what trains are routers and experts.

    Raises:
        UserError: a setting that a loss does not have, of another type, or at odds with another term's.
    """
    chosen = stage.routing_loss
    if chosen == "none":
        return RoutingTerms(())
    if chosen == "lora_mixer":
        return RoutingTerms((_rsl(stage.rsl),))
    if isinstance(chosen, str):
        return RoutingTerms(published[chosen])
    terms = tuple(
        _term(term.loss, term.settings, f"{KEY}.{index}.settings") for index, term in enumerate(chosen)
    )
    try:
        return RoutingTerms(terms)
    except ValueError as error:
        raise UserError(str(error), where=KEY, fix="give them the same smooth_temperature") from error


def _rsl(rsl: RslConfig) -> RoutingSpecializationLoss:
    return RoutingSpecializationLoss(
        alpha=rsl.alpha,
        entropy_weight=rsl.entropy_weight,
        entropy=rsl.entropy,
        usage=rsl.usage,
        usage_from=rsl.usage_from,
        smooth_temperature=rsl.smooth_temperature,
    )


def _term(name: str, settings: dict[str, Any], where: str) -> RoutingLoss:
    kind = routing_losses[name]
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key, value in settings.items():
        if key not in known:
            fix = f"{name} has {', '.join(known)}"
            raise UserError(f"{name} has no setting {key!r}", where=f"{where}.{key}", fix=fix)
        _check_value(value, hints[key], f"{where}.{key}")
    return kind(**settings)


def _check_value(value: Any, hint: Any, where: str) -> None:
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    if choices:
        if value not in choices:
            raise UserError(f"{value!r} is no choice", where=where, fix=f"one of {', '.join(choices)}")
        return
    optional = type(None) in get_args(hint)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (optional and value is None):
        raise UserError(f"expected a number, found {value!r}", where=where, fix="write a number")
    if is_number and value <= 0 and where.rsplit(".", 1)[-1] in ABOVE_ZERO:
        raise UserError(f"{value} is not above 0", where=where, fix="write a number above 0")
