"""A model that is loaded, or live in an engine, as lm-eval calls models. Imports lm-eval."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import nn

from dsmixer.evaluation.sharing import needs_company, world

BEFORE = ":"
"""Stands before a program while it is decoded."""


class LiveModel(HFLM):
    """lm-eval's own interface to transformers models, around one that is there already.

    Every rank of a run is asked the same, makes the same passes and gets the same answers, so that ranks
    that need each other inside a module (ZeRO-3, tokens that travel) stay in step.

    Args:
        model: a transformers model, routed by the caller; left in evaluation mode.
        tokenizer: the model's; a copy is used, because lm-eval may give it a padding token.
        batch_size: rows a forward pass.
        programs: names of the tasks whose answers go on in the middle of a program: they keep their leading
            blanks, which tokenizers made by SentencePiece take for the beginning of a text and drop.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch_size: int, programs: Collection[str] = ()
    ) -> None:
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._in_company = world()[1] > 1 and needs_company(model)
        self._silent = world()[0] != 0 or not sys.stderr.isatty()
        self._programs, self._goes_on = frozenset(programs), False

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._silent)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Programs by themselves: all other answers are decoded as lm-eval does, and score what it says."""
        answers = [""] * len(requests)
        for goes_on in (False, True):
            places = [
                place for place, one in enumerate(requests) if (one.task_name in self._programs) is goes_on
            ]
            if not places:
                continue
            self._goes_on = goes_on
            part = [requests[place] for place in places]
            texts = super().generate_until(part, disable_tqdm=disable_tqdm or self._silent)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        self._goes_on = False
        return answers

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        if self._goes_on and self.backend == "causal" and not isinstance(tokens, int):
            return self.continuation(tokens, skip_special_tokens)
        return super().tok_decode(tokens, skip_special_tokens)

    def continuation(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens that go on where another text ends.

        Args:
            tokens: ids.
            skip_special_tokens: leave those out.

        Returns:
            what the tokenizer decodes, with the blanks that it drops at the beginning of a text.
        """
        options: dict[str, Any] = {"skip_special_tokens": skip_special_tokens}
        before = self.tokenizer.encode(BEFORE, add_special_tokens=False)
        alone = str(self.tokenizer.decode(tokens, **options))
        whole = str(self.tokenizer.decode([*before, *tokens], **options))
        text = whole.removeprefix(str(self.tokenizer.decode(before, **options)))
        # else what stands before has changed more than blanks, such as bytes that are no letter by themselves
        return text if text.lstrip(" ") == alone.lstrip(" ") else alone

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        """A rank that is done goes on entering the modules until all are."""
        together = {"synced_gpus": True} if self._in_company else {}
        return super()._model_generate(*args, **options, **together)
