"""Tokens that are only to be answered skip the choice between forms, and get the same sums."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.few import MAX_PAIRS, ServedBank
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.routing.constant import ConstantWeights
from dsmixer.routing.context import BatchRouting, RoutingContext
from dsmixer.routing.modes import Routing
from dsmixer.routing.router import Router
from dsmixer.routing.statistics import RoutingStatistics

D, O, K = 24, 16, 3
RANKS = (8, 4)


def mixer(num_experts: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> MixedLinear:
    """Experts of unlike ranks and scales beside a projection, all of one dtype."""
    torch.manual_seed(seed)
    ranks = [RANKS[e % 2] for e in range(num_experts)]
    bank = ExpertBank(
        [f"e{e}" for e in range(num_experts)], D, O, ranks=ranks, alphas=[4.0 + e for e in range(num_experts)]
    )
    for e, rank in enumerate(ranks):
        bank.set_expert(e, torch.randn(rank, D), torch.randn(O, rank))
    router = Router(num_experts, D)
    nn.init.normal_(router.weight)
    context = RoutingContext(num_experts, Routing(top_k=K))
    return MixedLinear(nn.Linear(D, O), bank, router, router_index=0, context=context).to(dtype)


def written_out(mixed: MixedLinear, x: torch.Tensor) -> torch.Tensor:
    """The mixer's sum in float64, of the experts that its router puts first in the dtype it runs in."""
    x_TD, bank = x.reshape(-1, D), mixed.bank
    logits_TK, chosen_TK = nn.functional.linear(x_TD, mixed.router.weight).float().topk(K, dim=1)
    weights_TK = logits_TK.double().softmax(1) * torch.tensor(bank.scaling, dtype=torch.float64)[chosen_TK]
    a_TKRD, b_TKRO = bank.lora_A.double()[chosen_TK], bank.lora_B.double()[chosen_TK]
    y_TO = nn.functional.linear(x_TD.double(), mixed.base.weight.double(), mixed.base.bias.double())
    sum_TO = torch.einsum("tk,tkrd,tkro,td->to", weights_TK, a_TKRD, b_TKRO, x_TD.double())
    return (y_TO + sum_TO).view(*x.shape[:-1], O)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call that was served without the forms."""
    calls: list[int] = []
    add = ServedBank.add

    def counted(self: ServedBank, y_TO: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(y_TO))
        return add(self, y_TO, *rest)

    monkeypatch.setattr(ServedBank, "add", counted)
    return calls


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("num_experts", [3, 6, 64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (4, 2)])
@torch.no_grad()
def test_a_few_tokens_get_the_sum_written_out_in_float64(
    shape: tuple[int, int], num_experts: int, dtype: torch.dtype, tolerance: float, served: list[int]
) -> None:
    mixed = mixer(num_experts, dtype)
    x = torch.randn(*shape, D, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = written_out(mixed, x)
    for _ in range(2):  # nothing is left of the first call in the second
        y = mixed(x)
        assert y.dtype == dtype and y.shape == (*shape, O)
        assert (y.double() - expected).norm() <= tolerance * expected.norm()
    num_tokens = shape[0] * shape[1]
    assert num_experts < 64 or served == [num_tokens] * 2, "in a small pool one wide product may be cheaper"


@torch.no_grad()
def test_weights_that_change_are_seen(served: list[int]) -> None:
    mixed, other = mixer(64), mixer(64, seed=1)
    x = torch.randn(1, 1, D)
    mixed(x)
    mixed.load_state_dict(other.state_dict())
    assert torch.allclose(mixed(x).double(), written_out(other, x), rtol=1e-4, atol=1e-4)
    third = mixer(64, seed=2)
    for name in ("lora_A", "lora_B"):
        getattr(mixed.bank, name).data = getattr(third.bank, name).data.clone()
    mixed.router.weight.data = third.router.weight.data
    mixed.base.load_state_dict(third.base.state_dict())
    assert torch.allclose(mixed(x).double(), written_out(third, x), rtol=1e-4, atol=1e-4)
    mixed.to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    assert (mixed(x).double() - written_out(mixed, x)).norm() <= 3e-2 * written_out(mixed, x).norm()
    assert len(served) == 4


def test_after_inference_mode_it_trains(served: list[int]) -> None:
    mixed = mixer(64)
    x = torch.randn(1, 1, D)
    with torch.inference_mode():
        mixed(x)
    with torch.no_grad():
        mixed(x)
    assert len(served) == 2
    mixed(x).sum().backward()
    assert len(served) == 2 and mixed.bank.lora_A.grad is not None and mixed.router.weight.grad is not None


@pytest.mark.parametrize(
    "routing",
    [Routing("soft"), Routing("hard_soft"), Routing("topk", renormalize=False), Routing("topk", rows=(-1,))],
)
@torch.no_grad()
def test_other_routings_go_the_way_of_the_forms(routing: Routing, served: list[int]) -> None:
    mixed = mixer(64)
    with mixed.context.routed(routing):
        mixed(torch.randn(1, 1, D))
    assert served == []


@torch.no_grad()
def test_whoever_looks_on_sees_every_token(served: list[int]) -> None:
    mixed, statistics = mixer(64), RoutingStatistics(1, 64)
    batch = BatchRouting(mask_T=torch.ones(1))
    with mixed.context.recording(batch, statistics):
        mixed(torch.randn(1, 1, D))
    assert served == []
    mixed(torch.randn(1, MAX_PAIRS // K + 1, D))
    assert served == [], "many tokens are the other forms'"
    mixed(torch.randn(1, 1, D))
    assert served == [1]


@torch.no_grad()
def test_no_token_is_no_token(served: list[int]) -> None:
    assert mixer(64)(torch.zeros(0, D)).shape == (0, O) and mixer(64)(torch.zeros(0, 3, D)).shape == (0, 3, O)


@torch.no_grad()
def test_dropout_is_drawn_for_a_few_tokens_too(served: list[int]) -> None:
    mixed = mixer(64)
    mixed.dropout = 0.9
    x = torch.randn(1, 1, D)
    torch.manual_seed(0)
    assert len({tuple(mixed(x).flatten().tolist()) for _ in range(4)}) == 4 and served == []
    mixed.eval()
    assert torch.allclose(mixed(x).double(), written_out(mixed, x), rtol=1e-4, atol=1e-4) and served == [1]


@torch.no_grad()
def test_hooks_see_what_base_and_experts_put_out(served: list[int]) -> None:
    mixed, seen = mixer(64), []
    x = torch.randn(1, 1, D)
    expected = mixed(x)
    for module in (mixed.base, mixed.bank):
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.allclose(mixed(x), expected, rtol=1e-5, atol=1e-5)
    base, experts = seen
    assert torch.equal(base, nn.functional.linear(x, mixed.base.weight, mixed.base.bias)), "untouched"
    assert torch.allclose(base + experts.view_as(base), expected, rtol=1e-5, atol=1e-5) and served == [1]


@torch.no_grad()
def test_a_hooked_router_another_weight_and_autocast_are_seen(served: list[int]) -> None:
    mixed, other = mixer(64), mixer(64, seed=1)
    x = torch.randn(1, 1, D)
    mixed(x)
    mixed.bank.lora_A, mixed.bank.lora_B = (
        other.bank.lora_A,
        other.bank.lora_B,
    )  # other parameters, not values
    mixed.router.weight = other.router.weight
    mixed.base.load_state_dict(other.base.state_dict())
    assert torch.allclose(mixed(x).double(), written_out(other, x), rtol=1e-4, atol=1e-4) and len(served) == 2
    with torch.autocast("cpu", torch.bfloat16):
        mixed(x)
    seen: list[torch.Tensor] = []
    handle = mixed.router.register_forward_hook(lambda module, args, output: seen.append(output))
    mixed(x)
    assert len(seen) == 1 and len(served) == 2, "neither is answered by the short way"
    handle.remove()
    mixed(x)
    assert len(served) == 3


@torch.no_grad()
def test_a_copied_model_answers_with_its_own_weights(served: list[int]) -> None:
    mixed = mixer(64)
    x = torch.randn(1, 1, D)
    before = mixed(x)
    copied = copy.deepcopy(mixed)
    copied.bank.lora_B.zero_()
    assert mixed(x).equal(before)
    assert torch.allclose(copied(x), nn.functional.linear(x, mixed.base.weight, mixed.base.bias))
    assert len(served) == 3


def answer(mixed: MixedLinear, x: torch.Tensor) -> torch.Tensor:
    """What the forms put out, where nothing is served."""
    with torch.enable_grad():
        return mixed(x).detach()


@torch.no_grad()
def test_a_mixer_whose_parts_were_exchanged_answers_with_the_new_ones(served: list[int]) -> None:
    mixed, other, x = mixer(64), mixer(64, seed=1), torch.randn(1, 1, D)
    mixed(x)
    weights = torch.full((1, 64), 1 / 64)
    own, mixed._outside = mixed._outside, (ConstantWeights(weights), mixed.router)
    assert torch.allclose(mixed(x), answer(mixed, x), atol=1e-5), "every expert weighs the same"
    mixed._outside = own
    mixed(x)
    mixed.bank = other.bank
    assert torch.allclose(mixed(x), answer(mixed, x), atol=1e-5)
    mixed.base = other.base
    assert torch.allclose(mixed(x), answer(mixed, x), atol=1e-5)
    before = len(served)
    mixed.bank.compute = "loop"
    assert torch.allclose(mixed(x), answer(mixed, x), atol=1e-5) and len(served) == before


@torch.no_grad()
def test_what_a_hook_kept_is_not_altered() -> None:
    mixed, x, kept = mixer(64), torch.randn(1, 1, D), []
    mixed(x)
    base = mixed.base
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, y: kept.append((y, y.clone())) if module is base else None
    )
    try:
        mixed(x)
    finally:
        handle.remove()
    assert len(kept) == 1 and torch.equal(*kept[0])


@torch.no_grad()
def test_weights_that_are_no_parameters_go_the_way_of_the_forms(served: list[int]) -> None:
    mixed, x = mixer(64), torch.randn(1, 1, D)
    doubled = {"bank.lora_B": 2 * mixed.bank.lora_B}
    for _ in range(2):
        before = len(served)
        y, plain = torch.func.functional_call(mixed, doubled, (x,)), mixed.base(x)
        assert len(served) == before
        assert torch.allclose(y - plain, 2 * (mixed(x) - plain), atol=1e-4)
    assert len(served) == 2


@torch.no_grad()
def test_weights_that_were_moved_are_not_held_on_to() -> None:
    mixed = mixer(64)
    mixed(torch.randn(1, 1, D))
    old = weakref.ref(mixed.bank.lora_A.untyped_storage())
    mixed.to(torch.bfloat16)
    gc.collect()
    assert old() is None and mixed._served is None
