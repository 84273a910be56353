"""The frozen base alone: forward, and the gradient to its inputs, which adapters in all layers need."""

from __future__ import annotations

import torch

from tests.bench.case import Case
from tests.bench.decoding import Decoding
from tests.bench.systems.interface import Built
from tests.bench.systems.llama import random_llama, step_ids
from tests.bench.systems.training import mean_loss


def build(case: Case) -> Built:
    """Nothing trains; the norm is that of the gradient to what the embedding puts out."""
    model = random_llama(case)
    if case.what == "decode":
        return Built(0, decode_token=Decoding(model, case.rows, case.sequence, case.device).next_token)
    loss_of, kept = mean_loss(model.train()), []

    def remember(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        kept.append(output.requires_grad_(True))
        output.retain_grad()

    model.get_input_embeddings().register_forward_hook(remember)

    def train_step(step: int) -> tuple[float, float]:
        loss = loss_of(step_ids(case, step))
        loss.backward()
        gradient = kept.pop().grad
        return float(loss.detach()), float(gradient.norm())

    return Built(0, train_step)
