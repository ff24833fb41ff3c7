"""The benchmark itself: what it writes, when it refuses, and that its errors are errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import gate, report, runner
from bench.accuracy import errors_of
from bench.contender import Eager, Outcome
from bench.contenders import CONTENDERS
from bench.measure import largest, measure, relative
from bench.pictures import achieved_tflops
from bench.presets import PRESETS
from bench.problem import IGNORE, WORKS, Problem, Spec, exact, make_problem, sequence_sums, truth_of_rows

CPU = torch.device("cpu")
SMALL = {"tokens": 48, "hidden": 16, "vocab": 300, "dtype": "float32"}


def test_quick_preset_writes_json_markdown_and_pictures(tmp_path: Path) -> None:
    names = ["bare GEMM", "fastpo frozen", "fastpo lean", "torch linear_cross_entropy", "eager"]
    only = [argument for name in names for argument in ("--only", name)]
    options = ["--preset", "quick", "--out", str(tmp_path), "--threads", "1", "--tokens", "128"]
    assert command.main(options + only) == 0

    result = json.loads((tmp_path / "quick.json").read_text())
    assert {
        "hardware",
        "gpu",
        "driver",
        "cuda",
        "python",
        "versions",
        "commit",
        "dirty",
        "date",
        "command",
        "threads",
    } <= set(result["meta"])
    assert str(tmp_path) not in json.dumps(result)
    assert result["gemm_ceiling_tflops"] > 0
    measured = {(row["work"], row["contender"]) for row in result["rows"]}
    assert {("frozen", "fastpo frozen"), ("trainable", "fastpo lean"), ("dpo_frozen", "eager")} <= measured
    for row in result["rows"]:
        assert "failed" not in row, row
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["extra_bytes"] >= 0 and row["seconds"] and row["first_seconds"]
    ours = next(row for row in result["rows"] if row["contender"] == "fastpo frozen" and row["work"] == "frozen")
    assert ours["error_logps"] < 1e-3 and ours["error_hidden_grad"] < 1e-3
    errors = result["accuracy"]["rows"]
    assert errors["eager"]["max"] > errors["torch linear_cross_entropy"]["rms"] / 10

    text = (tmp_path / "quick.md").read_text()
    assert "| fastpo frozen |" in text and "against float64" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {f"quick-{x}.png" for x in ("time", "memory", "tflops")}


def test_no_report_when_fastpo_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(job: dict[str, Any], limit: float, threads: int | None = None) -> tuple[list[dict[str, Any]], str]:
        if job["contender"] is None:
            return [{"kind": "ceiling", "tflops": 1.0, "threads": 1}, {"kind": "truth"}], ""
        return [{"kind": "gate", "work": job["gate"][0], "ok": False, "errors": {}, "reason": "logps 1.0 > 1e-3"}], ""

    monkeypatch.setattr(runner, "spawn", wrong)
    assert command.main(["--preset", "quick", "--out", str(tmp_path), "--only", "fastpo frozen"]) == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_peer_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(job: dict[str, Any], limit: float, threads: int | None = None) -> tuple[list[dict[str, Any]], str]:
        if job["contender"] is None:
            return [{"kind": "ceiling", "tflops": 1.0, "threads": 1}, {"kind": "truth"}], ""
        return [{"kind": "row", "spec": spec, "failed": "wrong: loss 1.0"} for spec in job["points"]], ""

    monkeypatch.setattr(runner, "spawn", wrong)
    assert command.main(["--preset", "quick", "--out", str(tmp_path), "--only", "eager"]) == 0
    rows = json.loads((tmp_path / "quick.json").read_text())["rows"]
    assert rows and all(row["failed"] == "wrong: loss 1.0" and "median" not in row for row in rows)
    assert "| eager | wrong: loss 1.0 |" in (tmp_path / "quick.md").read_text()


def test_a_peer_that_fails_the_gate_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def wrong(job: dict[str, Any], limit: float, threads: int | None = None) -> tuple[list[dict[str, Any]], str]:
        if job["contender"] is None:
            return [{"kind": "ceiling", "tflops": 1.0, "threads": 1}, {"kind": "truth"}], ""
        timed.extend(job["points"])
        verdict = {"ok": False, "errors": {"loss": 1.0}, "reason": "loss 1.0e+00 > 1e-03"}
        return [{"kind": "gate", "work": work, **verdict} for work in job["gate"]], ""

    monkeypatch.setattr(runner, "spawn", wrong)
    assert command.main(["--preset", "cpu", "--out", str(tmp_path), "--only", "eager"]) == 0
    assert not timed
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert rows and all(row["failed"].startswith("wrong: loss") for row in rows)


class Off(Eager):
    """Eager with every logit of the label a little too large."""

    def token_outcome(self, problem: Problem) -> Outcome:
        outcome = super().token_outcome(problem)
        assert outcome.loss is not None and outcome.logps is not None
        return Outcome(1.01 * outcome.loss, outcome.logps + 0.01)


@pytest.mark.parametrize("work", ["forward", "frozen", "trainable"])
def test_gate_refuses_a_wrong_contender(work: str) -> None:
    assert gate.check(Eager(), work, "float32", CPU)["ok"]
    verdict = gate.check(Off(), work, "float32", CPU)
    assert not verdict["ok"] and "logps" in verdict["reason"]


@pytest.mark.parametrize(
    ("name", "work"), [(name, work) for name, c in CONTENDERS.items() if c.package == "fastpo" for work in c.works]
)
def test_gate_passes_every_mode_of_fastpo(name: str, work: str) -> None:
    if reason := CONTENDERS[name].missing(CPU, Spec(work, **SMALL)):
        pytest.skip(reason)
    verdict = gate.check(CONTENDERS[name], work, "float32", CPU)
    assert verdict["ok"], verdict


def test_gate_reports_an_exception_of_a_peer() -> None:
    class Broken(Eager):
        def token_logps(self, *_: torch.Tensor) -> Any:
            raise RuntimeError("no kernel for this")

    verdict = gate.check(Broken(), "forward", "float32", CPU)
    assert not verdict["ok"] and "no kernel for this" in verdict["reason"]


def test_sliced_truth_is_the_full_one() -> None:
    problem = make_problem(Spec("frozen", **SMALL), CPU)
    rows, labels = problem.rows(problem.hidden)
    truth, whole = truth_of_rows(rows, problem.weight, labels, grad=True, step=77), exact(problem)
    assert whole.hidden_grad is not None
    torch.testing.assert_close(truth.logps, whole.logps)
    torch.testing.assert_close(truth.entropy, whole.entropy)
    torch.testing.assert_close(truth.grad, whole.hidden_grad.flatten(0, 1))


def test_errors_of_known_numbers() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    value = torch.tensor([3.0, 4.5])
    assert largest(value, truth) == 0.5
    assert relative(value, truth) == pytest.approx(0.1)
    assert errors_of(value, truth) == {"rms": pytest.approx(math.sqrt(0.125)), "max": 0.5}
    assert largest(torch.tensor([math.nan, 4.0]), truth) == math.inf


def test_useful_products_over_time() -> None:
    row = {"work": "frozen", "labelled": 1000, "hidden": 500, "vocab": 1000, "median": 0.001}
    assert achieved_tflops(row) == pytest.approx(2.0)  # two products of 2 * 1000 * 500 * 1000


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_the_completions_are_the_fraction_asked_for(fraction: float) -> None:
    problem = make_problem(Spec("dpo_frozen", 16384, 8, 50, completion_fraction=fraction), CPU)
    labelled = problem.labels != IGNORE
    assert float(labelled.float().mean()) == pytest.approx(fraction, abs=0.06)
    assert bool(labelled.any(1).all()) and problem.reference.shape == problem.hidden.shape
    logps = torch.ones(int(labelled.sum()))
    torch.testing.assert_close(sequence_sums(logps, problem), labelled.sum(1).float())


def test_memory_is_beyond_the_required_gradients() -> None:
    row = measure(Eager(), Spec("trainable", 256, 32, 50000), CPU, seconds=0.01)
    logits = 256 * 50000 * 4
    assert 1.5 * logits < row["extra_bytes"] < 6 * logits


def test_presets_name_existing_contenders_and_cover_every_work() -> None:
    for preset in PRESETS.values():
        named = (
            preset.main_only | set(preset.most_tokens) | {name for spec in preset.points for name in spec.contenders}
        )
        assert named <= set(CONTENDERS), preset.name
    assert {spec.work for spec in PRESETS["gpu"].points} == set(WORKS)
    assert PRESETS["gpu"].budget < 9 * 60


def test_page_is_what_the_results_say() -> None:
    section = report.page_section()
    if section is None:
        pytest.skip("no results in bench/results")
    assert report.main(["--check"]) == 0


def test_report_fills_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "page_section", lambda: "new")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.main(["--check"]) == 0
