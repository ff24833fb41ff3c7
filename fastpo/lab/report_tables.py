"""The report's cards and tables."""

import json
from collections.abc import Sequence
from html import escape

from fastpo.lab.report_words import (
    MEASURES,
    counted,
    duration,
    flow,
    listed,
    measure,
    number,
    p_value,
    plus_minus,
    range_of,
    table,
    verdict,
)  # fmt: skip
from fastpo.lab.statistics import Difference, Interval, mean_interval
from fastpo.lab.summary import Corrected, Results

ALPHA = 0.05
VERDICTS = {"better": "better", "worse": "worse", "more": "more", "less": "less", "open": "no difference shown"}


def of_comparison(study: Results, data: str, title: str, name: str) -> dict[str, Corrected]:
    """method -> difference, of a comparison's methods that have one, in its order."""
    return {
        method: study.differences[key]
        for method in study.comparisons[title].methods
        if (key := (data, title, method, name)) in study.differences
    }


def answer(study: Results, data: str) -> tuple[str, dict[str, Corrected], str] | None:
    """Comparison, differences and measure that answer for a data set: of the first comparison that has any.

    The method in front is the first that the study names, not the one that came out best.
    """
    name = study.main_measure(data)
    for title in study.comparisons if name else ():
        assert name is not None
        if found := of_comparison(study, data, title, name):
            return title, found, name
    return None


def card(study: Results, data: str, anchor: str, reach: float) -> str:
    """The answer for one data set.

    Args:
        anchor: id of the data set's section.
        reach: how far the card's scale goes to either side of zero, in shown units.
    """
    head = f'<h3><a href="#{anchor}">{escape(data)}</a></h3>'
    found = answer(study, data)
    if found is None:
        text = "no comparison has finished runs of both methods" if study.ran(data) else "no run is finished"
        return f'<div class="card">{head}<p>{escape(text.capitalize())}.</p></div>'
    title, differences, name = found
    method, corrected = next(iter(differences.items()))
    interval, said = corrected.difference.interval, verdict(corrected.difference, name)
    shown, against = measure(name), study.comparisons[title].against
    big = f"{number(interval.mean, name, sign=True)} <span>{escape(shown.step)}</span>"
    words = {"open": f"{method} and {against}: no difference shown"}.get(said, f"{method} is {said} than {against}")
    if said in ("more", "less"):
        words = f"{method} has {said} than {against}"
    lines = [
        f'<p class="big">{big}</p>',
        f"<small>of {escape(shown.label)}</small>",
        _scale(interval, shown.scale, reach, said) if interval.low is not None else "",
        f'<p class="verdict">{escape(words)}</p>',
        f"<small>{flow(range_of(interval, name))}, {counted(interval.n, 'seed')}, "
        f"{flow(p_value(corrected.difference.p_t))}.</small>",
    ]
    if len(differences) > 1:
        lines.append(f"<small>{escape(tally(differences, against, name))}</small>")
    return f'<div class="card {said}">{head}{"".join(lines)}</div>'


def tally(differences: dict[str, Corrected], against: str, name: str) -> str:
    """How many methods differ after Holm's correction."""
    sure = {m: c for m, c in differences.items() if c.p_holm is not None and c.p_holm < ALPHA}
    groups: dict[str, list[str]] = {}
    for method, corrected in sure.items():
        groups.setdefault(verdict(corrected.difference, name), []).append(method)
    said = [
        f"{word}: {listed(found) if len(found) < 5 else counted(len(found), 'method')}"
        for word in ("better", "worse", "more", "less")
        if (found := groups.get(word))
    ]
    start = f"Of {counted(len(differences), 'method')} against {against}, corrected for their number"
    return f"{start}, {'; '.join(said) if said else 'none differs'}."


def overview(study: Results) -> str:
    """Difference of each method from the baseline on each data set, in its main measure."""
    columns = {data: name for data in study.data if (name := study.main_measure(data))}
    found = {
        (method, data): difference
        for data, name in columns.items()
        for method in study.methods
        if (difference := study.paired(data, method, study.baseline, name)) is not None
    }
    columns = {data: name for data, name in columns.items() if any(data == where for _, where in found)}
    if not found:
        return ""
    rows = []
    for method in study.methods:
        if any(method == which for which, _ in found):
            cells = [_shaded(found, method, data, name) for data, name in columns.items()]
            rows.append([_head(method), *cells])
    head = [f"against {escape(study.baseline)}"]
    head += [f"{escape(d)}<small>{escape(_with_unit(n))}</small>" for d, n in columns.items()]
    return table(head, rows, f"differences from {study.baseline} on all data")


def measures_table(study: Results, data: str) -> str:
    """Methods by measures: mean and half the interval, the best of each measure marked."""
    names = study.measures(data)
    best = {name: best_of(study, data, name) for name in names}
    rows = []
    for method in study.ran(data):
        cells = [_head(method, study.baseline)]
        for name in names:
            interval = study.intervals.get((data, method, name))
            if interval is None:
                cells.append("<td></td>")
                continue
            mark = ' class="best"' if best[name] == method else ""
            cells.append(f"<td{mark}>{number(interval.mean, name)}<small>{plus_minus(interval, name)}</small></td>")
        rows.append(cells)
    head = ["method", *(f"{escape(measure(n).short)}<small>{_arrow(n)}{_unit(n)}</small>" for n in names)]
    return _with_baseline(table(head, rows, f"measures of all methods on {data}"))


def differences_table(study: Results, data: str, title: str) -> str:
    """Differences of a comparison in all measures, and the main one's p-values."""
    main = study.main_measure(data)
    names = [name for name in study.measures(data) if of_comparison(study, data, title, name)]
    head = [
        "method",
        *(f"{escape(measure(n).short)}<small>{_arrow(n)}{escape(measure(n).step)}</small>" for n in names),
    ]
    if main:
        head += [
            f"{text}<small>{escape(measure(main).short)}</small>" for text in ("p, t-test", "p, Wilcoxon", "p, Holm")
        ]
    rows = []
    for method in study.comparisons[title].methods:
        found = {n: c for n in names if (c := study.differences.get((data, title, method, n))) is not None}
        if not found:
            continue
        cells = [_head(method)]
        for name in names:
            cells.append(_difference_cell(found[name].difference, name) if name in found else "<td></td>")
        if main:
            known = found.get(main)
            ps = (known.difference.p_t, known.difference.p_wilcoxon, known.p_holm) if known else (None, None, None)
            cells += [
                f"<td>{'' if p is None else escape(p_value(p).removeprefix('p ').removeprefix('= '))}</td>" for p in ps
            ]
        rows.append(cells)
    return table(head, rows, f"differences of {title} on {data}")


def scales_table(study: Results, data: str, methods: Sequence[str]) -> str:
    """What s(x) of the methods with a learned beta came to."""
    names = [n for n in study.measures(data) if n.startswith("s/") or n == study.main_measure(data)]
    rows = [[_head(method), *(_interval_cell(study, data, method, name) for name in names)] for method in methods]
    head = ["method", *(f"{escape(measure(n).short)}<small>{_unit(n)}</small>" for n in names)]
    return table(head, rows, f"s(x) on {data}")


def methods_table(study: Results) -> str:
    """Formula, settings and mean seconds of a run of each method."""
    rows = []
    for method, settings in study.methods.items():
        spent = [r.seconds for (_, m), runs in study.runs.items() if m == method for r in runs if r.seconds is not None]
        said = "<br>".join(f"<code>{escape(f'{k}: {_setting(v)}')}</code>" for k, v in settings.items())
        formula = _formula(study.formulas.get(method, ""))
        cells = [
            _head(method),
            f"<td>{formula}</td>",
        ]
        cells += [f"<td>{said}</td>", f"<td>{duration(mean_interval(spent).mean) if spent else ''}</td>"]
        rows.append(cells)
    return table(["method", "loss of a pair", "settings", "a run takes"], rows, "methods and their settings", "plain")


def _formula(text: str) -> str:
    """One line as it is; of more, as `fastpo explain` writes them, the loss, and the others on a click."""
    lines = text.strip().splitlines()
    if len(lines) < 2:
        return f"<code>{escape(text)}</code>" if text else ""
    first = next((line for line in lines if line.strip().startswith("loss")), lines[0])
    return f"<details><summary><code>{escape(first.strip())}</code></summary><code>{escape(text)}</code></details>"


def missing_table(study: Results) -> str:
    """Runs that are not finished."""
    rows = [
        [
            _head(data),
            f"<td>{escape(method)}</td>",
            f"<td>{'all seeds' if len(seeds) == len(study.seeds) else ', '.join(str(seed) for seed in seeds)}</td>",
        ]
        for (data, method), seeds in study.missing().items()
    ]
    return table(["data", "method", "seeds"], rows, "runs that are not finished", "plain")


def glossary(study: Results) -> str:
    """What each measure is."""
    rows = [
        [_head(known.short), f"<td>{escape(known.about)}</td>"]
        for name in study.measures()
        if (known := MEASURES.get(name))
    ]
    return table(["measure", "what it is"], rows, "measures", "plain") if rows else ""


def best_of(study: Results, data: str, name: str) -> str | None:
    """The method with the best mean, None where a measure has no better side or all are the same."""
    better = measure(name).better
    means = {
        m: study.intervals[data, m, name].mean * better for m in study.ran(data) if (data, m, name) in study.intervals
    }
    return max(means, key=lambda m: means[m]) if better and len(set(means.values())) > 1 else None


def _scale(interval: Interval, scale: float, reach: float, said: str) -> str:
    """Zero, the interval and its mean on a line from -reach to reach."""
    assert interval.low is not None and interval.high is not None
    low, mean, high = (150 + 140 * x * scale / reach for x in (interval.low, interval.mean, interval.high))
    colour = {"better": "var(--good)", "worse": "var(--bad)"}.get(said, "var(--open)")
    return (
        '<svg class="scale" viewBox="0 0 300 42" role="img" aria-label="interval and zero">'
        '<path d="M10 16h280" style="stroke: var(--line)"/><path d="M150 5v22" style="stroke: var(--ink)"/>'
        f'<path d="M{low:.1f} 16H{high:.1f}" style="stroke: {colour}; stroke-width: 5; stroke-linecap: round"/>'
        f'<circle cx="{mean:.1f}" cy="16" r="6.5" style="fill: {colour}; stroke: var(--surface); stroke-width: 2"/>'
        '<text x="150" y="40" text-anchor="middle">0</text></svg>'
    )


def _shaded(found: dict[tuple[str, str], Difference], method: str, data: str, name: str) -> str:
    difference = found.get((method, data))
    if difference is None:
        return "<td></td>"
    largest = max(abs(other.interval.mean) for (_, where), other in found.items() if where == data)
    share = 45 * abs(difference.interval.mean) / largest if largest else 0
    tone = "good" if difference.interval.mean * (measure(name).better or 1) > 0 else "bad"
    sure = "" if difference.interval.holds_zero else " sure"
    text = f"{number(difference.interval.mean, name, sign=True)}<small>{plus_minus(difference.interval, name)}</small>"
    return f'<td class="shade{sure}" style="--tone: var(--{tone}); --share: {share:.0f}%">{text}</td>'


def _difference_cell(difference: Difference, name: str) -> str:
    said = verdict(difference, name)
    tone = {"better": "good", "worse": "bad"}.get(said)
    style = f' class="shade sure" style="--tone: var(--{tone}); --share: 16%"' if tone else ""
    text = number(difference.interval.mean, name, sign=True)
    return f"<td{style}>{text}<small>{plus_minus(difference.interval, name)}</small></td>"


def _interval_cell(study: Results, data: str, method: str, name: str) -> str:
    interval = study.intervals.get((data, method, name))
    if interval is None:
        return "<td></td>"
    return f"<td>{number(interval.mean, name)}<small>{plus_minus(interval, name)}</small></td>"


def _head(name: str, baseline: str | None = None) -> str:
    mark = ' class="baseline"' if name == baseline else ""
    return f'<th scope="row"{mark}>{escape(name).replace("_", "_<wbr>")}</th>'


def _with_baseline(text: str) -> str:
    return text.replace('<tr><th scope="row" class="baseline">', '<tr class="baseline"><th scope="row">')


def _arrow(name: str) -> str:
    return {1: "\u2191 ", -1: "\u2193 ", 0: ""}[measure(name).better]


def _unit(name: str) -> str:
    return escape(measure(name).unit)


def _with_unit(name: str) -> str:
    shown = measure(name)
    return f"{shown.short}, {shown.step}" if shown.step else shown.short


def _setting(value: object) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_setting(inner)}' for name, inner in value.items())}}}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
