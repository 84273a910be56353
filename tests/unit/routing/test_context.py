"""The routing context: what is recorded, what is shared, and what is forgotten."""

from __future__ import annotations

import pytest
import torch

from dsmixer.routing.context import BatchRouting, RoutingContext
from dsmixer.routing.modes import Routing
from dsmixer.routing.router import Router
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics


def make(mode: str = "topk") -> tuple[RoutingContext, Router]:
    router = Router(4, 6)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return RoutingContext(4, Routing(mode=mode, top_k=2)), router


def tokens(num: int = 5) -> torch.Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(1))


def logit_sum(output: RouterOutput, index: int) -> torch.Tensor:
    return output.token_sum(output.logits_TE).sum() * (index + 1)


def test_projections_that_read_the_same_memory_are_routed_and_counted_once() -> None:
    context, router = make()
    x = tokens()
    statistics = RoutingStatistics(1, 4)
    with context.recording(BatchRouting(), statistics, logit_sum):
        first = context.assign(router, 0, x, shared_input=x)
        assert context.assign(router, 0, x, shared_input=x) is first
    assert statistics.tokens_M.item() == 5
    loss = context.take_loss()
    assert loss is not None
    torch.testing.assert_close(loss, (x @ router.weight.T).sum())
    assert context.take_loss() is None


def test_input_that_is_flattened_by_a_copy_is_still_shared() -> None:
    context, router = make()
    x = torch.randn(3, 2, 6).transpose(0, 1)
    first = context.assign(router, 0, x.reshape(-1, 6), shared_input=x)
    assert context.assign(router, 0, x.reshape(-1, 6), shared_input=x) is first


@pytest.mark.parametrize("change", ["memory", "contents", "router", "view", "routing", "grad mode"])
def test_another_input_is_routed_anew(change: str) -> None:
    context, router = make()
    x = tokens()
    first = context.assign(router, 0, x, shared_input=x)
    index = 0
    if change == "memory":
        x = x.clone()
    elif change == "contents":
        x.add_(1.0)
    elif change == "router":
        index = 1
    elif change == "view":
        x = x[:3]
    elif change == "routing":
        context.routing = Routing(mode="topk", top_k=3)
    with torch.set_grad_enabled(change != "grad mode"):
        again = context.assign(router, index, x, shared_input=x)
    assert again is not first
    assert again.indices_TK is not None and again.indices_TK.shape[0] == x.shape[0]


def test_sharing_works_in_inference_mode() -> None:
    context, router = make()
    with torch.inference_mode():
        x = tokens()
        first = context.assign(router, 0, x, shared_input=x)
        assert context.assign(router, 0, x, shared_input=x) is first


def test_losses_and_statistics_are_taken_only_inside_recording() -> None:
    context, router = make()
    statistics = RoutingStatistics(1, 4)
    batch = BatchRouting(mask_T=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]))
    with context.recording(batch, statistics, logit_sum):
        context.assign(router, 0, tokens())
    context.assign(router, 0, tokens())
    assert statistics.tokens_M.item() == 3
    loss = context.take_loss()
    assert loss is not None
    torch.testing.assert_close(loss, (tokens() @ router.weight.T)[[0, 1, 3]].sum())


def test_clear_ends_the_batch_and_its_losses() -> None:
    context, router = make()
    with context.recording(BatchRouting(mask_T=torch.ones(5)), None, logit_sum):
        context.assign(router, 0, tokens())
    context.clear()
    # a pass over another number of tokens would trip over the old mask
    context.assign(router, 0, tokens(3))


def test_hard_routing_follows_the_batchs_expert_ids() -> None:
    context, router = make()
    context.routing = Routing(mode="hard")
    ids = torch.tensor([3, -1, 0, 2, 2])
    with context.recording(BatchRouting(expert_ids_T=ids)):
        gate_TE = context.assign(router, 0, tokens()).as_gate()
    expected = torch.zeros(5, 4)
    for t, expert in enumerate(ids.tolist()):
        if expert >= 0:
            expected[t, expert] = 1.0
    assert torch.equal(gate_TE, expected)


def test_each_stream_of_tokens_has_its_own_ids_and_mask() -> None:
    """The encoder's five and the decoder's three, in turns, as layers that are run again would ask."""
    context, router = make()
    read, written = torch.tensor([3, -1, 0, 2, 2]), torch.tensor([1, 1, -1])
    batch = BatchRouting(expert_ids_T=written, encoder=BatchRouting(expert_ids_T=read))
    with context.routed(Routing(mode="hard")), context.recording(batch):
        for _ in range(2):
            for stream, ids in (("encoder", read), ("decoder", written)):
                gate_TE = context.assign(router, 0, tokens(len(ids)), stream=stream).as_gate()
                chosen = torch.where(gate_TE.sum(1) > 0, gate_TE.argmax(1), -1)
                assert torch.equal(chosen, ids)
    statistics = RoutingStatistics(2, 4)
    masks = {"encoder": torch.tensor([1.0, 0, 1, 1, 1]), "decoder": torch.tensor([1.0, 1, 0])}
    batch = BatchRouting(mask_T=masks["decoder"], encoder=BatchRouting(mask_T=masks["encoder"]))
    with context.recording(batch, statistics):
        context.assign(router, 0, tokens(5), stream="encoder")
        context.assign(router, 1, tokens(3))
    assert statistics.tokens_M.tolist() == [4.0, 2.0]


def test_uniform_hears_all_alike_and_the_routing_returns_afterwards() -> None:
    context, router = make()
    with context.routed(Routing(mode="uniform")):
        assert torch.equal(context.assign(router, 0, tokens()).as_gate(), torch.full((5, 4), 0.25))
    assert context.routing.mode == "topk"
    with pytest.raises(RuntimeError, match="inside"), context.routed(Routing(mode="none")):
        raise RuntimeError("inside")
    assert context.routing.mode == "topk"
