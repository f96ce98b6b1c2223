"""The style sheet of a comparison's page: light and dark, narrow and wide, screen and paper."""

from lowssl_core.comparison.charts import DARK, css_name

_STYLE = """
*, *::before { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100% }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 48px }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 20px; letter-spacing: -.01em }
h2 { font-size: 1.2rem; margin: 44px 0 12px; letter-spacing: -.005em }
h3 { font-size: 1rem; margin: 20px 0 8px }
p, li { max-width: 78ch }
p { margin: 8px 0 }
.quiet, caption, footer { color: var(--soft); font-size: .875rem }
ul { margin: 0; padding: 0 }
li { list-style: none; overflow-wrap: anywhere }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: 12px }
.card, .chart, .scroll, .note, .picture { border: 1px solid var(--line); border-radius: 10px; background: var(--card) }
.card { padding: 14px 16px; border-top: 4px solid var(--c) }
.card b { overflow-wrap: anywhere }
.key { display: inline-block; min-width: 1.55em; padding: 0 .35em; margin-right: .45em; border-radius: 5px;
  background: var(--c); color: var(--card); font-weight: 700; font-size: .875em; line-height: 1.55; text-align: center }
.state { display: block; margin-top: 6px; font-size: .875rem }
.state::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .5em; border-radius: 50%;
  background: var(--soft) }
.done::before { background: var(--good) } .running::before { background: var(--c-0072b2) }
.stopped::before { background: var(--warn) } .failed::before { background: var(--bad) }
.note { margin: 16px 0 0; padding: 12px 16px; border-left: 4px solid var(--soft) }
.note.warning { border-left-color: var(--bad); background: var(--alarm) }
.note li + li { margin-top: 6px }
.scroll { overflow-x: auto; width: fit-content; max-width: 100% }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: 7px 12px; text-align: left; vertical-align: top; border-top: 1px solid var(--line) }
thead tr:first-child > * { border-top: 0 }
thead th { font-weight: 600; vertical-align: bottom; min-width: 5.5em; overflow-wrap: anywhere }
thead th.group { border-left: 1px solid var(--line); padding-bottom: 0 }
thead tr + tr th { border-top: 0; font-weight: 400; color: var(--soft) }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--card); min-width: 11em; max-width: 17em;
  overflow-wrap: anywhere }
.texts tbody th { max-width: 21em } .texts td { min-width: 8.5em; overflow-wrap: anywhere }
.figures td, .figures thead th { text-align: right; white-space: nowrap } .figures thead th.group { text-align: left }
.best { font-weight: 700; background: var(--prize) } .changed { background: var(--prize) }
.faint { color: var(--soft) }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px; font-size: .875rem }
.legend svg { width: 30px; height: 10px; margin-right: 6px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px }
.charts.wide { grid-template-columns: minmax(0, 560px) }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 340px)) }
figure { margin: 0; min-width: 0 }
.chart { padding: 10px 12px 8px }
.chart figcaption { font-weight: 600; font-size: .875rem; margin-bottom: 6px }
.chart svg { display: block; width: 100%; height: auto; font-family: inherit }
svg * { stroke-linejoin: round; stroke-linecap: butt }
.picture { overflow-x: auto; background: #fff; padding: 8px }
.picture img { display: block; width: 100%; min-width: 760px; height: auto }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 12px }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
@media (max-width: 560px) { main { padding: 20px 14px 32px } th, td { padding: 6px 9px } tbody th { max-width: 10em } }
@media print { body { background: #fff; font-size: 13px } main { max-width: none; padding: 0 } h2 { margin-top: 24px }
  .charts { grid-template-columns: repeat(3, minmax(0, 1fr)) } .charts.wide { grid-template-columns: 60% }
  .key, .best, .changed, .state::before { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .chart, .card, .note, tr { break-inside: avoid }
  h2, h3 { break-after: avoid } .scroll { overflow: visible } table { font-size: .7rem } th, td { padding: 3px 5px }
  tbody th, thead th, .texts tbody th { max-width: 21em } .texts td { min-width: 0 } .picture img { min-width: 0 } }
"""
_LIGHT_TONES = {
    "back": "#F6F7F8", "card": "#FFFFFF", "ink": "#22262B", "soft": "#5C6570", "line": "#E1E4E8", "good": "#1A8754",
    "warn": "#B97900", "bad": "#C5362B", "alarm": "#FDF3F1", "prize": "#E4F4EC",
}  # fmt: skip
_DARK_TONES = {
    "back": "#121519", "card": "#1B1F24", "ink": "#E4E7EA", "soft": "#9BA4AE", "line": "#30363D", "good": "#3CC99B",
    "warn": "#E3B341", "bad": "#FF7B6E", "alarm": "#2B1C1B", "prize": "#17382C",
}  # fmt: skip


def style() -> str:
    """The style sheet, with the charts' colors as custom properties of both schemes."""
    light = _variables(_LIGHT_TONES | {css_name(color)[2:]: color for color in DARK})
    dark = _variables(_DARK_TONES | {css_name(color)[2:]: other for color, other in DARK.items()})
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{_STYLE}"


def _variables(values: dict[str, str]) -> str:
    return "; ".join(f"--{name}: {value}" for name, value in values.items())
