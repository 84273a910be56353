"""A recipe on this machine: whether it loads, and whether its plan fits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmixer.config.checks import check_recipe
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, load_recipe
from dsmixer.placement.reason import amount
from dsmixer.training.machine.child import python_child
from dsmixer.training.machine.finding import Finding, ok, problem, warning
from dsmixer.training.machine.hub import hub_names
from dsmixer.training.machine.probing import Answers

MODULE = "dsmixer.training.machine.planned"


@dataclass(frozen=True)
class Needs:
    """What a run will take.

    Attributes:
        run_bytes: in its run folder; None: not known.
        base_bytes: of the base's weights as they are downloaded; 0: not known.
    """

    run_bytes: int | None = None
    base_bytes: int = 0


def check_loads(path: str, overrides: Sequence[str]) -> tuple[LoadedRecipe | None, Finding]:
    """The recipe, None where it is wrong, and what is to be said of it."""
    try:
        loaded = load_recipe(path, overrides)
        check_recipe(loaded)
    except UserError as error:
        return None, problem("recipe", _told(error), error.fix or "correct it there")
    recipe = loaded.recipe
    domains = len(recipe.data.domains) or "a column of"
    hub = len(hub_names(recipe))
    where = f", {hub} names of the hub" if hub else ""
    return loaded, ok("recipe", f"{path}: base {recipe.base.model}, {domains} domains{where}")


def check_plan(
    loaded: LoadedRecipe,
    overrides: Sequence[str],
    *,
    answers: Answers,
    ranks: int,
    memory: int,
    model: str,
    seconds: float,
) -> tuple[Needs, Finding]:
    """Hold the plan's bytes against the memory of this machine's devices.

    Args:
        loaded: the recipe.
        overrides: as on the command line.
        answers: of the probe.
        ranks: of a run here.
        memory: bytes of a rank's device, or its share of the host's.
        model: a folder in place of ``base.model``; empty: none.
        seconds: how long planning may take.
    """
    failed = [step for step in ("torch", "transformers", "deepspeed") if answers[step].failed]
    if failed:
        return Needs(), warning("plan", f"not made, because {failed[0]} fails", f"see {failed[0]}")
    arguments = [str(loaded.path), str(ranks), str(memory), model, *overrides]
    with python_child(MODULE, arguments, seconds) as child:
        ended = child.ended()
    if ended.trouble is not None:
        fix = f"see what dsmixer plan --config {loaded.path} --world-size {ranks} says"
        return Needs(), warning("plan", f"it could not be made: {ended.trouble}", fix)
    told: dict[str, Any] = json.loads([line for line in ended.out.splitlines() if line.startswith("{")][-1])
    if "refused" in told:
        error = UserError(told["refused"], where=told["where"], fix=told["fix"])
        fix = (
            error.fix or "correct it there"
        ) + "; --model-config PATH plans with a config.json on this disk"
        return Needs(), problem("plan", _told(error), fix)
    return Needs(told["run_bytes"], told["base_bytes"]), _fits(told["plan"], ranks, memory)


def _fits(plan: Mapping[str, Any], ranks: int, memory: int) -> Finding:
    peak = max(stage["peak"] for stage in plan["bytes_per_rank"].values())
    each = f"{ranks} rank{'s' if ranks > 1 else ''}"
    found = (
        f"{plan['num_experts']} experts on {each}: {plan['mode']}, ZeRO {plan['zero_stage']}; "
        f"{amount(peak)} at the peak of {amount(memory)} a rank has"
    )
    if plan["fits"]:
        return ok("plan", found)
    fix = "; ".join(plan["remedies"]) or "take more or larger devices: dsmixer plan --world-size W tries them"
    return problem("plan", f"{found}: it does not fit", fix)


def _told(error: UserError) -> str:
    return f"{error.where}: {error.problem}" if error.where else error.problem
