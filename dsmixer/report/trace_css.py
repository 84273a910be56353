"""The look of texts whose tokens are coloured by expert: light and dark, on a phone, and in print."""

from __future__ import annotations

from dsmixer.report.colors import VARIABLES

TOKEN_CSS = """
.legend { list-style: none; margin: 0; padding: 0; display: grid; gap: 4px 22px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); font-size: 14px; }
.legend li { display: flex; align-items: baseline; gap: 8px; min-width: 0; }
.legend .name { overflow-wrap: anywhere; unicode-bidi: isolate; }
.legend .figure { color: var(--muted); margin-left: auto; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.chip { display: inline-block; min-width: 1.6em; text-align: center; border-radius: 4px; font-size: 12px;
  line-height: 1.5; color: var(--on, #fff); background: var(--c, #6b7583); }
.text { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  position: relative; line-height: 1; }
.token { display: inline-block; vertical-align: top; margin: 0 1px 7px 0; max-width: 100%;
  unicode-bidi: isolate; }
.token > summary, .unread { list-style: none; text-align: center; border-radius: 4px; }
.token > summary { cursor: pointer; }
.token > summary::-webkit-details-marker { display: none; }
.token > summary:focus-visible { outline: 2px solid var(--ink); }
.piece { display: block; white-space: pre-wrap; overflow-wrap: anywhere; padding: 4px 1px 3px;
  min-width: .7em; font-size: 16px; line-height: 1.3; border-bottom: 3px solid var(--c, var(--line));
  border-radius: 3px 3px 0 0; overflow: hidden;
  background: color-mix(in srgb, var(--c, transparent) calc(var(--w, 0) * var(--depth)), transparent); }
.token i { display: block; font: 600 10px/1.5 ui-monospace, Menlo, Consolas, monospace; color: var(--muted); }
.token[open] > summary .piece { outline: 2px solid var(--ink); }
.panel { position: absolute; left: 8px; right: 8px; z-index: 2; margin-top: 4px; padding: 12px 14px;
  text-align: left; font-size: 14px; line-height: 1.45; background: var(--card);
  border: 1px solid var(--muted); border-radius: 8px; max-height: 70vh; overflow: auto;
  box-shadow: 0 8px 30px rgb(0 0 0 / .25); }
.panel p { margin: 0 0 8px; }
.panel table { border-collapse: collapse; font-size: 13px; }
.panel th { font-weight: 500; text-align: left; }
.panel td, .panel th { padding: 2px 8px 2px 0; border: 0; }
.panel code { font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.panel .bars { width: 100%; margin-bottom: 10px; }
.panel .bars th { width: 40%; overflow-wrap: anywhere; }
.bar { display: block; height: 10px; border-radius: 5px; background: var(--c, var(--accent));
  width: calc(var(--w) * 100%); min-width: 2px; }
.panel .number { text-align: right; font-variant-numeric: tabular-nums; width: 3em; }
.panel .layers { width: 100%; font-variant-numeric: tabular-nums; }
.panel .layers th { color: var(--muted); }
.panel .layers td, .strip li { padding: 2px 6px; border: 1px solid var(--card); white-space: nowrap;
  background: color-mix(in srgb, var(--c, transparent) calc(var(--w, 0) * var(--depth)), transparent); }
.strip { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.strip li:first-child { background: none; }
.strip span { color: var(--muted); }
@media (max-width: 600px) {
  .text { padding: 10px; position: static; }
  .panel { position: fixed; left: 0; right: 0; bottom: 0; margin: 0; max-height: 60vh;
    border-radius: 12px 12px 0 0; }
}
@media print {
  .panel { display: none; }
  .piece, .chip, .bar { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .token { break-inside: avoid; }
}
"""

TRACE_CSS = (
    VARIABLES
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 28px 20px 60vh; }
h1 { margin: 0 0 10px; font-size: 25px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 26px 0 8px; font-size: 16px; }
.lead, .note { color: var(--muted); font-size: 14px; margin: 0 0 14px; }
.numbers { margin-top: 30px; }
.numbers > summary { cursor: pointer; color: var(--muted); font-size: 14px; }
.numbers table { margin-top: 10px; width: 100%; background: var(--card); border-collapse: collapse;
  font-size: 13px; }
.numbers td, .numbers th { border-bottom: 1px solid var(--line); padding: 3px 8px; text-align: left; }
.numbers code { font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
"""
    + TOKEN_CSS
    + """
@media (max-width: 600px) {
  main { padding: 18px 12px 60vh; }
  h1 { font-size: 21px; }
}
@media print {
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
}
"""
)
