"""The style sheet of a comparison's page: a phone, a desktop, dark mode and A4."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --page: #fff; --ink: #24292f; --faint: #57606a; --line: #d0d7de; --grid: #dde2e8; --shade: #eef1f5; --lead: #f3f6fa;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
}
/* Only on screens: what is printed is black on white whatever the system's mode. */
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --ink: #dfe3e8; --faint: #9da7b3; --line: #363d47; --grid: #2c323b; --shade: #1d222a;
    --lead: #1c2129; --c0: #4098d7; --c1: #f08035; --c2: #2cc295; --c3: #dc96bc; --c5: #a8dcff;
  }
  .pictures img { filter: brightness(.88); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 1140px; background: var(--page); color: var(--ink);
  font: 16px/1.5 var(--font); overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.25rem; line-height: 1.25; break-after: avoid; }
h3 { margin: 0 0 .35rem; font-size: 1rem; font-weight: 600; break-after: avoid; }
p { margin: .5rem 0; max-width: 75ch; }
.lead { background: var(--lead); border-left: 4px solid var(--c0); padding: .9rem 1.1rem; border-radius: 0 6px 6px 0; }
.lead p { margin: 0; } .lead p + p, .lead ul { margin: .5rem 0 0; padding: 0; list-style: none; }
.lead li { margin-top: .3rem; }
.lead p:first-child { font-size: 1.2rem; line-height: 1.4; font-weight: 600; }
.faint, figcaption, .note { color: var(--faint); font-size: .875rem; line-height: 1.45; }
figure { margin: 1rem 0; break-inside: avoid; }
figcaption { margin-top: .35rem; }
.note, figcaption { max-width: 100ch; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
.narrow { display: none; }
.swatch { width: 28px; height: 12px; flex: none; display: inline-block; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; list-style: none; padding: 0; margin: .6rem 0; }
.named { display: inline-flex; align-items: baseline; gap: .5rem; }
.dashed { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: normal; }
thead th { border-top: 0; font-size: .8rem; line-height: 1.3; color: var(--faint); font-weight: 600;
  vertical-align: bottom; white-space: normal; }
.settings th { overflow-wrap: anywhere; min-width: 8rem; }
tbody th { font-weight: 600; min-width: 12rem; max-width: 22rem; overflow-wrap: anywhere; background: var(--page); }
tbody tr.seed th { font-weight: 400; padding-left: 1.5rem; }
tbody tr.seed { font-size: .925em; color: var(--faint); }
tbody tr.seed th, tbody tr.seed td { border-top: 0; padding-top: .1rem; padding-bottom: .35rem; }
.number { text-align: right; }
.number small { white-space: nowrap; }
td.number, .group td { white-space: nowrap; }
.number small, td small { display: block; color: var(--faint); font-size: .85em; }
td.value { min-width: 7rem; max-width: 26rem; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { margin: .3rem 0; padding: .7rem .9rem; background: var(--shade); border-radius: 6px; white-space: pre-wrap; }
.grid { display: grid; gap: 1rem 1.6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.grid figure { margin: 0; max-width: 540px; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); margin: .5rem 0; }
.pictures figure { margin: 0; }
.pictures img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px;
  background: #fff; }
.pictures figcaption { margin: 0 0 .3rem; color: var(--ink); }
.none { border: 1px dashed var(--line); border-radius: 4px; padding: 1rem; color: var(--faint); font-size: .875rem; }
details { margin: .7rem 0; }
summary { cursor: pointer; padding: .35rem 0; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: .8rem 0; }
dt { color: var(--faint); } dd { margin: 0; min-width: 0; }
@media (max-width: 640px) {
  body { padding: 1.1rem 1rem 2.5rem; }
  h1 { font-size: 1.35rem; } .lead p:first-child { font-size: 1.08rem; }
  .wide { display: none; } .narrow { display: block; }
  .pictures { grid-template-columns: 1fr; }
  th, td { padding: .4rem .55rem; }
  tbody th { min-width: 8rem; max-width: 9.5rem; position: sticky; left: 0; border-right: 1px solid var(--line); }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; }
}
@media print {
  @page { size: A4; margin: 14mm; }
  :root { color-scheme: light; --ink: #000; --faint: #333; }
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  .wide { display: block; } .narrow { display: none; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7.5pt; } thead th { font-size: 7pt; } th, td { padding: .2rem .35rem; }
  tbody th { min-width: 26mm; } td.value { min-width: 0; }
  .settings { table-layout: fixed; } .settings th { min-width: 0; }
  .settings .named { flex-direction: column; gap: .1rem; }
  .whole, details { break-inside: avoid; } .before, summary { break-after: avoid; }
  .wide svg { max-height: 92mm; }
  tr { break-inside: avoid; } thead { display: table-header-group; }
  .grid { grid-template-columns: repeat(2, 1fr); }
  /* A panel of six images is taller than wide: two rows of them fit a sheet. */
  .pictures { break-inside: avoid; }
  .pictures img { max-height: 108mm; object-fit: contain; object-position: left top; border: 0; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  summary { list-style: none; }
  .lead { background: none; border: 1px solid #000; border-left-width: 4px; border-radius: 0; }
  pre { background: none; border: 1px solid #999; }
}
"""
