"""The style of the page, in the page itself."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a2130; --faint: #5d6675; --line: #dfe3ea; --paper: #fff; --card: #f7f8fa;
  --good: #00704e; --bad: #b3400a; --before: #7b8596; --after: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --faint: #9aa4b5; --line: #343b48; --paper: #14181f;
  --card: #1c222c; --good: #4cc79b; --bad: #ff9a62; --before: #8f9aad; --after: #6db3ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.6rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { margin: 1.6rem 0 .5rem; font-size: 1.05rem; }
p { max-width: 75ch; margin: .5rem 0; } .faint { color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: .8rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.tile em { font-style: normal; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: .88rem; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .7rem; text-align: right; vertical-align: top; } td span { white-space: nowrap; }
@media (max-width: 600px) { table { font-size: .8rem; width: 100%; } th, td { padding: .25rem .2rem; }
  .tile { padding: .7rem; } .tile b { font-size: 1.1rem; } }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
tr.all td { border-top: 1px solid var(--line); font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .88rem; color: var(--faint); margin-bottom: .3rem; }
svg { display: block; width: 100%; max-width: 560px; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--faint); } svg .axis { stroke: var(--line); } svg polyline { fill: none; stroke-width: 2; }
svg .before { stroke: var(--before); stroke-dasharray: 5 4; } svg .after { stroke: var(--after); }
svg circle.before { fill: var(--before); stroke: none; } svg circle.after { fill: var(--after); }
svg text.before { fill: var(--before); stroke: none; } svg text.after { fill: var(--after); stroke: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: .9rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .8rem; font-size: .9rem; min-width: 0; }
.card img { display: block; max-width: 100%; height: 150px; object-fit: contain;
  margin: 0 auto .6rem; border-radius: 4px; }
.card p { overflow-wrap: anywhere; margin: 0 0 .5rem; max-height: 9rem; overflow-y: auto; }
.said { display: grid; grid-template-columns: auto minmax(0, 1fr) minmax(0, auto); gap: .1rem .7rem; }
.said div { overflow-wrap: anywhere; max-height: 7rem; overflow-y: auto; }
details { border: 1px solid var(--line); border-radius: 10px; padding: .5rem .9rem; margin: .7rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; } details .cards { margin: .7rem 0 .3rem; }
"""
