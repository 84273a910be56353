"""Exact match of greedily written answers.

Writing stops for a row as soon as its text can no longer become the expected one, which saves a weak
model from writing to the limit and changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from dsmixer.evaluation.scoring import Row, row_of
from dsmixer.evaluation.sharing import batches_of, dealt, device_of, needs_company, summed, world
from dsmixer.evaluation.sheet import Sheet
from dsmixer.model.streams import decoder_start, is_encoder_decoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for the first bytes of a letter


@torch.no_grad()
def match_rows(
    model: Any,
    tokenizer: Any,
    sheet: Sheet,
    rows: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    pad_token_id: int,
    tick: Callable[[], None] | None = None,
) -> dict[int, bool]:
    """Whether the model, as it is routed now, writes each row's completion itself.

    Args:
        model: in evaluation mode; called by every rank, with the same rows.
        rows: rows of examples without choices.
        max_new_tokens: longest answer, in tokens.

    Returns:
        by row, the same on every rank: whether the greedy text equals the completion, blanks around both
        and special tokens aside.
    """
    device, store = device_of(model), sheet.store
    matched_M = torch.zeros(len(store), dtype=torch.int64)
    # under ZeRO-3 a rank that is done has to go on entering the modules until all are
    synced = needs_company(model) and world()[1] > 1
    for batch in dealt(batches_of(rows, store.target_starts.tolist(), batch_size)):
        prompts = [store.input_ids(row)[: store.target_starts[row]].tolist() for row in batch]
        wanted = [
            _text(tokenizer, store.input_ids(row)[store.target_starts[row] :].tolist()) for row in batch
        ]
        written = _write(
            model,
            tokenizer,
            prompts or [[pad_token_id]],
            wanted or [""],
            device,
            max_new_tokens,
            pad_token_id,
            synced,
        )
        for row, text, want in zip(batch, written, wanted, strict=False):
            matched_M[row] = int(text == want)
        if tick is not None:
            tick()
    total_M = summed(matched_M, device)
    return {row: bool(total_M[row]) for row in rows}


def exact_match_rows(
    sheet: Sheet, matched: dict[int, bool], method: str, domains: Collection[int]
) -> list[Row]:
    """``exact_match`` of each domain that has examples without choices."""
    found = []
    for domain in domains:
        hits = [matched[row] for row in sheet.free_rows([domain])]
        if hits:
            found.append(
                row_of(sheet.domains[domain], method, "exact_match", sum(hits) / len(hits), len(hits))
            )
    return found


def _write(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    wanted: list[str],
    device: torch.device,
    max_new_tokens: int,
    pad_token_id: int,
    synced: bool,
) -> list[str]:
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int):
        prompts = [prompt[-(limit - 1) :] for prompt in prompts]
        max_new_tokens = min(max_new_tokens, limit - max(len(prompt) for prompt in prompts))
    given = padded_prompts(model, prompts, pad_token_id, device)
    output = model.generate(
        given.input_ids,
        attention_mask=given.attention_mask,
        generation_config=greedy_config(model, tokenizer, max_new_tokens, pad_token_id),
        stopping_criteria=StoppingCriteriaList([_StillPossible(tokenizer, wanted, given.written_from)]),
        synced_gpus=synced,
    )
    return [_text(tokenizer, row[given.written_from :].tolist()) for row in output]


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts as ``generate`` takes them.

    Attributes:
        input_ids: int64 ``[B, S]``.
        attention_mask: int64 ``[B, S]``.
        written_from: the column of ``generate``'s output at which what was written begins.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    written_from: int


def padded_prompts(
    model: Any, prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> PaddedPrompts:
    """Prompts of unlike lengths as one batch for ``generate``.

    A decoder alone goes on from the last column of every row: padding is on the left. An encoder is padded on
    the right, as in training, and the output holds what the decoder wrote behind its start token.
    """
    encoder = is_encoder_decoder(model.config)
    width = max(len(prompt) for prompt in prompts)
    ids, mask = [], []
    for prompt in prompts:
        padding, real = [pad_token_id] * (width - len(prompt)), [1] * len(prompt)
        unseen = [0] * len(padding)
        ids.append([*prompt, *padding] if encoder else [*padding, *prompt])
        mask.append([*real, *unseen] if encoder else [*unseen, *real])
    as_ids, as_mask = (torch.tensor(rows, device=device) for rows in (ids, mask))
    return PaddedPrompts(as_ids, as_mask, written_from=1 if encoder else width)


def greedy_config(
    model: nn.Module, tokenizer: Any, max_new_tokens: int, pad_token_id: int
) -> GenerationConfig:
    """Greedy writing with the cache on, whatever the model's own generation defaults are."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=end_token_ids(model, tokenizer) or None,
        decoder_start_token_id=decoder_start(getattr(model, "config", None)),
    )


def end_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation defaults."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in ids if token is not None))


class _StillPossible(StoppingCriteria):
    """Ends a row whose text so far is no beginning of the wanted one."""

    def __init__(self, tokenizer: Any, wanted: Sequence[str], prompt_width: int) -> None:
        self.tokenizer, self.wanted, self.prompt_width = tokenizer, wanted, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = input_ids[:, self.prompt_width :].tolist()
        done = [
            not want.startswith(_text(self.tokenizer, row).rstrip(REPLACEMENT))
            for row, want in zip(rows, self.wanted, strict=True)
        ]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _text(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
