"""The style sheet of the page: dark text on light, one column on a phone, whole tables in print."""

CSS = """
:root { color-scheme: light; --ink: #1c2430; --muted: #5b6675; --line: #e3e7ee;
  --accent: #2563a8; --best: #e3f1ea; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
header p { margin: 0; color: var(--muted); }
h1 { margin: 0 0 4px; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 19px; border-bottom: 1px solid var(--line); padding-bottom: 6px; }
h3 { margin: 24px 0 8px; font-size: 15px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 22px 0 0; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
.card, figure { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 4px 16px; overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px; overflow-x: auto; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure svg { display: block; height: auto; margin: 0 auto; font-family: inherit; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 7px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; }
.long { max-height: 640px; overflow-y: auto; }
.long thead th { position: sticky; top: 0; background: #fff; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.best { background: var(--best); font-weight: 700; }
tr.mean > * { border-top: 2px solid var(--line); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(120px, 220px) 1fr; margin: 10px 0; gap: 5px 16px;
  font-size: 14px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.note { color: var(--muted); font-size: 13px; margin: 8px 0 12px; }
@media (max-width: 560px) {
  main { padding: 18px 12px 40px; }
  h1 { font-size: 23px; }
  th, td { padding: 6px 7px; }
  .card { padding: 2px 8px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: 10px 12px; }
  .tile b { font-size: 20px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print {
  body { background: #fff; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .tile, figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .card, figure { overflow: visible; max-height: none; border-color: #ccc; }
  td.best { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
