"""AESL on the mixers of a small model, as stage two takes it, against a plain float64 loop of its formula."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.tiny import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dsmixer import MixerConfig, attach_mixers
from dsmixer.config.stages import RoutingTermConfig, RslConfig, Stage2Config
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.model.inject import Mixture
from dsmixer.model.load import checkpoint_activations
from dsmixer.routing.modes import Routing
from dsmixer.training.stages import SoftStage, expert_lookup

EXPERTS, TOP_K = ["law", "chess", "go", "tax"], 3
Tensor = torch.Tensor
Gradients = dict[str, Tensor]

# the coefficients of the method, and those at which its small terms can be told apart from rounding
METHOD: Any = "aesl"
LOUD = tuple(
    RoutingTermConfig(loss=loss, settings=settings)  # type: ignore[arg-type]
    for loss, settings in (
        ("switch", {"alpha": 0.5}),
        ("aesl_orthogonality", {"weight": 0.7}),
        ("aesl_variance", {"weight": 2.0}),
    )
)
ORTHOGONALITY = (RoutingTermConfig(loss="aesl_orthogonality", settings={"weight": 1.0}),)


def make_mixture(router: str = "per_projection", checkpointing: bool = False) -> Mixture:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="eager").double()
    if checkpointing:
        checkpoint_activations(model)
    config = MixerConfig("qkvo", EXPERTS, rank=3, alpha=6, router=router, router_std=0.2)
    mixture = attach_mixers(model, config)
    model.double()
    for _, parameter in mixture.expert_parameters():
        nn.init.normal_(parameter, std=0.3)
    for _, parameter in (*mixture.expert_parameters(), *mixture.router_parameters()):
        parameter.requires_grad_(True)
    model.train()
    return mixture


def draw_micro() -> MicroBatch:
    """Four rows of six tokens, of two domains; three tokens are padding."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (4, 6), generator=rng)
    domains = torch.tensor([[0] * 6, [1] * 6, [0] * 6, [1, 1, 1, -1, -1, -1]])
    return part_of(MicroBatch(ids, domains, domains, domains, domains, 24, 21), slice(0, 4))


def part_of(micro: MicroBatch, rows: slice) -> MicroBatch:
    ids, domains = micro.input_ids[rows], micro.domain_ids[rows]
    real = int((domains >= 0).sum())
    return MicroBatch(ids, domains, domains, domains, domains, real, real)


def usage_of(mixture: Mixture, num_terms: int) -> Tensor:
    """Means of the step before, uneven, unlike from router to router and term to term."""
    rng = torch.Generator().manual_seed(2)
    shape = (num_terms, len(mixture.routers), len(EXPERTS))
    return torch.rand(shape, generator=rng, dtype=torch.float64).softmax(2)


def run(
    mixture: Mixture, routing_loss: Any, parts: list[slice], experts: Any = "preserve"
) -> tuple[float, Gradients]:
    """Value and gradients of a step's routing loss, as the loop takes them."""
    mixture.model.zero_grad()
    config = Stage2Config(routing_loss=routing_loss, rsl=RslConfig(ramp=0.0), experts=experts)
    stage = SoftStage(
        config=config,
        num_steps=1,
        mixture=mixture,
        routing=Routing(top_k=TOP_K),
        device=torch.device("cpu"),
        num_domains=2,
        expert_of_domain=expert_lookup([0, 1], torch.device("cpu")),
    )
    stage.usage = usage_of(mixture, len(stage.terms.terms))
    whole = draw_micro()
    micros = [part_of(whole, rows) for rows in parts]
    statistics = stage.start_step(0, StepBatch(micros, torch.tensor([15, 9]), 21))
    total = 0.0
    for micro in micros:
        loss, scale = stage.router_loss()
        recording = mixture.context.recording(
            stage.batch_routing(micro), statistics, loss, stage.output_loss()
        )
        with mixture.context.routed(stage.routing):
            with recording:
                mixture.model(input_ids=micro.input_ids, use_cache=False)
            found = mixture.context.take_loss()
            assert found is not None
            (found * scale).backward()
        assert mixture.context.take_loss() is None, "what ran again was counted"
        total += found.item() * scale
    return total, gradients_of(mixture)


def gradients_of(mixture: Mixture) -> Gradients:
    named = [*mixture.expert_parameters(), *mixture.router_parameters()]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


@dataclass
class Plain:
    """The formula, one token and one pair of experts after the other."""

    mixture: Mixture
    weights: tuple[float, float, float]

    def run(self) -> tuple[float, Gradients]:
        self.mixture.model.zero_grad()
        seen: dict[str, Tensor] = {}
        handles = [
            mixer.register_forward_pre_hook(
                lambda module, given, path=path: seen.update({path: given[0].reshape(-1, given[0].shape[-1])})
            )
            for path, mixer in self.mixture.mixers.items()
        ]
        micro = draw_micro()
        with self.mixture.context.routed(Routing(top_k=TOP_K)):
            self.mixture.model(input_ids=micro.input_ids, use_cache=False)
        for handle in handles:
            handle.remove()
        real = (micro.domain_ids.flatten() >= 0).tolist()
        total = self.of_routers(seen, real) + self.weights[1] * self.of_outputs(seen, real)
        total.backward()
        return total.item(), gradients_of(self.mixture)

    def of_routers(self, seen: dict[str, Tensor], real: list[bool]) -> Tensor:
        """Mean over routers of ``alpha E sum_i p_i f_i - gamma mean_x sum_j (p_j(x) - m_j)^2``."""
        alpha, _, gamma = self.weights
        if not alpha:
            return torch.zeros((), dtype=torch.float64)
        usage_NME = usage_of(self.mixture, 3)
        found = []
        for index, (path, router) in enumerate(self.mixture.routers.items()):
            p_TE = (seen[path] @ router.weight.T).softmax(1)[torch.tensor(real)]
            f_E, m_E = usage_NME[0, index], usage_NME[2, index]
            balance = len(EXPERTS) * (p_TE.mean(0) * f_E).sum()
            found.append(alpha * balance - gamma * (p_TE - m_E).square().sum(1).mean())
        return torch.stack(found).mean()

    def of_outputs(self, seen: dict[str, Tensor], real: list[bool]) -> Tensor:
        """Mean over mixers and real tokens of the squared projections of outputs on each other."""
        total = torch.zeros((), dtype=torch.float64)
        for path, mixer in self.mixture.mixers.items():
            router = mixer._outside[1].weight
            for x_D, is_real in zip(seen[path], real, strict=True):
                if is_real:
                    chosen = (router @ x_D).argsort(descending=True)[:TOP_K].tolist()
                    total = total + self.of_token(mixer.bank, x_D, chosen)
        return total / (sum(real) * len(self.mixture.mixers))

    def of_token(self, bank: Any, x_D: Tensor, chosen: list[int]) -> Tensor:
        outs = [6 / 3 * bank.lora_B[e].T @ (bank.lora_A[e] @ x_D) for e in chosen]
        total = torch.zeros((), dtype=torch.float64)
        for j, k in itertools.permutations(outs, 2):
            along = (j @ k) / (k @ k + 1e-6) * k
            total = total + along @ along
        return total


WHOLE, FOUR = [slice(0, 4)], [slice(row, row + 1) for row in range(4)]


def assert_same(found: tuple[float, Gradients], wanted: tuple[float, Gradients], rtol: float = 1e-8) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=rtol)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=1e-11, msg=name)


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize(
    ("routing_loss", "weights"),
    [(METHOD, (1e-3, 1e-3, 1e-4)), (LOUD, (0.5, 0.7, 2.0)), (ORTHOGONALITY, (0.0, 1.0, 0.0))],
    ids=["method", "loud", "orthogonality"],
)
def test_a_steps_loss_and_gradients_are_autograds_of_the_formula(
    router: str, routing_loss: Any, weights: tuple[float, float, float]
) -> None:
    mixture = make_mixture(router)
    found, wanted = run(mixture, routing_loss, WHOLE), Plain(mixture, weights).run()
    assert_same(found, wanted)
    experts = [name for name, _ in mixture.expert_parameters()]
    assert all(found[1][name].any() for name in experts), "L_o pulls at every bank"


def test_four_micro_batches_give_the_step_of_one() -> None:
    mixture = make_mixture()
    assert_same(run(mixture, LOUD, FOUR), run(mixture, LOUD, WHOLE))


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
def test_layers_that_run_again_count_it_once(router: str) -> None:
    again = make_mixture(router, checkpointing=True)
    assert_same(run(again, LOUD, WHOLE), run(make_mixture(router), LOUD, WHOLE), rtol=1e-12)


def test_the_router_that_chose_gets_none_of_it_and_those_before_do() -> None:
    """With frozen experts: what the last mixer's router decides, no other mixer reads."""
    mixture = make_mixture()
    for _, parameter in mixture.expert_parameters():
        parameter.requires_grad_(False)
    value, gradients = run(mixture, ORTHOGONALITY, WHOLE, experts="frozen")
    routers = [name for name, _ in mixture.router_parameters()]
    last = next(name for name in reversed(routers) if "o_proj" in name)
    assert value > 0 and not gradients[last].any()
    assert all(gradients[name].any() for name in routers if name.startswith("model.layers.0"))
    assert not any(gradients[name].any() for name, _ in mixture.expert_parameters())
    wanted = Plain(mixture, (0.0, 1.0, 0.0)).run()
    assert_same((value, gradients), wanted)


def test_a_row_of_padding_alone_adds_nothing() -> None:
    """The fourth row's last half, by itself."""
    mixture = make_mixture()
    whole = draw_micro()
    assert not (whole.domain_ids[3, 3:] >= 0).any()
    config = Stage2Config(routing_loss=LOUD, rsl=RslConfig(ramp=0.0))
    stage = SoftStage(
        config,
        1,
        mixture,
        Routing(top_k=TOP_K),
        torch.device("cpu"),
        2,
        expert_lookup([0, 1], torch.device("cpu")),
    )
    ids, domains = whole.input_ids[3:, 3:], whole.domain_ids[3:, 3:]
    micro = MicroBatch(ids, domains, domains, domains, domains, 0, 0)
    stage.start_step(0, StepBatch([micro], torch.tensor([0, 0]), 0))
    loss, scale = stage.router_loss()
    with mixture.context.recording(stage.batch_routing(micro), None, loss, stage.output_loss()):
        mixture.model(input_ids=ids, use_cache=False)
    found = mixture.context.take_loss()
    assert found is not None and found.item() == 0.0
    (found * scale).backward()
    assert not any(g.isnan().any() or g.any() for g in gradients_of(mixture).values())


def test_encoder_and_decoder_each_count_their_own_tokens() -> None:
    """A mean over mixers of means over the tokens of each one's side: c where every token costs c."""
    mixture = attach_mixers(
        AutoModelForSeq2SeqLM.from_config(CONFIGS["t5"]()),
        MixerConfig("qv", EXPERTS, rank=2, router="per_block"),
    )
    config = Stage2Config(routing_loss=ORTHOGONALITY, rsl=RslConfig(ramp=0.0))
    nowhere = expert_lookup([0, 1], torch.device("cpu"))
    stage = SoftStage(config, 1, mixture, Routing(top_k=TOP_K), torch.device("cpu"), 2, nowhere)
    tokens = {"encoder": 14, "decoder": 6}
    stage.start_step(0, StepBatch([], torch.tensor([2, 3]), sum(tokens.values()), tokens["encoder"]))
    (_, scale), loss = stage.router_loss(), stage.output_loss()
    assert loss is not None and {*mixture.streams} == {"encoder", "decoder"}
    cost = sum(
        loss(lambda per_token, of=mixer.stream: torch.tensor(2.5 * tokens[of]), mixer.router_index).item()
        for mixer in mixture.mixers.values()
    )
    assert cost * scale == pytest.approx(2.5)
