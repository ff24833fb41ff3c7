"""The example script for TRL, and the benchmark that exchanges its import."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import disable_progress_bars

from bench import trl_swap
from bench.trl_swap import COMMON, LEARNED, difference, holds
from bench.trl_swap_worker import SCRIPT, measure, script_of
from fastpo.planted import planted_preferences

disable_progress_bars()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Planted preferences in LLaMA-Factory's ranking form."""
    rows = [
        {
            "conversations": [{"from": "human", "value": row["prompt"][0]["content"]}],
            **{side: {"from": "gpt", "value": row[side][0]["content"]} for side in ("chosen", "rejected")},
        }
        for row in planted_preferences(16, seed=0)
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


def arguments(data: Path, *more: str) -> list[str]:
    """The benchmark's, with fewer tokens."""
    own = ["--dataset_name", str(data), "--output_dir", str(data.parent / "run")]
    return [*own, *COMMON.split(), *more, "--max_length", "48", "--max_steps", "2"]


def test_one_line_of_the_script_makes_the_difference() -> None:
    ours, theirs = (script_of(library).splitlines() for library in ("fastpo", "trl"))
    changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert changed == [
        ("from fastpo.integrations.trl import DPOConfig, DPOTrainer", "from trl import DPOConfig, DPOTrainer")
    ]
    assert len(ours) < 60 and "\n".join(ours) + "\n" == SCRIPT.read_text()


def test_both_train_alike(data: Path) -> None:
    pair = {library: measure(library, arguments(data)) for library in ("trl", "fastpo")}
    assert difference(pair["fastpo"]["losses"], pair["trl"]["losses"]) < 1e-4
    assert pair["fastpo"]["num_tokens"] == pair["trl"]["num_tokens"] > 0
    assert pair["fastpo"]["extra_bytes"] > 0


def test_fastpo_learns_its_beta(data: Path) -> None:
    found = measure("fastpo", arguments(data, *LEARNED.split()))
    assert found["beta"][0][0] == pytest.approx(0.1) and found["beta"][1][0] != pytest.approx(0.1, abs=1e-6)


ROW = {"losses": [0.7, 20.0], "num_tokens": 9, "extra_bytes": 100 << 20, "beta": [[0.1, 0.1]], "seconds": 1.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"extra_bytes": 50 << 20}, True),
        ({}, False),  # no less memory
        ({"extra_bytes": 50 << 20, "losses": [0.7, 20.001]}, True),
        ({"extra_bytes": 50 << 20, "losses": [0.7002, 20.0]}, False),
        ({"extra_bytes": 50 << 20, "num_tokens": 8}, False),
    ],
)
def test_verdict(changes: dict[str, Any], expected: bool) -> None:
    assert holds({"options": "", "trl": ROW, "fastpo": ROW | changes}) is expected


def test_command(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(library: str, options: str, *_: Any) -> dict[str, Any]:
        return copy.deepcopy(ROW) | ({"extra_bytes": 25 << 20} if library == "fastpo" else {})

    monkeypatch.setattr(trl_swap, "run", run)
    monkeypatch.setattr("sys.argv", ["trl_swap", str(data), "--out", str(tmp_path / "out"), "--only", "ipo"])
    assert trl_swap.main() == 0
    text = (tmp_path / "out/trl_swap.md").read_text()
    assert "| ipo | `--loss_type ipo` | 0.7000 20.0000 | 0e+00 | 100 | 25 | 0.25 |" in text
    assert json.loads((tmp_path / "out/trl_swap.json").read_text())["cases"].keys() == {"ipo"}
    assert "ipo: same" in capsys.readouterr().out
    monkeypatch.setattr(trl_swap, "run", lambda *_: copy.deepcopy(ROW))
    assert trl_swap.main() == 1
