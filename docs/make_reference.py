"""Writes docs/reference.md, the table of all recipe keys, from the schema: python docs/make_reference.py"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmixer.config.explain import describe
from dsmixer.config.schema import Recipe

PAGE = Path(__file__).with_name("reference.md")
HEAD = """\
# Reference: the keys of a recipe

Made by `python docs/make_reference.py` from the schema that recipes are checked with. `dsmixer schema` prints
the same as a JSON schema. An unknown key is an error. What stands on the command line (`section.key=value`)
goes before the recipe, the recipe before a DeepSpeed JSON file, and that before the defaults.
"""

Node = dict[str, Any]


def page() -> str:
    """The whole page."""
    schema = Recipe.model_json_schema()
    sections = schema["properties"].items()
    return HEAD + "".join(_section(name, _follow(node, schema), schema) for name, node in sections)


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


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page() and f"{PAGE} is not in step: run {__file__}")
    PAGE.write_text(page(), encoding="utf-8")
