"""The token loss against transformers' own, and the weights that make sums into each expert's mean."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.losses.task import per_expert_weights, shift_labels, token_losses


def test_shift_gives_each_position_the_next_token() -> None:
    labels = torch.tensor([[-100, 5, 6, -100]])
    assert shift_labels(labels).tolist() == [[5, 6, -100, -100]]


def test_mean_over_targets_equals_transformers_loss() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 17, (3, 6))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[2, 4:] = -100
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    losses = token_losses(out.logits, labels)
    num_targets = (shift_labels(labels) != -100).sum()
    torch.testing.assert_close(losses.sum() / num_targets, out.loss)
    assert not losses[shift_labels(labels) == -100].any()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1, 2, 3, 4]])
    assert token_losses(logits, labels).dtype == torch.float32
    torch.testing.assert_close(
        token_losses(logits, labels).double(), token_losses(logits.double(), labels), rtol=1e-5, atol=1e-5
    )


def test_weighted_sum_is_the_sum_of_each_experts_own_mean() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 99.0]])
    expert_ids = torch.tensor([[0, 0, 2], [2, 2, -1]])
    weights = per_expert_weights(expert_ids, torch.tensor([2, 0, 3]))
    expected = (1.0 + 2.0) / 2 + (3.0 + 10.0 + 20.0) / 3
    torch.testing.assert_close((losses * weights).sum(), torch.tensor(expected))
    assert weights[1, 2] == 0 and torch.isfinite(weights).all()
