"""The style sheet of the page: light and dark, one column on a phone, whole tables and figures in print."""

from __future__ import annotations

from dsmixer.report.colors import VARIABLES
from dsmixer.report.trace_css import TOKEN_CSS

CSS = (
    VARIABLES
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
header p { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
h1 { margin: 0 0 4px; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; unicode-bidi: isolate; }
h2 { margin: 40px 0 12px; font-size: 19px; border-bottom: 1px solid var(--line); padding-bottom: 6px; }
h3 { margin: 24px 0 8px; font-size: 15px; overflow-wrap: anywhere; }
h3 small { font-weight: 400; color: var(--muted); font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 20px 0 0; font-size: 14px; }
nav a { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 22px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  min-width: 0; overflow-wrap: anywhere; }
.tile b { display: block; font-size: 25px; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
.card, figure, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 4px 16px; overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px; overflow-x: auto; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure svg { display: block; height: auto; margin: 0 auto; font-family: inherit; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 7px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  unicode-bidi: isolate; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; }
.long { max-height: 640px; overflow-y: auto; }
.long thead th { position: sticky; top: 0; background: var(--card); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.best { background: var(--best); font-weight: 700; }
tr.mean > * { border-top: 2px solid var(--line); font-weight: 600; }
td.number > .bar { height: 5px; margin: 3px 0 0 auto; opacity: .75; width: calc(var(--w) * 160px); }
dl { display: grid; grid-template-columns: minmax(120px, 220px) 1fr; margin: 10px 0; gap: 5px 16px;
  font-size: 14px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
pre { margin: 0 0 14px; padding: 12px 14px; overflow: auto; max-height: 640px; font: 13px/1.5 ui-monospace,
  Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.folded { margin-top: 14px; }
.folded > summary { cursor: pointer; color: var(--accent); margin-bottom: 10px; }
.note { color: var(--muted); font-size: 13px; margin: 8px 0 12px; max-width: 80ch; }
.turn { display: inline-block; vertical-align: top; margin: 4px 4px 0 2px; color: var(--muted);
  font-size: 16px; line-height: 1.3; }
article { margin-top: 18px; }
"""
    + TOKEN_CSS
    + """
@media (max-width: 560px) {
  main { padding: 18px 12px 40px; }
  h1 { font-size: 23px; }
  th, td { padding: 6px 7px; }
  .card { padding: 2px 8px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: 10px 12px; }
  .tile b { font-size: 20px; }
  .card tr > :first-child { position: sticky; left: 0; background: var(--card); max-width: 40vw;
    overflow-wrap: break-word; }
  td.number > .bar { width: calc(var(--w) * 80px); }
  figure { padding: 6px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .figures { display: block; break-before: avoid; }
  figure { display: inline-block; width: 49%; margin: 0 0 10px; vertical-align: top; }
  figure.wide { width: 100%; }
  .tile, figure, tr, article, .note { break-inside: avoid; }
  h2, h3, thead, h2 + .note, h3 + .note { break-after: avoid; }
  .card, figure, pre { overflow: visible; max-height: none; }
  .long thead th { position: static; }
  td.best, figure svg { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
)
