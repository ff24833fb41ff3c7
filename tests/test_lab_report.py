"""The report of a comparison: its statistics against SciPy and by hand, its files, its page."""

import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fastpo.lab.report import make_report
from fastpo.lab.report_words import number, p_value, sentence, verdict
from fastpo.lab.statistics import Difference, Interval, holm, mean_interval, paired_difference
from fastpo.lab.summary import read_results

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
METHODS = ("dpo", "ledpo", "ipo", "<b>&\"x'")
DATA = ("words", "pairs & <co>")
FILES = ("report.html", "results.csv", "summary.csv", "comparisons.csv", "summary.json")


class Page(HTMLParser):
    """Fails on tags that do not match; collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.drawings: list[dict[str, str]] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "svg":
            self.drawings.append({name: value or "" for name, value in attrs})
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def result(data: str, method: str, seed: int) -> dict[str, Any]:
    """As `fastpo compare` leaves one: planted kinds and samples on the first data set only."""
    rng = random.Random(f"{data} {method} {seed}")
    planted, learned = data == DATA[0], method == "ledpo"
    quality = 0.7 + 0.03 * METHODS.index(method) + rng.gauss(0, 0.01)
    course = [
        {"step": i, "fraction": i / 4, "accuracy": 0.5 + i * (quality - 0.5) / 4, "kl": i * 0.7, "length": 7.0 + i}
        for i in range(5)
    ]
    measures: dict[str, Any] = {
        "accuracy": quality,
        "nll": 0.6,
        "ece": 0.1 + rng.random() / 50,
        "kl": 2.8,
        "margin": None,
    }
    found: dict[str, Any] = {"data": data, "method": method, "seed": seed, "seconds": 2.0, "measures": measures}
    if planted:
        measures |= {"reward": quality, "win_rate": quality, "own": 3.0}
        for point in course:
            point["reward"] = point["accuracy"]
        found["kinds"] = {
            name: {"reliability": p, "hard": hard, "pairs": 9, "accuracy": 0.8}
            | ({"s": [p + rng.random() for _ in range(9)]} if learned else {})
            for name, p, hard in (("court", 1.0, False), ("road", 0.7, True))
        }
    if learned:
        measures |= {"s/reliability": 0.8, "s/mean": 1.0, "s/std": 0.2, "s/min": 0.5, "s/max": 2.0}
    found["training"] = [
        {"step": i, "fraction": i / 3, "loss": 0.5}
        | (
            {"beta/mean": 0.1, "beta/std": 0.01 * i, "beta/min": 0.1 - 0.02 * i, "beta/max": 0.1 + 0.1 * i}
            if learned
            else {}
        )
        | ({"regularizers/global": 0.01 * i} if learned else {})
        for i in range(4)
    ]
    return {**found, "course": course}


def write_study(folder: Path, leave_out: tuple[tuple[str, str, int], ...] = (), seeds: int = 3) -> Path:
    study = {
        "name": "toy", "title": "Toy <i>study</i>", "description": "Of & with", "baseline": "dpo",
        "seeds": list(range(seeds)), "data": {data: {"task": "text", "description": "planted <p>"} for data in DATA},
        "methods": {method: {"preset": "dpo", "regularizers": {"global": 1.0}} for method in METHODS},
        "formulas": {"ledpo": "-log sigmoid(b s(x) h) < 1", "ipo": "z = b * h\n  loss  = ipo\n\nIn words"},
        "comparisons": {
            "Learned <b>": {"against": "dpo", "methods": ["ledpo"], "about": "does it help & how"},
            "All": {"against": "dpo", "methods": list(METHODS[1:]), "about": ""},
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study))
    for data in DATA:
        for method in METHODS:
            for seed in range(seeds):
                if (data, method, seed) not in leave_out:
                    path = folder / "runs" / data / method / str(seed) / "result.json"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(result(data, method, seed)))
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with two runs missing, and its report."""
    folder = write_study(tmp_path_factory.mktemp("study"), leave_out=((DATA[0], "ledpo", 1), (DATA[1], "ipo", 2)))
    assert make_report(folder) == [folder / name for name in FILES]
    return folder


@pytest.fixture(scope="module")
def text(reported: Path) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_and_p_values_are_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=n), rng.normal(0.5, size=n)
    interval = mean_interval(a.tolist())
    low, high = stats.t.interval(0.95, n - 1, loc=a.mean(), scale=stats.sem(a))
    assert interval == pytest.approx((a.mean(), low, high, n))
    assert interval.half == pytest.approx((high - low) / 2)
    difference = paired_difference(a.tolist(), b.tolist())
    assert difference.p_t == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert difference.p_wilcoxon == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert difference.interval.mean == pytest.approx((a - b).mean())


def test_interval_by_hand() -> None:
    # Mean 2, deviation 1, t of two degrees of freedom 4.302653.
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3), 3))


def test_one_pair_has_no_interval() -> None:
    assert mean_interval([2.0]) == Interval(2.0, None, None, 1)
    difference = paired_difference([2.0], [1.5])
    assert difference == Difference(Interval(0.5, None, None, 1), None, None)
    assert difference.interval.holds_zero


def test_differences_without_spread() -> None:
    same = paired_difference([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert same == Difference(Interval(0.0, 0.0, 0.0, 3), 1.0, 1.0)
    # All the same by chance, of a few: nothing to judge by, rather than all certainty.
    shifted = paired_difference([0.3, 0.4, 0.5], [0.1, 0.2, 0.3])
    assert shifted == Difference(Interval(pytest.approx(0.2), None, None, 3), None, None)
    # Differences of zero say nothing of the sign.
    assert paired_difference([1, 2, 3, 4], [1, 1, 1, 1]).p_wilcoxon == 0.25


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_must_be_finite(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values must be finite numbers"):
        mean_interval(values)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="must be pairs, got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []
    corrected = holm([0.2, 0.001, 0.03])
    assert all(a <= b for a, b in pairwise(sorted(x for x in corrected if x is not None)))


@pytest.mark.parametrize(
    ("interval", "name", "wanted"),
    [
        (Interval(0.02, 0.01, 0.03, 5), "accuracy", "better"),
        (Interval(0.02, 0.01, 0.03, 5), "ece", "worse"),
        (Interval(0.02, 0.01, 0.03, 5), "kl", "more"),
        (Interval(0.02, -0.01, 0.05, 5), "accuracy", "open"),
        (Interval(0.02, None, None, 1), "accuracy", "open"),
    ],
)
def test_verdicts(interval: Interval, name: str, wanted: str) -> None:
    assert verdict(Difference(interval, 0.01, 0.01), name) == wanted


def test_sentences() -> None:
    sure = Difference(Interval(0.018, 0.009, 0.027, 20), 0.0003, 0.001)
    assert sentence("ledpo", "dpo", sure, "accuracy", 0.0003, 1) == (
        "ledpo against dpo: +1.8 points of held-out accuracy, 95 % interval 0.9 to 2.7, 20 seeds, p = 0.0003."
    )
    unsure = Difference(Interval(0.001, -0.009, 0.011, 20), 0.8, 0.9)
    said = sentence("ledpo", "dpo", unsure, "accuracy", 1.0, 3)
    assert said.endswith("p = 0.8 (p = 1 corrected for 3 methods). The interval holds zero: no difference is shown.")
    assert "no interval" in sentence("a", "b", Difference(Interval(0.1, None, None, 1), None, None), "kl", None, 1)


def test_numbers() -> None:
    assert number(-0.0001, "accuracy", sign=True) == "0.0"
    assert number(-0.021, "accuracy", sign=True) == "\u22122.1"
    assert number(1.23456, "unheard of") == "1.235"
    assert [p_value(p) for p in (None, 1e-9, 0.0123, 1.0)] == ["no p-value", "p < 0.0001", "p = 0.012", "p = 1"]


def test_page_is_whole_and_asks_for_nothing(text: str) -> None:
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert tag != "script"
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:,")), value
            assert not value.startswith("#") or value[1:] in ids
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert not re.search(r"#0f0[cde]", text)  # a colour of matplotlib's that is not the page's
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(re.findall(r"--(\w+): ", text))


def test_figures_are_described(text: str) -> None:
    drawings = [svg for svg in Page(text).drawings if svg.get("aria-hidden") != "true"]
    assert len(drawings) > 30
    for svg in drawings:
        assert svg["role"] == "img"
        assert svg["aria-label"]
        assert "viewbox" in svg
        assert not {"width", "height"} & svg.keys()
    assert text.count("<figure") == text.count("<figcaption")


def test_names_are_said_and_escaped(text: str) -> None:
    said = "".join(Page(text).said)
    for name in (
        *METHODS,
        *DATA,
        "Toy <i>study</i>",
        "Learned <b>",
        "-log sigmoid(b s(x) h) < 1",
        "does it help & how",
    ):
        assert name in said
    assert "<summary><code>loss  = ipo</code></summary>" in text
    assert "<b>&" not in text
    assert "<i>study" not in text


def test_missing_runs_are_said(text: str) -> None:
    said = " ".join(Page(text).said)
    assert "22 of 24 runs finished" in said
    assert "2 runs of 24 are missing" in re.sub(r"\s+", " ", said)
    assert 'id="missing"' in text


def test_only_what_the_data_has_is_drawn(text: str) -> None:
    first, second = text.split('id="data-0"')[1].split('id="data-1"')
    assert "Reward of samples against KL" in first
    assert "s(x) on each kind of prompt" in first
    assert "Held-out accuracy against KL" in second
    assert "s(x) on each kind of prompt" not in second
    assert "Range of s(x)" in second


def test_tables(reported: Path) -> None:
    results = rows(reported / "results.csv")
    assert len(results) == 22
    assert {row["margin"] for row in results if "margin" in row} <= {""}
    study = read_results(reported)
    summary = {(r["data"], r["method"], r["measure"]): r for r in rows(reported / "summary.csv")}
    assert summary.keys() == study.intervals.keys()
    accuracies = [float(r["accuracy"]) for r in results if (r["data"], r["method"]) == (DATA[0], "ledpo")]
    row = summary[DATA[0], "ledpo", "accuracy"]
    assert (float(row["mean"]), int(row["n"])) == (pytest.approx(np.mean(accuracies)), 2)
    compared = rows(reported / "comparisons.csv")
    chosen = [r for r in compared if (r["data"], r["comparison"], r["measure"]) == (DATA[1], "All", "accuracy")]
    assert [r["method"] for r in chosen] == list(METHODS[1:])
    assert [int(r["n"]) for r in chosen] == [3, 2, 3]
    assert [float(r["p_holm"]) for r in chosen] == pytest.approx(holm([float(r["p_t"]) for r in chosen]))
    by_seed = {(r["method"], r["seed"]): float(r["accuracy"]) for r in results if r["data"] == DATA[1]}
    paired = [by_seed["ipo", seed] - by_seed["dpo", seed] for seed in "01"]
    assert float(chosen[1]["difference"]) == pytest.approx(np.mean(paired))
    whole = json.loads((reported / "summary.json").read_text())
    assert whole["missing"] == [
        {"data": DATA[0], "method": "ledpo", "seeds": [1]}, {"data": DATA[1], "method": "ipo", "seeds": [2]}
    ]  # fmt: skip
    assert (whole["runs"], len(whole["comparisons"])) == (22, len(compared))


def test_same_results_same_bytes(reported: Path) -> None:
    before = {name: (reported / name).read_bytes() for name in FILES}
    make_report(reported)
    assert {name: (reported / name).read_bytes() for name in FILES} == before


def test_one_run_is_reported(tmp_path: Path) -> None:
    every = [(data, method, seed) for data in DATA for method in METHODS for seed in range(3)]
    folder = write_study(tmp_path / "one", leave_out=tuple(every[1:]))
    make_report(folder)
    said = "".join(Page((folder / "report.html").read_text(encoding="utf-8")).said)
    assert "No comparison has finished runs of both methods." in said
    assert "No run is finished." in said
    assert rows(folder / "comparisons.csv") == []


def test_one_seed_is_reported_without_intervals(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "seed", seeds=1)
    make_report(folder)
    said = "".join(Page((folder / "report.html").read_text(encoding="utf-8")).said)
    assert "from one seed: no interval, nothing is shown." in said
    assert {row["low"] for row in rows(folder / "summary.csv")} == {""}


def test_folders_that_hold_no_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold study\.json.*got no such folder"):
        make_report(tmp_path / "none")
    with pytest.raises(ValueError, match=r"must hold study\.json.*got \[\]"):
        make_report(tmp_path)
    folder = write_study(tmp_path / "empty", seeds=0)
    with pytest.raises(ValueError, match=r"must have a list 'seeds', got \[\]"):
        make_report(folder)
    (folder / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json must be JSON"):
        make_report(folder)


def test_study_without_a_finished_run(tmp_path: Path) -> None:
    every = tuple((data, method, seed) for data in DATA for method in METHODS for seed in range(3))
    folder = write_study(tmp_path, leave_out=every)
    with pytest.raises(ValueError, match=r"must hold a finished run, .*got none"):
        make_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("broken", "wanted"),
    [
        ("{", "must be JSON"),
        ("[]", "must be a JSON object, got list"),
        ('{"measures": {"accuracy": NaN}}', "must have 'measures', at least one of them a number"),
        ('{"measures": {"accuracy": 1}, "course": {"a": 1}}', "'course' must be a list"),
    ],
)
def test_broken_results_are_named(tmp_path: Path, broken: str, wanted: str) -> None:
    folder = write_study(tmp_path)
    (folder / "runs" / DATA[0] / "ipo" / "2" / "result.json").write_text(broken)
    with pytest.raises(ValueError, match=rf"words/ipo/2/result\.json:? {re.escape(wanted)}"):
        make_report(folder)


def test_comparisons_must_name_methods(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    study = json.loads((folder / "study.json").read_text())
    study["comparisons"]["All"]["methods"].append("kto")
    (folder / "study.json").write_text(json.dumps(study))
    with pytest.raises(ValueError, match=r"comparison 'All' must name one of .*got 'kto'"):
        make_report(folder)
