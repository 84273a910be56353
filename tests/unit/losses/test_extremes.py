"""Every loss of the registry where its formula ends: no NaN, and a gradient of 0 where there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dsmixer.losses.balance import routing_losses
from dsmixer.losses.interface import Extras
from dsmixer.losses.preserve import add_preserve
from dsmixer.losses.terms import RoutingTerms, published
from dsmixer.routing.modes import Routing, modes
from dsmixer.routing.router import Router
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics

Tensor = torch.Tensor
NAMES = list(routing_losses)
USAGE_FROM = ["previous_step", "micro_batch"]


def build(name: str, usage_from: str, **settings: Any) -> Any:
    fields = {f.name for f in dataclasses.fields(routing_losses[name])}  # type: ignore[arg-type]
    chosen = {"usage_from": usage_from} if "usage_from" in fields else {}
    return routing_losses[name](**chosen, **settings)


def value_and_gradients(
    loss: Any,
    logits_TE: Tensor,
    *,
    top_k: int = 2,
    mode: str = "topk",
    mask_T: Tensor | None = None,
    outputs_TKO: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in the logits and in the experts' outputs, 0 where there is no path."""
    logits_TE = logits_TE.detach().requires_grad_()
    p_TE = logits_TE.softmax(1)
    num_tokens, num_experts = p_TE.shape
    choice = modes[mode](p_TE, Routing(mode=mode, top_k=min(top_k, num_experts)))
    if outputs_TKO is None:
        outputs_TKO = torch.randn(*choice.indices_TK.shape, 6, generator=torch.Generator().manual_seed(0))
    outputs_TKO = outputs_TKO.to(p_TE.dtype).detach().requires_grad_()
    extras = Extras(torch.arange(num_tokens) % num_experts, outputs_TKO)
    usage_E = torch.full((num_experts,), 1 / num_experts, dtype=p_TE.dtype)
    value = loss(RouterOutput(logits_TE, p_TE, choice, mask_T), usage_E, 1.0, extras)
    found = torch.autograd.grad(value, (logits_TE, outputs_TKO), allow_unused=True, materialize_grads=True)
    assert value.isfinite() and all(g.isfinite().all() for g in found)
    return value.detach(), found[0], found[1]


def draw(num_tokens: int, num_experts: int, size: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(num_tokens)
    return size * torch.randn(num_tokens, num_experts, generator=rng)


@pytest.mark.parametrize("usage_from", USAGE_FROM)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [50.0, 1e4, 1e8])
def test_huge_logits(name: str, usage_from: str, size: float) -> None:
    """All but one p of a token are exactly 0, and what is learned of them is finite."""
    logits_TE = draw(7, 5, size)
    logits_TE[0] = torch.tensor([size, size, -size, -size, -size])
    value_and_gradients(build(name, usage_from), logits_TE)


@pytest.mark.parametrize("usage_from", USAGE_FROM)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", list(modes))
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (1, 4), (4, 1), (3, 4)])
def test_few_tokens_few_experts_and_all_of_them_chosen(
    name: str, usage_from: str, mode: str, num_tokens: int, num_experts: int
) -> None:
    """K = E in every mode. With one expert p = 1, and only z-loss has anything to say."""
    logits_TE = draw(num_tokens, num_experts)
    _, gradient, _ = value_and_gradients(build(name, usage_from), logits_TE, top_k=num_experts, mode=mode)
    if num_experts == 1 and name != "z":
        # what float32 leaves of x - x, at the weight of the loss
        assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("usage_from", USAGE_FROM)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", list(modes))
def test_a_micro_batch_without_a_real_token_in_every_mode(name: str, usage_from: str, mode: str) -> None:
    """Its padding may be anything: here logits of 1e4 and outputs of 1e3."""
    logits_TE = draw(4, 3, 1e4)
    outputs = 1e3 * torch.ones(4, 3 if mode == "top_p" else 2, 6)
    found = value_and_gradients(
        build(name, usage_from), logits_TE, mode=mode, mask_T=torch.zeros(4), outputs_TKO=outputs
    )
    assert not any(part.any() for part in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("usage_from", USAGE_FROM)
def test_no_token_at_all(name: str, usage_from: str) -> None:
    value, *_ = value_and_gradients(build(name, usage_from), torch.zeros(0, 4))
    assert value.item() == 0.0


@pytest.mark.parametrize("method", list(published))
def test_a_step_without_a_real_token_leaves_even_usages_for_the_next(method: str) -> None:
    """What a step of padding counts is nothing, so that the step after begins as the first one does."""
    terms = RoutingTerms(published[method])
    statistics = RoutingStatistics(2, 4, smooth_temperature=terms.smooth_temperature)
    logits_TE = draw(5, 4)
    p_TE = logits_TE.softmax(1)
    choice = modes["topk"](p_TE, Routing(top_k=2))
    statistics.record(0, RouterOutput(logits_TE, p_TE, choice, torch.zeros(5)), None)
    assert torch.equal(terms.next_usage(statistics), terms.first_usage(2, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("usage_from", USAGE_FROM)
def test_a_bfloat16_model_has_the_loss_of_its_logits_in_float32(name: str, usage_from: str) -> None:
    """The router's product is rounded, all after it is float32, and the gradient reaches its weights."""
    torch.manual_seed(0)
    router = Router(4, 16)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(9, 16).bfloat16()
    logits_TE = router(x_TD)
    assert logits_TE.dtype == torch.float32
    loss = build(name, usage_from)
    value, gradient, pulled = value_and_gradients(loss, logits_TE)
    exact, wanted, pulled_64 = value_and_gradients(loss, logits_TE.double())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(pulled.double(), pulled_64, rtol=1e-3, atol=1e-6)
    logits_TE.backward(gradient)
    assert router.weight.grad is not None and router.weight.grad.isfinite().all()


ALONG = {
    "all zero": [[0.0, 0], [0, 0], [0, 0]],
    "one zero": [[0.0, 0], [1, 2], [3, 4]],
    "the same": [[1.0, 2], [1, 2], [1, 2]],
    "opposite": [[1.0, 2], [-1, -2], [2, 4]],
    "nearly the same": [[1.0, 2], [1, 2.0001], [1.0001, 2]],
    "tiny": [[1e-12, 0], [1e-12, 1e-12], [0, 1e-12]],
    "large": [[1e6, 0], [1e6, 1e6], [0, 1e6]],
}


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("case", list(ALONG))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_have_no_direction_or_all_the_same(form: str, case: str, dtype: torch.dtype) -> None:
    """No projection is longer than what is projected; the paper adds up K - 1 of them, the code has one."""
    loss = build("aesl_orthogonality", "previous_step", weight=1.0, form=form)
    outputs = torch.tensor([ALONG[case]], dtype=dtype)
    value, _, gradient = value_and_gradients(
        loss, torch.zeros(1, 3, dtype=dtype), top_k=3, outputs_TKO=outputs
    )
    whole = outputs.square().sum().item() * (2 if form == "paper" else 1 / 3)
    assert -1e-6 * whole <= value.item() <= whole * (1 + 1e-5)
    if case == "all zero":
        assert value.item() == 0.0 and not gradient.any()
    if case in ("the same", "opposite"):
        assert value.item() == pytest.approx(whole, rel=1e-4)


def test_preserve_by_hand() -> None:
    """(3, 1) from (1, 2) at beta 1/2: (4 + 1) / 2, pulled by 2 * 1/2 * (2, -1); the second is not held."""
    weights, origin = torch.tensor([[3.0, 1.0], [9.0, 9.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    gradient = torch.zeros(2, 2)
    value = add_preserve(gradient, weights, origin, torch.tensor([[0.5], [0.0]]))
    assert gradient.tolist() == [[2.0, -1.0], [0.0, 0.0]] and value.tolist() == [2.5, 0.0]
