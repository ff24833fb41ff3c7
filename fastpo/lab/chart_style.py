"""Figures as inline SVG whose colours are the page's, for light and dark, and whose text is the page's text.

Figures are drawn in sentinel colours; `to_svg` puts CSS variables in their place. A `gid` of `tip("...")` on an artist
becomes its tooltip.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fastpo.lab.report_words import flow

WIDTH = 360  # units of a chart that stands in a column; text is 11 of them
PANEL = 240  # of one of many small ones
INK, MUTED, GRID, SURFACE, GOOD, BAD, OPEN = (f"#0f0e{i:02x}" for i in range(7))
SERIES = tuple(f"#0f0d{i:02x}" for i in range(7))
RELIABILITY = tuple(f"#0f0c{i:02x}" for i in range(5))  # of a coin's labels to of sure ones
MARKERS = "osD^vPX"
Dash = str | tuple[int, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ("-", "-", "-", "-", (0, (4, 1.5)), (0, (4, 1.5)), (0, (1.5, 1.2)))
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", GOOD: "good", BAD: "bad", OPEN: "open",
    **{colour: f"c{i}" for i, colour in enumerate(SERIES)},
    **{colour: f"r{i}" for i, colour in enumerate(RELIABILITY)},
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 11, "text.parse_math": False, "axes.unicode_minus": True,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": MUTED, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.linewidth": 0.8,
    "axes.labelsize": 10.5, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "figure.facecolor": "none", "savefig.facecolor": "none",
    "hatch.linewidth": 0.8, "legend.frameon": False,
}  # fmt: skip
# Where each marker of a legend's key goes through, around (13, 6).
_KEYS = {
    "o": '<circle cx="13" cy="6" r="3.4"/>',
    "s": '<path d="M10 3h6v6h-6z"/>',
    "D": '<path d="M13 1.6l4.2 4.4-4.2 4.4-4.2-4.4z"/>',
    "^": '<path d="M13 2l4 7.4H9z"/>',
    "v": '<path d="M13 10L9 2.6h8z"/>',
    "P": '<path d="M11.6 2h2.8v2.6H17v2.8h-2.6V10h-2.8V7.4H9V4.6h2.6z"/>',
    "X": '<path d="M9.5 4.3l1.8-1.8L13 4.2l1.7-1.7 1.8 1.8L14.8 6l1.7 1.7-1.8 1.8L13 7.8l-1.7 1.7-1.8-1.8L11.2 6z"/>',
}


class Line(NamedTuple):
    """How a method's line looks, the same in all charts of a comparison."""

    colour: str
    marker: str
    dash: Dash


BASELINE = Line(MUTED, "o", (0, (2.5, 1.5)))


def lines_of(baseline: str, methods: Sequence[str], order: Sequence[str]) -> dict[str, Line]:
    """The baseline in grey, up to seven methods each in a colour, marker and dash.

    Args:
        order: of all methods that charts of the page have, by which a method looks the same in most of them.
    """
    looks = [Line(*look) for look in zip(SERIES, MARKERS, DASHES, strict=True)]
    lines, free = {}, list(looks)
    for method in sorted(methods, key=order.index):
        wanted = looks[order.index(method) % len(looks)]
        lines[method] = free.pop(free.index(wanted) if wanted in free else 0)
    return {baseline: BASELINE, **{method: lines[method] for method in methods}}


def reliability_colour(reliability: float) -> str:
    """One of `RELIABILITY` for a probability of a right label in [0.5, 1]."""
    return RELIABILITY[max(0, min(4, round((reliability - 0.5) * 8)))]


def tip(text: str) -> str:
    """The gid of an artist that says `text` under the pointer."""
    return f"tip:{text}"


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of width x height units and its axes, in the page's style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Inline SVG without a fixed size, the same text for the same figure.

    Args:
        name: of the figure, no other's on the page: ids inside are made of it.
        label: says what is seen, for those who do not see it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's fonts have what matplotlib's lack
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    opening = f'<svg {view[0]} role="img" aria-label="{escape(label)}">'
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r'<g id="tip:([^"]*)"([^>]*)>', r"<g\2><title>\1</title>", text)
    return _tidy(text)


def _tidy(text: str) -> str:
    """Shorter numbers, the page's colours and fonts, and no ids but those that something refers to."""
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' fill="(#[0-9a-f]{6})"', r' style="fill: \1"', text)
    text = re.sub(r"#0f0[cde]\w\w\b", lambda found: f"var(--{VARIABLES[found[0]]})", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda x: f"{float(x[0]):.2f}", tag[0]), text)
    return re.sub(r"\n\s*", "\n", text).strip()


def legend(lines: dict[str, Line]) -> str:
    """An HTML list of what the lines are."""
    items = []
    for name, line in lines.items():
        colour = f"var(--{VARIABLES[line.colour]})"
        dash = "" if isinstance(line.dash, str) else f' stroke-dasharray="{" ".join(str(2 * x) for x in line.dash[1])}"'
        mark = _KEYS.get(line.marker, "")
        items.append(
            f'<li><svg viewBox="0 0 26 12" class="key" aria-hidden="true" style="stroke: {colour}; fill: {colour}">'
            f'<path d="M0 6h26" stroke-width="2"{dash}/>{mark}</svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(title: str, note: str, *charts: str, key: str = "", kind: str = "") -> str:
    """<figure> of one chart or of several beside each other; title and note are text."""
    return (
        f'<figure class="{kind or "chart"}"><figcaption><b>{escape(title)}</b> {flow(note)}</figcaption>{key}'
        f"{''.join(charts)}</figure>"
    )


def panels(title: str, note: str, charts: dict[str, str], key: str = "", said: dict[str, str] | None = None) -> str:
    """<figure> of small charts, each under its name and what is said of it."""
    boxes = "".join(
        f'<div class="panel"><p>{escape(name)} <small>{escape((said or {}).get(name, ""))}</small></p>{svg}</div>'
        for name, svg in charts.items()
    )
    return figure(title, note, f'<div class="panels">{boxes}</div>', key=key, kind="chart wide")
