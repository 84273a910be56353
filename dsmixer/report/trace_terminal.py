"""A traced text in the terminal: under each token the letter of the expert that leads it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmixer.report.trace_data import OTHER, Trace, TracedToken, visible

COLORS = ("blue", "dark_orange", "green", "magenta", "red", "yellow", "cyan", "bright_black")
LOUD = 0.5  # from this mean weight on the letter is a capital
MAX_LEGEND = 26
GAP = "·"  # for a token without text of its own


def show_trace(trace: Trace, console: Console) -> None:
    """Print prompt and answer, each token over its leading expert, then who the letters are.

    Colours come on top of the letters, so that nothing is lost without them.
    """
    for part in ("prompt", "answer"):
        tokens = [token for token in trace.tokens if token.part == part]
        if tokens:
            console.print(Text(part, style="bold"))
            for line in _lines(tokens, trace, console.width):
                console.print(line, soft_wrap=True)
    console.print(legend(trace))
    console.print(Text(_remark(trace), style="dim"))


def _lines(tokens: list[TracedToken], trace: Trace, width: int) -> Iterator[Text]:
    """Pairs of lines, text and letters, no wider than the terminal."""
    symbols = trace.symbols()
    above, below, used = Text(), Text(), 0
    for token in tokens:
        shown = visible(token.text) or GAP
        style, letter = _style(token), _letter(token, symbols)
        if used and token.text.startswith("\n") and not token.text.endswith("\n"):
            yield from (above, below)
            above, below, used = Text(), Text(), 0
        for piece in _pieces(shown, max(1, width)):
            cells = cell_len(piece)
            if used + cells > width:
                yield from (above, below)
                above, below, used = Text(), Text(), 0
            above.append(piece, style=style)
            below.append(letter + " " * (cells - 1), style=style)
            letter, used = " ", used + cells
        if token.text.endswith("\n"):
            yield from (above, below)
            above, below, used = Text(), Text(), 0
    if used:
        yield from (above, below)


def _pieces(text: str, width: int) -> Iterator[str]:
    """A token, cut only where it is wider than the terminal."""
    piece = ""
    for sign in text:
        if piece and cell_len(piece + sign) > width:
            yield piece
            piece = ""
        piece += sign
    # a sign of no width of its own still needs a column for its letter
    yield piece if cell_len(piece) else piece + " "


def _style(token: TracedToken) -> str:
    leader = token.leader
    return "" if leader is None else _color(leader) + (" bold" if _weight(token) >= LOUD else "")


def _color(expert: int) -> str:
    return COLORS[expert % len(COLORS)]


def _weight(token: TracedToken) -> float:
    return 0.0 if token.weights is None else max(token.weights)


def _letter(token: TracedToken, symbols: list[str]) -> str:
    leader = token.leader
    if leader is None:
        return "-"
    return symbols[leader] if _weight(token) >= LOUD else symbols[leader].lower()


def legend(trace: Trace) -> Table:
    """Letters, names, how many tokens each expert leads, and its mean weight."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("expert", overflow="fold")
    table.add_column("leads tokens", justify="right")
    table.add_column("mean weight", justify="right")
    symbols, led, means = trace.symbols(), trace.led(), trace.mean_weights()
    for e in trace.order()[:MAX_LEGEND] if means else []:
        table.add_row(
            Text(symbols[e], style=_color(e)),
            Text(visible(trace.experts[e])),
            str(led[e]),
            f"{means[e]:.3f}",
        )
    rest = len(trace.experts) - MAX_LEGEND
    if rest > 0 and means:
        others = trace.order()[MAX_LEGEND:]
        mean = sum(means[e] for e in others)
        table.add_row(OTHER, f"{rest} others", str(sum(led[e] for e in others)), f"{mean:.3f}")
    return table


def _remark(trace: Trace) -> str:
    entropies = [token.entropy for token in trace.tokens if token.entropy is not None]
    mean = sum(entropies) / len(entropies) if entropies else math.nan
    most = math.log(len(trace.experts))
    return (
        f"Weights are means over all mixers; a letter is a capital from {LOUD} on. Entropy of a token: "
        f"{mean:.2f} nats of at most {most:.2f}. The last token (-) was written and never read."
    )
