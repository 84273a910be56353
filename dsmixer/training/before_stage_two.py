"""The experts as they were before stage two trained them, for the evaluation at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dsmixer.evaluation.methods import KINDS, STAGE_ONE
from dsmixer.training.run_state import RunState
from dsmixer.training.saving import load_experts

BEFORE = f"experts{STAGE_ONE}"


def kinds_to_score(state: RunState) -> tuple[str, ...]:
    """What ``evaluation.methods`` names, without what can't be told apart; a collective.

    Experts that stage two has not trained are afterwards what they were before.
    """
    recipe = state.loaded.recipe
    kinds = recipe.evaluation.methods or KINDS
    if BEFORE not in kinds:
        return kinds
    reason = None
    if not recipe.stage2.enabled or recipe.stage2.experts == "frozen":
        reason = "stage two has not trained the experts, which are what they were before it"
    else:
        saved = state.checkpoints.open(2)
        if saved is None or not saved.state.finished:
            reason = "the checkpoint of the end of stage two is not whole"
    if reason is None:
        return kinds
    state.say(f"note: {BEFORE} is not scored: {reason}")
    return tuple(kind for kind in kinds if kind != BEFORE)


@contextmanager
def before_stage_two(state: RunState) -> Iterator[None]:
    """Under it the experts are theta(0), what stage two began with, wherever they are held; a collective.

    They come from the last checkpoint of stage two, and so do those that are put back. Where an error
    leaves it nothing is put back: the ranks may no longer be together.
    """
    saved = state.checkpoints.open(2)
    assert saved is not None
    load_experts(state.mixture, saved, "origin")
    yield
    load_experts(state.mixture, saved, "weights")
