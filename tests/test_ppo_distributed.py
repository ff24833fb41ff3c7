"""PPO on two processes is PPO on one with twice the accumulation, and a resumed run is the whole one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_distributed_run import run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found."""
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(here / "ppo_distributed_run.py"), str(folder)]
    paths = {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"found.{process}") for process in range(2)]


def test_two_processes_train_as_one(two: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = run(tmp_path)
    for process in two:
        found = process["whole"]
        for name, x in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], x, rtol=1e-4, atol=1e-6)
        for row, wanted in zip(found["logs"], alone["logs"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert any(x.any() for x in found["head"].values())


def test_every_process_resumes_within_the_use_of_its_rollouts(two: list[dict[str, Any]]) -> None:
    for process in two:
        whole, resumed = process["whole"], process["resumed"]
        assert resumed["logs"] == whole["logs"] and len(whole["logs"]) == 5
        assert [name for name, x in whole["weights"].items() if not torch.equal(x, resumed["weights"][name])] == []
    assert two[0]["whole"]["evaluation"] == two[1]["whole"]["evaluation"]


def test_a_value_head_trains_on_both_alike(two: list[dict[str, Any]]) -> None:
    """Advantages are whitened over a process's tokens, so that one process would train otherwise."""
    first, second = (process["values"]["weights"] for process in two)
    assert [name for name, x in first.items() if not torch.equal(x, second[name])] == []
    assert first["value_head.linear.weight"].any()
