"""What a study came to, read from its result files alone: intervals, paired differences, and tables of them."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from fastpo.files import replacing
from fastpo.lab.folder import RESULT, RUNS, STUDY, Comparison, Run
from fastpo.lab.statistics import Difference, Interval, holm, mean_interval, paired_difference

MEASURE_ORDER = (
    "accuracy", "win_rate", "reward", "kl", "margin", "nll", "ece", "length", "finished", "bleu", "chrf", "rouge_l",
    "s/reliability", "s/hard", "s/mean", "s/std", "s/min", "s/max",
)  # fmt: skip
MAIN_MEASURES = ("accuracy", "win_rate", "reward", "bleu", "chrf", "rouge_l")  # a study's answer is the first it has


class Finished(NamedTuple):
    """One finished run.

    Attributes:
        data, method, seed: which.
        seconds: it took, None if the file does not say.
        measures: name -> finite number.
        kinds: name of a kind of prompts -> what is known of it; empty where none are planted.
        course: evaluations during training, in order.
        training: training logs, in order.
    """

    data: str
    method: str
    seed: int
    seconds: float | None
    measures: dict[str, float]
    kinds: dict[str, dict[str, Any]]
    course: list[dict[str, Any]]
    training: list[dict[str, Any]]


class Corrected(NamedTuple):
    """A paired difference and its p-value corrected over the methods of its comparison.

    Attributes:
        difference: as it is.
        p_holm: p_t after Holm's correction.
    """

    difference: Difference
    p_holm: float | None


class Results:
    """A study and those of its runs that are finished.

    Attributes:
        name, title, description, baseline, seeds: as study.json has them.
        data: name -> {"task", "description", and "methods" where those are not all}.
        methods: name -> settings.
        formulas: name -> loss of a pair.
        comparisons: title -> comparison.
        runs: (data, method) -> runs by seed.
        intervals: (data, method, measure) -> mean over the seeds.
        differences: (data, comparison, method, measure) -> over the seeds that both methods have.
    """

    def __init__(self, described: dict[str, Any], runs: Iterable[Finished]) -> None:
        self.name = str(described.get("name", "study"))
        self.title = str(described.get("title") or self.name)
        self.description = str(described.get("description") or "")
        self.baseline: str = described["baseline"]
        self.seeds: list[int] = described["seeds"]
        self.data: dict[str, dict[str, Any]] = described["data"]
        self.methods: dict[str, dict[str, Any]] = described["methods"]
        self.formulas: dict[str, str] = described.get("formulas") or {}
        self.comparisons = {
            title: Comparison(found["against"], tuple(found["methods"]), str(found.get("about") or ""))
            for title, found in (described.get("comparisons") or {}).items()
        }
        self.runs: dict[tuple[str, str], list[Finished]] = {}
        for run in runs:
            self.runs.setdefault((run.data, run.method), []).append(run)
        self.intervals = {
            (data, method, measure): mean_interval(list(values.values()))
            for (data, method) in self.runs
            for measure in self.measures(data)
            if (values := self.values(data, method, measure))
        }
        self.differences = self._differences()

    def values(self, data: str, method: str, measure: str) -> dict[int, float]:
        """seed -> value, of the runs that have one."""
        runs = self.runs.get((data, method), [])
        return {run.seed: run.measures[measure] for run in runs if measure in run.measures}

    def measures(self, data: str | None = None) -> list[str]:
        """Names that some run has, on one data set or on any: known ones first, others by name."""
        found = {name for key, runs in self.runs.items() if data in (None, key[0]) for r in runs for name in r.measures}
        return [*(name for name in MEASURE_ORDER if name in found), *sorted(found.difference(MEASURE_ORDER))]

    def main_measure(self, data: str) -> str | None:
        """The measure that answers for a data set, None where it has none of `MAIN_MEASURES`."""
        return next((name for name in MAIN_MEASURES if name in self.measures(data)), None)

    def ran(self, data: str) -> list[str]:
        """Methods with a finished run on a data set."""
        return [method for method in self.methods if (data, method) in self.runs]

    def paired(self, data: str, method: str, against: str, measure: str) -> Difference | None:
        """Difference of two methods over the seeds that both have, None where there are none."""
        first, second = self.values(data, method, measure), self.values(data, against, measure)
        common = [seed for seed in first if seed in second]
        if not common or method == against:
            return None
        return paired_difference([first[seed] for seed in common], [second[seed] for seed in common])

    def missing(self) -> dict[tuple[str, str], list[int]]:
        """(data, method) -> seeds whose run is not finished."""
        lacking = {}
        for data, plan in self.data.items():
            for method in plan.get("methods", self.methods):
                finished = {run.seed for run in self.runs.get((data, method), [])}
                if seeds := [seed for seed in self.seeds if seed not in finished]:
                    lacking[data, method] = seeds
        return lacking

    def _differences(self) -> dict[tuple[str, str, str, str], Corrected]:
        found = {}
        for data in self.data:
            for title, comparison in self.comparisons.items():
                for measure in self.measures(data):
                    pairs = {
                        method: difference
                        for method in comparison.methods
                        if (difference := self.paired(data, method, comparison.against, measure)) is not None
                    }
                    corrected = holm([difference.p_t for difference in pairs.values()])
                    for (method, difference), p_holm in zip(pairs.items(), corrected, strict=True):
                        found[data, title, method, measure] = Corrected(difference, p_holm)
        return found


def read_results(folder: str | Path) -> Results:
    """The study in a folder: study.json and runs/DATA/METHOD/SEED/result.json, as many as are there.

    Raises:
        ValueError: study.json is missing or broken, a result.json is broken, or no run is finished.
    """
    folder = Path(folder)
    described = _described(folder)
    runs = []
    for data in described["data"]:
        for method in described["methods"]:
            for seed in described["seeds"]:
                path = folder / Run(data, method, seed).path / RESULT
                if path.is_file():
                    runs.append(_run(path, data, method, seed))
    if not runs:
        raise ValueError(
            f"{folder} must hold a finished run, {RUNS}/DATA/METHOD/SEED/{RESULT} of what {STUDY} names; got none"
        )
    return Results(described, runs)


def write_tables(study: Results, folder: str | Path) -> list[Path]:
    """results.csv, summary.csv, comparisons.csv and summary.json; their paths.

    Raises:
        SaveError: a file cannot be written; what was there is whole.
    """
    folder, measures = Path(folder), study.measures()
    intervals = [
        {"data": data, "method": method, "measure": measure, **interval._asdict()}
        for (data, method, measure), interval in study.intervals.items()
    ]
    comparisons = [_row(study, key, corrected) for key, corrected in study.differences.items()]
    runs = [run for found in study.runs.values() for run in found]
    lacking = [{"data": data, "method": method, "seeds": seeds} for (data, method), seeds in study.missing().items()]
    summary = {
        "name": study.name,
        "title": study.title,
        "baseline": study.baseline,
        "runs": len(runs),
        "missing": lacking,
        "seconds": math.fsum(run.seconds or 0.0 for run in runs),
        "summary": intervals,
        "comparisons": comparisons,
    }
    paths = [folder / name for name in ("results.csv", "summary.csv", "comparisons.csv", "summary.json")]
    _write_csv(
        paths[0],
        ["data", "method", "seed", "seconds", *measures],
        ({"data": r.data, "method": r.method, "seed": r.seed, "seconds": r.seconds, **r.measures} for r in runs),
    )
    _write_csv(paths[1], ["data", "method", "measure", *Interval._fields], intervals)
    tests = ("p_t", "p_wilcoxon", "p_holm")
    key = ("data", "comparison", "method", "against", "measure")
    _write_csv(paths[2], [*key, "difference", "low", "high", "n", *tests], comparisons)
    with replacing(paths[3]) as aside:
        aside.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return paths


def _row(study: Results, key: tuple[str, str, str, str], corrected: Corrected) -> dict[str, Any]:
    data, title, method, measure = key
    interval, p_t, p_wilcoxon = corrected.difference
    return {
        "data": data,
        "comparison": title,
        "method": method,
        "against": study.comparisons[title].against,
        "measure": measure,
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "p_t": p_t,
        "p_wilcoxon": p_wilcoxon,
        "p_holm": corrected.p_holm,
    }


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(found).__name__}")
    return found


def _described(folder: Path) -> dict[str, Any]:
    path = folder / STUDY
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder} must hold {STUDY}, as `fastpo compare` leaves it; got {there}")
    found = _read(path)
    for name, kind in {"data": dict, "methods": dict, "seeds": list, "baseline": str}.items():
        if not isinstance(found.get(name), kind) or not found[name]:
            raise ValueError(f"{path} must have a {kind.__name__} {name!r}, got {found.get(name)!r}")
    named = {"baseline": [found["baseline"]]}
    for title, comparison in (found.get("comparisons") or {}).items():
        if not isinstance(comparison, dict) or not {"against", "methods"} <= comparison.keys():
            raise ValueError(f"{path}: comparison {title!r} must have 'against' and 'methods', got {comparison!r}")
        named[f"comparison {title!r}"] = [comparison["against"], *comparison["methods"]]
    for where, methods in named.items():
        for method in methods:
            if method not in found["methods"]:
                raise ValueError(f"{path}: {where} must name one of {list(found['methods'])}, got {method!r}")
    return found


def _run(path: Path, data: str, method: str, seed: int) -> Finished:
    found = _read(path)
    shapes = {"measures": dict, "kinds": dict, "course": list, "training": list}
    for name, kind in shapes.items():
        if not isinstance(found.get(name) or kind(), kind):
            raise ValueError(f"{path}: {name!r} must be a {kind.__name__}, got {found[name]!r}")
    measures = {name: float(value) for name, value in (found.get("measures") or {}).items() if is_number(value)}
    if not measures:
        raise ValueError(f"{path} must have 'measures', at least one of them a number; got {found.get('measures')!r}")
    seconds = found.get("seconds")
    return Finished(
        data,
        method,
        seed,
        float(seconds) if is_number(seconds) else None,
        measures,
        found.get("kinds") or {},
        found.get("course") or [],
        found.get("training") or [],
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number; runs that went wrong have None or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
