"""Tokens that travel between four real gloo processes come to what one pool on one rank says, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import exchange_ranks
from support.exchange_ranks import (
    CASES,
    EXPERTS,
    FOUR,
    IN,
    OUT,
    RANKS,
    ROUTERS,
    Case,
    bank_of,
    inputs,
    run_case,
)
from support.launching import launch

from dsmixer.placement.exchange import LocalExchange

COUNT_BYTES, PAIR_BYTES, VALUE_BYTES = 8, 4, 8  # int64, float32, float64
LAYERS, PROJECTIONS = 2, 4
# a dispatch sends counts, pairs and inputs; a combine sends outputs
DISPATCH_CALLS, COMBINE_CALLS = 3, 1

pytestmark = pytest.mark.timeout(900)  # the launch counts for the first test


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by case."""
    folder = tmp_path_factory.mktemp("exchange")
    launch(Path(exchange_ranks.__file__), [str(folder)], ranks=RANKS).check()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def whole_pool(case: Case, rank: int) -> dict[str, torch.Tensor]:
    """One rank with all experts: the plain loop."""
    return run_case(case, rank, bank_of(tuple(range(EXPERTS)), "loop"), LocalExchange())


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_of_tokens_are_those_of_the_whole_pool(
    name: str, found: list[dict[str, Any]]
) -> None:
    for rank in range(RANKS):
        got, want = found[rank][name], whole_pool(CASES[name], rank)
        torch.testing.assert_close(got["y"], want["y"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got["x"], want["x"], rtol=1e-12, atol=1e-12)
        # their gradients come back as float32, too
        torch.testing.assert_close(got["weights"], want["weights"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_group_s_banks_have_the_gradients_that_its_ranks_have_together(
    name: str, found: list[dict[str, Any]]
) -> None:
    case = CASES[name]
    for first in range(0, RANKS, len(case.owned)):
        group = case.group_of(first)
        alone = [whole_pool(case, rank) for rank in group]
        for matrix in ("A", "B"):
            want = torch.stack([gradients[matrix] for gradients in alone]).sum(0)
            got = torch.full_like(want, torch.nan)
            for rank, experts in zip(group, case.owned, strict=True):
                got[list(experts)] = found[rank][name][matrix]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_cases_are_what_their_names_say() -> None:
    """Each unusual case has what makes it so, and gradients are nowhere zero by accident."""
    chosen = {name: pairs_of(case) for name, case in CASES.items() if case.top_k is not None}
    assert chosen["a-rank-with-tokens-for-nobody"][2].eq(-1).all()
    assert torch.cat(chosen["a-rank-with-tokens-for-nobody"]).ge(0).any()
    assert chosen["a-rank-without-tokens"][1].shape[0] == 0
    assert not torch.cat(chosen["an-expert-nobody-chose"]).eq(1).any() and FOUR[2] == (1,)
    assert torch.cat(chosen["all-to-one-expert"]).eq(4).all()
    assert torch.cat(chosen["nobody-asks-anybody"]).eq(-1).all()
    for name in ("ep4-k3", "ep2-k3", "absent-pairs"):
        assert set(torch.cat(chosen[name]).flatten().tolist()) >= set(range(EXPERTS))
        assert all(gradient.abs().sum() > 0 for gradient in whole_pool(CASES[name], 0).values())


def pairs_of(case: Case) -> list[torch.Tensor]:
    """Experts of the tokens of each rank."""
    indices = [inputs(case, rank).indices_TK for rank in range(RANKS)]
    return [indices_TK for indices_TK in indices if indices_TK is not None]


@pytest.mark.parametrize("name", CASES)
def test_one_copy_of_a_token_goes_to_each_rank_that_holds_one_of_its_experts(
    name: str, found: list[dict[str, Any]]
) -> None:
    """Bytes to each destination, message by message, from the assignment alone."""
    case = CASES[name]
    pairs = 2 * (case.top_k or EXPERTS) * PAIR_BYTES
    for rank in range(RANKS):
        group = case.group_of(rank)
        out = [copies(case, rank, owner) for owner in range(len(group))]
        back = [copies(case, other, rank - group.start) for other in group]
        assert found[rank][name]["calls"] == [
            [COUNT_BYTES] * len(group),
            [n * pairs for n in out],
            [n * IN * VALUE_BYTES for n in out],
            [n * OUT * VALUE_BYTES for n in back],
            # the backward pass sends each message's gradient the other way, the last one first
            [n * OUT * VALUE_BYTES for n in out],
            [n * IN * VALUE_BYTES for n in back],
            [n * pairs for n in back],
        ]


def copies(case: Case, rank: int, owner: int) -> int:
    """Tokens of a rank with at least one expert at ``owner``, a rank of its group."""
    indices_TK = inputs(case, rank).indices_TK
    if indices_TK is None:
        return case.tokens[rank]
    held = set(case.owned[owner])
    return sum(not held.isdisjoint(experts) for experts in indices_TK.tolist())


@pytest.mark.parametrize("router", ROUTERS)
def test_a_model_with_its_experts_spread_is_the_model_with_all_of_them(
    router: str, found: list[dict[str, Any]]
) -> None:
    """Gradients of pairs are rounded to float32 on their way back, and reach everything below a router."""
    here = [rank[router]["here"] for rank in found]
    spread = [rank[router]["spread"] for rank in found]
    for one, other in zip(here, spread, strict=True):
        torch.testing.assert_close(other["logits"], one["logits"], rtol=1e-10, atol=1e-10)
    for name, whole in here[0]["grads"].items():
        if ".bank." not in name:
            for one, other in zip(here, spread, strict=True):
                assert one["grads"][name].abs().max() > 0
                close(other["grads"][name], one["grads"][name])
            continue
        want = torch.stack([one["grads"][name] for one in here]).sum(0)
        got = torch.full_like(whole, torch.nan)
        for experts, other in zip(FOUR, spread, strict=True):
            got[list(experts)] = other["grads"][name]
        assert (want.flatten(1).abs().amax(1) > 0).all(), "an expert without a gradient shows nothing"
        close(got, want)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for what float32 rounds, against the largest element."""
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-6 * want.abs().max().item())


def test_a_router_for_q_k_and_v_needs_one_dispatch_for_them(found: list[dict[str, Any]]) -> None:
    for rank in found:
        calls = {router: rank[router]["spread"]["forward_calls"] for router in ROUTERS}
        assert rank["per_block"]["here"]["forward_calls"] == 0
        assert calls["per_projection"] == LAYERS * PROJECTIONS * (DISPATCH_CALLS + COMBINE_CALLS)
        # q, k, v share one; o has its own
        assert calls["per_block"] == LAYERS * (2 * DISPATCH_CALLS + PROJECTIONS * COMBINE_CALLS)
