"""A model that is loaded, or live in an engine, as lm-eval calls models. Imports lm-eval."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import nn

from dsmixer.evaluation.sharing import needs_company, world


class LiveModel(HFLM):
    """lm-eval's own interface to transformers models, around one that is there already.

    Every rank of a run is asked the same, makes the same passes and gets the same answers, so that ranks
    that need each other inside a module (ZeRO-3, tokens that travel) stay in step.

    Args:
        model: a transformers model, routed by the caller; left in evaluation mode.
        tokenizer: the model's; a copy is used, because lm-eval may give it a padding token.
        batch_size: rows a forward pass.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._in_company = world()[1] > 1 and needs_company(model)
        self._silent = world()[0] != 0 or not sys.stderr.isatty()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._silent)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self._silent)

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        """A rank that is done goes on entering the modules until all are."""
        together = {"synced_gpus": True} if self._in_company else {}
        return super()._model_generate(*args, **options, **together)
