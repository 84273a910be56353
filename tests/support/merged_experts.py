"""Stage one as separate trainings of transformers' own model with ``W0 + s B A`` in the place of its weights.

An oracle for projections that PEFT refuses or whose calls a model passes over: it changes no module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from dsmixer.model.inject import Mixture
from support.comparing import Tensors
from support.oracles import PeftExperts, plain_base


class Merged(nn.Module):
    """A frozen model that computes with one expert's product added to its weights.

    Args:
        base: transformers' model.
        matrices: A ``[R, D]`` and B ``[R, O]`` by the path of their projection.
        scaling: s.
    """

    def __init__(
        self, base: Any, matrices: dict[str, tuple[torch.Tensor, torch.Tensor]], scaling: float
    ) -> None:
        super().__init__()
        self._base, self.scaling = [base.requires_grad_(False)], scaling
        self.pairs = nn.ModuleDict(
            {
                path.replace(".", "/"): nn.ParameterList([A.clone(), B.clone()])
                for path, (A, B) in matrices.items()
            }
        )

    @property
    def config(self) -> Any:
        return self._base[0].config

    def forward(self, **inputs: torch.Tensor) -> Any:
        base = self._base[0].train()
        weights = {}
        for path, (A, B) in self.pairs.items():
            name = path.replace("/", ".") + ".weight"
            weights[name] = base.get_parameter(name) + self.scaling * (A.T @ B).T
        return functional_call(base, weights, (), inputs)


class MergedExperts(PeftExperts):
    """One such training a domain; clip, rate and AdamW as in the trainings with PEFT."""

    def _model(self, start: Mixture, expert: int, kind: str) -> Any:
        mixer = self.steps.loaded.recipe.mixer
        matrices = {
            path: (bank.lora_A[expert, : self.rank].detach(), bank.lora_B[expert, : self.rank].detach())
            for path, bank in ((path, start.mixers[path].bank) for path in self.paths)
        }
        return Merged(plain_base(self.steps.loaded.recipe.base), matrices, mixer.alpha / mixer.rank)

    def weights(self, like: Tensors) -> Tensors:
        """The experts as stacked banks, padded with zero rows."""
        stacked = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        for e, model in enumerate(self.models):
            for path, (A, B) in model.pairs.items():
                own = path.replace("/", ".")
                stacked[f"{own}.bank.lora_A"][e, : self.rank] = A.detach()
                stacked[f"{own}.bank.lora_B"][e, : self.rank] = B.detach()
        return stacked
