"""Which form is taken where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.blocked import BlockedPairs
from dsmixer.experts.choice import MEASURED, FormTable, choose_form, suits_blocks
from dsmixer.experts.forms import forms
from dsmixer.experts.pairs import sort_pairs

CPU = MEASURED.costs["cpu"]


def pairs(num_tokens: int, num_experts: int, top_k: int, among: int | None = None) -> Assignment:
    odds_E = torch.zeros(num_experts)
    odds_E[:among] = 1.0
    rng = torch.Generator().manual_seed(0)
    indices_TK = torch.multinomial(odds_E.expand(num_tokens, -1), top_k, generator=rng)
    return Assignment(num_experts, indices_TK=indices_TK, weights_TK=torch.ones(num_tokens, top_k))


@pytest.mark.parametrize(
    ("dtype", "width", "tokens", "experts", "rank", "top_k", "among", "expected"),
    [
        (torch.float32, 2048, 1024, 6, 64, 3, None, "pairs"),
        (torch.float32, 2048, 1024, 6, 64, 1, None, "pairs"),
        (torch.float32, 1024, 128, 6, 64, 3, None, "pairs"),
        (torch.float32, 1024, 32, 6, 64, 3, None, "dense"),
        (torch.bfloat16, 2048, 1024, 6, 64, 3, None, "dense"),
        (torch.bfloat16, 2048, 1024, 16, 64, 3, None, "pairs"),
        (torch.float32, 2048, 1024, 196, 16, 3, None, "pairs"),
        (torch.float32, 2048, 1024, 196, 16, 1, 2, "dense"),
        (torch.float64, 2048, 1024, 196, 16, 3, None, "pairs"),
    ],
)
def test_the_form_that_the_table_finds_cheapest(
    dtype: torch.dtype,
    width: int,
    tokens: int,
    experts: int,
    rank: int,
    top_k: int,
    among: int | None,
    expected: str,
) -> None:
    x_TD = torch.empty(tokens, width, dtype=dtype)
    assert choose_form(x_TD, rank, pairs(tokens, experts, top_k, among)) == expected


def test_a_gate_over_all_experts_is_one_wide_product() -> None:
    gate = Assignment(196, gate_TE=torch.full((64, 196), 1 / 196))
    assert choose_form(torch.empty(64, 2048), 16, gate) == "dense"


def test_blocks_for_even_loads_and_for_short_ones_rows_of_their_own_for_skewed_ones() -> None:
    even = torch.arange(600).view(200, 3) % 6
    skewed = torch.where(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.8, 0, even)
    assert suits_blocks(sort_pairs(even, 6), 64, CPU)
    assert not suits_blocks(sort_pairs(skewed, 6), 64, CPU)
    assert suits_blocks(sort_pairs(skewed[:4], 6), 8, CPU), "so few rows that no product costs much"
    assert not suits_blocks(replace(sort_pairs(even, 6), seen=False), 64, CPU), "nothing is looked at"


def test_a_bank_does_as_its_own_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens by a table that never takes the wide product and never blocks, and by one that does."""
    bank = ExpertBank("abcd", 16, 16, ranks=[8] * 4, alphas=[8.0] * 4)
    with torch.no_grad():
        for weights in (bank.lora_A, bank.lora_B):
            weights.normal_(generator=torch.Generator().manual_seed(1))
    x_TD, assignment = torch.randn(64, 16, generator=torch.Generator().manual_seed(2)), pairs(64, 4, 2)
    never = replace(CPU, rank=0, row=0, call=0, filled=2.0, short=0, fused=0)
    tables = {
        "dense": FormTable({"cpu": replace(CPU, always=1e9)}),
        "grouped": FormTable({"cpu": never}),
        "blocked": FormTable({"cpu": replace(never, filled=0.0)}),
        "fused": FormTable({"cpu": replace(never, fused=1e9)}),
    }
    blocked: list[int] = []
    products = BlockedPairs.of_tokens
    monkeypatch.setattr(
        BlockedPairs, "of_tokens", lambda own, *rest: blocked.append(1) or products(own, *rest)
    )
    for name, table in tables.items():
        bank.table = table
        before = len(blocked)
        y_TO = bank(x_TD, assignment)
        taken = len(blocked) - before
        assert y_TO.equal(
            forms[name](x_TD, bank.lora_A, bank.lora_B, bank.scaling_on(x_TD.device), assignment)
        )
        assert (taken > 0) == (name == "blocked")


def test_a_table_goes_through_json() -> None:
    assert FormTable.from_json(MEASURED.to_json()) == MEASURED


def test_a_table_from_before_the_kernels_of_the_host_never_takes_them() -> None:
    before = {key: value for key, value in vars(CPU).items() if key != "fused"}
    assert FormTable.from_json({"cpu": before}).costs["cpu"] == replace(CPU, fused=0)


@pytest.mark.parametrize(
    "value", [[], {"cpu": 3}, {"cpu": {"rank": 1}}, {"cpu": {**vars(CPU), "row": "many"}}]
)
def test_what_is_no_table_is_told(value: object) -> None:
    with pytest.raises(ValueError, match="it is no table|wants a number"):
        FormTable.from_json(value)
