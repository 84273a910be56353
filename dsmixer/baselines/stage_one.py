"""An expert as stage one left it, read from the checkpoints of its run (arXiv 2507.00029, appendix A.14).

Shapes: D input width, O output width, R LoRA rank (padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from dsmixer.baselines.interface import Fitted, Given
from dsmixer.checkpoint.publish import list_checkpoints
from dsmixer.checkpoint.restore import SavedCheckpoint, Wanted
from dsmixer.checkpoint.verify import UnreadableError, damage
from dsmixer.config.errors import RunError, UserError
from dsmixer.config.schema import Recipe
from dsmixer.evaluation.methods import STAGE_ONE
from dsmixer.model.inject import Mixture, route_to

# by module path, A [R, D] and B [R, O] of one expert
Rows = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BeforeStageTwo:
    """Where theta(0) of a run is.

    Attributes:
        saved: a checkpoint.
        kind: ``weights`` of the end of stage one, or ``origin`` of a stage two that trained the experts.
    """

    saved: SavedCheckpoint
    kind: str


@dataclass(frozen=True)
class StageOneExpert:
    """One expert for all domains, as it was before stage two.

    Attributes:
        expert: its name.
        source: where it is.
    """

    trains: ClassVar[bool] = False

    expert: str
    source: BeforeStageTwo

    def __call__(self, given: Given) -> Fitted:
        """Read it; arguments as ``Method``.

        Raises:
            UserError: the mixture is no longer as the run made it.
        """
        rows = self._read(given.mixture)

        @contextmanager
        def under(_: str) -> Iterator[None]:
            with _in_place(given.mixture, self.expert, rows), route_to(given.mixture.model, self.expert):
                yield

        return Fitted(under, found={"checkpoint": str(self.source.saved.path)})

    def _read(self, mixture: Mixture) -> Rows:
        _check_same(self.source.saved, mixture, self.expert)
        rows = {
            path: (
                torch.empty_like(m.bank.lora_A[0], device="cpu"),
                torch.empty_like(m.bank.lora_B[0], device="cpu"),
            )
            for path, m in mixture.mixers.items()
        }
        wanted = (
            Wanted(f"{path}.bank.{name}", self.expert, 0, tensor.view(-1))
            for path, pair in rows.items()
            for name, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
        )
        self.source.saved.fill(self.source.kind, wanted)
        return rows


@contextmanager
def _in_place(mixture: Mixture, expert: str, rows: Rows) -> Iterator[None]:
    """Under it the expert's rows of the banks are these."""
    index = mixture.expert_names.index(expert)

    @torch.no_grad()
    def put(given: Rows) -> Rows:
        before = {}
        for path, (a_RD, b_RO) in given.items():
            bank = mixture.mixers[path].bank
            before[path] = bank.lora_A[index].clone(), bank.lora_B[index].clone()
            bank.lora_A[index].copy_(a_RD)
            bank.lora_B[index].copy_(b_RO)
        return before

    own = put(rows)
    try:
        yield
    finally:
        put(own)


def find_before_stage_two(run: Path | None, recipe: Recipe | None) -> BeforeStageTwo:
    """The experts of a run before its stage two: those of its last checkpoint of stage one, or theta(0) of
    its stage two.

    Args:
        run: the folder of the run; None: the mixture lies in none.
        recipe: of the run.

    Raises:
        UserError: there is none, or none that is what was saved.
        RunError: the system refuses to read it.
    """
    if run is None or recipe is None:
        raise UserError(
            "a mixture alone does not hold its experts as they were before stage two",
            where=f"expert:NAME{STAGE_ONE}",
            fix="give the folder of the run with its checkpoints, runs/NAME",
        )
    problems = []
    for stage, kind in ((1, "weights"), (2, "origin")):
        for path in list_checkpoints(run / "checkpoints" / f"stage{stage}")[-1:]:
            problem = _damage(path)
            if problem is None:
                saved = SavedCheckpoint(path)
                if (saved.state.finished or stage == 2) and kind in saved.kinds():
                    return BeforeStageTwo(saved, kind)
            else:
                problems.append(problem)
    raise _none(run, recipe, problems)


def _damage(path: Path) -> str | None:
    try:
        return damage(path)
    except UnreadableError as error:
        raise RunError(str(error)) from error


def _none(run: Path, recipe: Recipe, problems: list[str]) -> UserError:
    where, fix = str(run / "checkpoints"), f"leave the methods that end in {STAGE_ONE} out"
    if problems:
        return UserError(problems[0], where=where, fix=f"put the file back, or {fix}")
    untouched = not recipe.stage2.enabled or recipe.stage2.experts == "frozen"
    if not recipe.stage1.enabled and untouched:
        return UserError(
            "the run has not trained its experts: they came ready-made, and stage two has left them so",
            where=where,
            fix=f"{fix}; expert:NAME is the same by construction",
        )
    return UserError("no checkpoint of the run has its experts before stage two", where=where, fix=fix)


def _check_same(saved: SavedCheckpoint, mixture: Mixture, expert: str) -> None:
    state, told = saved.state, "the run had"
    here = dict(zip(mixture.expert_names, mixture.config.rank_list, strict=True))
    there = dict(zip(state.experts, state.ranks, strict=True))
    problem = None
    if expert not in there:
        problem = f"{told} no expert {expert}, but {', '.join(state.experts)}"
    elif there[expert] != here[expert]:
        problem = f"{told} {expert} at rank {there[expert]}, and it is {here[expert]} here"
    for path, mixer in mixture.mixers.items():
        for name, weight in (("lora_A", mixer.bank.lora_A), ("lora_B", mixer.bank.lora_B)):
            shape = state.shapes.get(f"{path}.bank.{name}")
            if problem is None and (shape is None or list(shape[1:]) != list(weight.shape[1:])):
                problem = f"{told} other experts on {path}"
    if problem is not None:
        fix = "give the mixture as the run has published it"
        raise UserError(f"the mixture was changed since its run: {problem}", where=str(saved.path), fix=fix)
