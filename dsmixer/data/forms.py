"""The record forms: how a record of each becomes an example.

``prompt_completion``  prompt, completion
``multiple_choice``    prompt, choices, answer (index, letter or the choice's text); completion optional
``alpaca``             instruction, input (optional), output
``messages``           messages: [{role, content}, …]
``sharegpt``           conversations: [{from, value}, …]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.data.records import Example, checked_text, field_error, is_given, list_field, text_field

Record = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
}
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)


def parse_record(record: Record, form: str, location: str, *, domain: str = "") -> Example:
    """Turn one record into an example.

    Args:
        record: the record's fields.
        form: a name in ``FORMS``, or ``auto``: the form whose fields the record has.
        location: where the record stands, for errors and for the example.
        domain: the domain's name.

    Raises:
        UserError: the record does not have the form; names file, line, field and what to do.
    """
    if form == "auto":
        form = _detected_form(record, location)
    if form not in FORMS:
        raise UserError(
            f"unknown record form {form!r}", where=location, fix=f"one of auto, {', '.join(FORMS)}"
        )
    return FORMS[form](record, location, domain)


def _detected_form(record: Record, location: str) -> str:
    """The form whose fields the record has, or most of whose fields: its own check names what is wrong."""

    def share(form: str) -> tuple[float, float]:
        fields = SIGNATURES[form]
        filled = sum(is_given(record, field) for field in fields)
        return filled / len(fields), sum(field in record for field in fields) / len(fields)

    best = max(SIGNATURES, key=share)
    if share(best) > (0.0, 0.0):
        return best
    found = ", ".join(str(name) for name in list(record)[:20]) or "none"
    wanted = "; ".join(f"{', '.join(fields)} ({form})" for form, fields in SIGNATURES.items())
    raise UserError(f"no known form has these fields: {found}", where=location, fix=f"use one of: {wanted}")


def _prompt_completion(record: Record, location: str, domain: str) -> Example:
    prompt = text_field(record, "prompt", location, allow_empty=True)
    return Example(prompt, text_field(record, "completion", location), domain, location=location)


def _alpaca(record: Record, location: str, domain: str) -> Example:
    instruction = text_field(record, "instruction", location)
    output = text_field(record, "output", location)
    if not is_given(record, "input"):
        return Example(ALPACA_PROMPT.format(instruction=instruction), output, domain, location=location)
    given = text_field(record, "input", location)
    prompt = ALPACA_INPUT_PROMPT.format(instruction=instruction, input=given)
    return Example(prompt, output, domain, location=location)


def _multiple_choice(record: Record, location: str, domain: str) -> Example:
    prompt = text_field(record, "prompt", location, allow_empty=True)
    listed = list_field(record, "choices", location)
    choices = tuple(checked_text(choice, location, f"choices[{i}]") for i, choice in enumerate(listed))
    if len(choices) < 2 or "" in choices:
        raise field_error(
            location, "choices", "expected two or more texts, none of them empty", "complete the list"
        )
    answer = _answer_index(record.get("answer"), choices, location)
    completion = choices[answer]
    if is_given(record, "completion") and record["completion"] != completion:
        problem = f"the completion is {record['completion']!r}, but choices[{answer}] is {completion!r}"
        raise field_error(location, "completion", problem, "make them equal, or leave the completion out")
    return Example(prompt, completion, domain, choices, answer, location)


def _answer_index(answer: Any, choices: tuple[str, ...], location: str) -> int:
    """The index of the right choice, from an index, a choice's own text or a letter from A on."""
    index: int | None = None
    if isinstance(answer, str):
        letter = answer.strip()
        if answer in choices:
            index = choices.index(answer)
        elif letter.isascii() and letter.isdigit():
            index = int(letter)
        elif len(letter) == 1 and letter.isascii() and letter.isalpha():
            index = ord(letter.upper()) - ord("A")
    elif isinstance(answer, int | float) and not isinstance(answer, bool) and float(answer).is_integer():
        index = int(answer)
    if index is None or not 0 <= index < len(choices):
        fix = f"an index from 0 to {len(choices) - 1}, a letter from A, or the text of a choice"
        problem = (
            "the field is missing" if answer is None else f"{answer!r} is none of {len(choices)} choices"
        )
        raise field_error(location, "answer", problem, fix)
    return index


def _messages(record: Record, location: str, domain: str) -> Example:
    return _conversation(
        record, location, domain, "messages", "role", "content", {role: role for role in ROLES}
    )


def _sharegpt(record: Record, location: str, domain: str) -> Example:
    return _conversation(record, location, domain, "conversations", "from", "value", SHAREGPT_ROLES)


def _conversation(
    record: Record,
    location: str,
    domain: str,
    field: str,
    role_key: str,
    text_key: str,
    roles: Mapping[str, str],
) -> Example:
    turns = []
    for i, turn in enumerate(list_field(record, field, location)):
        name = f"{field}[{i}]"
        if not isinstance(turn, dict):
            raise field_error(location, name, "expected an object", f'{{"{role_key}": …, "{text_key}": …}}')
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise field_error(
                location, f"{name}.{role_key}", f"unknown role {role!r}", f"one of {', '.join(roles)}"
            )
        if turn.get("tool_calls"):
            raise field_error(
                location, f"{name}.tool_calls", "tool calls cannot be read", "write them as text"
            )
        content = _joined_parts(turn.get(text_key), location, f"{name}.{text_key}")
        turns.append({"role": roles[role], "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()  # nothing answers these turns, so there is nothing in them to learn
    if not turns or not turns[-1]["content"]:
        problem = "the assistant's last message is empty" if turns else "no message of the assistant"
        raise field_error(location, field, problem, "a conversation ends with the assistant's answer")
    return Example("", "", domain, location=location, messages=tuple(turns))


def _joined_parts(content: Any, location: str, field: str) -> str:
    """A message's text, given as one text or as a list of ``{"type": "text", "text": …}`` parts."""
    if not isinstance(content, list):
        return checked_text(content, location, field)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise field_error(
                location, f"{field}[{i}]", "only text parts can be read", "remove the other parts"
            )
        texts.append(checked_text(part.get("text"), location, f"{field}[{i}].text"))
    return "".join(texts)


FORMS: dict[str, Callable[[Record, str, str], Example]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "multiple_choice": _multiple_choice,
}
# The first of equally good matches is taken: a multiple-choice record often has a completion too.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "multiple_choice": ("prompt", "choices", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
