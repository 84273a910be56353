"""HTML from nested calls: text is escaped, markup is what :func:`tag` made."""

from __future__ import annotations

import html
import xml.etree.ElementTree as ElementTree

from dsmixer.report.colors import FOLLOWS_PAGE
from dsmixer.report.text import harmless

VOID = frozenset({"br", "col", "hr", "img", "meta"})
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


class Markup(str):
    """Text that is markup already."""


def text(value: object) -> Markup:
    """Any value as escaped text, in which nothing is hidden or turned round."""
    return value if isinstance(value, Markup) else Markup(html.escape(harmless(str(value)), quote=True))


def join(*parts: object) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. ``class_`` stands for ``class``; an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def inline_svg(svg: str, key: str, label: str) -> Markup:
    """An SVG document as an element of a page.

    Args:
        svg: the document.
        key: put before every id in it, so that those of several figures do not meet.
        label: what a screen reader says.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{key}-{value}")
            elif name == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(name, f"#{key}-{value[1:]}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{key}-"))
            elif name == "style":
                element.set(name, _following(value))
    root.set("role", "img")
    root.set("aria-label", label)
    root.attrib.pop("height", None)
    root.set("width", "100%")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _following(style: str) -> str:
    """A style whose ink and lines are those of the page, light or dark."""
    for color, variable in FOLLOWS_PAGE.items():
        style = style.replace(color, f"var({variable})")
    return style
