"""Every shipped kernel configuration compiles, ahead of time and without a GPU, to code worth running."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
GEMM_KERNELS = {"linear_logps_fwd_kernel", "linear_logps_bwd_kernel"}
DTYPES = {"bf16", "fp32"}
# target -> bytes of shared memory that one block can have; a launch that asks for more fails
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    # Triton's interpreter, which conftest.py switches on, cannot compile.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("["), done.stderr
    reports = json.loads(done.stdout)
    assert done.returncode == (0 if all(report["clean"] for report in reports) else 1), done.stderr
    return reports


def test_no_other_target(reports: list[dict[str, Any]]) -> None:
    assert {report["target"] for report in reports} == set(SHARED_MEMORY)


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_target(target: str, reports: list[dict[str, Any]]) -> None:
    mine = [report for report in reports if report["target"] == target]
    gemms = [report for report in mine if report["kernel"] in GEMM_KERNELS]
    assert {(r["kernel"], r["dtype"]) for r in gemms} == {(kernel, d) for kernel in GEMM_KERNELS for d in DTYPES}
    # The reduction reads the fp32 partials of either dtype.
    assert {(r["kernel"], r["dtype"]) for r in mine if r not in gemms} == {("linear_logps_reduce_kernel", "fp32")}
    assert not [report for report in mine if report["spills"] != 0 or report["serialized"]]
    assert not [report for report in gemms if not report["matrix"]]
    assert not [report for report in mine if not 0 < report["registers"] <= 512 or not report["clean"]]
    assert not [report for report in mine if report["shared"] > SHARED_MEMORY[target]]
