"""A few held-out texts, each token coloured by the expert that leads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dsmixer.config.outline import short_layer_name
from dsmixer.report.frames import note, section
from dsmixer.report.held_out_texts import HeldOutText, HeldOutTexts
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.run_folder import RunFolder
from dsmixer.report.trace_data import Trace
from dsmixer.report.trace_tokens import legend, token_element

NUM_BARS = 3  # experts of one token that get a bar
MAX_CELLS = 12_000  # of tokens times layers: most of a page's size; what is further down has no layers


def texts(run: RunFolder) -> Markup:
    """The texts under a legend of the experts in them; empty where the run kept none."""
    kept = run.examples
    if kept is None or not kept.texts:
        return Markup("")
    trace = whole_trace(kept)
    symbols, layers = trace.symbols(), LayerStrip(kept.layers, kept.experts)
    cells, shown = 0, []
    for text in kept.texts:
        cells += len(text.tokens) * len(kept.layers)
        shown.append(_text(text, trace, symbols, layers if cells <= MAX_CELLS else None))
    lead = _lead(trace, kept) + (" Further down without layers." if cells > MAX_CELLS else "")
    return section("Texts, token by token", note(lead), legend(trace), *shown, key="texts")


def whole_trace(kept: HeldOutTexts) -> Trace:
    """All tokens of all texts as one trace, so that a letter and a colour are one expert throughout."""
    tokens = [token for text in kept.texts for token in text.tokens]
    return Trace("held-out texts", kept.experts, kept.layers, tokens)


def _lead(trace: Trace, kept: HeldOutTexts) -> str:
    entropies = [token.entropy for token in trace.tokens if token.entropy is not None]
    mean = f"{sum(entropies) / len(entropies):.2f}" if entropies else "–"
    told = (
        "Held-out texts, as the mixture read them. Under each token stands the letter of the expert with the "
        "largest weight, mean over all projections; the stronger the colour, the larger the weight. Open a "
        f"token for its weights, by layer too. Entropy of a token: {mean} nats on average, of at most "
        f"{math.log(len(kept.experts)):.2f}."
    )
    domains = len({text.domain for text in kept.texts})
    if domains < kept.num_domains:
        told += f" Texts of {domains} evenly picked domains of {kept.num_domains}."
    if len(kept.layers) < kept.num_layers:
        told += f" {len(kept.layers)} evenly picked layers of {kept.num_layers}."
    return told


def _text(text: HeldOutText, trace: Trace, symbols: Sequence[str], layers: LayerStrip | None) -> Markup:
    end, cut = text.begin + len(text.tokens), ""
    if len(text.tokens) < text.num_tokens:
        cut = f" · tokens {text.begin + 1} to {end} of {text.num_tokens}"
    led = sum(
        token.leader is not None and trace.experts[token.leader] == text.own_expert for token in text.tokens
    )
    own = f" · own expert leads {led} of {len(text.tokens)} tokens"
    if text.own_expert not in trace.experts:
        own = " · no expert of its own"
    parts = [
        token_element(token, trace, symbols, layers, NUM_BARS if layers is not None else 1)
        for token in text.tokens
    ]
    start = next((i for i, token in enumerate(text.tokens) if token.part == "answer"), None)
    if start:
        parts.insert(start, tag("b", "▸", class_="turn", title="the answer starts here"))
    head = tag("h3", text.domain, tag("small", f"{own}{cut}"))
    return tag("article", head, tag("div", *parts, class_="text"))


class LayerStrip:
    """The loudest expert of each layer in a row that wraps.

    Args:
        layers, experts: names, in order.
    """

    def __init__(self, layers: Sequence[str], experts: Sequence[str]) -> None:
        self.layers = layers
        self.numbers = {name: e for e, name in enumerate(experts)}

    def table(
        self, routers: Mapping[str, Sequence[tuple[str, float]]], trace: Trace, symbols: Sequence[str]
    ) -> Markup:
        """One token's layers; those that did not read it are left out."""
        found = []
        for layer in self.layers:
            for name, weight in list(routers.get(layer, ()))[:1]:
                e = self.numbers[name]
                said = f"{symbols[e]} {weight:.2f}".replace("0.", ".", 1)
                label = join(tag("span", short_layer_name(layer)), f" {said}")
                found.append(tag("li", label, class_=f"e{e}", style=f"--w:{weight:.2f}"))
        return tag("ul", tag("li", tag("span", "layer")), *found, class_="strip")
