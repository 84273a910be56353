"""Every record form becomes the example its convention says; a bad field is named with its place."""

from __future__ import annotations

import pytest

from dsmixer.config.errors import UserError
from dsmixer.data.forms import FORMS, parse_record
from dsmixer.data.records import MAX_TEXT_CHARACTERS, Example

CHOICE = {"prompt": "2+2?", "choices": [" 3", " 4"], "answer": 1}


def test_prompt_and_completion_are_taken_as_given_with_their_spaces() -> None:
    example = parse_record({"prompt": "a:", "completion": " b \n", "id": 7}, "auto", "f:3", domain="d")
    assert example == Example("a:", " b \n", "d", None, None, "f:3", None)


def test_an_empty_prompt_is_allowed_and_other_forms_columns_may_be_empty() -> None:
    record = {"prompt": "", "completion": "b", "choices": None, "answer": "", "messages": None}
    assert parse_record(record, "auto", "f:1").completion == "b"


@pytest.mark.parametrize(
    ("answer", "index"), [(1, 1), ("1", 1), (1.0, 1), ("B", 1), ("b", 1), (" 4", 1), (0, 0), ("A", 0)]
)
def test_the_answer_may_be_an_index_a_letter_or_the_text(answer: object, index: int) -> None:
    example = parse_record({**CHOICE, "answer": answer}, "auto", "f:1")
    assert (example.answer, example.completion) == (index, CHOICE["choices"][index])
    assert example.choices == (" 3", " 4")


def test_the_text_of_a_choice_goes_before_an_index() -> None:
    assert parse_record({"prompt": "", "choices": ["1", "0"], "answer": "0"}, "auto", "f:1").answer == 1


def test_choices_in_a_table_cell_are_json() -> None:
    record = {"prompt": "2+2?", "choices": '[" 3", " 4"]', "answer": "1"}
    assert parse_record(record, "auto", "f:1").completion == " 4"


def test_alpaca_with_and_without_input() -> None:
    short = parse_record({"instruction": "Add {1}.", "input": "", "output": "2"}, "auto", "f:1")
    assert "### Instruction:\nAdd {1}.\n\n### Response:\n" in short.prompt and "### Input" not in short.prompt
    long = parse_record({"instruction": "Add.", "input": "1 1", "output": "2"}, "auto", "f:1")
    assert "### Input:\n1 1\n\n### Response:\n" in long.prompt and long.completion == "2"


def test_sharegpt_is_the_same_conversation_as_messages() -> None:
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    plain = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "a question nobody answers"},
    ]
    a = parse_record({"conversations": shared}, "auto", "f:1", domain="d")
    b = parse_record({"messages": plain}, "auto", "f:1", domain="d")
    assert a == b and a.messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    )


BAD = {
    "completion is missing": ({"prompt": "x"}, "completion: the field is missing"),
    "completion is empty": ({"prompt": "x", "completion": ""}, "completion: the text is empty"),
    "completion is null": ({"prompt": "x", "completion": None}, "completion: the field is missing"),
    "prompt is a number": ({"prompt": 3, "completion": "x"}, "prompt: expected text, found int 3"),
    "half a surrogate": ({"prompt": "\ud83d", "completion": "x"}, "prompt: the text holds half a surrogate"),
    "answer out of range": ({**CHOICE, "answer": 2}, "answer: 2 is none of 2 choices"),
    "answer below zero": ({**CHOICE, "answer": -1}, "answer: -1 is none"),
    "answer is true": ({**CHOICE, "answer": True}, "answer: True is none"),
    "answer is missing": ({"prompt": "x", "choices": ["a", "b"]}, "answer: the field is missing"),
    "one choice": ({**CHOICE, "choices": [" 4"], "answer": 0}, "choices: expected two or more"),
    "choice is no text": ({**CHOICE, "choices": [" 4", 5]}, "choices[1]: expected text"),
    "choices are not JSON": ({**CHOICE, "choices": "3|4"}, "choices: expected a list written as JSON"),
    "completion contradicts": ({**CHOICE, "completion": "4"}, "completion: the completion is '4', but"),
    "no output": ({"instruction": "x"}, "output: the field is missing"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role: unknown role 'bot'"),
    "message is text": ({"messages": ["x"]}, "messages[0]: expected an object"),
    "no assistant": ({"messages": [{"role": "user", "content": "x"}]}, "messages: no message of the assist"),
    "empty conversation": ({"messages": []}, "messages: the list is empty"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages[0].content[0]: only",
    ),
    "tool call": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls: tool calls cannot be read",
    ),
    "sharegpt role": ({"conversations": [{"from": "x", "value": ""}]}, "conversations[0].from: unknown role"),
    "no known form": ({"text": "x", "label": 1}, "no known form has these fields: text, label"),
    "no fields": ({}, "no known form has these fields: none"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_an_error_with_place_and_field(case: str) -> None:
    record, message = BAD[case]
    with pytest.raises(UserError) as error:
        parse_record(record, "auto", "data.jsonl:12")
    assert str(error.value).startswith(f"data.jsonl:12: {message}") and error.value.fix


def test_a_given_form_is_held_to_its_own_fields() -> None:
    record = {"prompt": "x", "completion": " 4", "choices": "kept for others"}
    assert parse_record(record, "prompt_completion", "f:1").choices is None
    with pytest.raises(UserError, match="f:1: instruction: the field is missing"):
        parse_record(record, "alpaca", "f:1")
    with pytest.raises(UserError, match="unknown record form 'csv'"):
        parse_record(record, "csv", "f:1")
    assert set(FORMS) == {"prompt_completion", "messages", "alpaca", "sharegpt", "multiple_choice"}


def test_a_text_above_ten_million_characters_is_refused() -> None:
    longest = "x" * MAX_TEXT_CHARACTERS
    assert parse_record({"prompt": "", "completion": longest}, "auto", "f:1").completion == longest
    with pytest.raises(UserError, match="f:1: completion: the text has 10,000,001 characters"):
        parse_record({"prompt": "", "completion": longest + "x"}, "auto", "f:1")
