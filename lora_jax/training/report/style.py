"""The frame of the page and its style sheet."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1b1b1a; --soft: #5c5b57; --rule: #e3e2dd;
  --train: #2563c9; --held: #b4500b; --good: #1a7440; --bad: #b3261e; --warn: #8a5a00;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1b1c1f; --text: #ececea; --soft: #a5a6aa; --rule: #34363b;
    --train: #7cb0ff; --held: #ffa45c; --good: #6fd08c; --bad: #ff8a80; --warn: #f0c060;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 var(--sans); }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1, h2, h3, h4, p, dl, dd, figure, pre { margin: 0; }
h1 { font-size: 1.75rem; font-weight: 650; line-height: 1.2; letter-spacing: -0.015em; }
h2 { font-size: 1.1rem; font-weight: 650; margin-bottom: 0.85rem; }
h3 { font-size: 0.9rem; font-weight: 600; }
h4, .note, small, dt { font-size: 0.8rem; font-weight: 400; color: var(--soft); }
h1, p, dd { overflow-wrap: anywhere; }
section { margin-top: 2.75rem; break-inside: avoid; min-width: 0; }
.about { margin-top: 0.6rem; color: var(--soft); }
.status { margin-right: 0.75rem; font-weight: 600; color: var(--warn); }
.status.finished, .good { color: var(--good); }
.status.failed, .bad { color: var(--bad); }
.status.running { color: var(--train); }
.figures, article, .chart { background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr));
  gap: 1.25rem; margin-top: 1.5rem; padding: 1.1rem 1.25rem; }
.figures dd:not(.note) { font-size: 1.3rem; font-weight: 600; line-height: 1.4;
  letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.two, .three, .pair, .some, .answers { display: grid; gap: 1rem;
  grid-template-columns: minmax(0, 1fr); }
.two, .some { row-gap: 0; }
.below { margin-top: 0.6rem; }
.chart { padding: 0.9rem 1.1rem 0.8rem; }
.chart.loss, .pair { margin-bottom: 1rem; }
figcaption { display: flex; flex-wrap: wrap; align-items: center; gap: 0.25rem 1.1rem; }
.key { font-size: 0.8rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; vertical-align: 0.22em; width: 1.1rem;
  margin-right: 0.4rem; border-top: 2px solid var(--train); }
.key.held::before { width: 9px; height: 9px; border: 0; border-radius: 50%;
  background: var(--held); vertical-align: 0; }
.key.broken::before { border-top: 2px dotted var(--bad); }
.plot { padding: 0.9rem 0.9rem 3rem 3rem; }
.plot > svg { display: block; width: 100%; height: 9rem; overflow: visible; }
.several .plot > svg { height: 14rem; }
.loss .plot > svg { height: 18rem; }
svg svg { overflow: visible; }
svg text { font: 12px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); }
.tick { stroke: var(--soft); }
.line { fill: none; stroke: var(--train); stroke-width: 1.75; stroke-linejoin: round;
  stroke-linecap: round; vector-effect: non-scaling-stroke; }
.line.own { stroke: currentColor; }
.own circle { fill: currentColor; }
.key.own::before { border-top-color: currentColor; }
.line.held { stroke: var(--held); stroke-width: 1; }
.band { fill: var(--train); opacity: 0.22; }
.alone { fill: var(--train); }
circle.held { fill: var(--held); stroke: var(--card); stroke-width: 1.5; }
line.broken { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 3; }
.told { fill: transparent; }
.told:hover { fill: var(--text); opacity: 0.07; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.75rem 0.4rem 0; border-bottom: 1px solid var(--rule);
  text-align: right; font-weight: 400; }
th[scope="row"] { text-align: left; color: var(--soft); }
thead th { font-weight: 600; vertical-align: bottom; }
th small { display: block; }
td:last-child, th:last-child { padding-right: 0; }
section > table { width: 100%; }
.bars th, .bars td { white-space: nowrap; }
.bars .bar { width: 40%; }
.bar svg { display: block; width: 100%; height: 0.6rem; }
.bar rect { fill: var(--train); rx: 2px; }
article { padding: 1rem 1.1rem; }
article + article { margin-top: 1rem; }
article h3 { font-size: 0.8rem; font-weight: 400; color: var(--soft); }
pre { font: 13px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 24rem; overflow-y: auto; }
code { font-family: var(--mono); white-space: nowrap; }
.answers { margin-top: 0.9rem; }
.answers h4 { margin-bottom: 0.3rem; }
.answers pre { padding: 0.65rem 0.8rem; background: var(--page); border: 1px solid var(--rule);
  border-radius: 6px; }
.listed > div { display: grid; grid-template-columns: minmax(8rem, 1fr) 2.2fr; gap: 1rem;
  padding: 0.3rem 0; border-bottom: 1px solid var(--rule); break-inside: avoid; }
.listed dt { line-height: 1.6; }
.listed dd { font: 13px/1.5 var(--mono); min-width: 0; }
@media (min-width: 46rem) {
  .two { grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 3rem; }
  .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .some { grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); column-gap: 3rem; }
  .answers { grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
  .many { columns: 2; column-gap: 3rem; }
}
@media (max-width: 30rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .chart { padding-inline: 0.8rem; }
  .plot { padding-left: 2.6rem; }
  .loss .plot > svg { height: 13rem; }
}
"""
