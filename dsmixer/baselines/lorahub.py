"""LoraHub: a weight an expert, searched without gradients on a few examples.

Shapes: E experts.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from dsmixer.baselines.extras import imported
from dsmixer.baselines.fitting import at_rest, mean_loss
from dsmixer.baselines.interface import Fitted, Given
from dsmixer.baselines.merged import Merged, factor_sum
from dsmixer.baselines.rows import drawn_rows
from dsmixer.data.collate import collate
from dsmixer.evaluation.sharing import device_of

# weights of the experts -> what is minimised
Objective = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Search:
    """What a search came to.

    Attributes:
        weights: the best found, one an expert.
        objective: there.
        start: the objective at 0, the base alone.
    """

    weights: tuple[float, ...]
    objective: float
    start: float


@dataclass(frozen=True)
class LoraHub:
    """LoraHub (arXiv 2307.13269).

    ``A = sum_e w_e A_e`` and ``B = sum_e w_e B_e``, each with the root of its scale, so cross terms stay. w
    is searched by nevergrad's NGOpt from 0 within its bounds, on the mean loss of a few examples, nats a
    target token, + ``penalty * mean_e |w_e|``. Its code divides the loss by the number of examples once
    more, which is another weight of the penalty; here the loss is the mean alone.

    Attributes:
        steps: its 40 evaluations; that of 0 comes before them.
        bound: its 1.5: w in [-bound, bound].
        penalty: its 0.05.
        num_examples: its 5, of each domain.
        per_domain: search once a domain, on its own few examples, and answer it with what came of that, as
            the paper does; that is to be told the domain. Otherwise once, on the few of all domains
            together.
    """

    trains: ClassVar[bool] = True

    steps: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    num_examples: int = 5
    per_domain: bool = False

    def __call__(self, given: Given) -> Fitted:
        """Search; arguments as ``Method``.

        ``found``: ``weights`` by expert, ``objective`` and its ``start``; with ``per_domain`` by the domain's
        expert.

        Raises:
            UserError: the ranks differ, nevergrad is not installed, or there are too few rows.
        """
        names = given.mixture.expert_names
        few = {name: self._few(given, name) for name in given.rows.served}
        if self.per_domain:
            searches = {name: self._search(given, rows) for name, rows in few.items()}
            merged = {name: factor_sum(given.mixture, s.weights) for name, s in searches.items()}

            def under(own: str) -> AbstractContextManager[None]:
                return merged[own].under(given.mixture)

            return Fitted(
                under,
                num_trainable=len(names) * len(few),
                num_steps=(self.steps + 1) * len(few),
                told=frozenset(few),
                found={name: _told(search, names) for name, search in searches.items()},
            )
        search = self._search(given, [row for rows in few.values() for row in rows])
        whole: Merged = factor_sum(given.mixture, search.weights)
        return Fitted(
            lambda _: whole.under(given.mixture),
            num_trainable=len(names),
            num_steps=self.steps + 1,
            found=_told(search, names),
            merged=whole,
        )

    def _few(self, given: Given, name: str) -> list[int]:
        return drawn_rows(given.rows.of(name), self.num_examples, given.seed, f"lorahub {name}")

    def _search(self, given: Given, rows: Sequence[int]) -> Search:
        mixture = given.mixture
        micro = collate(given.rows.store, [(row,) for row in rows], given.rows.pad_token_id)
        micro = micro.to(device_of(mixture.model))

        @torch.no_grad()
        def objective(weights: Sequence[float]) -> float:
            with factor_sum(mixture, weights).under(mixture):
                loss = float(mean_loss(mixture.model, micro))
            return loss + self.penalty * float(np.abs(weights).mean())

        with at_rest(mixture.model):
            return minimized(objective, len(mixture.expert_names), self.steps, self.bound, seed=given.seed)


def minimized(objective: Objective, num_weights: int, steps: int, bound: float, *, seed: int) -> Search:
    """The best of ``steps`` evaluations that NGOpt chooses, and of 0, which its search starts from.

    NGOpt recommends where it believes the least to be, which it need not have evaluated; kept is the best
    that was.
    """
    nevergrad = imported("nevergrad", "LoraHub")
    start, box = [0.0] * num_weights, [bound] * num_weights
    space = nevergrad.p.Array(init=start, lower=[-b for b in box], upper=box)
    space.random_state.seed(seed)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        # of settings that NGOpt makes by itself for the searches that it picks
        warnings.filterwarnings("ignore", module="scipy")
        optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=steps)
        tried: list[tuple[float, tuple[float, ...]]] = [(objective(start), tuple(start))]
        for _ in range(steps):
            asked = optimizer.ask()
            weights = tuple(float(w) for w in asked.value)
            tried.append((objective(weights), weights))
            optimizer.tell(asked, tried[-1][0])
    best, weights = min(tried)
    return Search(weights, best, tried[0][0])


def _told(search: Search, names: Sequence[str]) -> dict[str, object]:
    weights = dict(zip(names, search.weights, strict=True))
    return {"weights": weights, "objective": search.objective, "start": search.start}
