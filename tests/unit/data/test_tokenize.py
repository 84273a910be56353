"""Tokens, labels and truncation against the tokenizer itself; the cache against the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmixer.config.errors import UserError
from dsmixer.data.encode import encode_pairs, encode_prompts, pad_token_id, truncated
from dsmixer.data.records import Example
from dsmixer.data.tokenize import tokenize_examples, tokenizer_fingerprint

QUESTION = Example("Question: what is 12 + 7? Answer:", " 19", "a", location="f:1")
REVIEW = Example("Review: a fine film. Sentiment:", " positive", "b", location="f:2")
CHAT = Example(
    "",
    "",
    "a",
    location="f:3",
    messages=(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "second"},
    ),
)


def store_of(tokenizer: Any, *examples: Example, **how: Any) -> Any:
    how = {"max_length": 128, **how}
    return tokenize_examples(examples, [0] * len(examples), tokenizer, **how)


def target_text(tokenizer: Any, store: Any, i: int) -> str:
    labels = store.labels(i)
    return str(tokenizer.decode(labels[labels != -100]))


def test_an_example_is_bos_prompt_completion_eos_with_loss_on_the_completion(chat_tokenizer: Any) -> None:
    store = store_of(chat_tokenizer, QUESTION, REVIEW)
    for i, example in enumerate((QUESTION, REVIEW)):
        whole = chat_tokenizer(example.prompt + example.completion)["input_ids"] + [2]
        num_prompt = len(chat_tokenizer(example.prompt)["input_ids"])
        assert store.input_ids(i).tolist() == whole and whole[0] == 1
        assert store.labels(i).tolist() == [-100] * num_prompt + whole[num_prompt:]
        assert store.lengths[i] == len(whole) and store.target_counts[i] == len(whole) - num_prompt
    assert store.input_ids(0).dtype == np.int32 and store.locations == ["f:1", "f:2"] and len(store) == 2


def test_no_bos_is_put_where_the_tokenizer_puts_none(plain_tokenizer: Any) -> None:
    assert encode_prompts(plain_tokenizer, ["a b"]) == [plain_tokenizer("a b")["input_ids"]]
    store = store_of(plain_tokenizer, Example("", " positive", "a"))
    # Nothing stands before the first token that could predict it, so it is no target.
    assert store.labels(0)[0] == -100 and (store.labels(0)[1:] == store.input_ids(0)[1:]).all()


def test_loss_all_has_every_token_but_the_first_as_target(chat_tokenizer: Any) -> None:
    store = store_of(chat_tokenizer, QUESTION, CHAT, loss="all")
    for i in range(2):
        assert store.labels(i).tolist() == [-100, *store.input_ids(i).tolist()[1:]]


def test_a_seam_that_the_tokenizer_would_merge_keeps_the_prompt_that_generation_sees(
    plain_tokenizer: Any,
) -> None:
    text = "Answer: positive question"
    whole = plain_tokenizer(text)["input_ids"]
    alone, cut = next(
        (ids, cut)
        for cut in range(1, len(text))
        if whole[: len(ids := plain_tokenizer(text[:cut])["input_ids"])] != ids
    )
    prompt, completion = text[:cut], text[cut:]
    ((prompt_ids, completion_ids),) = encode_pairs(plain_tokenizer, [prompt], [completion])
    assert prompt_ids == alone and plain_tokenizer.decode(prompt_ids + completion_ids) == prompt + completion


def test_a_conversation_goes_through_the_chat_template_and_its_last_answer_is_the_target(
    chat_tokenizer: Any,
) -> None:
    store = store_of(chat_tokenizer, CHAT)
    whole = "<s><user>hi</s>\n<assistant>first</s>\n<user>and</s>\n<assistant>second</s>"
    assert chat_tokenizer.decode(store.input_ids(0)) == whole
    assert target_text(chat_tokenizer, store, 0) == "second</s>"


def test_last_answers_in_a_row_are_all_targets(chat_tokenizer: Any) -> None:
    again = Example("", "", "a", messages=(*CHAT.messages, {"role": "assistant", "content": "third"}))
    store = store_of(chat_tokenizer, again)
    assert target_text(chat_tokenizer, store, 0) == "second</s>\n<assistant>third</s>"


def test_a_tokenizer_without_a_template_refuses_conversations(plain_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"f:3: the record is a conversation, but .* no chat template"):
        store_of(plain_tokenizer, CHAT)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no system role') }}", "f:3: the chat template refuses .*: no system role"),
        ("{{ messages | length }}{{ messages[-1]['content'] }}", "f:3: the chat template rewrites"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(chat_tokenizer: Any, template: str, problem: str) -> None:
    kept, chat_tokenizer.chat_template = chat_tokenizer.chat_template, template
    try:
        with pytest.raises(UserError, match=problem):
            store_of(chat_tokenizer, CHAT)
    finally:
        chat_tokenizer.chat_template = kept


def test_an_example_without_any_target_is_refused(plain_tokenizer: Any) -> None:
    kept, plain_tokenizer.eos_token = plain_tokenizer.eos_token, None
    try:
        with pytest.raises(UserError, match="f:9: no token to learn is left"):
            store_of(plain_tokenizer, Example("", "x", "a", location="f:9"))
    finally:
        plain_tokenizer.eos_token = kept


@given(
    prompt=st.integers(0, 30), completion=st.integers(1, 30), max_length=st.integers(2, 40), bos=st.booleans()
)
def test_truncation_keeps_what_it_promises(prompt: int, completion: int, max_length: int, bos: bool) -> None:
    p, c = list(range(prompt)), list(range(100, 100 + completion))
    kept_p, kept_c = truncated(p, c, max_length, int(bos))
    assert len(kept_p) + len(kept_c) == min(max_length, prompt + completion)
    assert kept_c == c[: len(kept_c)] and len(kept_c) >= min(completion, -(-max_length // 2))
    if len(kept_c) < completion:
        assert len(kept_p) == min(prompt, max_length // 2), "the completion was cut before the prompt"
    if bos and kept_p:
        assert kept_p[0] == 0 and kept_p[1:] == (p[-(len(kept_p) - 1) :] if len(kept_p) > 1 else [])
    elif not bos:
        assert kept_p == p[len(p) - len(kept_p) :]


def test_a_long_example_is_cut_from_the_prompts_left_and_keeps_bos_and_completion(
    chat_tokenizer: Any,
) -> None:
    long = Example("Question: " * 50 + "Answer:", " positive", "a")
    store = store_of(chat_tokenizer, long, max_length=16)
    assert store.lengths[0] == 16 and store.input_ids(0)[0] == 1
    assert target_text(chat_tokenizer, store, 0) == " positive</s>"
    assert chat_tokenizer.decode(store.input_ids(0)).endswith("Answer: positive</s>")


def test_many_batches_give_what_single_examples_give(chat_tokenizer: Any) -> None:
    examples = [Example(f"Question: {i} Answer:", f" {i}", "a") for i in range(2500)]
    store = store_of(chat_tokenizer, *examples)
    for i in (0, 999, 1000, 2499):
        assert store.input_ids(i).tolist() == store_of(chat_tokenizer, examples[i]).input_ids(0).tolist()
    assert store.lengths.tolist() == [len(store.input_ids(i)) for i in range(2500)]


def test_the_cache_gives_the_same_tokens_and_is_read_the_second_time(
    chat_tokenizer: Any, tmp_path: Path
) -> None:
    memory = store_of(chat_tokenizer, QUESTION, CHAT)
    first = store_of(chat_tokenizer, QUESTION, CHAT, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    second = store_of(chat_tokenizer, QUESTION, CHAT, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mtime_ns == written
    for store in (first, second):
        assert store.fingerprint == memory.fingerprint
        for i in range(2):
            assert (store.labels(i) == memory.labels(i)).all()
            assert (store.input_ids(i) == memory.input_ids(i)).all()
    kept = datasets.Dataset.from_file(str(path))
    assert kept["input_ids"][0] == memory.input_ids(0).tolist()


def test_a_damaged_cache_file_is_made_again(chat_tokenizer: Any, tmp_path: Path) -> None:
    whole = store_of(chat_tokenizer, QUESTION, REVIEW, cache_dir=tmp_path).input_ids(1).tolist()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert store_of(chat_tokenizer, QUESTION, REVIEW, cache_dir=tmp_path).input_ids(1).tolist() == whole


def test_a_cache_folder_that_cannot_be_made_is_the_users_error(chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the token cache cannot be written"):
        store_of(chat_tokenizer, QUESTION, cache_dir=tmp_path / "file")


def test_the_fingerprint_tells_texts_settings_and_tokenizers_apart(
    chat_tokenizer: Any, plain_tokenizer: Any
) -> None:
    stores = [
        store_of(chat_tokenizer, QUESTION),
        store_of(chat_tokenizer, REVIEW),
        store_of(chat_tokenizer, QUESTION, REVIEW),
        store_of(chat_tokenizer, QUESTION, loss="all"),
        store_of(chat_tokenizer, QUESTION, max_length=64),
        store_of(plain_tokenizer, QUESTION),
    ]
    assert len({store.fingerprint for store in stores}) == len(stores)
    before = tokenizer_fingerprint(chat_tokenizer)
    chat_tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(chat_tokenizer) == before


def test_rows_are_filled_with_the_padding_token_or_the_end_of_sequence(
    chat_tokenizer: Any, plain_tokenizer: Any
) -> None:
    assert pad_token_id(chat_tokenizer) == 0 and pad_token_id(plain_tokenizer) == 2
