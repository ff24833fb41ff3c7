"""The report's charts: methods with their intervals, differences, courses over training, reward against KL."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from fastpo.lab import chart_style as style
from fastpo.lab.chart_style import INK, MUTED, OPEN, SERIES, SURFACE, WIDTH, Line, drawing, tip, to_svg
from fastpo.lab.report_words import measure, number, plus_minus, range_of, verdict
from fastpo.lab.statistics import Interval, mean_interval
from fastpo.lab.summary import Corrected, Finished, Results, is_number

ROW = 19  # units a row of a chart with names takes
Points = list[tuple[float, Interval]]


def over_training(runs: Iterable[Finished], part: Callable[[Finished], list[dict[str, Any]]], x: str, y: str) -> Points:
    """(x, interval of y over the runs) of the logged points that have both, x upward."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for row in part(run):
            if is_number(row.get(x)) and is_number(row.get(y)):
                found.setdefault(round(float(row[x]), 6), []).append(float(row[y]))
    return [(place, mean_interval(values)) for place, values in sorted(found.items())]


def forest(study: Results, data: str, name: str, methods: Sequence[str], figure_name: str) -> str:
    """Means with intervals and a dot for each seed, in the order given, which is from the top."""
    shown = measure(name)
    rows = [method for method in methods if (data, method, name) in study.intervals]
    with drawing(WIDTH, ROW * len(rows) + 42) as (figure, axes):
        if (data, study.baseline, name) in study.intervals:
            centre = study.intervals[data, study.baseline, name].mean * shown.scale
            axes.axvline(centre, color=MUTED, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
        for place, method in enumerate(rows):
            interval = study.intervals[data, method, name]
            colour = INK if method == study.baseline else SERIES[0]
            seeds = [value * shown.scale for value in study.values(data, method, name).values()]
            axes.plot(
                seeds, [place] * len(seeds), "o", color=colour, alpha=0.3, markersize=4, markeredgewidth=0, zorder=2
            )
            _bar(axes, interval, place, shown.scale, colour, f"{method}: {said(interval, name)}")
        _rows(axes, rows, bold=study.baseline)
        axes.set_xlabel(f"{shown.label}{f' ({shown.unit})' if shown.unit else ''}")
        return to_svg(figure, figure_name, f"{shown.label} of {len(rows)} methods on {data}, with 95 % intervals")


def differences(found: dict[str, Corrected], against: str, name: str, figure_name: str) -> str:
    """Paired differences with intervals, from the top in the order given; filled where the interval excludes zero."""
    shown = measure(name)
    rows = list(found)
    colours = {"better": style.GOOD, "worse": style.BAD, "more": SERIES[0], "less": SERIES[0], "open": OPEN}
    with drawing(WIDTH, ROW * len(rows) + 42) as (figure, axes):
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        for place, method in enumerate(rows):
            difference = found[method].difference
            judged = verdict(difference, name)
            text = (
                f"{method}: {number(difference.interval.mean, name, sign=True)}, {range_of(difference.interval, name)}"
            )
            mean = difference.interval.mean * shown.scale
            axes.barh(place, mean, height=0.62, color=colours[judged], alpha=0.22, linewidth=0, zorder=1)
            _bar(axes, difference.interval, place, shown.scale, colours[judged], text, hollow=judged == "open")
            axes.text(
                1.02, place, number(difference.interval.mean, name, sign=True), transform=axes.get_yaxis_transform(),
                va="center", fontsize=10, color=MUTED if judged == "open" else INK,
                fontweight="normal" if judged == "open" else "bold",
            )  # fmt: skip
        _rows(axes, rows)
        axes.set_xlabel(f"{shown.short} less {against}'s{f' ({shown.step})' if shown.step else ''}")
        return to_svg(
            figure, figure_name, f"differences of {shown.label} to {against}, {len(rows)} methods, 95 % intervals"
        )


def courses(study: Results, data: str, lines: dict[str, Line], name: str, figure_name: str) -> str | None:
    """A measure over training, mean and interval of each method; None where nothing was logged."""
    shown = measure(name)
    found = {
        method: points
        for method in lines
        if len(points := over_training(study.runs.get((data, method), []), lambda run: run.course, "fraction", name))
        > 1
    }
    if not found:
        return None
    with drawing(WIDTH, 240) as (figure, axes):
        for method, points in found.items():
            line = lines[method]
            x = [100 * place for place, _ in points]
            mean = [interval.mean * shown.scale for _, interval in points]
            bounds = [
                [(interval.mean if end is None else end) * shown.scale for end in (interval.low, interval.high)]
                for _, interval in points
            ]
            low, high = zip(*bounds, strict=True)
            axes.fill_between(x, low, high, color=line.colour, alpha=0.13, linewidth=0)
            text = tip(f"{method}: {said(points[-1][1], name)} in the end")
            axes.plot(
                x, mean, color=line.colour, linestyle=line.dash, marker=line.marker, gid=text, zorder=3,
                markevery=max(1, len(x) // 8), markeredgecolor=SURFACE, markeredgewidth=0.6,
            )  # fmt: skip
        axes.set(xlabel="part of training (%)", ylabel=f"{shown.label}{f' ({shown.unit})' if shown.unit else ''}")
        return to_svg(figure, figure_name, f"{shown.label} over training on {data}: {', '.join(found)}")


def frontier(study: Results, data: str, lines: dict[str, Line], name: str, figure_name: str) -> str | None:
    """The path of a measure against KL over training; None where not both were logged."""
    shown, paths = measure(name), {}
    for method in lines:
        runs = study.runs.get((data, method), [])
        up, across = (dict(over_training(runs, lambda run: run.course, "fraction", which)) for which in (name, "kl"))
        places = [place for place in up if place in across]
        if len(places) > 1:
            paths[method] = [(across[place].mean, up[place].mean * shown.scale) for place in places]
    if not paths:
        return None
    with drawing(WIDTH, 240) as (figure, axes):
        for method, path in paths.items():
            line, (x, y) = lines[method], zip(*path, strict=True)
            axes.plot(x, y, color=line.colour, linestyle=line.dash, linewidth=1.3, zorder=2)
            axes.plot(x[1:-1], y[1:-1], ".", color=line.colour, markersize=4, zorder=2)
            text = tip(f"{method}: {number(y[-1] / shown.scale, name)} at {x[-1]:.2f} nats in the end")
            axes.plot(
                x[-1],
                y[-1],
                line.marker,
                color=line.colour,
                markersize=8.5,
                markeredgecolor=SURFACE,
                gid=text,
                zorder=4,
            )
        axes.set(xlabel="KL of a response from the reference (nats)", ylabel=shown.label)
        return to_svg(figure, figure_name, f"{shown.label} against KL on {data}: {', '.join(paths)}")


def _bar(
    axes: Axes, interval: Interval, place: float, scale: float, colour: str, text: str, hollow: bool = False
) -> None:
    """An interval with its mean; hollow: nothing is shown by it."""
    if interval.low is not None and interval.high is not None:
        axes.plot(
            [interval.low * scale, interval.high * scale], [place, place], color=colour, linewidth=2,
            solid_capstyle="round", zorder=3, gid=tip(text),
        )  # fmt: skip
    axes.plot(
        interval.mean * scale, place, "o", markersize=6.5, color=colour, gid=tip(text), zorder=4,
        markerfacecolor=SURFACE if hollow else colour, markeredgecolor=colour if hollow else SURFACE,
        markeredgewidth=1.6 if hollow else 0.8,
    )  # fmt: skip


def _rows(axes: Axes, names: Sequence[str], bold: str | None = None) -> None:
    """Names down the left side, the first at the top."""
    axes.set_yticks(range(len(names)), names, fontsize=10.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=style.GRID)
    for label in axes.get_yticklabels():
        label.set_color(INK)
        if label.get_text() == bold:
            label.set_fontweight("bold")


def said(interval: Interval, name: str) -> str:
    """A mean with its unit and interval."""
    unit = measure(name).unit
    return f"{number(interval.mean, name)} {unit} {plus_minus(interval, name)}".replace("  ", " ").strip()
