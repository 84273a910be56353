"""The token loss against transformers' own, and the weights that make sums into each expert's mean."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.losses import task
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_give_the_losses_and_gradients_of_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through float64; the last block is a shorter one."""
    monkeypatch.setattr(task, "BLOCK_ELEMENTS", 3 * 50)
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 4, 50, generator=draw)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = torch.randint(0, 50, (2, 4), generator=draw)
    labels[0, :2] = -100
    weights = torch.rand(2, 4, generator=draw)
    found, expected = token_losses(logits, labels), token_losses(exact, labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad is not None and exact.grad is not None and logits.grad.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert (logits.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


class LargestTensor(TorchDispatchMode):
    """The most bytes that one operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *(t.numel() * t.element_size() for t in made)])
        return out


def test_no_float32_copy_of_the_logits_is_made_or_kept() -> None:
    """Of bfloat16 logits larger than a block: nothing is made in the size of tokens x vocabulary x 4."""
    rows, vocabulary = 64, task.BLOCK_ELEMENTS // 4
    assert rows * vocabulary > task.BLOCK_ELEMENTS
    logits = torch.zeros(1, rows, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = token_losses(logits, torch.zeros(1, rows, dtype=torch.int64))
        losses.sum().backward()
    assert kept.pop(logits.untyped_storage().data_ptr()) == 2 * rows * vocabulary
    assert sum(kept.values()) < 64 * rows
    assert largest.bytes == 2 * rows * vocabulary, "the logits' gradient, in their own type"


def test_the_first_loss_of_a_process_writes_nothing_to_standard_output() -> None:
    """Commands print JSON there, and deepspeed, which knows the loss, a warning when it is imported."""
    program = (
        "import torch; from dsmixer.losses.task import token_losses;"
        "token_losses(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
