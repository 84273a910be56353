"""The look of a traced text: light and dark, on a phone, and in print."""

from __future__ import annotations

PALETTE = ("#2f6fb7", "#d9722b", "#2e8b6f", "#8a5bb5", "#c2496b", "#7f8c3a", "#2a9db0", "#9c6b4e")
GOLDEN_ANGLE = 137.508  # hues of further experts keep clear of each other


def expert_colors(num_experts: int) -> str:
    """A rule a expert: ``.e3`` has its colour as ``--c``."""
    rules = []
    for e in range(num_experts):
        color = PALETTE[e] if e < len(PALETTE) else f"hsl({e * GOLDEN_ANGLE % 360:.0f} 55% 48%)"
        rules.append(f".e{e} {{ --c: {color}; }}\n")
    return "".join(rules)


TRACE_CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5b6675; --line: #dfe4ec; --page: #f6f7f9;
  --card: #fff; --depth: 62%; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #9aa5b4; --line: #333c49; --page: #14181e; --card: #1d232b; --depth: 72%; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 28px 20px 60vh; }
h1 { margin: 0 0 10px; font-size: 25px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 26px 0 8px; font-size: 16px; }
.lead, .note { color: var(--muted); font-size: 14px; margin: 0 0 14px; }
.legend { list-style: none; margin: 0; padding: 0; display: grid; gap: 4px 22px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); font-size: 14px; }
.legend li { display: flex; align-items: baseline; gap: 8px; min-width: 0; }
.legend .name { overflow-wrap: anywhere; }
.legend .figure { color: var(--muted); margin-left: auto; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.chip { display: inline-block; min-width: 1.6em; text-align: center; border-radius: 4px; font-size: 12px;
  line-height: 1.5; color: #fff; background: var(--c, #7b8594); }
.text { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  position: relative; line-height: 1; }
.token { display: inline-block; vertical-align: top; margin: 0 1px 7px 0; max-width: 100%; }
.token > summary, .unread { list-style: none; text-align: center; border-radius: 4px; }
.token > summary { cursor: pointer; }
.token > summary::-webkit-details-marker { display: none; }
.token > summary:focus-visible { outline: 2px solid var(--ink); }
.piece { display: block; white-space: pre-wrap; overflow-wrap: anywhere; padding: 4px 1px 3px;
  min-width: .7em; font-size: 16px; line-height: 1.3; border-bottom: 3px solid var(--c, var(--line));
  border-radius: 3px 3px 0 0;
  background: color-mix(in srgb, var(--c, transparent) calc(var(--w, 0) * var(--depth)), transparent); }
.token i { display: block; font: 600 10px/1.5 ui-monospace, Menlo, Consolas, monospace; color: var(--muted); }
.token[open] > summary .piece { outline: 2px solid var(--ink); }
.panel { position: absolute; left: 8px; right: 8px; z-index: 2; margin-top: 4px; padding: 12px 14px;
  text-align: left; font-size: 14px; line-height: 1.45; background: var(--card);
  border: 1px solid var(--muted); border-radius: 8px; max-height: 70vh; overflow: auto;
  box-shadow: 0 8px 30px rgb(0 0 0 / .25); }
.panel p { margin: 0 0 8px; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; }
th { font-weight: 500; text-align: left; }
td, th { padding: 2px 8px 2px 0; }
.bars { width: 100%; margin-bottom: 10px; }
.bars th { width: 40%; overflow-wrap: anywhere; }
.bar { display: block; height: 10px; border-radius: 5px; background: var(--c); width: calc(var(--w) * 100%);
  min-width: 2px; }
.number { text-align: right; font-variant-numeric: tabular-nums; width: 3em; }
.layers { width: 100%; font-variant-numeric: tabular-nums; }
.layers th { color: var(--muted); }
.layers td { padding: 2px 6px; border: 1px solid var(--card); white-space: nowrap;
  background: color-mix(in srgb, var(--c, transparent) calc(var(--w, 0) * var(--depth)), transparent); }
.numbers { margin-top: 30px; }
.numbers > summary { cursor: pointer; color: var(--muted); font-size: 14px; }
.numbers table { margin-top: 10px; width: 100%; background: var(--card); }
.numbers td, .numbers th { border-bottom: 1px solid var(--line); padding: 3px 8px; }
@media (max-width: 600px) {
  main { padding: 18px 12px 60vh; }
  h1 { font-size: 21px; }
  .text { padding: 10px; position: static; }
  .panel { position: fixed; left: 0; right: 0; bottom: 0; margin: 0; max-height: 60vh;
    border-radius: 12px 12px 0 0; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --muted: #444; --line: #ccc; --page: #fff;
    --card: #fff; --depth: 62%; }
  main { max-width: none; padding: 0; }
  .panel { display: none; }
  .piece, .chip, .bar { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h2 { break-after: avoid; }
  .token { break-inside: avoid; }
}
"""
