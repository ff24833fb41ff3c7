"""Beta histograms in TensorBoard, Weights & Biases and trackio: in stand-ins that record, and in those installed."""

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_args, tiny_model, tiny_pairs, tiny_tokenizer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from fastpo import PreferenceTrainer
from fastpo.reporting import MetricsFile
from fastpo.stages import HISTOGRAM_EDGES, HISTOGRAM_NAMES
from fastpo.trackers import beta_histograms

BETA = 0.3
Row = tuple[int, str, Any]


def trained(folder: Path, **arguments: Any) -> PreferenceTrainer:
    """Two steps with a learned beta, logged and evaluated at each."""
    fields = {"learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 1, **arguments}
    callbacks = [MetricsFile(str(folder)), *fields.pop("callbacks", [])]
    trainer = PreferenceTrainer(
        tiny_model(),
        args=tiny_args(folder, beta=BETA, add_beta_head=True, beta_mode="dynamic_scaling", **fields),
        train_dataset=tiny_pairs(8), eval_dataset=tiny_pairs(8, seed=2), processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer


def expected(trainer: PreferenceTrainer) -> Iterator[Row]:
    """Step, name and shares of each histogram that shall be shown, from what the trainer remembers having logged."""
    for row in trainer.state.log_history:
        for prefix, shown in (("", "train/"), ("eval_", "eval/")):
            if f"{prefix}beta/mean" in row:
                yield row["step"], f"{shown}beta/histogram", [row[prefix + name] for name in HISTOGRAM_NAMES]


class Recorder(ModuleType):
    """A tracker as far as it is used: TensorBoard's writer, and the module of wandb and trackio."""

    class Histogram:
        def __init__(self, np_histogram: tuple[list[float], list[float]]) -> None:
            self.shares, self.edges = np_histogram

    def __init__(self) -> None:
        super().__init__("recorder")
        self.rows: list[Row] = []
        self.run = SimpleNamespace(summary={})

    def log(self, row: dict[str, Any]) -> None:
        self.rows += [(row["train/global_step"], name, value) for name, value in row.items()]

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        self.rows.append((step, name, value))

    def add_histogram_raw(self, name: str, *, global_step: int, **raw: Any) -> None:
        assert raw["bucket_counts"][0] == 0 and raw["min"] == raw["bucket_limits"][0]
        self.rows.append((global_step, name, self.Histogram((raw["bucket_counts"][1:], raw["bucket_limits"]))))

    def add_text(self, *args: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(params=[TensorBoardCallback, WandbCallback, TrackioCallback])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Recorder]:
    """A callback of transformers' and what it tells its tracker."""
    recorder, kind = Recorder(), request.param
    callback = kind.__new__(kind)  # __init__ wants the tracker
    if kind is TensorBoardCallback:
        callback.__dict__ |= {"tb_writer": recorder, "logging_dir": None}
    else:
        name = kind.__name__.removesuffix("Callback").lower()
        monkeypatch.setitem(sys.modules, name, recorder)
        callback.__dict__ |= {f"_{name}": recorder, "_initialized": True, "_log_model": None}
    for event in ("on_train_begin", "on_train_end"):
        monkeypatch.setattr(kind, event, lambda *args, **kwargs: None)
    return callback, recorder


def test_a_tracker_gets_a_histogram_and_not_its_bins(recorded: tuple[Any, Recorder], tmp_path: Path) -> None:
    callback, recorder = recorded
    trainer = trained(tmp_path, callbacks=[callback])
    shown = [(step, name, x.shares) for step, name, x in recorder.rows if isinstance(x, Recorder.Histogram)]
    assert len(shown) == 4 and shown == list(expected(trainer))
    assert not [name for _, name, _ in recorder.rows if "histogram/" in name]
    assert {"train/loss", "train/beta/mean", "eval/beta/mean"} <= {name for _, name, _ in recorder.rows}
    # Our own file, and what evaluate() returns, have the bins.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(HISTOGRAM_NAMES) <= set(lines[0]) and f"eval_{HISTOGRAM_NAMES[0]}" in trainer.evaluate()


def test_the_bins_are_multiples_of_the_scheduled_beta(recorded: tuple[Any, Recorder], tmp_path: Path) -> None:
    callback, recorder = recorded
    trained(tmp_path, callbacks=[callback], beta_schedule={"points": [[0, 0.3], [1, 0.1]]}, eval_strategy="no")
    first, second = [x.edges for _, _, x in recorder.rows if isinstance(x, Recorder.Histogram)]
    assert first == pytest.approx([0.2 * edge for edge in HISTOGRAM_EDGES])  # logged after the first of two steps
    assert second == pytest.approx([0.1 * edge for edge in HISTOGRAM_EDGES])


def test_only_the_main_process_shows(recorded: tuple[Any, Recorder], tmp_path: Path) -> None:
    callback, recorder = recorded
    trainer = trained(tmp_path, callbacks=[callback])
    recorder.rows.clear()
    trainer.state.is_world_process_zero = False
    trainer.log({**trainer.state.log_history[0]})
    assert recorder.rows == []


def test_callbacks_do_not_pile_up_log_by_log(recorded: tuple[Any, Recorder], tmp_path: Path) -> None:
    callback, recorder = recorded
    trainer = trained(tmp_path, callbacks=[callback])
    trainer.log({"x": 1.0})
    assert callback.on_log.args[0].func is type(callback).on_log
    assert [name for _, name, _ in recorder.rows].count("train/x") == 1


def test_a_trackio_without_histograms_gets_the_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    old = ModuleType("trackio")
    callback = TrackioCallback.__new__(TrackioCallback)
    callback.__dict__ |= {"_trackio": recorder, "_initialized": True}
    monkeypatch.setitem(sys.modules, "trackio", old)
    for event in ("on_train_begin", "on_train_end"):
        monkeypatch.setattr(TrackioCallback, event, lambda *args, **kwargs: None)
    trained(tmp_path, callbacks=[callback])
    assert f"train/{HISTOGRAM_NAMES[3]}" in {name for _, name, _ in recorder.rows}


def test_a_fixed_beta_has_no_histogram() -> None:
    assert list(beta_histograms({"loss": 1.0, "beta/mean": 0.1}, 0.1)) == []


def test_the_outer_edges_reach_to_the_extremes() -> None:
    logs = {**dict.fromkeys(HISTOGRAM_NAMES, 1 / 7), "beta/min": 0.001, "beta/max": 0.2}
    [(name, histogram)] = beta_histograms(logs, 0.1)
    assert name == "beta/histogram" and histogram.edges[0] == 0.001 and histogram.edges[-1] == pytest.approx(0.4)
    assert all(low < high for low, high in pairwise(histogram.edges))


# --- for real, where the tracker is installed -------------------------------------------------------------------------


def test_tensorboard_reads_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trained(tmp_path, report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "events"), size_guidance={"histograms": 0}).Reload()
    assert set(events.Tags()["histograms"]) == {"train/beta/histogram", "eval/beta/histogram"}
    assert not [name for name in events.Tags()["scalars"] if "histogram" in name]
    found = [(e.step, "train/beta/histogram", e.histogram_value) for e in events.Histograms("train/beta/histogram")]
    wanted = [row for row in expected(trainer) if row[1].startswith("train")]
    assert [row[:2] for row in found] == [row[:2] for row in wanted] == [(s, "train/beta/histogram") for s in (1, 2)]
    for (_, _, value), (_, _, shares) in zip(found, wanted, strict=True):
        assert list(value.bucket)[-7:] == pytest.approx(shares)
        assert list(value.bucket_limit)[-8:] == pytest.approx([BETA * edge for edge in HISTOGRAM_EDGES])


def test_wandb_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = trained(tmp_path, report_to=["wandb"])
    try:
        *_, last = (shares for _, name, shares in expected(trainer) if name.startswith("train"))
        assert list(wandb.run.summary["train/beta/histogram"]["values"]) == pytest.approx(last)
        assert not [name for name in wandb.run.summary.keys() if "histogram/" in name]  # noqa: SIM118
    finally:
        wandb.finish()


def test_trackio_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    trainer = trained(tmp_path, report_to=["trackio"], project="fastpo-test", run_name="run", trackio_space_id=None)
    logged = [row.get("train/beta/histogram") for row in storage.get_logs("fastpo-test", "run")]
    wanted = [shares for _, name, shares in expected(trainer) if name.startswith("train")]
    assert [histogram["values"] for histogram in logged if histogram] == [pytest.approx(shares) for shares in wanted]
