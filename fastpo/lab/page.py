"""The report as a page: one HTML file with its style inside, which asks for nothing from outside."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_LIGHT = """
--bg: #f7f7f5; --surface: #ffffff; --ink: #1a1d21; --muted: #59616b; --grid: #e6e8ea; --line: #dcdfe3;
--good: #0069a8; --bad: #bf4a00; --open: #757d87; --wash: #0069a80d; --link: #0069a8;
--c0: #0072b2; --c1: #d55e00; --c2: #00866a; --c3: #b3418c; --c4: #8a6a00; --c5: #2f9fd0; --c6: #6a51c7;
--r0: #dca02c; --r1: #ab9a5e; --r2: #7c8b8d; --r3: #43719f; --r4: #08489a;
"""
_DARK = """
--bg: #121417; --surface: #1a1d22; --ink: #e9ebee; --muted: #a0a9b4; --grid: #2a2f36; --line: #30363e;
--good: #5cb3f2; --bad: #ff9350; --open: #8f98a3; --wash: #5cb3f214; --link: #7cc0f5;
--c0: #4fa8f0; --c1: #ff8a3d; --c2: #35c9a0; --c3: #e88cc8; --c4: #e3c443; --c5: #9fdcff; --c6: #ab9bff;
--r0: #f2bd4b; --r1: #cdb878; --r2: #a3afae; --r3: #74a6da; --r4: #4b8df5;
"""
_STYLE = (
    f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} --bg: #fff; }} }}
"""
    + """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Noto Sans", sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
main { padding: 2rem 1.25rem 4rem; width: 100%; max-width: 74rem; margin: 0 auto; min-width: 0; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 .5rem; }
h2 { font-size: 1.6rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .35rem; }
h3 { font-size: 1.15rem; margin: 2.6rem 0 .25rem; }
p { margin: 0 0 .8rem; max-width: 46rem; text-wrap: pretty; }
.lead { font-size: 1.1rem; color: var(--muted); }
.meta, .note, figcaption, .card small { color: var(--muted); font-size: .875rem; }
.headline { font-size: 1.15rem; }
a { color: var(--link); }
main > section { margin-top: 4rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
nav { position: sticky; top: 0; z-index: 5; background: var(--bg); border-bottom: 1px solid var(--line); }
nav ul { display: flex; gap: .2rem 1.1rem; overflow-x: auto; list-style: none; margin: 0; padding: .6rem 1.25rem;
  white-space: nowrap; font-size: .9rem; }
nav a { color: var(--muted); text-decoration: none; display: block; padding: .15rem 0; }
nav a:hover, nav a:focus-visible { color: var(--ink); text-decoration: underline; }
nav ul ul { display: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17.5rem), 1fr)); gap: 1rem;
  margin: 1.6rem 0 1rem; }
.card, figure.chart, .scroll, details, .notice { background: var(--surface); border: 1px solid var(--line);
  border-radius: .7rem; }
.card { padding: 1.1rem 1.2rem 1.2rem; display: flex; flex-direction: column; border-top: 4px solid var(--open); }
.card.better { border-top-color: var(--good); }
.card.worse { border-top-color: var(--bad); }
.card h3 { margin: 0; font-size: 1rem; }
.card h3 a { color: inherit; text-decoration: none; }
.card h3 a:hover { text-decoration: underline; }
.card .big { font-size: 2.5rem; line-height: 1.1; font-weight: 700; letter-spacing: -0.03em; margin: .5rem 0 0; }
.card .big span { font-size: 1rem; font-weight: 500; letter-spacing: 0; color: var(--muted); }
.card p { margin: 0 0 .5rem; }
.card.better .big { color: var(--good); }
.card.worse .big { color: var(--bad); }
.card .scale { width: 100%; height: 2.6rem; overflow: visible; margin: .3rem 0 .5rem; }
.card .scale text { font-size: 11px; fill: var(--muted); }
.verdict { font-weight: 600; }
.notice { border-left: 4px solid var(--bad); padding: .8rem 1.1rem; margin: 1.2rem 0; }
.notice p { margin: 0; max-width: none; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; min-width: 0; }
figure.chart { padding: 1rem 1.1rem; }
figure.wide { margin: 1rem 0; }
figcaption { margin-bottom: .6rem; max-width: 46rem; }
figcaption b { display: block; color: var(--ink); font-size: .98rem; line-height: 1.35; }
figure svg:not(.key, .swatch) { display: block; width: 100%; height: auto; max-width: 31rem; overflow: visible;
  margin-inline: auto; }
svg text { font-family: inherit; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); gap: 1.1rem; }
.panel { min-width: 0; max-width: 18rem; }
.panel p { margin: 0 0 .2rem; font-weight: 600; font-size: .88rem; }
.panel small { display: block; font-weight: 400; color: var(--muted); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem .95rem; margin: 0 0 .6rem; padding: 0;
  font-size: .85rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.key { width: 26px; height: 12px; flex: none; }
.swatch { width: 14px; height: 12px; border-radius: 3px; flex: none; }
.scroll { overflow-x: auto; margin: 1rem 0; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; width: 100%; }
th, td { padding: .38rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; border-bottom-color: var(--line); }
thead small { display: block; font-weight: 400; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--surface); z-index: 1;
  border-right: 1px solid var(--grid); }
tbody th { font-weight: 500; }
wbr { display: none; }
tbody tr:hover > * { background-image: linear-gradient(var(--wash), var(--wash)); }
td small { color: var(--muted); font-size: .76rem; margin-left: .3em; }
td.best, td.sure { font-weight: 700; }
td.best small, td.sure small { font-weight: 400; }
td.best::before { content: "\\25CF"; color: var(--good); font-size: .6em; vertical-align: middle; margin-right: .45em; }
tr.baseline th { font-weight: 700; }
tr.baseline th::after { content: " baseline"; color: var(--muted); font-weight: 400; font-size: .76rem; }
td.shade { background: color-mix(in srgb, var(--tone) var(--share), transparent); }
table.plain td { text-align: left; white-space: normal; min-width: 11rem; vertical-align: top; }
table.plain td:nth-child(2) { min-width: 15rem; }
table.plain details { border: 0; margin: 0; padding: 0; }
table.plain summary { padding: 0; font-weight: 400; font-size: inherit; }
table.plain code { white-space: pre-wrap; }
table.plain th { text-align: left; vertical-align: top; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .84em; }
details { margin: 1rem 0; padding: .2rem 1.1rem; }
details[open] { padding-bottom: .6rem; }
details .scroll, details figure.chart { border: 0; padding-left: 0; padding-right: 0; }
summary { cursor: pointer; padding: .55rem 0; font-weight: 600; font-size: .95rem; }
summary span { font-weight: 400; color: var(--muted); }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--surface); padding: .3rem .8rem; z-index: 9; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (min-width: 76rem) {
  .layout { display: grid; grid-template-columns: 15rem minmax(0, 1fr); }
  html { scroll-padding-top: 1rem; }
  nav { align-self: start; height: 100vh; overflow-y: auto; border-bottom: 0; border-right: 1px solid var(--line); }
  nav ul { display: block; white-space: normal; padding: 2.2rem 1.4rem; overflow: visible; }
  nav li { margin: .25rem 0; }
  nav ul ul { display: block; padding: .1rem 0 .5rem .8rem; font-size: .84rem; }
  main { padding: 2.4rem 2.2rem 5rem; }
}
@media (max-width: 40rem) {
  main { padding: 1.3rem .9rem 3rem; }
  figure.chart { padding: .8rem .7rem; }
  th, td { padding: .34rem .55rem; }
  wbr { display: inline; }
  th:first-child { min-width: 6.8rem; max-width: 9.5rem; white-space: normal; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  nav, .skip { display: none; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  figure, .card, tr { break-inside: avoid; }
  h2, h3, figcaption { break-after: avoid; }
  main > section { margin-top: 1.5rem; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)


class Entry(NamedTuple):
    """A line of the table of contents.

    Attributes:
        anchor: id of what it leads to.
        text: its words.
        under: further lines below it.
    """

    anchor: str
    text: str
    under: Sequence["Entry"] = ()


def page(title: str, contents: Sequence[Entry], body: str) -> str:
    """A whole HTML document.

    Args:
        title: text.
        contents: of the navigation.
        body: HTML of the main part.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="fastpo report">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<a class="skip" href="#main">To the results</a>
<div class="layout">
<nav aria-label="Contents">{_list(contents)}</nav>
<main id="main">
{body}
</main>
</div>
</body>
</html>
"""


def details(title: str, about: str, body: str) -> str:
    """Something that opens on a click; title and about are text."""
    said = f" <span>{escape(about)}</span>" if about else ""
    return f"<details><summary>{escape(title)}{said}</summary>{body}</details>"


def _list(entries: Sequence[Entry]) -> str:
    items = (
        f'<li><a href="#{entry.anchor}">{escape(entry.text)}</a>{_list(entry.under) if entry.under else ""}</li>'
        for entry in entries
    )
    return f"<ul>{''.join(items)}</ul>"
