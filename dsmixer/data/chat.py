"""Conversations through the tokenizer's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dsmixer.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsmixer.data.records import Example


def rendered(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt and completion of an example as text.

    A conversation's prompt is the template up to and with the opening of the assistant's last turn (the last
    turns, where several follow each other); the completion is what the template writes after that, without
    blanks behind an end-of-sequence token.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses or rewrites the conversation.
    """
    if example.messages is None:
        return example.prompt, example.completion
    if not tokenizer.chat_template:
        fix = "take an instruction-tuned base, add a chat_template, or give records of prompt and completion"
        problem = "the record is a conversation, but the tokenizer has no chat template"
        raise UserError(problem, where=example.location, fix=fix)
    messages = [dict(message) for message in example.messages]
    first = len(messages)
    while first > 0 and messages[first - 1]["role"] == "assistant":
        first -= 1
    whole = _template(example, tokenizer, messages, opened=False)
    for opened in (True, False):
        prompt = _template(example, tokenizer, messages[:first], opened=opened) if first else ""
        if whole.startswith(prompt) and len(prompt) < len(whole):
            return prompt, _without_tail(whole[len(prompt) :], tokenizer)
    problem = (
        "the chat template rewrites earlier messages when the answer follows: no completion can be told apart"
    )
    raise UserError(
        problem, where=example.location, fix="give prompt and completion, or another chat template"
    )


def ends_sequence(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text ends with the tokenizer's end-of-sequence token, as many chat templates make it."""
    return bool(tokenizer.eos_token) and text.endswith(str(tokenizer.eos_token))


def _template(
    example: Example, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, opened: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except TemplateError as error:
        problem = f"the chat template refuses the conversation: {error}"
        raise UserError(problem, where=example.location, fix="change the roles or their order") from error
    return str(text)


def _without_tail(completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    # Generation stops at the end-of-sequence token: a line break behind it would never be written.
    return completion.rstrip() if ends_sequence(completion.rstrip(), tokenizer) else completion
