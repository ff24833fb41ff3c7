"""Micro-benchmarks of each fastpo mode and work: ``pytest bench --benchmark-only``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.contenders import CONTENDERS
from bench.problem import WORKS, Spec, make_problem

pytest.importorskip("pytest_benchmark")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPE = (4096, 1024, 151936, "bfloat16") if ON_GPU else (256, 896, 16384, "float32")
MODES = [name for name in CONTENDERS if name.startswith("fastpo") or name == "bare GEMM"]
CASES = [(name, work) for work in WORKS for name in MODES if work in CONTENDERS[name].works]


@pytest.mark.parametrize(("name", "work"), CASES)
def test_mode(name: str, work: str, benchmark: Callable[..., Any]) -> None:
    spec = Spec(work, *SHAPE)
    if reason := CONTENDERS[name].missing(DEVICE, spec):
        pytest.skip(reason)
    problem = make_problem(spec, DEVICE)

    def call() -> None:
        problem.clear()
        CONTENDERS[name].run(problem)
        if ON_GPU:
            torch.cuda.synchronize(DEVICE)

    call()
    benchmark(call)
