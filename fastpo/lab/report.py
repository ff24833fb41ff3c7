"""`fastpo report`: a study's result files as one HTML page for people, and as tables for programs."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastpo.files import replacing
from fastpo.lab import beta_charts, charts
from fastpo.lab.chart_style import VARIABLES, Line, figure, legend, lines_of, panels, reliability_colour
from fastpo.lab.page import Entry, details, page
from fastpo.lab.report_tables import (
    answer,
    best_of,
    card,
    differences_table,
    glossary,
    measures_table,
    methods_table,
    missing_table,
    of_comparison,
    overview,
    scales_table,
    tally,
)  # fmt: skip
from fastpo.lab.report_words import counted, duration, flow, listed, measure, sentence
from fastpo.lab.summary import Results, read_results, write_tables

REPORT_FILE = "report.html"
MOST_LINES = 7  # of a chart, besides the baseline's
SECOND = ("reward", "win_rate", "chrf", "bleu")  # what is drawn beside the main measure, the first there is


def make_report(folder: str | Path) -> list[Path]:
    """Write report.html, results.csv, summary.csv, comparisons.csv and summary.json into a study's folder.

    The same result files give the same bytes. A study that is not finished is reported with the runs that are.

    Returns:
        The files' paths.

    Raises:
        ValueError: as `read_results`.
        SaveError: a file cannot be written; what was there is whole.
    """
    folder = Path(folder)
    study = read_results(folder)
    text = _page(study)
    with replacing(folder / REPORT_FILE) as aside:
        aside.write_text(text, encoding="utf-8")
    return [folder / REPORT_FILE, *write_tables(study, folder)]


def headlines(folder: str | Path) -> list[str]:
    """A sentence for each data set: what the study's first comparison says.

    Raises:
        ValueError: as `read_results`.
    """
    study = read_results(Path(folder))
    return [f"{data}: {said}" for data in study.data if (said := _headline(study, data))]


def _headline(study: Results, data: str) -> str:
    """Of the first comparison's first method; nothing where no comparison has finished pairs."""
    found = answer(study, data)
    if found is None:
        return ""
    title, differences, main = found
    method, corrected = next(iter(differences.items()))
    against = study.comparisons[title].against
    return sentence(method, against, corrected.difference, main, corrected.p_holm, len(differences))


def _page(study: Results) -> str:
    anchors = {data: f"data-{place}" for place, data in enumerate(study.data)}
    contents = [Entry("main", "The answer")]
    sections = [_top(study, anchors)]
    for data, anchor in anchors.items():
        if study.ran(data):
            text, under = _data_section(study, data, anchor)
            sections.append(text)
            contents.append(Entry(anchor, data, under))
    contents += [Entry("methods", "Methods"), Entry("reading", "How to read this")]
    sections += [_methods(study), _reading(study)]
    return page(study.title, contents, "\n".join(sections))


def _top(study: Results, anchors: dict[str, str]) -> str:
    runs = [run for found in study.runs.values() for run in found]
    expected = sum(len(plan.get("methods", study.methods)) for plan in study.data.values()) * len(study.seeds)
    facts = [
        counted(len(study.methods), "method"),
        counted(len(study.data), "data set"),
        counted(len(study.seeds), "seed"),
        counted(len(runs), "finished run") if len(runs) == expected else f"{len(runs)} of {expected} runs finished",
        f"{duration(sum(run.seconds or 0.0 for run in runs))} of computing",
    ]
    parts = [f"<header><h1>{escape(study.title)}</h1>"]
    parts += [f'<p class="lead">{escape(study.description)}</p>'] if study.description else []
    parts += [f'<p class="meta">{escape(", ".join(facts))}. Baseline: {escape(study.baseline)}.</p></header>']
    if lacking := study.missing():
        count = sum(map(len, lacking.values()))
        parts.append(
            f'<div class="notice" role="note"><p>This study is not finished: {counted(count, "run")} of {expected} '
            f'{"is" if count == 1 else "are"} missing, <a href="#missing">listed below</a>. Differences are over the '
            "seeds that both methods have.</p></div>"
        )
    reaches: dict[str, float] = {}
    for data in study.data:
        if found := answer(study, data):
            interval, name = next(iter(found[1].values())).difference.interval, found[2]
            ends = [abs(x) * measure(name).scale for x in interval[:3] if x is not None]
            reaches[name] = max(reaches.get(name, 0.0), 1.08 * max(ends), 1e-9)
    cards = []
    for data, anchor in anchors.items():
        found = answer(study, data)
        cards.append(card(study, data, anchor, reaches[found[2]] if found else 1.0))
    parts.append(f'<div class="cards">{"".join(cards)}</div>')
    if text := overview(study):
        parts.append(
            "<h3>Everything against the baseline</h3>"
            f'<p class="note">Paired differences from {escape(study.baseline)} over the seeds; blue is better, orange '
            "worse. Bold: the 95 % interval excludes zero, not corrected for how many there are.</p>" + text
        )
    return "\n".join(parts)


def _data_section(study: Results, data: str, anchor: str) -> tuple[str, list[Entry]]:
    """HTML, and its lines of the table of contents."""
    name = study.main_measure(data)
    known = study.data[data]
    parts = [f'<section id="{anchor}"><h2>{escape(data)}</h2>']
    parts += [f'<p class="note">{escape(str(known["description"]))}</p>'] if known.get("description") else []
    if said := _headline(study, data):
        parts.append(f'<p class="headline">{flow(said)}</p>')
    if name and (best := best_of(study, data, name)):
        interval = study.intervals[data, best, name]
        parts.append(
            f'<p class="note">Highest mean of {escape(measure(name).label)}: {escape(best)}, '
            f"{flow(charts.said(interval, name))}. The best of many is flattered by luck; its difference below says "
            "how much is shown.</p>"
        )
    forests = [_forest(study, data, which, anchor) for which in [name, _second(study, data, name)] if which]
    parts.append(f'<div class="grid">{"".join(forests)}</div>')
    marks = "\u2191 more is better, \u2193 less is; a dot marks the best mean"
    parts.append(f'<p class="note">Mean and half the 95 % interval; {marks}.</p>')
    parts.append(measures_table(study, data))
    under = []
    for place, title in enumerate(study.comparisons):
        if text := _comparison(study, data, title, f"{anchor}-comparison-{place}"):
            parts.append(text)
            under.append(Entry(f"{anchor}-comparison-{place}", title))
    for end, heading, text in (
        ("beta", "Beta of each prompt", _beta(study, data, f"{anchor}-beta")),
        ("calibration", "Calibration", _calibration(study, data, anchor)),
    ):
        if text:
            parts.append(f'<h3 id="{anchor}-{end}">{heading}</h3>{text}')
            under.append(Entry(f"{anchor}-{end}", heading))
    return "\n".join([*parts, "</section>"]), under


def _second(study: Results, data: str, main: str | None) -> str | None:
    return next((name for name in SECOND if name != main and name in study.measures(data)), None)


def _forest(study: Results, data: str, name: str, anchor: str) -> str:
    better = measure(name).better or 1
    rows = [method for method in study.ran(data) if (data, method, name) in study.intervals]
    rows.sort(key=lambda method: -better * study.intervals[data, method, name].mean)
    note = f"Best at the top; the dashed line is {study.baseline}. Bars: 95 % interval of the mean, pale dots: seeds."
    chart = charts.forest(study, data, name, rows, f"{anchor}-forest-{name}")
    return figure(f"{_capital(measure(name).label)} of each method", note, chart)


def _comparison(study: Results, data: str, title: str, anchor: str) -> str:
    """One comparison on one data set; nothing where it has no finished pairs."""
    main, comparison = study.main_measure(data), study.comparisons[title]
    found = of_comparison(study, data, title, main) if main else {}
    if not main or not found:
        return ""
    drawn = _drawn(study, data, list(found), main)
    lines = lines_of(comparison.against, drawn, _order(study))
    key = legend(lines)
    left_out = f" The {len(drawn)} with the best {measure(main).label} are drawn." if len(drawn) < len(found) else ""
    parts = [f'<h3 id="{anchor}">{escape(title)}</h3>']
    parts += [f'<p class="note">{escape(comparison.about)}</p>'] if comparison.about else []
    parts.append(f"<p>{escape(tally(found, comparison.against, main))}</p>")
    second = _second(study, data, main)
    figures = [_differences(study, data, title, which, anchor) for which in (main, second) if which]
    note = f"Higher is better; bands are 95 % intervals over the seeds.{left_out}"
    if chart := charts.courses(study, data, lines, main, f"{anchor}-{main}"):
        figures.append(figure(f"{_capital(measure(main).label)} during training", note, chart, key=key))
    ahead = next((n for n in ("reward", "win_rate", "accuracy") if n in study.measures(data)), main)
    if chart := charts.frontier(study, data, lines, ahead, f"{anchor}-frontier"):
        note = f"Further up for the same KL is better; the large mark is the end of training.{left_out}"
        figures.append(figure(f"{_capital(measure(ahead).label)} against KL", note, chart, key=key))
    parts.append(f'<div class="grid">{"".join(figures)}</div>')
    notes = {
        "kl": "How far the policy goes from the reference.",
        "length": "Whether answers grow longer while they improve.",
        "win_rate": "Against the reference's samples; 50 % is where it starts.", "reward": "Of sampled responses.",
        "margin": "A margin that grows while accuracy stands is overconfidence.",
    }  # fmt: skip
    more = []
    for name, note in notes.items():
        if name != main and (chart := charts.courses(study, data, lines, name, f"{anchor}-{name}")):
            more.append(figure(f"{_capital(measure(name).label)} during training", note + left_out, chart, key=key))
    inside = differences_table(study, data, title) + f'<div class="grid">{"".join(more)}</div>'
    parts.append(details("More of this comparison", "all measures, p-values, courses over training", inside))
    return "\n".join(parts)


def _differences(study: Results, data: str, title: str, name: str, anchor: str) -> str:
    found, against = of_comparison(study, data, title, name), study.comparisons[title].against
    if not found:
        return ""
    note = "Hollow grey: the 95 % interval holds zero. Right of the line is more, blue is better, orange worse."
    if len(found) > MOST_LINES:
        found = dict(sorted(found.items(), key=lambda item: -item[1].difference.interval.mean))
    chart = charts.differences(found, against, name, f"{anchor}-difference-{name}")
    return figure(f"{_capital(measure(name).label)}: difference from {against}", note, chart)


def _drawn(study: Results, data: str, methods: Sequence[str], name: str) -> list[str]:
    """The best of them, as many as a chart can show, in their order."""
    better = measure(name).better or 1
    best = sorted(methods, key=lambda method: -better * study.intervals[data, method, name].mean)[:MOST_LINES]
    return [method for method in methods if method in best]


def _beta(study: Results, data: str, anchor: str) -> str:
    methods = beta_charts.learned(study, data)
    if not methods:
        return ""
    parts = []
    planted = [method for method in methods if beta_charts.kinds_of(study.runs[data, method])]
    bounds = beta_charts.scale_bounds(study, data, planted)
    if bounds is not None:
        key = _reliability_key(study, data, planted)
        ridges = {
            method: beta_charts.histograms(
                study.runs[data, method],
                bounds,
                f"{anchor}-s-{place}",
                f"histograms of s(x) of {method} by kind on {data}",
            )
            for place, method in enumerate(planted)
        }
        note = (
            "Held-out prompts of all seeds, by kind; the most reliable labels at the top. Pale with a dashed outline: "
            "hard kinds. A useful s(x) stands right of 1 where labels are reliable, left of it where they are not."
        )
        parts.append(panels("s(x) on each kind of prompt", note, ridges, key=key))
        shared = beta_charts.kind_mean_bounds(study, data, planted)
        means: dict[str, str] = {}
        ranks: dict[str, str] = {}
        for place, method in enumerate(planted):
            label = f"mean s(x) of {method} against label reliability on {data}"
            if interval := study.intervals.get((data, method, "s/reliability")):
                ranks[method] = f"rank correlation {charts.said(interval, 's/reliability')}"
            means[method] = beta_charts.against_reliability(
                study.runs[data, method], shared, f"{anchor}-means-{place}", label
            )
        note = (
            "Upward to the right: beta is larger where labels can be trusted. Hollow: hard kinds. Bars: 95 % intervals."
        )
        parts.append(panels("Mean s(x) against planted reliability", note, means, key=key, said=ranks))
    if courses := beta_charts.trajectories(study, data, methods, f"{anchor}-course"):
        note = "Line: mean over prompts; band: one deviation; dashed: least and greatest. Means over the seeds."
        parts.append(panels("Beta during training", note, courses))
    beside = []
    if chart := beta_charts.ranges(study, data, methods, f"{anchor}-ranges"):
        note = "From least to greatest s(x); thick: one deviation around the mean. Narrow: held by regularisers."
        beside.append(figure("Range of s(x)", note, chart))
    if "s/reliability" in study.measures(data):
        beside.append(_forest(study, data, "s/reliability", anchor))
    parts += [f'<div class="grid">{"".join(beside)}</div>'] if beside else []
    if any((data, method, "s/std") in study.intervals for method in methods):
        parts.append(scales_table(study, data, methods))
    names = beta_charts.regularizer_names(study, data)
    lines = {name: Line(*look) for name, look in zip(names, _looks(), strict=False)}
    if values := beta_charts.regularizers(study, data, methods, lines, f"{anchor}-regularizers"):
        note = "As logged, means over the seeds, all on one scale."
        parts.append(panels("Regularisers during training", note, values, key=legend(lines)))
    return "\n".join(parts)


def _looks() -> list[Line]:
    names = [str(i) for i in range(MOST_LINES)]
    return list(lines_of("", names, names).values())[1:]


def _order(study: Results) -> list[str]:
    """Methods in the order in which comparisons name them."""
    return list(dict.fromkeys(method for c in study.comparisons.values() for method in c.methods))


def _reliability_key(study: Results, data: str, methods: Sequence[str]) -> str:
    kinds = (seeds[0] for m in methods for seeds in beta_charts.kinds_of(study.runs[data, m]).values())
    items = "".join(
        f'<li><svg class="swatch" viewBox="0 0 14 12" aria-hidden="true"><path d="M0 0h14v12H0z" '
        f'style="fill: var(--{VARIABLES[reliability_colour(reliability)]})"/></svg>{100 * reliability:.0f} %</li>'
        for reliability in sorted({reliability for reliability, _, _ in kinds}, reverse=True)
    )
    return f'<ul class="legend"><li>right labels:</li>{items}</ul>'


def _calibration(study: Results, data: str, anchor: str) -> str:
    found = [name for name in ("ece", "nll") if name in study.measures(data)]
    return f'<div class="grid">{"".join(_forest(study, data, name, anchor) for name in found)}</div>' if found else ""


def _methods(study: Results) -> str:
    parts = ['<section id="methods"><h2>Methods</h2>', methods_table(study)]
    if study.missing():
        parts.append('<h3 id="missing">Runs that are not finished</h3>' + missing_table(study))
    return "\n".join([*parts, "</section>"])


def _reading(study: Results) -> str:
    files = listed([f"<code>{n}</code>" for n in ("results.csv", "summary.csv", "comparisons.csv", "summary.json")])
    return (
        '<section id="reading"><h2>How to read this</h2>'
        "<p>Intervals are 95 % t-intervals of the mean over seeds. Differences are paired: the same seed of both "
        "methods. p-values are two-sided, of a paired t-test, and in the tables of Wilcoxon's signed-rank test too; "
        "Holm's correction is over the methods of a comparison, for each measure alone. An interval that holds zero "
        "shows no difference; it does not show that there is none.</p>"
        f"<p>The numbers are in {files} beside this page.</p>{glossary(study)}</section>"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
