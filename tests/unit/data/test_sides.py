"""Prompts for an encoder and completions for its decoder: tokens, cuts, rows, and steps."""

from __future__ import annotations

import pytest
import torch
from support.tiny import CONFIGS, byte_tokenizer
from transformers import AutoModelForSeq2SeqLM

from dsmixer.config.errors import UserError
from dsmixer.data.collate import collate, step_batch
from dsmixer.data.records import Example
from dsmixer.data.sampler import StepSampler
from dsmixer.data.store import TokenStore
from dsmixer.data.tokenize import tokenize_examples

START, PAD = 0, 0
TOKENIZER = byte_tokenizer(ends=True)


def store_of(*pairs: tuple[str, str], max_length: int = 16) -> TokenStore:
    examples = [Example(prompt, completion, "d", location="f:1") for prompt, completion in pairs]
    ids = [i % 2 for i in range(len(pairs))]
    return tokenize_examples(examples, ids, TOKENIZER, max_length=max_length, decoder_start=START)


def sides(store: TokenStore, i: int) -> tuple[list[int], list[int]]:
    ids, start = store.input_ids(i).tolist(), int(store.target_starts[i])
    return ids[:start], ids[start:]


def test_both_sides_are_what_the_tokenizer_makes_of_prompt_and_answer() -> None:
    store = store_of(("add 1 2", "3"), ("", "x"))
    assert sides(store, 0) == (TOKENIZER("add 1 2")["input_ids"], TOKENIZER("3")["input_ids"])
    assert sides(store, 1) == ([TOKENIZER.eos_token_id], TOKENIZER("x")["input_ids"])


def test_each_side_is_cut_by_itself_and_the_prompt_as_the_tokenizer_cuts_it() -> None:
    """A prompt that is too long still ends; a completion that is too long does not, as the model did not."""
    prompt, completion = "a long prompt of many words", "an answer that goes on"
    store = store_of((prompt, completion), ("a", completion), (prompt, "b"), max_length=9)
    theirs = TOKENIZER(prompt, truncation=True, max_length=9)["input_ids"]
    cut = TOKENIZER(completion)["input_ids"][:9]
    assert sides(store, 0) == (theirs, cut) and cut[-1] != TOKENIZER.eos_token_id == theirs[-1]
    assert sides(store, 1) == (TOKENIZER("a")["input_ids"], cut)
    assert sides(store, 2) == (theirs, TOKENIZER("b")["input_ids"])


def test_an_empty_prompt_that_nothing_ends_is_refused() -> None:
    with pytest.raises(UserError, match="no token to learn"):
        tokenize_examples(
            [Example("", "x", "d", location="f:1")], [0], byte_tokenizer(), max_length=8, decoder_start=0
        )


def test_tokens_for_an_encoder_have_another_fingerprint() -> None:
    examples = [Example("a", "b", "d", location="f:1")]
    plain = tokenize_examples(examples, [0], TOKENIZER, max_length=8)
    assert plain.fingerprint != store_of(("a", "b"), max_length=8).fingerprint


def test_rows_are_padded_on_both_sides_and_the_decoder_reads_what_it_wrote() -> None:
    store = store_of(("abc", "d"), ("e", "fgh"))
    batch = collate(store, [(0,), (), (1,)], PAD)
    a, b, c, d, e, f, g, h = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcdefgh")
    assert batch.encoder is not None
    assert batch.encoder.input_ids.tolist() == [[a, b, c, 2], [0] * 4, [e, 2, 0, 0]]
    assert batch.encoder.attention_mask.tolist() == [[1] * 4, [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch.encoder.domain_ids.tolist() == [[0] * 4, [-1] * 4, [1, 1, -1, -1]]
    assert batch.encoder.example_ids.tolist() == [[0] * 4, [-1] * 4, [1, 1, -1, -1]]
    assert batch.labels.tolist() == [[d, 2, -100, -100], [-100] * 4, [f, g, h, 2]]
    assert batch.targets is batch.labels
    assert batch.input_ids.tolist() == [[START, d, 0, 0], [0] * 4, [START, f, g, h]]
    assert batch.domain_ids.tolist() == [[0, 0, -1, -1], [-1] * 4, [1] * 4]
    assert (batch.num_tokens, batch.num_targets) == (4 + 2 + 2 + 4, 6)


def test_the_decoder_reads_what_the_model_makes_of_the_labels() -> None:
    """Wherever it counts: behind the last label both are padding."""
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS["t5"]())
    batch = collate(store_of(("abc", "d"), ("e", "fgh")), [(0,), (1,)], PAD)
    theirs = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
    real = batch.labels != -100
    assert torch.equal(batch.input_ids[real], theirs[real])


def test_a_step_counts_the_tokens_of_both_sides() -> None:
    store = store_of(("abc", "d"), ("e", "fgh"), ("ij", "k"), ("l", "m"))
    sampler = StepSampler(
        store,
        weights=[1.0, 1.0],
        max_length=16,
        packing=False,
        global_batch_size=4,
        epochs=1,
        max_steps=None,
        seed=0,
    )
    how = {"world_size": 2, "micro_batch_size": 1, "pad_token_id": PAD}
    shares = [step_batch(sampler, store, 0, world_rank=rank, **how) for rank in range(2)]
    for share in shares:
        assert share.real_tokens == (4 + 2) + (2 + 4) + (3 + 2) + (2 + 2)
        assert share.encoder_tokens == 4 + 2 + 3 + 2
        assert share.target_tokens.tolist() == [4, 6]
    assert sum(m.num_tokens for share in shares for m in share.micro_batches) == shares[0].real_tokens


def test_packing_is_refused() -> None:
    with pytest.raises(AssertionError, match="one example a row"):
        collate(store_of(("a", "b"), ("c", "d")), [(0, 1)], PAD)


def test_moving_a_batch_moves_both_sides() -> None:
    moved = collate(store_of(("a", "b")), [(0,)], PAD).to("meta")
    assert {t.device.type for t in moved.inputs().values()} == {"meta"}
    assert set(moved.inputs()) == {"input_ids", "attention_mask", "decoder_input_ids"}
