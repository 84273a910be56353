"""MixLoRA: experts on whole feed-forward blocks, and one LoRA on the attention.

It trains experts of its own, so that it compares a way to build a mixture, not a way to route given experts.

Shapes: T tokens, D width of a block's input, E experts, R LoRA rank, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from dsmixer.baselines.adding import Delta, adding, wide
from dsmixer.baselines.fitting import Fit, GateLoss, count, fit, trained
from dsmixer.baselines.interface import Fitted, Given
from dsmixer.baselines.one_lora import PlainLora
from dsmixer.baselines.phatgoose import first_and_last
from dsmixer.experts.init import kaiming_rows, named_generator, normal_rows
from dsmixer.losses.auxiliary import MixLoraLoss
from dsmixer.model.load import model_class
from dsmixer.model.streams import stream_of
from dsmixer.model.targets import find_targets, is_projection, projection_widths
from dsmixer.routing.context import Stream
from dsmixer.routing.modes import Routing, topk


@dataclass(frozen=True)
class MixLora:
    """MixLoRA (arXiv 2404.15159).

    An expert is a whole feed-forward block: the frozen projections, each with a LoRA of the expert's own. A
    router reads the block's input, ``p = softmax(G x)``, and the block puts out ``sum_e w_e FFN_e(x)`` over
    the K largest p, renormalised. So a token's inner activations are one expert's all through, which mixing
    projection by projection is not. The mixture's other projections carry one plain LoRA. All of it trains
    on all rows, the experts' and the routers', with MixLoRA's auxiliary loss.

    Attributes:
        num_experts: E, its 8.
        top_k: K, its 2.
        rank: R of every LoRA, its 16.
        scaling: s, its alpha 32 over the rank.
        balance: weight of the auxiliary loss: 1e-2 in its README, 1e-3 in its code.
        router_std: the routers' start, its 0.02.
        fitting: steps of the shared loop.
    """

    trains: ClassVar[bool] = True

    num_experts: int = 8
    top_k: int = 2
    rank: int = 16
    scaling: float = 2.0
    balance: float = 1e-2
    router_std: float = 0.02
    fitting: Fit = field(
        default=Fit(steps=None, batch_size=16, learning_rate=2e-4, warmup_ratio=0.1, scheduler="cosine")
    )

    def __call__(self, given: Given) -> Fitted:
        """Train experts, routers and the attention's LoRA; arguments as ``Method``. ``found``: ``losses``.

        Raises:
            UserError: no feed-forward block was found.
        """
        model, mixers = given.mixture.model, given.mixture.mixers
        gate_loss = GateLoss(MixLoraLoss(alpha=self.balance))
        blocks = [
            FeedForward(model, path, self, given.seed, gate_loss) for path in feed_forward_blocks(model)
        ]
        inside = tuple(f"{block.path}." for block in blocks)
        plain = {
            path: PlainLora(mixer.bank, path, self.rank, self.scaling, given.seed)
            for path, mixer in mixers.items()
            if not path.startswith(inside)
        }
        parameters = [p for lora in plain.values() for p in (lora.a_RD, lora.b_OR)]
        parameters += [p for block in blocks for p in block.parameters()]

        @contextmanager
        def under(_: str) -> Iterator[None]:
            deltas: dict[str, Delta] = {**plain}
            for block in blocks:
                deltas |= block.deltas()
            with adding(model, deltas), ExitStack() as stack:
                for block in blocks:
                    stack.enter_context(block.in_place())
                yield

        with under(""):
            losses = fit(
                model,
                parameters,
                given.all_rows,
                given.all_rows.everything,
                self.fitting,
                seed=given.seed,
                purpose="mixlora",
                gate_loss=gate_loss,
            )
        return Fitted(
            under,
            num_trainable=count(parameters),
            num_steps=len(losses),
            found={"losses": first_and_last(losses)},
        )


def feed_forward_blocks(model: nn.Module) -> list[str]:
    """Paths of the modules that hold a feed-forward part: a projection down, and what comes before it.

    Raises:
        UserError: there are none.
    """
    config: Any = model.config
    # roles are told by a projection's place among modules, which mixers have changed
    with torch.device("meta"):
        bare = model_class(config).from_config(config, trust_remote_code=False)
    return [target.path.rpartition(".")[0] for target in find_targets(bare, ["down"])]


class FeedForward:
    """A feed-forward block with E experts on all of its projections, and its router.

    Args:
        model: that has it.
        path: of the block.
        settings: E, K, R, scale and the router's start.
        seed: of the start.
        gate_loss: told of the router's work.
    """

    def __init__(
        self, model: nn.Module, path: str, settings: MixLora, seed: int, gate_loss: GateLoss
    ) -> None:
        self.path, self._settings, self._gate_loss = path, settings, gate_loss
        self._module: Any = model.get_submodule(path)
        self._stream: Stream = stream_of(model, path)
        self._expert = 0  # the one whose turn it is
        num, rank = settings.num_experts, settings.rank
        self.a_ERD: dict[str, nn.Parameter] = {}
        self.b_EOR: dict[str, nn.Parameter] = {}
        for name, width_in, width_out, device in _projections(self._module):
            starts = [
                kaiming_rows(rank, width_in, named_generator(seed, path, name, f"expert {e}"))
                for e in range(num)
            ]
            self.a_ERD[name] = trained(torch.stack(starts).to(device))
            self.b_EOR[name] = trained(torch.zeros(num, width_out, rank, device=device))
        first = next(iter(self.a_ERD.values()))
        generator = named_generator(seed, path, "router")
        self.g_ED: nn.Parameter = trained(
            normal_rows(num, first.shape[2], settings.router_std, generator).to(first.device)
        )

    def parameters(self) -> list[nn.Parameter]:
        """All that trains."""
        return [*self.a_ERD.values(), *self.b_EOR.values(), self.g_ED]

    def deltas(self) -> dict[str, Delta]:
        """What the expert in turn adds to each projection of the block, by path in the model."""
        return {f"{self.path}.{name}": self._delta(name) for name in self.a_ERD}

    def _delta(self, name: str) -> Delta:
        def delta(x_TD: torch.Tensor) -> torch.Tensor:
            a_RD, b_OR = self.a_ERD[name][self._expert], self.b_EOR[name][self._expert]
            h_TR = nn.functional.linear(x_TD, a_RD.to(x_TD.dtype))
            return self._settings.scaling * nn.functional.linear(h_TR, b_OR.to(x_TD.dtype))

        return delta

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Under it the block answers as a mixture of its experts; ``deltas`` have to be in place too."""
        one_expert: Callable[[torch.Tensor], torch.Tensor] = self._module.forward
        before = self._module.__dict__.get("forward")
        self._module.forward = lambda x: self._mixed(one_expert, x)
        try:
            yield
        finally:
            if before is None:
                del self._module.forward
            else:
                self._module.forward = before

    def _mixed(self, one_expert: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = wide(x_TD) @ self.g_ED.T.to(wide(x_TD).dtype)
        p_TE = torch.softmax(logits_TE, dim=1)
        choice = topk(p_TE, Routing(mode="topk", top_k=self._settings.top_k))
        self._gate_loss.record(logits_TE, p_TE, choice, self._stream)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self._settings.num_experts):
            tokens, places = (choice.indices_TK == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            self._expert = expert
            spoken = one_expert(x_TD[tokens][None])[0]
            weights = choice.weights_TK[tokens, places, None].to(spoken.dtype)
            y_TD = y_TD.index_add(0, tokens, spoken * weights)
        return y_TD.reshape(x.shape)


def _projections(block: nn.Module) -> Sequence[tuple[str, int, int, torch.device]]:
    """Name in the block, widths and device of each linear layer, with or without a mixer around it."""
    found = []
    for name, module in block.named_modules():
        if is_projection(module):
            device = next(module.parameters()).device
            found.append((name.removesuffix(".base"), *projection_widths(module), device))
    return found
