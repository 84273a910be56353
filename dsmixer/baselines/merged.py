"""One LoRA made of all experts: the methods that work on weights.

Shapes: E experts, D input width, O output width, R_e rank of an expert, R of the merged LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from dsmixer.adapters.module_names import base_module_names, shortest_names
from dsmixer.adapters.peft_format import LoraPair, write_adapter
from dsmixer.baselines.adding import Delta, adding, lora_delta
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture
from dsmixer.model.streams import is_encoder_decoder


@dataclass(frozen=True)
class Merged:
    """A LoRA on a mixture's projections: ``B A x``, its scale inside B.

    Attributes:
        matrices: by module path, A ``[R, D]`` and B ``[O, R]``, float32.
    """

    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def rank(self) -> int:
        """R, the same on every projection."""
        (rank,) = {a_RD.shape[0] for a_RD, _ in self.matrices.values()}
        return rank

    def deltas(self) -> dict[str, Delta]:
        """What it adds to each projection."""
        return {path: lora_delta(*pair) for path, pair in self.matrices.items()}

    def under(self, mixture: Mixture) -> AbstractContextManager[None]:
        """Under it the model is its base with this LoRA."""
        return adding(mixture.model, self.deltas())


def pairs_of(mixture: Mixture, path: str) -> list[LoraPair]:
    """Each expert on one projection, at its own rank, detached."""
    bank = mixture.mixers[path].bank
    return [
        LoraPair(a_RD[:rank].detach(), b_RO[:rank].detach().T, scaling)
        for a_RD, b_RO, rank, scaling in zip(bank.lora_A, bank.lora_B, bank.ranks, bank.scaling, strict=True)
    ]


def concatenated(mixture: Mixture, weights: Sequence[float]) -> Merged:
    """``sum_e w_e s_e B_e A_e`` exactly, of rank ``sum_e R_e``: PEFT's ``combination_type="cat"``."""
    matrices = {}
    for path in mixture.mixers:
        pairs = pairs_of(mixture, path)
        scaled = [pair.b_OR * (w * pair.scaling) for w, pair in zip(weights, pairs, strict=True)]
        matrices[path] = torch.cat([pair.a_RD for pair in pairs]), torch.cat(scaled, dim=1)
    return Merged(matrices)


def factor_sum(mixture: Mixture, weights: Sequence[float]) -> Merged:
    """``A = sum_e w_e sqrt(s_e) A_e`` and ``B = sum_e w_e sqrt(s_e) B_e``: the cross terms ``B_i A_j`` stay.

    With weights that are not negative this is PEFT's ``combination_type="linear"`` with the squares of the
    weights.

    Raises:
        UserError: the ranks differ. Row r of one expert meets row r of the others in the cross terms; padding
            would choose for the user which rows meet none, and neither PEFT nor LoraHub has a rule for it.
    """
    ranks = mixture.config.rank_list
    if len(set(ranks)) > 1:
        raise UserError(
            f"the experts have ranks {', '.join(map(str, ranks))}, and matrices are added here one by one",
            fix="use uniform, which averages products, or experts of one rank",
        )
    matrices = {}
    for path in mixture.mixers:
        pairs = pairs_of(mixture, path)
        shares = [w * math.sqrt(pair.scaling) for w, pair in zip(weights, pairs, strict=True)]
        a_RD = torch.stack([share * pair.a_RD for share, pair in zip(shares, pairs, strict=True)]).sum(0)
        b_OR = torch.stack([share * pair.b_OR for share, pair in zip(shares, pairs, strict=True)]).sum(0)
        matrices[path] = a_RD, b_OR
    return Merged(matrices)


def write_merged(
    merged: Merged, mixture: Mixture, folder: Path, *, base: str | None = None, revision: str | None = None
) -> None:
    """Write the LoRA as a plain PEFT adapter folder, for anyone to use.

    Args:
        folder: made here; must not exist.
        base: name or path of the base model; for the reader only.

    Raises:
        UserError: a matrix is not finite.
    """
    bases = [mixture.mixers[path].base for path in merged.matrices]
    # a packed layer has forgotten, but for this, that it lay the other way round
    conv1d = [issubclass(getattr(module, "source_cls", type(module)), Conv1D) for module in bases]
    write_adapter(
        folder,
        merged.matrices,
        rank=merged.rank,
        alpha=merged.rank,
        targets=shortest_names(merged.matrices.keys(), base_module_names(mixture.model)),
        fan_in_fan_out=all(conv1d),
        base=base,
        revision=revision,
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(mixture.model.config) else "CAUSAL_LM",
    )
