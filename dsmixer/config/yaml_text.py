"""YAML in and out, with the line of every key.

YAML 1.1, which PyYAML follows, reads ``1e-5`` as text, ``1:30`` as 90, ``010`` as 8 and ``2024-01-02`` as a
date. A recipe means none of these, so numbers are read by the rules of YAML 1.2 and dates stay text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dsmixer.config.errors import UserError

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_REPLACED = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}


class _RecipeLoader(yaml.SafeLoader):
    pass


class _RecipeDumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our loader would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_RecipeDumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class YamlText(NamedTuple):
    """The value of a YAML text, and the line (from 1) of every dotted key in it."""

    value: Any
    lines: dict[str, int]


def read_text(path: str | Path, what: str) -> str:
    """The UTF-8 text of a file; ``what`` names its kind in the UserError raised where it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such {what}", where=str(path), fix="check the path") from None
    except OSError as error:
        raise UserError(f"cannot read this {what}: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"this {what} is not UTF-8 text", where=f"{path}:{line}", fix="save it as UTF-8"
        ) from None


def parse_yaml(text: str, where: str) -> YamlText:
    """Parse one YAML document, and find the line of every key.

    Raises:
        UserError: malformed YAML, a duplicate or non-text key, an alias inside itself, a tag of another kind.
    """
    loader = None
    try:
        loader = _RecipeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return YamlText(None, {})
        lines: dict[str, int] = {}
        _collect_lines(node, (), (), lines, where)
        return YamlText(loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        raise _yaml_error(error, text, where) from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"a value cannot be read: {error}", where=where, fix="write a plain value") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: Any) -> str:
    """Block-style YAML that reads back to the same value under YAML 1.1 and 1.2 alike."""
    return yaml.dump(value, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


def _yaml_error(error: yaml.YAMLError, text: str, where: str) -> UserError:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}"
        context = f" ({error.context})" if error.context else ""
        problem = f"malformed YAML at column {mark.column + 1}: {error.problem}{context}"
    elif isinstance(error, yaml.reader.ReaderError):
        place = f"{where}:{text[: error.position].count(chr(10)) + 1}"
        problem = f"a character that YAML does not allow: {error.character!r}"
    else:
        place, problem = where, f"malformed YAML: {error}"
    fix = (
        "correct the YAML there: two spaces a level, a space after each colon, quotes around text with : or #"
    )
    return UserError(problem, where=place, fix=fix)


def _collect_lines(
    node: yaml.Node, path: tuple[str, ...], above: tuple[yaml.Node, ...], lines: dict[str, int], where: str
) -> None:
    """Fill ``lines`` from a node; keys that a merge (``<<``) brings give way to those written out."""
    if any(node is other for other in above):
        line = node.start_mark.line + 1
        raise UserError("an alias stands inside itself", where=f"{where}:{line}", fix="write the values out")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault(".".join((*path, str(index))), item.start_mark.line + 1)
            _collect_lines(item, (*path, str(index)), above, lines, where)
    elif isinstance(node, yaml.MappingNode):
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        written = [(key, value) for key, value in node.value if key.tag != "tag:yaml.org,2002:merge"]
        _check_keys([key for key, _ in written], path, where)
        for key, value in written:
            lines.setdefault(".".join((*path, key.value)), key.start_mark.line + 1)
            _collect_lines(value, (*path, key.value), above, lines, where)
        for value in merged:
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in sources:
                _collect_lines(source, path, above, lines, where)


def _check_keys(keys: list[yaml.Node], path: tuple[str, ...], where: str) -> None:
    seen: dict[str, int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            found = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            inside = f" in {'.'.join(path)}" if path else ""
            raise UserError(
                f"{found!r} cannot be a key{inside}", where=f"{where}:{line}", fix="keys are plain text"
            )
        if key.value in seen:
            dotted = ".".join((*path, key.value))
            raise UserError(
                f"written twice, on lines {seen[key.value]} and {line}",
                where=f"{where}:{line}: {dotted}",
                fix="keep one of the two",
            )
        seen[key.value] = line
