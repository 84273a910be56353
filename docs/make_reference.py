"""Writes the pages that are made of the code: ``python docs/make_reference.py``; ``--check`` compares.

``reference.md`` has all keys of a recipe, from the schema; ``commands.md`` what each command says of itself,
from the parsers; ``python.md`` the public names of ``dsmixer`` and ``dsmixer.peft``, from their docstrings.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsmixer.cli.main import build_parser
from dsmixer.config.explain import describe
from dsmixer.config.schema import Recipe

DOCS = Path(__file__).parent
RECIPE_HEAD = """\
# Reference: the keys of a recipe

Made by `python docs/make_reference.py` from the schema that recipes are checked with. `dsmixer schema` prints
the same as a JSON schema. An unknown key is an error. What stands on the command line (`section.key=value`)
goes before the recipe, the recipe before a DeepSpeed JSON file, and that before the defaults.
"""
COMMANDS_HEAD = """\
# Reference: the commands

What each command says with `--help`; made by `python docs/make_reference.py` from their parsers.
`deepspeed [launcher flags] launch/train.py` takes what `dsmixer train` takes, and is the one that trains on
several ranks.
"""
PYTHON_HEAD = """\
# Reference: Python

The public names of `dsmixer`, and those of `dsmixer.peft`; made by `python docs/make_reference.py` from their
docstrings. Shape letters: T tokens, D and O the widths of a projection, E experts, R LoRA rank, K experts a
token. What is not on this page may change without notice.
"""
WIDTH = 100
NAMED = re.compile(r"^([*A-Za-z_]+):")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")

Node = dict[str, Any]


def recipe_page() -> str:
    """Every key of a recipe."""
    schema = Recipe.model_json_schema()
    sections = schema["properties"].items()
    return RECIPE_HEAD + "".join(_section(name, _follow(node, schema), schema) for name, node in sections)


def _section(name: str, node: Node, schema: Node) -> str:
    rows = "".join(
        f"| `{key}` | {kind} | {default} | {text} |\n" for key, kind, default, text in _rows(node, schema)
    )
    head = f"\n## {name}\n\n{node.get('description', '')}\n\n"
    return f"{head}| key | value | default | meaning |\n|---|---|---|---|\n{rows}"


def _rows(node: Node, schema: Node, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, value, default and help of each key; keys below it follow, of list entries as ``key[].below``."""
    needed = node.get("required", [])
    for key, child in node["properties"].items():
        below, is_list = _below(child, schema)
        default = "required" if key in needed else _shown(child["default"]) if "default" in child else ""
        kind = ("a list of mappings" if is_list else "a mapping") if below else describe(child)
        yield prefix + key, _cell(kind), _cell(default), _cell(child.get("description", ""))
        if below:
            yield from _rows(below, schema, f"{prefix}{key}[]." if is_list else f"{prefix}{key}.")


def _below(node: Node, schema: Node) -> tuple[Node | None, bool]:
    """The mapping that a value, or each entry of a list, is; and whether it is a list."""
    for option in node.get("anyOf", [node]):
        option = _follow(option, schema)
        is_list = option.get("type") == "array"
        inner = _follow(option.get("items", {}) if is_list else option, schema)
        if "properties" in inner:
            return inner, is_list
    return None, False


def _follow(node: Node, schema: Node) -> Node:
    found: Node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
    return found


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands_page() -> str:
    """Every command's help."""
    return COMMANDS_HEAD + "".join(_commands(build_parser(), level=2))


def _commands(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                command.formatter_class = partial(command.formatter_class, width=WIDTH)  # type: ignore[assignment]
                command.color = False  # type: ignore[attr-defined]  # Python 3.14
                yield f"\n{'#' * level} {command.prog}\n\n```text\n{command.format_help()}```\n"
                yield from _commands(command, level + 1)


def python_page() -> str:
    """Every public name."""
    return PYTHON_HEAD + _names("dsmixer") + _names("dsmixer.peft")


def _names(module: str) -> str:
    names = import_module(module).__all__
    return f"\n## {module}\n" + "".join(_name(module, name) for name in names)


def _name(module: str, name: str) -> str:
    thing = getattr(import_module(module), name)
    title = f"\n### {module}.{name}\n\n"
    if inspect.isclass(thing):
        return title + _class(thing)
    if inspect.isfunction(thing):
        return f"{title}```python\n{_signature(name, thing)}\n```\n\n{markdown(thing.__doc__ or '')}"
    home = import_module(type(thing).__module__)
    return f"{title}{markdown(_below_assignment(home, name))}"


def _class(thing: type) -> str:
    own = vars(thing)
    parts = [f"```python\n{_head_of_class(thing)}\n```\n\n{markdown(thing.__doc__ or '')}"]
    for name, member in own.items():
        work = _function_of(member)
        if name.startswith("_") or work is None or not work.__doc__:
            continue
        shown = _signature(name, work)
        if isinstance(member, property):  # it is read, not called
            shown = shown.replace("()", "", 1)
        parts.append(f"\n#### {thing.__name__}.{name}\n\n```python\n{shown}\n```\n\n{markdown(work.__doc__)}")
    return "".join(parts)


def _function_of(member: object) -> Any:
    if isinstance(member, property):
        return member.fget
    work = getattr(member, "__func__", member)
    return work if inspect.isfunction(work) else None


def _head_of_class(thing: type) -> str:
    """The class with its own fields, one a line."""
    if not dataclasses.is_dataclass(thing):
        bases = [base.__name__ for base in thing.__bases__ if base.__name__[0] != "_"]
        return f"class {thing.__name__}({', '.join(bases)})"
    lines = []
    for key in dataclasses.fields(thing):
        if key.name not in thing.__annotations__:
            continue
        made = key.default_factory is not dataclasses.MISSING
        value = key.default_factory() if made else key.default  # type: ignore[misc]
        default = "" if value is dataclasses.MISSING else f" = {value!r}"
        lines.append(f"    {key.name}: {key.type}{default}")
    bases = [base.__name__ for base in thing.__bases__ if base is not object]
    return "\n".join([f"class {thing.__name__}{'(' + ', '.join(bases) + ')' if bases else ''}:", *lines])


class _Plain:
    """An annotation that shows as it is written."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(name: str, work: Any) -> str:
    signature = inspect.signature(work)
    given = [
        value.replace(annotation=_Plain(value.annotation)) if isinstance(value.annotation, str) else value
        for value in signature.parameters.values()
        if value.name not in ("self", "cls")
    ]
    back = signature.return_annotation
    back = _Plain(back) if isinstance(back, str) else back
    whole = f"{name}{signature.replace(parameters=given, return_annotation=back)}"
    if len(whole) <= WIDTH:
        return whole
    lines, starred = [], False
    for value in given:
        if value.kind is value.KEYWORD_ONLY and not starred:
            lines.append("    *,")
        starred = starred or value.kind in (value.KEYWORD_ONLY, value.VAR_POSITIONAL)
        lines.append(f"    {value},")
    return "\n".join([f"{name}(", *lines, f") -> {back!r}"])


def _below_assignment(module: Any, name: str) -> str:
    """The string below the assignment of a constant."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, below in pairwise(body):
        targets = [getattr(statement, "target", None), *getattr(statement, "targets", [])]
        if any(getattr(target, "id", None) == name for target in targets):
            return str(ast.literal_eval(below.value)) if isinstance(below, ast.Expr) else ""
    return ""


def markdown(docstring: str) -> str:
    """A docstring as Markdown: its sections as lists."""
    lines, parts = inspect.cleandoc(docstring).split("\n"), []
    starts = [n for n, line in enumerate(lines) if line.rstrip(":") in SECTIONS and line.endswith(":")]
    text = "\n".join(lines[: starts[0] if starts else None]).strip()
    parts.append(f"{text}\n" if text else "")
    for start, end in pairwise([*starts, len(lines)]):
        parts.append(
            _list(lines[start].rstrip(":"), inspect.cleandoc("\n".join(lines[start + 1 : end])).split("\n"))
        )
    return "\n".join(parts)


def _list(title: str, lines: Sequence[str]) -> str:
    """A section: ``name: text`` as an entry each, text without a name as a paragraph."""
    entries: list[str] = []
    for line in lines:
        if not line.strip():
            continue
        if line.startswith(" ") or (title in ("Returns", "Yields") and entries):
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    if title in ("Returns", "Yields"):
        return f"{title}: {' '.join(entries)}\n"
    named = [NAMED.sub(r"`\1`:", entry) for entry in entries]
    return f"{title}:\n\n" + "".join(f"- {entry}\n" for entry in named)


PAGES = {"reference.md": recipe_page, "commands.md": commands_page, "python.md": python_page}


def out_of_step() -> list[str]:
    """The pages that do not say what the code says; how their lines are broken does not count."""
    return [
        name
        for name, page in PAGES.items()
        if (DOCS / name).read_text(encoding="utf-8").split() != page().split()
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        old = out_of_step()
        sys.exit(f"not in step: {', '.join(old)}; run {__file__}" if old else 0)
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
