"""The tokens of a text as elements of a page: each over the letter of its leading expert, opening to more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from dsmixer.report.html import Markup, join, tag
from dsmixer.report.trace_data import OTHER, Trace, TracedToken, visible

MAX_LEGEND = 40
MAX_BARS = 5  # experts of one token that get a bar


class ByRouter(Protocol):
    """Shows what one token heard at single routers, or in single layers."""

    def table(
        self, routers: Mapping[str, Sequence[tuple[str, float]]], trace: Trace, symbols: Sequence[str]
    ) -> Markup: ...


def legend(trace: Trace) -> Markup:
    """The letters: each expert with its mean weight and the number of tokens that it leads."""
    symbols, led, means = trace.symbols(), trace.led(), trace.mean_weights()
    rows = [
        tag(
            "li",
            tag("b", symbols[e], class_=f"chip e{e}"),
            tag("span", visible(trace.experts[e]), class_="name"),
            tag("span", f"{means[e]:.1%} · leads {led[e]}", class_="figure"),
        )
        for e in (trace.order()[:MAX_LEGEND] if means else [])
    ]
    rest = len(trace.experts) - MAX_LEGEND
    if rest > 0 and means:
        weight = sum(means[e] for e in trace.order()[MAX_LEGEND:])
        rows.append(
            tag("li", tag("b", OTHER, class_="chip"), f"{rest} others ", tag("span", f"{weight:.1%}"))
        )
    return tag("ul", *rows, class_="legend")


def token_element(
    token: TracedToken,
    trace: Trace,
    symbols: Sequence[str],
    by_router: ByRouter | None,
    num_bars: int = MAX_BARS,
) -> Markup:
    """One token, that opens to its weights and its entropy, and to what ``by_router`` shows."""
    shown = visible(token.text) or "·"
    if token.weights is None:
        unread = tag("span", tag("span", shown, class_="piece"), tag("i", "–"), class_="token unread")
        return _on_its_line(unread, token)
    leader = token.leader
    assert leader is not None
    summary = tag(
        "summary",
        tag("span", shown, class_="piece"),
        tag("i", symbols[leader]),
        title=f"{visible(trace.experts[leader])} {token.weights[leader]:.2f}",
    )
    panel = tag("div", *_panel(token, trace, symbols, by_router, num_bars), class_="panel")
    opened = tag(
        "details",
        summary,
        panel,
        class_=f"token e{leader}",
        name="token",
        style=f"--w:{token.weights[leader]:.2f}",
    )
    return _on_its_line(opened, token)


def _on_its_line(shown: Markup, token: TracedToken) -> Markup:
    if token.text.endswith("\n"):
        return join(shown, tag("br"))
    return join(tag("br"), shown) if token.text.startswith("\n") else shown


def _panel(
    token: TracedToken,
    trace: Trace,
    symbols: Sequence[str],
    by_router: ByRouter | None,
    num_bars: int,
) -> list[Markup]:
    assert token.weights is not None
    parts = [
        tag("p", tag("code", shown_code(token)), f" id {token.id} · entropy {token.entropy:.2f} nats"),
        tag("table", *_bars(token.weights, trace, symbols, num_bars), class_="bars"),
    ]
    if by_router is not None and token.routers is not None:
        parts.append(by_router.table(token.routers, trace, symbols))
    return parts


def shown_code(token: TracedToken) -> str:
    """A token's text in quotes."""
    return f"“{visible(token.text)}”"


def _bars(weights: Sequence[float], trace: Trace, symbols: Sequence[str], num_bars: int) -> list[Markup]:
    heard = [e for e, weight in enumerate(weights) if weight > 0]
    order = sorted(heard, key=lambda e: (-weights[e], e))[:num_bars]
    return [
        tag(
            "tr",
            tag("th", tag("b", symbols[e], class_=f"chip e{e}"), " ", visible(trace.experts[e])),
            tag("td", tag("span", class_=f"bar e{e}", style=f"--w:{weights[e]:.3f}")),
            tag("td", f"{weights[e]:.2f}", class_="number"),
        )
        for e in order
    ]
