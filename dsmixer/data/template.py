"""Records of any columns through a template, in the forms that ``forms`` knows.

A template is Jinja, as chat templates and lm-evaluation-harness's tasks are. It runs in Jinja's sandbox: it
sees the columns of one record and can't reach what is behind them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsmixer.config.errors import UserError
from dsmixer.config.schema import RecordTemplate
from dsmixer.data.records import field_error

_UNFIT = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, re.error)
"""What a template raises on a record that it was not made for."""


def templated(record: Mapping[str, Any], template: RecordTemplate, location: str) -> dict[str, Any]:
    """The fields ``prompt``, ``completion``, ``choices`` and ``answer`` that a template makes of a record.

    Args:
        record: the columns.
        template: the recipe's; ``separator`` goes before the completion and each choice.
        location: where the record stands, for errors.

    Raises:
        UserError: a column is missing, or the template can't be applied to this record.
    """
    made: dict[str, Any] = {"prompt": _text(template.prompt, record, location, "template.prompt")}
    if template.completion is not None:
        text = _text(template.completion, record, location, "template.completion")
        made["completion"] = template.separator + text
    if template.choices is not None:
        choices = _choices(template.choices, record, location)
        made["choices"] = [template.separator + choice for choice in choices]
    if template.answer is not None:
        answer = _text(template.answer, record, location, "template.answer").strip()
        # the text of a choice is meant with what stands before it
        is_choice = template.separator + answer in made.get("choices", ())
        made["answer"] = template.separator + answer if is_choice else answer
    return made


def check_template(template: RecordTemplate, key: str) -> None:
    """Refuse a template that is no Jinja, before data is read.

    Raises:
        UserError: names the key, the line and what Jinja says.
    """
    given = tuple(text is not None for text in (template.completion, template.choices, template.answer))
    if given not in ((True, False, False), (False, True, True)):
        fix = "write completion, or both choices and answer"
        raise UserError("a template gives a completion, or choices and the answer", where=key, fix=fix)
    texts = {"prompt": template.prompt, "completion": template.completion, "answer": template.answer}
    try:
        for name in ("prompt", "completion", "answer"):
            if texts[name] is not None:
                _compiled(str(texts[name]))
        name = "choices"
        if isinstance(template.choices, str):
            _expression(template.choices)
        for choice in template.choices if isinstance(template.choices, tuple) else ():
            _compiled(choice)
    except TemplateError as error:
        fix = "write columns as {{ column }}"
        raise UserError(f"is no template: {error}", where=f"{key}.{name}", fix=fix) from error


def _choices(choices: str | tuple[str, ...], record: Mapping[str, Any], location: str) -> list[str]:
    where = "template.choices"
    if not isinstance(choices, str):
        return [_text(choice, record, location, where) for choice in choices]
    try:
        found = _expression(choices)(**record)
        listed = list(found)
    except _UNFIT as error:
        raise _unfit(error, record, location, where) from error
    if isinstance(found, str) or not all(isinstance(choice, str) for choice in listed):
        raise field_error(location, where, "the expression gives no list of texts", "name a column of texts")
    return listed


def _text(source: str, record: Mapping[str, Any], location: str, where: str) -> str:
    try:
        return _compiled(source).render(record)
    except _UNFIT as error:
        raise _unfit(error, record, location, where) from error


def _unfit(error: Exception, record: Mapping[str, Any], location: str, where: str) -> UserError:
    columns = ", ".join(str(name) for name in list(record)[:20])
    return field_error(
        location, where, str(error).split("\n")[0], f"the record has: {columns or 'no columns'}"
    )


def _regex_replace(text: str, pattern: str, replacement: str = "") -> str:
    return re.sub(pattern, replacement, text)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    return environment


@cache
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


@cache
def _expression(source: str) -> Any:
    return _environment().compile_expression(source, undefined_to_none=False)
