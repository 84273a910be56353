"""Examples to tokens with loss marks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from dsmixer.config.errors import UserError
from dsmixer.data.encode import bos_ids, encode_examples, end_ids, truncated, truncated_sides
from dsmixer.data.parallel import tokenizer_threads
from dsmixer.data.store import SCHEMA, TokenStore, cached_table, record_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsmixer.data.records import Example

BATCH_EXAMPLES = 1000
VERSION = 1
"""Part of the fingerprint: to be raised when the same texts give other tokens."""


def tokenize_examples(
    examples: Sequence[Example],
    domain_ids: Sequence[int] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss: Literal["completion", "all"] = "completion",
    cache_dir: str | Path | None = None,
    decoder_start: int | None = None,
) -> TokenStore:
    """Tokenise, truncate (``encode.truncated``, ``truncated_sides``) and mark what carries loss.

    A fast tokenizer encodes on all cores meanwhile, if the environment does not forbid it.

    Args:
        examples: N examples.
        domain_ids: the domain index of each.
        tokenizer: a transformers tokenizer; conversations need its chat template.
        max_length: longest example in tokens, at least 2; for an encoder-decoder model of each side.
        loss: ``completion``, or ``all``: every token but an example's first.
        cache_dir: folder of the cache of tokens, keyed by texts, tokenizer and settings; None: in memory.
        decoder_start: the decoder's first token, of an encoder-decoder model; None: a decoder alone.

    Raises:
        UserError: a conversation does not go through the chat template, an example has no token that could
            be a target, or the cache cannot be written.
    """
    assert max_length >= 2 and len(examples) == len(domain_ids)
    sides = decoder_start is not None
    assert not sides or loss == "completion", "an encoder's tokens have no loss"
    fingerprint = _fingerprint(examples, tokenizer, max_length, "sides" if sides else loss)
    batches = _batches(examples, tokenizer, max_length, "sides" if sides else loss)
    with tokenizer_threads():
        if cache_dir is None:
            table = pa.Table.from_batches(list(batches), SCHEMA)
        else:
            path = Path(cache_dir).expanduser() / f"tokens-{fingerprint}.arrow"
            table = cached_table(batches, path, len(examples))
    ids = np.asarray(domain_ids, dtype=np.int64)
    locations = [example.location for example in examples]
    return TokenStore(table, ids, locations, fingerprint, decoder_start)


def _batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, loss: str
) -> Iterator[pa.RecordBatch]:
    sides, num_bos, num_end = loss == "sides", len(bos_ids(tokenizer)), len(end_ids(tokenizer))
    for first in range(0, len(examples), BATCH_EXAMPLES):
        batch = examples[first : first + BATCH_EXAMPLES]
        tokens, starts = [], []
        for example, (prompt_ids, completion_ids) in zip(
            batch, encode_examples(tokenizer, batch, for_encoder=sides), strict=True
        ):
            cut, kept = (truncated_sides, num_end) if sides else (truncated, num_bos)
            prompt, completion = cut(prompt_ids, completion_ids, max_length, 0 if example.messages else kept)
            if not completion or (sides and not prompt) or len(prompt) + len(completion) < 2:
                problem = "no token to learn is left after tokenisation"
                raise UserError(
                    problem, where=example.location, fix="give it a prompt or a longer completion"
                )
            tokens.append(prompt + completion)
            starts.append(1 if loss == "all" else max(1, len(prompt)))
        yield record_batch(tokens, starts)


def _fingerprint(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, loss: str
) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, max_length, loss]).encode())
    digest.update(tokenizer_fingerprint(tokenizer).encode())
    for example in examples:
        digest.update(json.dumps([example.prompt, example.completion, example.messages]).encode())
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides a tokenizer's output: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "class": type(tokenizer).__name__,
        "model": json.loads(backend.to_str())
        if backend is not None
        else sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "bos": bos_ids(tokenizer),
    }
    if isinstance(parts["model"], dict):
        # What the last call set on the tokenizer for itself says nothing about the tokens.
        parts["model"].pop("padding", None)
        parts["model"].pop("truncation", None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
