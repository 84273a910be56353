"""A loss on what single experts put out, summed block by block and made again, against a loop in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from dsmixer.experts.apart import Outputs, sum_apart
from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.dropout import Dropout
from dsmixer.experts.forms import auto_form, forms
from dsmixer.losses.aesl import AeslOrthogonalityLoss
from dsmixer.placement import activations

T, D, O, E, K = 9, 8, 12, 5, 3
MASK_T = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0, 1])
Tensor = torch.Tensor


def make_bank(dtype: torch.dtype = torch.float64, compute: str = "auto", num_experts: int = E) -> ExpertBank:
    """Of unlike ranks and scales; the last rows of the smaller experts only pad."""
    torch.manual_seed(0)
    ranks = [4, 2, 3, 1, 4, *[4] * num_experts][:num_experts]
    alphas = [8.0, 2, 6, 1, 4, *[8] * num_experts][:num_experts]
    bank = ExpertBank(
        [f"e{i}" for i in range(num_experts)], D, O, ranks=ranks, alphas=alphas, compute=compute
    )
    for e, rank in enumerate(ranks):
        bank.set_expert(e, torch.randn(rank, D), torch.randn(O, rank))
    return bank.to(dtype)


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x_TD = torch.randn(T, D, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    return x_TD, torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(T)])


def by_hand(bank: ExpertBank, x_TD: Tensor, indices_TK: Tensor, chosen_TK: Tensor, mask_T: Tensor) -> Tensor:
    """``sum_x sum_j sum_{k != j} |<o_j, o_k> / (<o_k, o_k> + 1e-6) o_k|^2``, one pair after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for x_D, experts, chosen, real in zip(x_TD, indices_TK, chosen_TK, mask_T, strict=True):
        outs = []
        for e in [int(e) for e, c in zip(experts, chosen, strict=True) if c]:
            scale = bank.alphas[e] / bank.ranks[e]
            outs.append(scale * (bank.lora_B[e].double().T @ (bank.lora_A[e].double() @ x_D)))
        for j, k in itertools.permutations(range(len(outs)), 2):
            along = outs[j] @ outs[k] / (outs[k] @ outs[k] + 1e-6) * outs[k]
            total = total + real.double() * (along @ along)
    return total


LOSS = AeslOrthogonalityLoss(weight=1.0).per_token


def gradients(value: Tensor, bank: ExpertBank, x_TD: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, (x_TD, bank.lora_A, bank.lora_B))


@pytest.mark.parametrize("compute", ["auto", "loop", "dense", "grouped"])
@pytest.mark.parametrize("block_elements", [1, 4 * 40 * K, 2**22])
def test_value_and_gradients_are_those_of_a_loop_over_pairs_however_the_tokens_are_cut(
    compute: str, block_elements: int
) -> None:
    bank, (x_TD, indices_TK) = make_bank(compute=compute), draw()
    form = auto_form if compute == "auto" else forms[compute]
    weights_TK = torch.full((T, K), 1 / K)
    pairs = Assignment(E, indices_TK=indices_TK, weights_TK=weights_TK)
    s_E = bank.scaling_on(x_TD.device)
    how = Outputs(form, block_elements=block_elements)
    found = sum_apart(x_TD, bank.lora_A, bank.lora_B, s_E, pairs, LOSS, MASK_T, how)
    wanted = by_hand(bank, x_TD, indices_TK, weights_TK > 0, MASK_T)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    for got, expected in zip(gradients(found, bank, x_TD), gradients(wanted, bank, x_TD), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)
        assert expected.any()


def test_pairs_without_an_expert_and_experts_of_weight_nought_do_not_enter() -> None:
    bank, (x_TD, indices_TK) = make_bank(), draw()
    weights_TK = torch.rand(T, K, generator=torch.Generator().manual_seed(2))
    weights_TK[1, 0] = 0.0
    indices_TK[3, 2], indices_TK[4] = -1, -1
    pairs = Assignment(E, indices_TK=indices_TK, weights_TK=weights_TK)
    found = bank.sum_apart(x_TD, pairs, None, LOSS, None)
    chosen_TK = (weights_TK > 0) & (indices_TK >= 0)
    torch.testing.assert_close(found, by_hand(bank, x_TD, indices_TK, chosen_TK, torch.ones(T)))
    (x_grad, *_) = gradients(found, bank, x_TD)
    assert not x_grad[4].any() and x_grad[3].any()


def test_a_full_gate_chooses_where_it_is_above_nought() -> None:
    bank, (x_TD, _) = make_bank(), draw()
    gate_TE = torch.relu(torch.randn(T, E, generator=torch.Generator().manual_seed(3)))
    found = bank.sum_apart(x_TD, Assignment(E, gate_TE=gate_TE), None, LOSS, MASK_T)
    everyone = torch.arange(E).expand(T, E)
    wanted = by_hand(bank, x_TD, everyone, gate_TE > 0, MASK_T)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


def test_dropout_is_that_of_the_input_that_the_experts_see() -> None:
    """One mask for all tokens, whatever the blocks, with its gradient."""
    bank, (x_TD, indices_TK) = make_bank(), draw()
    dropout = Dropout(0.4, seed=5)
    pairs = Assignment(E, indices_TK=indices_TK, weights_TK=torch.ones(T, K))
    s_E = bank.scaling_on(x_TD.device)
    how = Outputs(auto_form, dropout, block_elements=1)
    found = sum_apart(x_TD, bank.lora_A, bank.lora_B, s_E, pairs, LOSS, MASK_T, how)
    dropped_TD = x_TD * dropout.kept(x_TD) * dropout.scale
    wanted = by_hand(bank, dropped_TD, indices_TK, torch.ones(T, K) > 0, MASK_T)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    for got, expected in zip(gradients(found, bank, x_TD), gradients(wanted, bank, x_TD), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_nothing_is_kept_but_the_input_the_pairs_and_the_bank() -> None:
    bank, (x_TD, indices_TK) = make_bank(torch.float32), draw(torch.float32)
    weights_TK = torch.ones(T, K)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pairs = Assignment(E, indices_TK=indices_TK, weights_TK=weights_TK)
        value = bank.sum_apart(x_TD, pairs, None, LOSS, MASK_T)
    given = (x_TD, bank.lora_A, bank.lora_B, weights_TK, indices_TK, MASK_T, bank.scaling_on(x_TD.device))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in given}
    value.backward()
    assert bank.lora_A.grad is not None and bank.lora_A.grad.any()


def test_frozen_experts_leave_the_gradient_to_the_input_and_an_input_without_history_to_the_experts() -> None:
    bank, (x_TD, indices_TK) = make_bank(), draw()
    pairs = Assignment(E, indices_TK=indices_TK, weights_TK=torch.ones(T, K))
    expected = gradients(bank.sum_apart(x_TD, pairs, None, LOSS, MASK_T), bank, x_TD)
    bank.sum_apart(x_TD.detach(), pairs, None, LOSS, MASK_T).backward()
    torch.testing.assert_close((bank.lora_A.grad, bank.lora_B.grad), expected[1:], rtol=1e-12, atol=0)
    bank.requires_grad_(False).sum_apart(x_TD, pairs, None, LOSS, MASK_T).backward()
    torch.testing.assert_close(x_TD.grad, expected[0], rtol=1e-12, atol=0)
    assert not bank.sum_apart(x_TD.detach(), pairs, None, LOSS, MASK_T).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [E, 200])
def test_lower_precision_is_near_and_checkpointing_changes_no_bit(
    dtype: torch.dtype, num_experts: int
) -> None:
    """A pool of 200 takes the sorted form. The sum is float32 whatever the products are."""
    bank, (x_TD, indices_TK) = make_bank(torch.float32, num_experts=num_experts), draw(dtype)
    pairs = Assignment(num_experts, indices_TK=indices_TK, weights_TK=torch.ones(T, K))

    def run(x_TD: Tensor) -> Tensor:
        return bank.sum_apart(x_TD, pairs, None, LOSS, MASK_T)

    found, again = run(x_TD), checkpoint(run, x_TD, use_reentrant=False)
    assert found.dtype == torch.float32 and torch.equal(found, again)
    for one, two in zip(gradients(found, bank, x_TD), gradients(again, bank, x_TD), strict=True):
        assert torch.equal(one, two) and one.isfinite().all() and one.any()
    exact = by_hand(bank, x_TD.double(), indices_TK, torch.ones(T, K) > 0, MASK_T)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5 if dtype == torch.float32 else 0.05)


def test_no_token_costs_nothing_and_has_gradients_of_nought() -> None:
    bank = make_bank()
    x_TD = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    nobody = torch.zeros(0, K, dtype=torch.int64)
    pairs = Assignment(E, indices_TK=nobody, weights_TK=torch.zeros(0, K))
    value = bank.sum_apart(x_TD, pairs, None, LOSS, None)
    assert value.item() == 0.0 and not any(g.any() for g in gradients(value, bank, x_TD))


def test_memory_is_that_of_a_block_which_the_plan_counts() -> None:
    """64 blocks take as much as one: no more than inputs of pairs, outputs and gradients of one."""
    assert Outputs(auto_form).block_elements == activations.OUTPUT_ELEMENTS
    torch.manual_seed(0)
    width, tokens, block_elements = 64, 4096, 2**12 * K
    bank = ExpertBank("abcde", width, width, ranks=[8] * E, alphas=[8.0] * E)
    x_TD = torch.randn(tokens, width)
    indices_TK = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    pairs = Assignment(E, indices_TK=indices_TK, weights_TK=torch.ones(tokens, K))
    how = Outputs(forms["grouped"], block_elements=block_elements)
    s_E = bank.scaling_on(x_TD.device)
    with LiveBytes() as live:
        sum_apart(x_TD, bank.lora_A, bank.lora_B, s_E, pairs, LOSS, None, how).backward()
    banks = 3 * 2 * 4 * bank.lora_A.numel()
    of_block = block_elements * (4 * 4 + 3 * 4)
    print(live.peak, banks, of_block, 4 * tokens * K * width)
    assert live.peak < banks + 1.5 * of_block < 4 * tokens * K * width
