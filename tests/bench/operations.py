"""Model operations of a step: what the method needs, whatever an implementation does instead.

A product of ``[T, D]`` and ``[D, O]`` is ``2 T D O``. The base is frozen: forward and the gradient to its
inputs, 4 a weight and token. What trains takes 6. A token's experts are K of E, whatever else is computed.
"""

from __future__ import annotations

from tests.bench.case import Case

ACTIVE_EXPERTS = {"base": 0, "one": 1, "hard": 1, "mixture": 3}
"""Experts that a token hears, by kind of system; ``mixture`` means K."""


def operations(case: Case, kind: str) -> float:
    """Model operations of a training step, or of the tokens that one decoding step puts out.

    Args:
        case: the shapes.
        kind: ``base``, ``one`` (a single LoRA), ``hard`` (one expert of E), ``mixture`` (K of E, routers).
    """
    active = case.top_k if kind == "mixture" else ACTIVE_EXPERTS[kind]
    trained = active * case.expert_weights + (case.router_weights if kind == "mixture" else 0)
    if case.what == "decode":
        return case.tokens * (2.0 * case.linear_weights + 2.0 * trained)
    # causal attention: every position sees half of the row; two products forward, twice that backward
    attention = 3 * 2 * 2 * case.width * case.sequence / 2 * case.layers
    return case.tokens * (4.0 * case.linear_weights + 6.0 * trained + attention)
