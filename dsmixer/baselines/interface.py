"""What a method is given and what it gives: one interface, so that all are scored alike.

A method is a frozen dataclass whose fields are its settings, each with a default. It is called on a model
with experts attached, trains or searches what it has to, and answers with a ``Fitted``: a context under
which the model's forward pass is the method's, beside what it cost. The model itself stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from dsmixer.baselines.merged import Merged
from dsmixer.baselines.rows import TrainingRows
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture

# (the own expert of the domain that is asked) -> a context around forward passes
Under = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Given:
    """What every method gets: the same experts, the same rows.

    Attributes:
        mixture: a model with its experts attached, all of them in this process.
        training: the rows that a method may train or search on; None: there are none.
        seed: of all that is drawn.
        whole: all rows, those of the experts' own training among them, for a method that takes the place of
            experts and routers together; None: ``training`` is all there is.

    Raises:
        UserError: the experts are spread over processes.
    """

    mixture: Mixture
    training: TrainingRows | None = None
    seed: int = 0
    whole: TrainingRows | None = None

    def __post_init__(self) -> None:
        banks = [mixer.bank for mixer in self.mixture.mixers.values()]
        num = len(self.mixture.expert_names)
        if any(bank.num_experts != num or not bank.lora_A.numel() for bank in banks):
            problem = "the experts are spread over processes, and other methods need them together"
            raise UserError(problem, fix="load the mixture in one process, with load_mixture")

    @property
    def rows(self) -> TrainingRows:
        """The training rows.

        Raises:
            UserError: there are none.
        """
        if self.training is None:
            raise UserError("this method trains, and there are no rows to train on", fix="give training rows")
        return self.training

    @property
    def all_rows(self) -> TrainingRows:
        """All rows: what experts and routers together have trained on.

        Raises:
            UserError: there are none.
        """
        return self.rows if self.whole is None else self.whole


@dataclass(frozen=True)
class Fitted:
    """A method that is ready to answer.

    Attributes:
        under: gives the context under which the model's forward pass is the method's. It takes the name of
            the own expert of the domain that is asked, and only a method that is ``told`` looks at it.
        num_trainable: weights that were trained or searched.
        num_steps: optimizer steps, or evaluations of a search.
        told: the experts of whose domains it answers when told the domain; None: it is told nothing, as a
            mixture is, and answers all.
        found: what it found, as plain JSON values.
        merged: the one LoRA that it made of all, where it makes one.
    """

    under: Under
    num_trainable: int = 0
    num_steps: int = 0
    told: frozenset[str] | None = None
    found: Mapping[str, Any] = field(default_factory=dict)
    merged: Merged | None = None


class Method(Protocol):
    """One of the methods that are compared."""

    trains: ClassVar[bool]
    """Whether it needs training rows."""

    def __call__(self, given: Given) -> Fitted:
        """Make the method ready.

        Raises:
            UserError: the experts or the rows are not what the method can work with.
        """
