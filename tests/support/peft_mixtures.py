"""Settings of a small mixture that PEFT makes, and experts that say something."""

from __future__ import annotations

from typing import Any

import torch

from dsmixer.model.inject import Mixture

SETTINGS: dict[str, Any] = {
    "targets": ["q", "k", "v", "o"],
    "experts": ["law", "chess", "go"],
    "rank": 4,
    "alpha": 8,
    "ranks": {"go": 6},
    "router_std": 0.3,
    "top_k": 2,
    "task_type": "CAUSAL_LM",
}


@torch.no_grad()
def stir(mixture: Mixture) -> None:
    """Give all experts an output; rows that only pad a rank stay zero."""
    generator = torch.Generator().manual_seed(7)
    for mixer in mixture.mixers.values():
        for e, rank in enumerate(mixer.bank.ranks):
            mixer.bank.lora_B[e, :rank].normal_(0.0, 0.3, generator=generator)
