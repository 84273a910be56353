"""Methods by the names that a user writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsmixer.baselines.interface import Method
from dsmixer.baselines.registry import methods
from dsmixer.baselines.routed import Routed
from dsmixer.baselines.stage_one import BeforeStageTwo, StageOneExpert
from dsmixer.config.errors import UserError
from dsmixer.config.explain import nearest_key
from dsmixer.evaluation.methods import STAGE_ONE

EXPERT = "expert:"


@dataclass(frozen=True)
class Names:
    """What the methods that a user may name are made from.

    Attributes:
        experts: names of the pool.
        before: finds the experts before stage two; called where a method wants them.
    """

    experts: Sequence[str]
    before: Callable[[], BeforeStageTwo]

    def chosen(self, names: Sequence[str]) -> dict[str, Method]:
        """Methods by name: those of the registry, ``base``, ``mixture``, ``expert:NAME`` and
        ``expert:NAME@stage1``; ``experts`` and ``experts@stage1`` stand for all of them.

        Raises:
            UserError: there is none of a name, or the experts before stage two are nowhere.
        """
        whole = [name for given in names for name in self._spelled_out(given)]
        for name in whole:
            self._check(name)
        before = self.before() if any(name.endswith(STAGE_ONE) for name in whole) else None
        return {name: self._method(name, before) for name in whole}

    def _spelled_out(self, name: str) -> Iterator[str]:
        if name.removesuffix(STAGE_ONE) == "experts":
            yield from (f"{EXPERT}{expert}{name.removeprefix('experts')}" for expert in self.experts)
        else:
            yield name

    def _check(self, name: str) -> None:
        if name in methods or name in ("base", "mixture"):
            return
        if name.startswith(EXPERT) and name.removeprefix(EXPERT).removesuffix(STAGE_ONE) in self.experts:
            return
        known = [*methods, "base", "mixture", "experts", *(f"{EXPERT}{expert}" for expert in self.experts)]
        near = nearest_key(name.removesuffix(STAGE_ONE), known)
        fix = f"write {near}" if near else f"write one of {', '.join(known[:40])}"
        raise UserError(f"there is no method {name!r}", where="--methods", fix=fix)

    def _method(self, name: str, before: BeforeStageTwo | None) -> Method:
        if name in methods:
            return methods[name]
        if name.endswith(STAGE_ONE):
            assert before is not None
            return StageOneExpert(name.removeprefix(EXPERT).removesuffix(STAGE_ONE), before)
        return Routed(name)
