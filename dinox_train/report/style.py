"""The report's style sheet: one column on a phone, two on a desk, light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f5f7f9; --card: #ffffff; --ink: #18212b; --soft: #566473; --line: #e1e7ec; --hover: #18212b14;
  --first: #2468b0; --second: #c2571a; --third: #6a4fb3;
  --good: #287d57; --watch: #a86a08; --bad: #c0322b; --alarm: #c0322b26;
  --part0: #2468b0; --part1: #c2571a; --part2: #6a4fb3; --part3: #287d57; --part4: #a86a08; --part5: #b0417f;
  --part6: #3d8b99; --part7: #7d8a3a; --rest: #b9c4ce; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #0e1318; --card: #161c23; --ink: #e6ebf0; --soft: #97a5b3; --line: #28313b; --hover: #ffffff1a;
  --first: #6eb0f2; --second: #f2a065; --third: #b39df5;
  --good: #6bc99a; --watch: #e5b252; --bad: #f2827b; --alarm: #f2827b38;
  --part0: #6eb0f2; --part1: #f2a065; --part2: #b39df5; --part3: #6bc99a; --part4: #e5b252; --part5: #e58cbe;
  --part6: #76c4d1; --part7: #b9c777; --rest: #44515e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
header p, section > p { max-width: 46em; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
p.intro { color: var(--soft); margin: 0 0 16px; }
.kind { color: var(--soft); font-size: 14px; }
.state { color: var(--soft); margin: 6px 0 20px; }
.state b { color: var(--ink); }
.bar { height: 4px; border-radius: 2px; background: var(--line); margin: 0 0 24px; }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--first); }
.verdict { border-left: 4px solid; padding: 2px 0 2px 16px; font-size: 19px; line-height: 1.4; }
.verdict.good { border-color: var(--good); }
.verdict.watch { border-color: var(--watch); }
.verdict.bad { border-color: var(--bad); }
ul.findings { list-style: none; margin: 18px 0 0; padding: 0; color: var(--soft); font-size: 14px; }
ul.findings li { padding: 2px 0 2px 20px; position: relative; }
ul.findings li::before { content: ""; position: absolute; left: 2px; top: 9px; width: 8px; height: 8px;
  border-radius: 50%; background: var(--good); }
ul.findings li.watch { color: var(--ink); }
ul.findings li.watch::before { background: var(--watch); border-radius: 1px; transform: rotate(45deg); }
ul.findings li.bad { color: var(--ink); }
ul.findings li.bad::before { background: var(--bad); border-radius: 1px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 12px; margin: 32px 0 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.figures dt { color: var(--soft); font-size: 13px; }
.figures dd { margin: 0; font-size: 24px; line-height: 1.35; white-space: nowrap; }
.figures dd + dd { color: var(--soft); font-size: 12px; white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.charts.wide { grid-template-columns: 1fr; margin-bottom: 16px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 20px 12px; min-width: 0; display: flex; flex-direction: column; }
.chart figcaption p { color: var(--soft); font-size: 13px; line-height: 1.45; max-width: 52em; }
.chart .empty { color: var(--soft); font-size: 13px; padding: 8px 0; }
.chart .legend { margin-top: 6px; color: var(--ink); display: flex; flex-wrap: wrap; gap: 2px 16px; }
.legend i { display: inline-block; width: 16px; height: 0; border-top: 2px solid; margin-right: 6px;
  vertical-align: 4px; }
.legend i.first { border-color: var(--first); }
.legend i.second { border-color: var(--second); }
.legend i.third { border-color: var(--third); }
.legend i.faint { opacity: 0.4; }
.legend i.resumed { border-top: 2px dashed var(--soft); }
.legend i.skipped { width: 0; height: 12px; border-top: 0; border-left: 2px solid var(--bad); vertical-align: -2px; }
.legend i.back { border-top: 2px dotted var(--bad); }
.legend i.alarm { height: 12px; border-top: 0; background: var(--alarm); vertical-align: -2px; }
.chart figcaption { margin-bottom: 30px; }
.charts + .charts { margin-top: 16px; }
.stages { margin-bottom: 16px; }
.stages figcaption { margin-bottom: 12px; }
.parts { display: flex; height: 22px; border-radius: 5px; overflow: hidden; background: var(--rest); }
.parts i { display: block; height: 100%; min-width: 1px; }
.stages .legend { margin: 10px 0 4px; font-size: 13px; }
.stages .legend i { width: 10px; height: 10px; border: 0; border-radius: 2px; vertical-align: -1px; }
.stages .part0 { background: var(--part0); } .stages .part1 { background: var(--part1); }
.stages .part2 { background: var(--part2); } .stages .part3 { background: var(--part3); }
.stages .part4 { background: var(--part4); } .stages .part5 { background: var(--part5); }
.stages .part6 { background: var(--part6); } .stages .part7 { background: var(--part7); }
.stages .rest { background: var(--rest); }
.plot { position: relative; height: 170px; margin: auto 6px 26px 52px; }
.wide .plot { height: 260px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.8; stroke-linejoin: round; }
.plot path.first { stroke: var(--first); }
.plot path.second { stroke: var(--second); }
.plot path.third { stroke: var(--third); }
.plot path.faint { opacity: 0.35; stroke-width: 1; }
.plot path.dots { stroke-width: 6; stroke-linecap: round; }
.plot path.faint.dots { stroke-width: 4; }
.plot path.level { stroke: var(--line); stroke-width: 1; }
.plot path.resumed { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; }
.plot path.back { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 3; }
.plot path.alarm { fill: var(--alarm); stroke: none; }
.plot path.skipped { stroke: var(--bad); stroke-width: 2; }
.plot span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap; }
.plot span.y { right: 100%; padding-right: 8px; transform: translateY(-50%); }
.plot span.x { top: 100%; padding-top: 8px; transform: translateX(-50%); }
.plot span.x.start { transform: none; }
.plot span.x.end { transform: translateX(-100%); }
.hover { position: absolute; inset: 0; display: flex; }
.hover i { flex: 1; font-style: normal; }
.hover i:hover { background: var(--hover); }
.hover b { display: none; position: absolute; right: 0; bottom: 100%; margin-bottom: 4px; padding: 0 0 0 8px;
  font: inherit; font-size: 12px; color: var(--ink); background: var(--card); pointer-events: none; }
.hover i:hover b { display: block; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
td, th { text-align: left; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; font-weight: normal; }
th { color: var(--soft); }
.timeline { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 20px 26px;
  margin: 0 0 16px; }
.lane { display: grid; grid-template-columns: 170px 1fr 48px; gap: 0 12px; align-items: center; padding: 3px 0; }
.lane b { font-weight: 400; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; line-height: 1.3; }
.lane span { position: relative; height: 12px; background: var(--line); border-radius: 3px; overflow: hidden; }
.lane u { text-decoration: none; font-size: 13px; color: var(--soft); text-align: right; }
.lane span i { position: absolute; top: 0; height: 100%; min-width: 3px; margin-left: -1px; background: var(--first); }
.lane.grave i { background: var(--watch); }
.lane.alarm i { background: var(--bad); }
.lane.alarm b { color: var(--ink); }
.lane.scale span { background: none; overflow: visible; }
.lane.scale span i { background: none; font: normal 12px/1 system-ui, sans-serif; color: var(--soft); top: 2px;
  transform: translateX(-50%); }
.lane.scale span i:first-child { transform: none; }
.lane.scale span i:last-child { transform: translateX(-80%); }
table.events th:first-child { width: 5.5em; }
table.events td:nth-child(2) { width: 9em; }
table.events tr.grave td:nth-child(2) { color: var(--bad); }
table.numbers { width: auto; margin: 0 0 6px; }
table.numbers td, table.numbers th { padding-right: 24px; }
p.note { color: var(--soft); font-size: 13px; margin: 0 0 16px; }
.picture + .picture { margin-top: 24px; }
.charts + .picture { margin-top: 24px; }
.picture { margin: 0 0 24px; }
.picture img { display: block; max-width: 100%; height: auto; border-radius: 10px; }
.picture figcaption { color: var(--soft); font-size: 14px; margin: 8px 0 0; max-width: 52em; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 20px;
  margin: 0 0 12px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre.digest { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 20px;
  margin: 0; }
footer { color: var(--soft); font-size: 13px; margin-top: 40px; }
@media (max-width: 560px) {
  main { padding: 24px 14px 40px; }
  h1 { font-size: 24px; }
  .verdict { font-size: 17px; }
  .figures { grid-template-columns: 1fr 1fr; gap: 8px; }
  .figures dd { font-size: 21px; }
  .chart { padding: 14px 12px 10px; }
  .plot { margin-left: 46px; }
  .wide .plot { height: 200px; }
  .timeline { padding: 10px 12px 26px; }
  .lane { grid-template-columns: 1fr auto; gap: 1px 8px; padding: 4px 0; }
  .lane span { grid-row: 2; grid-column: 1 / 3; }
  .lane.scale b { display: none; }
  details, pre.digest { padding: 10px 12px; }
  pre { font-size: 12px; }
  td, th { padding: 5px 8px 5px 0; font-size: 13px; }
  table.numbers td, table.numbers th { padding-right: 10px; }
  table.events th:first-child { width: 4.2em; }
  table.events td:nth-child(2) { width: 6em; } }
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .chart, .picture, .figures div, .timeline, .stages, pre.digest, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr; }
  .charts.wide { grid-template-columns: 1fr; }
  .hover { display: none; } }
"""
