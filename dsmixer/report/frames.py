"""What the parts of a page stand in: sections, cards, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from dsmixer.report.html import Markup, inline_svg, join, tag
from dsmixer.report.plots import as_svg
from dsmixer.report.text import harmless, readable

WIDE_INCHES = 5.5  # a figure wider than this gets the whole width of the page
LONG_ROWS = 40  # a table with more scrolls in its frame, on a screen


def section(title: str, *parts: object, key: str) -> Markup:
    """A part of the page under a heading that can be linked to; empty where it has no content."""
    content = join(*parts)
    return tag("section", tag("h2", title), content, id=key) if content else Markup("")


def note(text: object) -> Markup:
    """A remark in small print."""
    return tag("p", text, class_="note")


def definitions(entries: Iterable[tuple[object, object]]) -> Markup:
    """Terms and what is said of them; empty where there are none."""
    lines = [join(tag("dt", name), tag("dd", value)) for name, value in entries]
    return tag("div", tag("dl", *lines), class_="card") if lines else Markup("")


def table(columns: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """Rows of cells under their titles; all but the first column hold numbers."""
    name, *rest = columns
    head = tag("tr", tag("th", name), *(tag("th", title, class_="number") for title in rest))
    frame = "card long" if len(rows) > LONG_ROWS else "card"
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_=frame, tabindex="0")


def cells(values: Iterable[object]) -> Markup:
    """A row of a table: a name, then numbers."""
    name, *rest = (readable(value) for value in values)
    return tag("tr", tag("th", name, scope="row"), *(tag("td", value, class_="number") for value in rest))


def figures(key: str, pairs: Iterable[tuple[str, Figure]]) -> Markup:
    """Pairs of a caption and a figure, beside each other where there is room."""
    found = [_figure(f"{key}{index}", caption, figure) for index, (caption, figure) in enumerate(pairs)]
    return tag("div", *found, class_="figures") if found else Markup("")


def _figure(key: str, caption: str, figure: Figure) -> Markup:
    width = float(figure.get_figwidth())
    svg = inline_svg(as_svg(figure), key, harmless(caption, keep=""))
    style = f"max-width:{width * 1.35:.1f}in;min-width:{width * 0.66:.1f}in;margin:0 auto"
    return tag("figure", tag("div", svg, style=style), class_="wide" if width > WIDE_INCHES else None)
