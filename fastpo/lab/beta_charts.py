"""Charts of a learned beta: what s(x) came to on each kind of prompt, and how it got there."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from fastpo.lab.chart_style import (
    INK,
    PANEL,
    SERIES,
    SURFACE,
    WIDTH,
    Line,
    drawing,
    reliability_colour,
    tip,
    to_svg,
)  # fmt: skip
from fastpo.lab.charts import Points, over_training
from fastpo.lab.report_words import range_of
from fastpo.lab.statistics import Interval, mean_interval
from fastpo.lab.summary import Finished, Results, is_number

TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)
FINE_TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 2.5)  # for less than two doublings
BINS = 36
FLAT = 1.25  # a scale whose ends are nearer to each other than this is not drawn as a logarithm


def learned(study: Results, data: str) -> list[str]:
    """Methods with a beta of their own for each prompt."""
    return [
        method
        for method in study.ran(data)
        if (data, method, "s/std") in study.intervals or kinds_of(study.runs[data, method])
    ]


def kinds_of(runs: Iterable[Finished]) -> dict[str, list[tuple[float, bool, list[float]]]]:
    """Sort of kinds -> (reliability, hard, s of its prompts) of each run that has s: reliable first, easy before hard.

    Kinds of the same reliability and difficulty are of one sort, whatever their names, to which each seed deals others.
    """
    found: dict[tuple[float, bool], list[list[float]]] = {}
    for run in runs:
        own: dict[tuple[float, bool], list[float]] = {}
        for known in run.kinds.values():
            values = [float(x) for x in known.get("s") or [] if is_number(x) and x > 0]
            if values and is_number(known.get("reliability")):
                own.setdefault((float(known["reliability"]), bool(known.get("hard"))), []).extend(values)
        for sort, values in own.items():
            found.setdefault(sort, []).append(values)
    order = sorted(found, key=lambda sort: (-sort[0], sort[1]))
    return {
        f"{100 * reliability:.4g} % {'hard' if hard else 'easy'}": [
            (reliability, hard, s) for s in found[reliability, hard]
        ]
        for reliability, hard in order
    }


def scale_bounds(study: Results, data: str, methods: Sequence[str]) -> tuple[float, float] | None:
    """Least and greatest s(x) of some methods with a little room, the scale that their charts share."""
    values = [
        x for m in methods for seeds in kinds_of(study.runs[data, m]).values() for *_, s in seeds for x in s
    ]  # fmt: skip
    if not values:
        return None
    low, high = min(*values, 0.95), max(*values, 1 / 0.95)
    return low / 1.05, high * 1.05


def histograms(runs: Sequence[Finished], bounds: tuple[float, float], figure_name: str, label: str) -> str:
    """One ridge a kind, of s(x) over all seeds; hard kinds are paler and have a dashed outline."""
    kinds = kinds_of(runs)
    edges = np.geomspace(*bounds, BINS + 1)
    with drawing(PANEL, 22 * len(kinds) + 40) as (figure, axes):
        for place, (kind, seeds) in enumerate(kinds.items()):
            reliability, hard, _ = seeds[0]
            counts, _ = np.histogram([x for *_, s in seeds for x in s], edges)
            filled = np.flatnonzero(counts)
            first, last = max(filled[0] - 1, 0), min(filled[-1] + 2, BINS)
            heights = place - 1.35 * np.append(counts[first:last], 0) / counts.max()
            x, colour = edges[first : last + 1], reliability_colour(reliability)
            text = tip(f"{kind}: labels right with probability {reliability:.2f}, {'hard' if hard else 'easy'}")
            axes.fill_between(
                x, place, heights, step="post", facecolor=colour, edgecolor="none", zorder=place + 1,
                alpha=0.35 if hard else 0.8, gid=text,
            )  # fmt: skip
            axes.step(
                x, heights, where="post", color=colour, zorder=place + 1, linewidth=1.3,
                linestyle=(0, (2.5, 1.2)) if hard else "-",
            )  # fmt: skip
        axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=50)
        axes.set_yticks(range(len(kinds)), list(kinds), fontsize=9.5)
        axes.set_ylim(len(kinds) - 0.7, -1.5)
        axes.grid(axis="y", visible=False)
        _logarithmic(axes, bounds, "x")
        axes.set_xlabel("s(x)")
        return to_svg(figure, figure_name, label)


def against_reliability(runs: Sequence[Finished], bounds: tuple[float, float], figure_name: str, label: str) -> str:
    """Mean s(x) of each kind over its reliability, with intervals over the seeds; hard kinds hollow."""
    with drawing(PANEL, 180) as (figure, axes):
        for kind, seeds in kinds_of(runs).items():
            reliability, hard, _ = seeds[0]
            interval = mean_interval([math.fsum(s) / len(s) for *_, s in seeds])
            colour = reliability_colour(reliability)
            # Easy and hard ones of the same reliability beside each other.
            place = reliability + (0.008 if hard else -0.008)
            text = tip(f"{kind}: mean s(x) {interval.mean:.3f}, {_range(interval)}")
            if interval.low is not None and interval.high is not None:
                axes.plot([place] * 2, [interval.low, interval.high], color=colour, linewidth=2, gid=text)
            axes.plot(
                place, interval.mean, "o", markersize=7, color=colour, gid=text, zorder=4,
                markerfacecolor=SURFACE if hard else colour, markeredgewidth=1.6 if hard else 0,
            )  # fmt: skip
        axes.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        axes.set_xlim(*_widened([seeds[0][0] for seeds in kinds_of(runs).values()], 0.08))
        _logarithmic(axes, bounds, "y")
        axes.set(xlabel="probability of a right label", ylabel="mean s(x)")
        return to_svg(figure, figure_name, label)


def kind_mean_bounds(study: Results, data: str, methods: Sequence[str]) -> tuple[float, float]:
    """A scale for `against_reliability` that several methods share."""
    ends = [0.98, 1.02]
    for method in methods:
        for seeds in kinds_of(study.runs[data, method]).values():
            interval = mean_interval([math.fsum(s) / len(s) for *_, s in seeds])
            ends += [interval.mean, *(end for end in (interval.low, interval.high) if end is not None and end > 0)]
    return min(ends) / 1.03, max(ends) * 1.03


def trajectories(study: Results, data: str, methods: Sequence[str], figure_name: str) -> dict[str, str]:
    """Beta over training of each method that logged it, all on one scale: mean, one deviation, least and greatest."""
    parts = ("mean", "std", "min", "max")
    found: dict[str, dict[str, dict[float, float]]] = {}
    for method in methods:
        runs = study.runs[data, method]
        logged = {part: _means(over_training(runs, _training, "fraction", f"beta/{part}")) for part in parts}
        if logged["mean"]:
            found[method] = logged
    values = [x for logged in found.values() for part in ("mean", "min", "max") for x in logged[part].values()]
    if not values:
        return {}
    logarithmic = min(values) > 0 and max(values) / min(values) > FLAT
    bounds = (min(values) / 1.1, max(values) * 1.1) if logarithmic else _widened(values, 0.05)
    charts = {}
    for index, (method, logged) in enumerate(found.items()):
        with drawing(PANEL, 160) as (figure, axes):
            x = [100 * place for place in logged["mean"]]
            mean = list(logged["mean"].values())
            if len(logged["std"]) == len(mean):
                pairs = list(zip(mean, logged["std"].values(), strict=True))
                low, high = [max(m - d, bounds[0]) for m, d in pairs], [m + d for m, d in pairs]
                axes.fill_between(x, low, high, color=SERIES[0], alpha=0.25, linewidth=0)
            for part in ("min", "max"):
                ends = logged[part]
                axes.plot(
                    [100 * p for p in ends], list(ends.values()), color=SERIES[0], linewidth=1, linestyle=(0, (3, 2))
                )
            axes.plot(x, mean, color=SERIES[0], gid=tip(f"{method}: mean beta {mean[-1]:.3g} in the end"))
            if logarithmic:
                _logarithmic(axes, bounds, "y", multiples=False)
            else:
                axes.set_ylim(*bounds)
            axes.set(xlabel="part of training (%)", ylabel="beta")
            charts[method] = to_svg(figure, f"{figure_name}-{index}", f"beta of {method} over training on {data}")
    return charts


def ranges(study: Results, data: str, methods: Sequence[str], figure_name: str) -> str | None:
    """Least to greatest s(x), mean and one deviation of each method, means over the seeds; None without them."""
    found = {
        method: [study.intervals[data, method, f"s/{part}"].mean for part in ("min", "mean", "std", "max")]
        for method in methods
        if all((data, method, f"s/{part}") in study.intervals for part in ("min", "mean", "std", "max"))
    }
    if not found:
        return None
    ends = [end for low, _, _, high in found.values() for end in (low, high) if end > 0]
    bounds = min(*ends, 0.95) / 1.05, max(*ends, 1.05) * 1.05
    with drawing(WIDTH, 22 * len(found) + 42) as (figure, axes):
        for place, (method, (low, mean, deviation, high)) in enumerate(found.items()):
            text = tip(f"{method}: s(x) from {low:.2f} to {high:.2f}, mean {mean:.2f}, deviation {deviation:.2f}")
            axes.plot([low, high], [place, place], "|-", color=SERIES[0], linewidth=1.3, markersize=8, gid=text)
            axes.plot(
                [max(mean - deviation, bounds[0]), mean + deviation], [place, place], color=SERIES[0], linewidth=7,
                alpha=0.35, solid_capstyle="butt", gid=text,
            )  # fmt: skip
            axes.plot(mean, place, "o", color=SERIES[0], markersize=6.5, markeredgecolor=SURFACE, gid=text, zorder=4)
        axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        axes.set_yticks(range(len(found)), list(found), fontsize=10.5, color=INK)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        _logarithmic(axes, bounds, "x")
        axes.set_xlabel("s(x) on held-out prompts")
        return to_svg(figure, figure_name, f"range of s(x) of {', '.join(found)} on {data}")


def regularizers(
    study: Results, data: str, methods: Sequence[str], lines: dict[str, Line], figure_name: str
) -> dict[str, str]:
    """Values of each regulariser over training, a chart a method, all on one scale."""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for method in methods:
        runs = study.runs[data, method]
        logged = {n: _means(over_training(runs, _training, "fraction", f"regularizers/{n}")) for n in lines}
        if any(logged.values()):
            found[method] = {name: points for name, points in logged.items() if points}
    values = [x for logged in found.values() for points in logged.values() for x in points.values()]
    if not values:
        return {}
    bounds, charts = _widened(values, 0.05), {}
    for index, (method, logged) in enumerate(found.items()):
        with drawing(PANEL, 160) as (figure, axes):
            for name, points in logged.items():
                line, x = lines[name], [100 * place for place in points]
                axes.plot(
                    x, list(points.values()), color=line.colour, linestyle=line.dash, marker=line.marker, markersize=4,
                    markevery=max(1, len(x) // 5), linewidth=1.5, gid=tip(f"{method}: {name}"),
                )  # fmt: skip
            axes.set_ylim(*bounds)
            axes.set(xlabel="part of training (%)", ylabel="value")
            charts[method] = to_svg(figure, f"{figure_name}-{index}", f"regularisers of {method} on {data}")
    return charts


def regularizer_names(study: Results, data: str) -> list[str]:
    """Those that some run on a data set logged."""
    prefix = "regularizers/"
    rows = [row for (where, _), runs in study.runs.items() if where == data for run in runs for row in run.training]
    return sorted({name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)})


def _training(run: Finished) -> list[dict[str, object]]:
    return run.training


def _means(points: Points) -> dict[float, float]:
    return {place: interval.mean for place, interval in points}


def _range(interval: Interval) -> str:
    return range_of(interval, "s/mean")


def _widened(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high - low) * share, abs(high) * 1e-3, 1e-6)
    return low - room, high + room


def _logarithmic(axes: Axes, bounds: tuple[float, float], which: str, multiples: bool = True) -> None:
    """A logarithmic axis with few plain numbers: parts and multiples of 1, else 1, 2 and 5."""
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(*bounds)
    axis = getattr(axes, f"{which}axis")
    low, high = bounds
    if multiples:
        ticks = list(TICKS if high / low > 4 else FINE_TICKS)
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 7)
        ticks = [digit * 10.0**decade for decade in decades for digit in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.01 else f"{value:.1g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
