"""A model with its prompt read, that puts out one token after the other, greedily, with the cache on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

FIRST_ID, LAST_ID = 3, 100


def prompt(rows: int, tokens: int, device: str = "cpu") -> torch.Tensor:
    """The same for every system, int64 ``[rows, tokens]``."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_ID, LAST_ID, (rows, tokens), generator=draw).to(device)


class Decoding:
    """A transformers model, ``next_token`` after ``next_token``."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, rows: int, prompt_tokens: int, device: str = "cpu") -> None:
        self.model, self.cache = model.eval(), DynamicCache()
        self.ids = self._next(prompt(rows, prompt_tokens, device))

    @torch.no_grad()
    def next_token(self) -> None:
        """One token for each row."""
        self.ids = self._next(self.ids)

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        out: Any = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)
