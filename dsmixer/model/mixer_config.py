"""What a mixture is made of, as a value: the public ``MixerConfig``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.experts.forms import forms
from dsmixer.routing.modes import Routing, modes

DEFAULT_TOP_K = 3


@dataclass(frozen=True)
class MixerConfig:
    """The experts on a model and how its routers choose among them.

    Attributes:
        targets: roles (``q``, ``k``, ``v``, ``o``; ``in``, ``x``, ``dt``, ``out``; ``gate``, ``up``,
            ``down``) and names of linear modules.
        experts: names of the experts, in order; E of them.
        rank: LoRA rank of each expert that ``ranks`` does not name.
        alpha: LoRA alpha of each expert that ``alphas`` does not name.
        ranks: rank by expert name, where it differs.
        alphas: alpha by expert name, where it differs.
        dropout: probability on the input of the experts, in training.
        rslora: scale by ``alpha / sqrt(rank)``.
        router: ``per_projection``, or ``per_block`` for one router for those that read the same input.
        router_std: standard deviation of a router's start.
        compute: ``auto``, ``loop``, ``dense``, ``grouped``, ``blocked`` or ``fused``.
        routing: ``topk``, ``soft``, ``hard_soft`` or ``top_p``: how the trained mixture routes.
        top_k: K; None for ``min(3, E)``.
        renormalize: whether chosen weights are divided by their sum.
        top_p: the mass that ``top_p`` routing reaches.
        seed: of the experts' and routers' start.
    """

    targets: Sequence[str]
    experts: Sequence[str]
    rank: int = 64
    alpha: float = 128
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    router: str = "per_projection"
    router_std: float = 0.02
    compute: str = "auto"
    routing: str = "topk"
    top_k: int | None = None
    renormalize: bool = True
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("targets", "experts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("ranks", "alphas"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        def require(ok: bool, key: str, problem: str, fix: str) -> None:
            if not ok:
                raise UserError(problem, where=f"mixer.{key}", fix=fix)

        num = len(self.experts)
        require(num > 0, "experts", "a mixture needs at least one expert", "name one")
        require(len(set(self.experts)) == num, "experts", "two experts share a name", "rename one")
        for key in ("ranks", "alphas"):
            unknown = set(getattr(self, key)) - set(self.experts)
            require(not unknown, key, f"no expert is called {', '.join(sorted(unknown))}", "drop it")
        require(min(self.rank_list) > 0, "rank", f"ranks {self.rank_list}", "give ranks above 0")
        alphas = (self.alpha, *self.alphas.values())
        require(all(a > 0 for a in alphas), "alpha", f"alphas {alphas}", "give alphas above 0")
        require(self.router_std > 0, "router_std", f"{self.router_std} is not above 0", "use 0.02")
        require(0 < self.top_p <= 1, "top_p", f"{self.top_p} is no share", "use above 0, at most 1")
        for key, allowed in (
            ("router", ("per_projection", "per_block")),
            ("compute", ("auto", *forms)),
            ("routing", tuple(modes)),
        ):
            value = getattr(self, key)
            require(value in allowed, key, f"unknown value {value!r}", f"choose from {', '.join(allowed)}")
        require(0.0 <= self.dropout < 1.0, "dropout", f"{self.dropout} is no probability", "use 0 to 0.99")
        k_fits = self.top_k is None or 0 < self.top_k <= num
        require(k_fits, "top_k", f"top_k {self.top_k} with {num} experts", f"use 1 to {num}")

    def __getattr__(self, name: str) -> Any:
        # what PEFT asks a configuration first
        if name == "base_model_name_or_path":
            raise UserError(
                "PEFT's calls don't take a dsmixer.MixerConfig",
                fix="import dsmixer.peft, and give them dsmixer.peft.MixerConfig, which has the same fields",
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def rank_list(self) -> tuple[int, ...]:
        """Rank of each expert, in order."""
        return tuple(self.ranks.get(name, self.rank) for name in self.experts)

    @property
    def alpha_list(self) -> tuple[float, ...]:
        """Alpha of each expert, in order."""
        return tuple(self.alphas.get(name, self.alpha) for name in self.experts)

    def default_routing(self) -> Routing:
        """How the mixture routes outside ``route_to``."""
        top_k = self.top_k if self.top_k is not None else min(DEFAULT_TOP_K, len(self.experts))
        return Routing(mode=self.routing, top_k=top_k, renormalize=self.renormalize, top_p=self.top_p)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "targets": list(self.targets), "experts": list(self.experts)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MixerConfig:
        """From ``to_dict``; an unknown key is a ``UserError``."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(
                f"unknown keys {', '.join(sorted(unknown))}",
                where="mixer_config.json",
                fix="load the mixture with the version of dsmixer that wrote it, or a later one",
            )
        return cls(**values)
