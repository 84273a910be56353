"""Token ids of prompts and completions, the same for training, scoring and generation.

The ids of a prompt are those of the prompt alone, as ``generate`` will see them, with a beginning-of-sequence
token where the tokenizer puts one by itself. The completion's ids are those that follow the prompt's in
``prompt + completion``; where the tokenizer would merge across the seam, the completion is tokenised alone.

An encoder-decoder model reads the prompt on one side and writes the completion on the other: the prompt's ids
are those that the tokenizer makes of it with its own special tokens (T5's ends a text), the completion's
those of the completion alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsmixer.data.chat import ends_sequence, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsmixer.data.records import Example


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``[bos]`` if the tokenizer starts a text with it by itself, else nothing."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``[eos]`` if the tokenizer ends a text with it by itself, else nothing."""
    ids = tokenizer("a")["input_ids"]
    return [ids[-1]] if ids and ids[-1] == tokenizer.eos_token_id else []


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    templated: bool = False,
    for_encoder: bool = False,
) -> list[list[int]]:
    """Token ids of prompts, for generation.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: texts.
        templated: whether a chat template wrote them; it writes its own special tokens.
        for_encoder: whether an encoder reads them, so that the text ends there.
    """
    start = [] if templated else bos_ids(tokenizer)
    end = end_ids(tokenizer) if for_encoder and not templated else []
    return [start + ids + end for ids in _plain(tokenizer, prompts)]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    templated: bool = False,
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and of the completions that follow them, without an end-of-sequence token.

    Multiple choice scores ``(prompt, choices[i])`` pairs made here, so that it sees what training saw.
    """
    alone = _plain(tokenizer, prompts)
    joined = _plain(tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    stable = [whole[: len(ids)] == ids for whole, ids in zip(joined, alone, strict=True)]
    apart = iter(_plain(tokenizer, [c for c, kept in zip(completions, stable, strict=True) if not kept]))
    start = [] if templated else bos_ids(tokenizer)
    return [
        (start + ids, whole[len(ids) :] if kept else next(apart))
        for ids, whole, kept in zip(alone, joined, stable, strict=True)
    ]


def encode_sides(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    templated: bool = False,
) -> list[tuple[list[int], list[int]]]:
    """As ``encode_pairs``, for an encoder-decoder model: prompts for the encoder, completions alone."""
    sources = encode_prompts(tokenizer, prompts, templated=templated, for_encoder=True)
    return list(zip(sources, _plain(tokenizer, completions), strict=True))


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, for_encoder: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each example's prompt and completion, the latter closed by the end-of-sequence token.

    Args:
        tokenizer: a transformers tokenizer.
        examples: any.
        for_encoder: whether an encoder reads the prompts.

    Raises:
        UserError: a conversation does not go through the chat template.
    """
    encode = encode_sides if for_encoder else encode_pairs
    pairs: list[tuple[list[int], list[int]]] = [([], [])] * len(examples)
    for templated in (False, True):
        places = [i for i, example in enumerate(examples) if (example.messages is not None) == templated]
        texts = [rendered(examples[i], tokenizer) for i in places]
        encoded = encode(tokenizer, [p for p, _ in texts], [c for _, c in texts], templated=templated)
        for i, (_, completion), (prompt_ids, completion_ids) in zip(places, texts, encoded, strict=True):
            closed = templated and ends_sequence(completion, tokenizer)
            end = [] if closed or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            pairs[i] = (prompt_ids, completion_ids + end)
    return pairs


def truncated(
    prompt_ids: list[int], completion_ids: list[int], max_length: int, num_bos: int
) -> tuple[list[int], list[int]]:
    """Cut a pair to ``max_length`` tokens.

    The prompt gives way first, from its left and without its ``num_bos`` leading tokens, until it holds half
    the row; then the completion's end is cut. At least half the row is the completion's if it needs it.
    """
    if len(prompt_ids) + len(completion_ids) <= max_length:
        return prompt_ids, completion_ids
    kept = min(len(prompt_ids), max(max_length // 2, max_length - len(completion_ids)))
    start = prompt_ids[: min(num_bos, kept)]
    tail = kept - len(start)
    prompt = start + (prompt_ids[len(prompt_ids) - tail :] if tail else [])
    return prompt, completion_ids[: max_length - kept]


def truncated_sides(
    prompt_ids: list[int], completion_ids: list[int], max_length: int, num_end: int
) -> tuple[list[int], list[int]]:
    """Cut each side of a pair to ``max_length`` tokens, at its end.

    The prompt keeps its ``num_end`` closing tokens, as T5's tokenizer does when it truncates; a completion
    that is cut loses its own, so that no model learns to stop there.
    """
    if len(prompt_ids) > max_length:
        end = prompt_ids[len(prompt_ids) - num_end :]
        prompt_ids = prompt_ids[: max_length - num_end] + end
    return prompt_ids, completion_ids[:max_length]


def _plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is ours to cut, not the tokenizer's to warn of.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows, without loss: the tokenizer's own, else its end of sequence, else 0."""
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in given if token is not None)
