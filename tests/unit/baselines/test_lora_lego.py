"""LoRA-LEGO: an example where the clusters are plain to see, and its limit, PEFT's concatenation."""

from __future__ import annotations

import math

import pytest
import torch

from dsmixer.adapters.peft_format import LoraPair
from dsmixer.baselines.interface import Given
from dsmixer.baselines.lora_lego import LoraLego

EAST, NORTH = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
UP, DOWN = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0])


def pair(*pieces, scaling=1.0):
    """An expert from pieces of a row of A and a column of B."""
    return LoraPair(torch.stack([a for a, _ in pieces]), torch.stack([b for _, b in pieces], dim=1), scaling)


def products(a_kD, b_Ok):
    """The rank-one products of a LoRA, ordered, so that the order of clusters does not matter."""
    each = [torch.outer(b_O, a_D) for a_D, b_O in zip(a_kD, b_Ok.T, strict=True)]
    return torch.stack(sorted(each, key=lambda product: product.flatten().tolist()))


def test_pieces_of_two_kinds_become_two_centres():
    # two experts hold the same two pieces in another order, one of them a little off
    near = EAST + torch.tensor([0.0, 0.0, 0.2])
    experts = [pair((EAST, UP), (NORTH, DOWN)), pair((NORTH, DOWN), (near, UP))]
    a_kD, b_Ok = LoraLego(reweight_centres=False)._merge(experts, 2, seed=0)
    middle = torch.tensor([1.0, 0.0, 0.1])
    wanted = products(torch.stack([middle, NORTH]), torch.stack([UP, DOWN], dim=1))
    torch.testing.assert_close(products(a_kD, b_Ok), wanted)


def test_a_centre_gets_the_mean_length_of_its_members():
    left, right = EAST + 0.5 * NORTH, EAST - 0.5 * NORTH
    a_kD, b_Ok = LoraLego()._merge([pair((left, UP)), pair((right, UP))], 1, seed=0)
    # members are sqrt(1.25 + 1) long, their mean (EAST, UP) is sqrt(2) long
    longer = 1.5 / math.sqrt(2)
    torch.testing.assert_close(a_kD[0], longer * EAST)
    torch.testing.assert_close(b_Ok[:, 0], longer * UP)


def test_scales_are_inside_the_pieces():
    a_kD, b_Ok = LoraLego()._merge([pair((EAST, UP), scaling=4.0)], 1, seed=0)
    torch.testing.assert_close(b_Ok @ a_kD, 4.0 * torch.outer(UP, EAST))


def test_a_projection_that_few_pieces_are_on_is_filled_with_zeros():
    experts = [pair((EAST, UP)), pair((0 * EAST, 0 * UP))]
    a_kD, b_Ok = LoraLego(reweight_output=False)._merge(experts, 3, seed=0)
    assert a_kD.shape == (3, 3) and int(a_kD.any(1).sum()) == 1
    torch.testing.assert_close(b_Ok @ a_kD, torch.outer(UP, EAST))


def test_with_a_cluster_a_piece_it_is_the_experts_sum_as_pefts_cat_has_it(make_mixture, in_peft, logits_of):
    mixture = make_mixture(ranks={"sums": 2}, alphas={"spare": 3})
    fitted = LoraLego(rank=10, reweight_output=False, num_starts=1)(Given(mixture))
    peft_model, _ = in_peft(mixture)
    peft_model.add_weighted_adapter(list(mixture.expert_names), [1.0] * 3, "all", combination_type="cat")
    peft_model.set_adapter("all")
    found = logits_of(mixture.model, fitted.under(""))
    torch.testing.assert_close(found, logits_of(peft_model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "share"), [(1, math.sqrt(2)), (2, 1.0), (8, 0.5)])
def test_the_whole_is_weighted_by_the_root_of_the_ranks_ratio(rank, share):
    experts = [pair((EAST, UP), (NORTH, DOWN))]
    plain, weighted = (LoraLego(reweight_output=on)._merge(experts, rank, seed=0) for on in (False, True))
    torch.testing.assert_close(weighted[1] @ weighted[0], share * plain[1] @ plain[0])
