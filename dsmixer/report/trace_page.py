"""A traced text as one HTML page that needs nothing beside itself, and no script."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsmixer.config.errors import UserError
from dsmixer.report.colors import expert_colors
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.trace_css import TRACE_CSS
from dsmixer.report.trace_data import Trace, visible
from dsmixer.report.trace_tokens import legend, shown_code, token_element

GENERATOR = "dsmixer trace"
MAX_CELLS = 300_000  # of all tokens' tables by router: above that a page would be too large to open


def check_target(path: Path) -> None:
    """Whether a page may be written there.

    Raises:
        UserError: it is no .html file in an existing folder, or another file is there already.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError("no name of a page", where=str(path), fix="give a file that ends in .html to --trace")
    if not path.parent.is_dir():
        raise UserError("no such folder", where=str(path.parent), fix="make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError("the folder can't be written to", where=str(path.parent), fix="choose another one")
    if path.exists() and not _is_trace(path):
        raise UserError("is there already and no trace", where=str(path), fix="give another name")


def _is_trace(path: Path) -> bool:
    return path.is_file() and GENERATOR in path.read_text(encoding="utf-8", errors="replace")[:2000]


def trace_page(trace: Trace) -> str:
    """The whole page as text.

    Each token stands over the letter of the expert with the largest mean weight, coloured after it, the
    stronger the larger the weight. It opens to its weights, its entropy, and the experts layer by layer.
    """
    title = f"{trace.name}: which experts spoke"
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=GENERATOR),
        tag("title", title),
        tag("style", Markup(TRACE_CSS + expert_colors(trace.order()))),
    )
    body = join(tag("h1", title), _lead(trace), legend(trace), _parts(trace), _numbers(trace))
    page = tag("html", tag("head", head), tag("body", tag("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _lead(trace: Trace) -> Markup:
    entropies = [token.entropy for token in trace.tokens if token.entropy is not None]
    mean = f"{sum(entropies) / len(entropies):.2f}" if entropies else "–"
    return tag(
        "p",
        f"Under each token stands the expert with the largest weight, mean over all "
        "mixers; the stronger the colour, the larger the weight. Open a token for its weights layer by "
        f"layer. Entropy of a token: {mean} nats on average, of at most {math.log(len(trace.experts)):.2f}. "
        "The last token was written and never read, so no router saw it.",
        class_="lead",
    )


def _parts(trace: Trace) -> Markup:
    symbols, columns = trace.symbols(), Columns(trace.routers)
    detailed = len(trace.tokens) * len(trace.routers) <= MAX_CELLS
    found = []
    for part, title in (("prompt", "Prompt"), ("answer", "Answer")):
        tokens = [token for token in trace.tokens if token.part == part]
        if tokens:
            shown = [token_element(token, trace, symbols, columns if detailed else None) for token in tokens]
            found.append(tag("section", tag("h2", title), tag("div", *shown, class_="text")))
    if not detailed:
        note = "The text is too long for tables layer by layer; --json has these numbers."
        found.append(tag("p", note, class_="note"))
    return join(*found)


class Columns:
    """The routers as a table: a row a layer, a column a projection.

    Args:
        routers: module paths.
    """

    def __init__(self, routers: Sequence[str]) -> None:
        self.places: dict[str, tuple[str, str]] = {}
        for path in routers:
            found = re.match(r"(.*?\.(?:layers?|h|blocks?|block)\.(\d+))\.(.*)", path)
            row, column = (found[1], found[3]) if found else ("", path)
            self.places[path] = (row, column)
        self.rows = list(dict.fromkeys(row for row, _ in self.places.values()))
        self.names = list(dict.fromkeys(column for _, column in self.places.values()))
        self.paths = {place: path for path, place in self.places.items()}

    def table(
        self, routers: Mapping[str, Sequence[tuple[str, float]]], trace: Trace, symbols: Sequence[str]
    ) -> Markup:
        """The loudest expert of one token at each router."""
        numbers = {name: e for e, name in enumerate(trace.experts)}
        short = [_last(name) for name in self.names]
        head = tag("tr", tag("th", "layer"), *(tag("th", name) for name in short))
        rows = []
        for row in self.rows:
            cells = [
                self._cell(routers.get(self.paths.get((row, name), "")), numbers, symbols)
                for name in self.names
            ]
            if any(cells):
                rows.append(tag("tr", tag("th", _layer(row)), *(cell or tag("td") for cell in cells)))
        return tag("table", tag("thead", head), tag("tbody", *rows), class_="layers")

    @staticmethod
    def _cell(
        heard: Sequence[tuple[str, float]] | None, numbers: dict[str, int], symbols: Sequence[str]
    ) -> Markup | None:
        if not heard:
            return None
        name, weight = heard[0]
        e = numbers[name]
        return tag(
            "td",
            f"{symbols[e]} {weight:.2f}".replace("0.", ".", 1),
            class_=f"e{e}",
            style=f"--w:{weight:.2f}",
        )


def _last(path: str) -> str:
    """``q_proj`` of ``self_attn.q_proj``; two parts where the last says little."""
    parts = path.split(".")
    name = parts[-1]
    return name.removesuffix("_proj") if len(name) > 2 else ".".join(parts[-2:])


def _layer(row: str) -> str:
    side = next((side for side in ("encoder", "decoder") if side in row.split(".")), "")
    number = row.rpartition(".")[2]
    return f"{side} {number}".strip() if number else "–"


def _numbers(trace: Trace) -> Markup:
    """All tokens in a table, for reading aloud and for print."""
    symbols = trace.symbols()
    rows = []
    for place, token in enumerate(trace.tokens, 1):
        leader = token.leader
        said = ("–", "–", "–")
        if leader is not None and token.weights is not None:
            name = f"{symbols[leader]} {visible(trace.experts[leader])}"
            said = (name, f"{token.weights[leader]:.2f}", f"{token.entropy:.2f}")
        cells = (place, tag("code", shown_code(token)), *said)
        rows.append(tag("tr", *(tag("td", cell) for cell in cells), class_=token.part))
    head = tag(
        "tr", *(tag("th", name) for name in ("", "token", "leading expert", "weight", "entropy, nats"))
    )
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return tag("details", tag("summary", "All tokens as a table"), table, class_="numbers")
