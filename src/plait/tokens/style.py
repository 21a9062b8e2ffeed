"""How tokens.html looks, by day and by night."""

COLOURS = ("#3b6ea8", "#d9822b", "#4f9d69", "#a8527a", "#7a68b3", "#8a7a4d", "#3f9aa6", "#c0504d")
BY_NIGHT = ("#74a9e6", "#f0a35a", "#79c994", "#d586ac", "#a899e0", "#c2b17e", "#6cc5d1", "#e58581")


def _classes(colours: tuple[str, ...]) -> str:
    return " ".join(f".c{number} {{ --c: {colour}; }}" for number, colour in enumerate(colours))


STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1d2733; --grey: #56616d; --paper: #fff; --card: #f4f6f8;
  --line: #dfe4e9; --learnt: #c9ecd3; --learnt2: #addfbc; --given: #eceff3; --given2: #dfe4ea;
  --mark: #8a4b08; --picture: #3b6ea8; --loss: #3f9a5f; --text: #b9c1ca; }}
{_classes(COLOURS)}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ed; --grey: #a0abb7; --paper: #14181d; --card: #1d232a; --line: #323b45;
    --learnt: #1e4b30; --learnt2: #296440; --given: #2a323b; --given2: #36404b; --mark: #ffc078;
    --picture: #74a9e6; --loss: #57b87a; --text: #56616d; }}
  {_classes(BY_NIGHT)}
}}
* {{ box-sizing: border-box; }}
html {{ scroll-behavior: smooth; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 2.2rem 1.25rem 4rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0; }}
h2 {{ font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 1.8rem 0 .3rem; }}
p {{ margin: .2rem 0 .9rem; color: var(--grey); max-width: 52rem; }}
a {{ color: inherit; }}
nav {{ display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .8rem 0 0; font-size: .9rem; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .7rem;
  margin: 1.3rem 0; padding: 0; list-style: none; }}
.figures li {{ background: var(--card); border-radius: .5rem; padding: .65rem .9rem; color: var(--grey);
  font-size: .82rem; }}
.figures b {{ display: block; font-size: 1.3rem; color: var(--ink); font-variant-numeric: tabular-nums; }}
.bar {{ display: flex; height: 1.1rem; border-radius: .3rem; overflow: hidden; gap: 1px;
  background: var(--line); }}
.bar > * {{ min-width: 0; background: var(--c); }}
.key {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin: .5rem 0 1rem; }}
.dot {{ display: inline-block; width: .75rem; height: .75rem; border-radius: .2rem; margin-right: .4rem;
  background: var(--c); vertical-align: -1px; }}
.parts {{ display: grid; grid-template-columns: minmax(5rem, auto) 1fr auto; gap: .45rem .9rem;
  align-items: center; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .8rem 0 1.2rem; }}
.parts > :nth-child(3n) {{ text-align: right; }}
.picture {{ --c: var(--picture); }} .loss {{ --c: var(--loss); }} .rest {{ --c: var(--text); }}
.wide {{ overflow-x: auto; margin-bottom: 1.2rem; }}
table {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ padding: .3rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }}
th {{ color: var(--grey); font-weight: 600; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
tr:last-child td {{ border-bottom: 0; }}
tr.sum td {{ font-weight: 600; border-top: 1px solid var(--grey); }}
.why td {{ vertical-align: top; text-align: left; }}
.why td:nth-child(2), .why td:nth-child(3) {{ text-align: right; }}
.why th:nth-child(4) {{ text-align: left; }}
.why td:last-child, .why th:last-child {{ text-align: left; white-space: normal;
  min-width: 16rem; width: 60%; }}
.plain th, .plain td {{ text-align: left; }}
.why ul {{ margin: 0; padding: 0; list-style: none; }}
.why li {{ overflow-wrap: anywhere; }} .why li + li {{ margin-top: .35rem; }}
code {{ font: .84em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }}
li code {{ color: var(--grey); display: block; }}
pre {{ background: var(--card); padding: .8rem 1rem; border-radius: .5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .8rem/1.5 ui-monospace, monospace; max-height: 14rem; overflow-y: auto; }}
details {{ margin: 0 0 1rem; }} summary {{ cursor: pointer; color: var(--grey); font-size: .88rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: .6rem
  1.4rem; }}
svg {{ width: 100%; max-width: 26rem; height: auto; display: block; }}
svg text {{ font: 10.5px system-ui, sans-serif; fill: var(--grey); }} svg .words {{ fill: var(--ink);
  font-size: 11.5px; }}
.grid {{ stroke: var(--line); fill: none; }} .axis {{ stroke: var(--grey); fill: none; }}
.line {{ fill: none; stroke: var(--c); stroke-width: 1.8; }} .line.more {{ stroke-dasharray: 5 3; }}
.area {{ fill: var(--c); }}
.charts {{ margin-bottom: 1rem; }}
.samples {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(32rem, 100%), 1fr)); gap:
  .9rem;
  align-items: start; }}
article {{ border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; min-width: 0; }}
article header {{ background: var(--card); padding: .5rem .8rem; font-size: .8rem; color: var(--grey);
  overflow-wrap: anywhere; }}
article header b {{ display: block; color: var(--ink); font: 600 .84rem/1.4 ui-monospace, monospace; }}
.said {{ padding: .7rem .8rem; max-height: 24rem; overflow-y: auto; white-space: pre-wrap; line-height: 1.75;
  overflow-wrap: anywhere; font-size: .92rem; unicode-bidi: isolate; scrollbar-width: thin; }}
i, em {{ font-style: normal; border-radius: .15rem; padding: .1em 0; background: var(--b); }}
.y i:nth-of-type(odd), .y em {{ --b: var(--learnt); }} .y i:nth-of-type(even) {{ --b: var(--learnt2); }}
.n i:nth-of-type(odd), .n em {{ --b: var(--given); }} .n i:nth-of-type(even) {{ --b: var(--given2); }}
em {{ font: .8em ui-monospace, monospace; color: var(--mark); border: 1px solid currentColor; padding: 0
  .25em;
  margin: 0 1px; }}
.said i:hover, .said em:hover {{ outline: 2px solid var(--mark); position: relative; }}
.said i:hover::after, .said em:hover::after {{ content: "token " attr(data-i); position: absolute; left: 0;
  top: 100%; z-index: 1;
  background: var(--ink); color: var(--paper); font: .75rem/1.4 system-ui, sans-serif; padding: .1rem .4rem;
  border-radius: .2rem; white-space: nowrap; }}
figure {{ display: inline-block; margin: .2rem .4rem .2rem 0; vertical-align: top; max-width: 100%; }}
figure img {{ display: block; max-width: 100%; height: auto; border-radius: .3rem; background: var(--card);
  min-width: 3rem; image-rendering: auto; }}
figcaption, .more-of {{ font-size: .74rem; line-height: 1.35; color: var(--grey); }}
@media (max-width: 44rem) {{
  .why, .why tbody, .why tr, .why td:last-child {{ display: block; }} .why th {{ display: none; }}
  .why tr + tr + tr {{ border-top: 1px solid var(--line); padding-top: .4rem; }}
  .why td {{ display: inline-block; border: 0; padding: .1rem .8rem .1rem 0; white-space: normal; }}
  .why td:first-child {{ font-weight: 600; }} .why td:nth-child(3)::after {{ content: " of read"; }}
  .why td:last-child {{ width: auto; min-width: 0; }}
}}
@media print {{ .said {{ max-height: none; }} }}
"""
