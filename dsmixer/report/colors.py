"""The colours of pages and figures, told apart also by those who see few: after Okabe and Ito (2008)."""

from __future__ import annotations

from collections.abc import Sequence

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8f8300", "#5b6675")
GOLDEN_ANGLE = 137.508  # hues of further experts keep clear of each other
DARK_TEXT_ON = ("#cc79a7", "#56b4e9", "#e69f00")  # white would not be read on these
LOAD_SCALE = ("#f6f8fb", "#9cc3e6", "#2563a8", "#12305e")
GAIN_SCALE = ("#a14a00", "#f0c9a0", "#f7f7f5", "#9fc5e3", "#1f5f9e")  # orange to blue: no red beside green

INK, MUTED, GRID, EDGE = "#1c2430", "#5b6675", "#e3e7ee", "#aab2bf"
FOLLOWS_PAGE = {INK: "--ink", MUTED: "--muted", GRID: "--line", EDGE: "--muted"}
"""What a figure takes from the page around it, so that it can be read on a dark one."""

VARIABLES = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5b6675; --line: #dfe4ec; --page: #f6f7f9;
  --card: #fff; --accent: #1f5f9e; --best: #dcebf7; --depth: 62%; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #9aa5b4; --line: #333c49; --page: #14181e; --card: #1d232b;
    --accent: #7db7ea; --best: #1d3c58; --depth: 72%; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --muted: #444; --line: #ccc; --page: #fff; --card: #fff;
    --accent: #1f5f9e; --best: #dcebf7; --depth: 62%; }
}
"""


def color_of(place: int) -> str:
    """The colour of the ``place``-th of several things."""
    if place < len(PALETTE):
        return PALETTE[place]
    return f"hsl({place * GOLDEN_ANGLE % 360:.0f} 55% 42%)"


def expert_colors(experts: Sequence[int]) -> str:
    """A rule an expert, by index: ``.e3`` has its colour as ``--c`` and that of text upon it as ``--on``.

    In a small pool an expert has the same colour on every page; in a larger one the palette goes to those
    that come first.
    """
    small = all(e < len(PALETTE) for e in experts)
    rules = []
    for place, e in enumerate(experts):
        color = color_of(e if small else place)
        on = INK if color in DARK_TEXT_ON else "#fff"
        rules.append(f".e{e} {{ --c: {color}; --on: {on}; }}\n")
    return "".join(rules)
