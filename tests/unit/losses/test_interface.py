"""What holds for every loss of the registry: it is its published formula, whatever the layout of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dsmixer.losses.balance import routing_losses
from dsmixer.losses.interface import Extras
from dsmixer.losses.usage import micro_batch_usage
from dsmixer.routing.modes import Routing, modes
from dsmixer.routing.statistics import RouterOutput

TOP_K, NUM_EXPERTS, WIDTH = 2, 4, 5
REAL = [True, True, False, True, True, True, False, True]
Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Tokens with labels and with what every expert would put out; ``order`` renames the experts."""

    logits_TE: Tensor
    labels_T: Tensor
    outputs_TEO: Tensor
    mask_T: Tensor | None

    def output(self, mode: str = "topk") -> RouterOutput:
        p_TE = torch.softmax(self.logits_TE, dim=1)
        routing = Routing(mode=mode, top_k=min(TOP_K, p_TE.shape[1]))
        return RouterOutput(self.logits_TE, p_TE, modes[mode](p_TE, routing), self.mask_T)

    def extras(self, output: RouterOutput) -> Extras:
        chosen_TK1 = output.choice.indices_TK[..., None]
        return Extras(self.labels_T, self.outputs_TEO.take_along_dim(chosen_TK1, 1))

    def take(self, rows: Any) -> Drawn:
        mask_T = None if self.mask_T is None else self.mask_T[rows]
        return Drawn(self.logits_TE[rows], self.labels_T[rows], self.outputs_TEO[rows], mask_T)

    def renamed(self, order: Tensor) -> Drawn:
        labels_T = torch.where(self.labels_T < 0, -1, order.argsort()[self.labels_T.clamp_min(0)])
        return Drawn(self.logits_TE[:, order], labels_T, self.outputs_TEO[:, order], self.mask_T)


def draw(num_tokens: int = 8, num_experts: int = NUM_EXPERTS, masked: bool = True, seed: int = 0) -> Drawn:
    rng = torch.Generator().manual_seed(seed)
    logits_TE = 1.5 * torch.randn(num_tokens, num_experts, generator=rng, dtype=torch.float64)
    labels_T = torch.arange(num_tokens) % (num_experts + 1) - 1
    outputs_TEO = torch.randn(num_tokens, num_experts, WIDTH, generator=rng, dtype=torch.float64)
    mask_T = torch.tensor(REAL[:num_tokens], dtype=torch.float32) if masked else None
    return Drawn(logits_TE.requires_grad_(), labels_T, outputs_TEO.requires_grad_(), mask_T)


# the published formulas as a mean over the tokens of one batch, in plain torch: p [n, E] of n real tokens
def top_counts(p: Tensor, k: int) -> Tensor:
    best = p.argsort(1, descending=True)[:, :k]
    return torch.stack([(best == i).double().sum() / len(p) for i in range(p.shape[1])])


def top_weights(p: Tensor, k: int) -> Tensor:
    kept = torch.where(p >= p.sort(1, descending=True).values[:, k - 1 : k], p, torch.zeros_like(p))
    return (kept / kept.sum(1, keepdim=True)).mean(0)


def target(masses: list[float]) -> Tensor:
    q = torch.tensor(masses, dtype=torch.float64)
    return (q / q.sum()).sort(descending=True).values


POISSON = target([1.5**i / math.factorial(i) for i in range(1, NUM_EXPERTS + 1)])
NORMAL = target([math.exp(-((i - 2.0) ** 2) / 8.0) for i in range(1, NUM_EXPERTS + 1)])


def divergence(q: Tensor, p: Tensor, form: str) -> Tensor:
    ratio = q * torch.log(q / p.sort(-1, descending=True).values)
    return (ratio.abs() if form == "code" else ratio).sum(-1)


def pairs(o: Tensor, epsilon: float = 1e-6) -> Tensor:
    total = torch.zeros((), dtype=o.dtype)
    for token in o:
        for j in range(len(token)):
            for k in set(range(len(token))) - {j}:
                along = (token[j] @ token[k]) / (token[k] @ token[k] + epsilon) * token[k]
                total = total + along @ along
    return total / len(o)


def spans(o: Tensor) -> Tensor:
    """With two experts, the span of the others is the other one."""
    return pairs(o, 0.0) / 2


def shannon(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def multiclass_hinge(z: Tensor, y: Tensor) -> Tensor:
    """All rows train: the token's own logit against the best of the others."""
    costs = [
        torch.relu(1 + max(z[t, j] for j in range(z.shape[1]) if j != y[t]) - z[t, y[t]])
        for t in range(len(y))
        if y[t] >= 0
    ]
    return torch.stack(costs).sum() / len(y)


Plain = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# (name, settings): the formula of (logits, p, labels, outputs)
CASES: dict[str, tuple[str, dict[str, Any], Plain]] = {
    "rsl": (
        "rsl",
        {"usage": "top1"},
        lambda z, p, y, o: 0.1 * p.mean(0) @ top_counts(p, 1) + 0.05 * shannon(p).mean(),
    ),
    "switch": ("switch", {}, lambda z, p, y, o: 0.01 * 4 * p.mean(0) @ top_counts(p, 1)),
    "auxiliary": ("auxiliary", {}, lambda z, p, y, o: 0.1 * p.mean(0) @ top_counts(p, 1)),
    "mixlora": ("mixlora", {}, lambda z, p, y, o: 0.01 * 4 * p.mean(0) @ top_counts(p, TOP_K)),
    "quadratic": ("quadratic", {}, lambda z, p, y, o: 0.1 * p.mean(0).square().sum()),
    "z": ("z", {}, lambda z, p, y, o: 1e-3 * z.exp().sum(1).log().square().mean()),
    "tsallis": ("tsallis", {}, lambda z, p, y, o: 0.01 * ((1 - (p**1.4).sum(1)) / 0.4).mean()),
    "mutual_information": (
        "mutual_information",
        {},
        lambda z, p, y, o: 4e-4 * (shannon(p).mean() - shannon(p.mean(0))),
    ),
    "mole": (
        "mole",
        {"smooth_temperature": 0.5},
        lambda z, p, y, o: -0.5 * (z / 0.5).softmax(1).mean(0).prod().log(),
    ),
    "gmoe_poisson": ("gmoe_poisson", {}, lambda z, p, y, o: 0.005 * divergence(POISSON, p, "paper").mean()),
    "gmoe_poisson code": (
        "gmoe_poisson",
        {"form": "code"},
        lambda z, p, y, o: 0.005 * divergence(POISSON, p, "code").mean(),
    ),
    "gmoe_normal": (
        "gmoe_normal",
        {},
        lambda z, p, y, o: 8 * divergence(NORMAL, top_weights(p, TOP_K), "paper"),
    ),
    "gmoe_normal code": (
        "gmoe_normal",
        {"form": "code"},
        lambda z, p, y, o: 8 * divergence(NORMAL, top_weights(p, TOP_K), "code"),
    ),
    "aesl_orthogonality": ("aesl_orthogonality", {}, lambda z, p, y, o: 1e-3 * pairs(o)),
    "aesl_orthogonality code": (
        "aesl_orthogonality",
        {"form": "code", "epsilon": 0.0},
        lambda z, p, y, o: 1e-3 * spans(o),
    ),
    "aesl_variance": (
        "aesl_variance",
        {},
        lambda z, p, y, o: -1e-4 * (p - p.mean(0)).square().mean(0).sum(),
    ),
    "aesl_variance experts": (
        "aesl_variance",
        {"over": "experts"},
        lambda z, p, y, o: -1e-4 * (p - 0.25).square().mean(),
    ),
    "supervised_gate": (
        "supervised_gate",
        {},
        lambda z, p, y, o: 50 * -(p[range(len(y)), y].log() * (y >= 0)).mean(),
    ),
    "supervised_margin": ("supervised_margin", {}, lambda z, p, y, o: 50 * multiclass_hinge(z, y)),
}

PARAMETERS = list(CASES)


def build(case: str, usage_from: str) -> Any:
    name, settings, _ = CASES[case]
    fields = {f.name for f in dataclasses.fields(routing_losses[name])}  # type: ignore[arg-type]
    chosen = {"usage_from": usage_from} if "usage_from" in fields else {}
    return routing_losses[name](**settings, **chosen)


def apply(loss: Any, drawn: Drawn, usage_E: Tensor, ramp: float = 1.0) -> Tensor:
    output = drawn.output()
    return loss(output, usage_E, ramp, drawn.extras(output))


def usage_of(loss: Any, drawn: Drawn) -> Tensor:
    return micro_batch_usage(drawn.output(), loss.usage, loss.smooth_temperature)


def gradients(value: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
    leaves = (drawn.logits_TE, drawn.outputs_TEO)
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return found[0], found[1]


def uneven() -> Tensor:
    return torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def plainly(case: str, drawn: Drawn) -> Tensor:
    """The formula on the real tokens alone, times their number."""
    real_T = torch.ones(len(drawn.logits_TE)).bool() if drawn.mask_T is None else drawn.mask_T.bool()
    kept = drawn.take(real_T)
    p_TE = kept.logits_TE.softmax(1)
    best_TK = p_TE.argsort(1, descending=True)[:, :TOP_K]
    outputs = torch.stack([o[best] for o, best in zip(kept.outputs_TEO, best_TK, strict=True)])
    return CASES[case][2](kept.logits_TE, p_TE, kept.labels_T, outputs) * int(real_T.sum())


def test_every_loss_of_the_registry_has_its_published_formula_here() -> None:
    assert {name for name, _, _ in CASES.values()} == set(routing_losses)


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("usage_from", ["previous_step", "micro_batch"])
def test_value_and_gradient_are_autograds_of_the_published_formula(case: str, usage_from: str) -> None:
    """With padding; the form of the step before is asked at a mean that does not move."""
    drawn, loss = draw(), build(case, usage_from)
    nowhere = torch.full((NUM_EXPERTS,), math.nan, dtype=torch.float64)
    found = apply(loss, drawn, nowhere if usage_from == "micro_batch" else usage_of(loss, drawn))
    expected = plainly(case, drawn)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    both = gradients(found, drawn)
    for got, wanted in zip(both, gradients(expected, drawn), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-11)
        assert not got[torch.tensor(REAL).logical_not()].any(), "padding"
    assert both[0].any() or both[1].any()


@pytest.mark.parametrize("case", PARAMETERS)
def test_the_step_before_makes_it_a_sum_over_tokens_in_any_layout(case: str) -> None:
    """Micro-batches of 1, 5 and 2 rows give the sum and the gradients of one batch, at a foreign mean too."""
    drawn, loss = draw(), build(case, "previous_step")
    whole = apply(loss, drawn, uneven())
    rows = (slice(0, 1), slice(1, 6), slice(6, 8))
    parts = sum((apply(loss, drawn.take(part), uneven()) for part in rows), torch.zeros(()))
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-15)
    for got, wanted in zip(gradients(parts, drawn), gradients(whole, drawn), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("usage_from", ["previous_step", "micro_batch"])
def test_names_of_experts_do_not_matter(case: str, usage_from: str) -> None:
    drawn, loss = draw(), build(case, usage_from)
    order = torch.tensor([2, 0, 3, 1])
    renamed = apply(loss, drawn.renamed(order), uneven()[order])
    torch.testing.assert_close(apply(loss, drawn, uneven()), renamed, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", PARAMETERS)
def test_the_ramp_multiplies_the_whole_loss(case: str) -> None:
    drawn, loss = draw(), build(case, "previous_step")
    at_half, at_zero = (apply(loss, drawn, uneven(), ramp) for ramp in (0.5, 0.0))
    torch.testing.assert_close(2 * at_half, apply(loss, drawn, uneven()), rtol=1e-12, atol=1e-15)
    assert at_zero.item() == 0.0


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("usage_from", ["previous_step", "micro_batch"])
def test_a_micro_batch_of_padding_costs_and_pulls_nothing(case: str, usage_from: str) -> None:
    drawn = dataclasses.replace(draw(), mask_T=torch.zeros(8))
    value = apply(build(case, usage_from), drawn, uneven())
    assert value.item() == 0.0
    assert not any(g.isnan().any() or g.any() for g in gradients(value, drawn))


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("usage_from", ["previous_step", "micro_batch"])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (1, 4), (3, 1)])
def test_one_token_and_one_expert_are_finite(
    case: str, usage_from: str, num_tokens: int, num_experts: int
) -> None:
    """A single expert is always chosen with p = 1: but for z-loss and outputs, nothing is left to learn."""
    drawn = draw(num_tokens, num_experts, masked=False)
    usage_E = torch.full((num_experts,), 1.0 / num_experts, dtype=torch.float64)
    value = apply(build(case, usage_from), drawn, usage_E)
    found = gradients(value, drawn)
    assert value.isfinite() and all(g.isfinite().all() for g in found)
    if num_experts == 1:
        assert found[1].abs().max() < 1e-12, "no other output to be orthogonal to"
        assert case == "z" or found[0].abs().max() < 1e-9


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("usage_from", ["previous_step", "micro_batch"])
def test_certain_float32_routers_and_unused_experts_are_finite(case: str, usage_from: str) -> None:
    """p is exactly 0 in three places a token, and no token ever chose the experts 2 and 3."""
    logits_TE = torch.tensor([[200.0, 0, -1, -2], [0, 300.0, -1, -2]]).requires_grad_()
    drawn = Drawn(logits_TE, torch.tensor([0, 1]), torch.zeros(2, 4, WIDTH, requires_grad=True), None)
    for usage_E in (torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.full((4,), 0.25)):
        value = apply(build(case, usage_from), drawn, usage_E)
        assert value.dtype == torch.float32 and value.isfinite()
        assert all(g.isfinite().all() for g in gradients(value, drawn))


@pytest.mark.parametrize("mode", list(modes))
@pytest.mark.parametrize("case", PARAMETERS)
def test_every_routing_mode_can_be_trained_with_it(case: str, mode: str) -> None:
    drawn, loss = draw(), build(case, "previous_step")
    output = drawn.output(mode)
    extras = drawn.extras(output)
    found = gradients(loss(output, uneven(), 1.0, extras), drawn)
    assert all(g.isfinite().all() for g in found)
    moved = found[1] if "outputs_TKO" in loss.needs else found[0]
    assert moved.any()


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("usage_from", ["previous_step", "micro_batch"])
def test_activation_checkpointing_changes_nothing(case: str, usage_from: str) -> None:
    """What runs again has to save the same tensors, or torch refuses."""
    drawn, loss = draw(), build(case, usage_from)

    def run(logits_TE: Tensor, outputs_TEO: Tensor) -> Tensor:
        again = dataclasses.replace(drawn, logits_TE=logits_TE, outputs_TEO=outputs_TEO)
        return apply(loss, again, uneven())

    value = checkpoint(run, drawn.logits_TE, drawn.outputs_TEO, use_reentrant=False)
    value.backward()
    wanted = gradients(apply(loss, drawn, uneven()), drawn)
    for leaf, gradient in zip((drawn.logits_TE, drawn.outputs_TEO), wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, gradient)


@pytest.mark.parametrize("name", list(routing_losses))
def test_a_section_of_a_recipe_can_be_made_from_the_dataclass(name: str) -> None:
    """Frozen, a default for every field, and types that pydantic checks."""
    made: Any = routing_losses[name]
    assert made.__dataclass_params__.frozen
    adapter = pydantic.TypeAdapter(made)
    assert adapter.validate_python({}) == made()
    for field in dataclasses.fields(made):
        assert field.default is not dataclasses.MISSING
        with pytest.raises(pydantic.ValidationError):
            adapter.validate_python({field.name: "nonsense"})
