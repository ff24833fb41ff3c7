"""Time, peak memory and error of one contender at one point, in this process."""

import math
import time
from typing import Any

import torch

from bench.contender import Contender, Outcome
from bench.problem import IGNORE, Problem, Spec, make_problem, truth_of_rows
from fastpo.memory import peak_bytes_of

SAMPLED_ROWS = 32


def measure(contender: Contender, spec: Spec, device: torch.device, seconds: float) -> dict[str, Any]:
    """One row of the report, without its name. On a GPU, warm calls are repeated for about `seconds`."""
    if device.type == "cpu" and not contender.compiles:
        # Libraries load and thread pools start outside the measurement.
        tiny = Spec(spec.work, 64, spec.hidden, 512, spec.dtype)
        contender.run(make_problem(tiny, device))
    problem = make_problem(spec, device)
    row = _on_gpu(contender, problem, seconds) if device.type == "cuda" else _on_cpu(contender, problem)
    outcome = row.pop("outcome")
    return row | {"labelled": int((problem.labels != IGNORE).sum())} | sampled_error(problem, outcome)


def _on_cpu(contender: Contender, problem: Problem) -> dict[str, Any]:
    """A first call, as a fresh process sees it, and a second. The first shows memory, unless it compiles code as well.

    Memory freed in a first call may stay with the process, so the second call of a frugal method shows too little.
    """
    times: list[float] = []
    peaks: list[int] = []
    outcomes: list[Outcome] = []

    def call() -> None:
        start = time.perf_counter()
        outcomes.append(contender.run(problem))
        times.append(time.perf_counter() - start)

    for _ in range(2):
        problem.clear()
        outcomes.clear()
        peaks.append(peak_bytes_of(call, problem.hidden.device) - problem.required_bytes)
    return {
        "first_seconds": [times[0]],
        "seconds": [times[1]],
        "extra_bytes": max(0, peaks[1 if contender.compiles else 0]),
        "outcome": outcomes[0],
    }


def _on_gpu(contender: Contender, problem: Problem, seconds: float) -> dict[str, Any]:
    """The first call compiles and tunes; the second says how many fit into `seconds`. Times are CUDA events'."""
    device = problem.hidden.device

    def call() -> tuple[float, Outcome]:
        problem.clear()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        outcome = contender.run(problem)
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000, outcome

    begun = time.perf_counter()
    contender.run(problem)
    torch.cuda.synchronize(device)
    first = time.perf_counter() - begun
    problem.clear()
    warm: list[tuple[float, Outcome]] = []
    peak = peak_bytes_of(lambda: warm.append(call()), device)
    seconds_each, outcome = warm[0]
    extra_bytes = max(0, peak - problem.required_bytes)
    times = [call()[0] for _ in range(max(2, min(20, int(seconds / max(seconds_each, 1e-6)))))]
    return {
        "first_seconds": [first],
        "seconds": times,
        "extra_bytes": extra_bytes,
        "outcome": outcome,
    }


def sampled_error(problem: Problem, outcome: Outcome) -> dict[str, float | None]:
    """Largest error of log-probs and entropy, in nats, and relative error of dh, on some rows, against float64."""
    errors: dict[str, float | None] = {"error_logps": None, "error_entropy": None, "error_hidden_grad": None}
    if problem.spec.is_dpo:
        return errors
    rows, labels = problem.rows(problem.hidden.detach())
    chosen = torch.linspace(0, rows.shape[0] - 1, min(SAMPLED_ROWS, rows.shape[0]), device=rows.device).long()
    grad = problem.hidden.grad
    truth = truth_of_rows(rows[chosen], problem.weight, labels[chosen], grad=grad is not None)
    if outcome.logps is not None:
        errors["error_logps"] = largest(outcome.logps[chosen], truth.logps)
    if outcome.entropy is not None:
        errors["error_entropy"] = largest(outcome.entropy[chosen], truth.entropy)
    if grad is not None and outcome.loss is not None:
        errors["error_hidden_grad"] = relative(problem.rows(grad)[0][chosen], truth.grad)
    return errors


def largest(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; infinite if it is not a number."""
    return _finite(float((value.detach().double() - truth).abs().max()))


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth; infinite if it is not a number."""
    return _finite(float((value.detach().double() - truth).norm() / truth.norm()))


def _finite(number: float) -> float:
    return float("inf") if math.isnan(number) else number


def gemm_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The most TFLOP/s that plain matrix products reach here, over a few shapes."""
    shapes = [(8192, 4096, 16384), (8192, 8192, 8192)] if device.type == "cuda" else [(1024, 896, 8192), (2048,) * 3]
    best = 0.0
    for n, d, v in shapes:
        a, b = torch.randn(n, d, device=device).to(dtype), torch.randn(v, d, device=device).to(dtype).t()
        out = torch.empty(n, v, device=device, dtype=dtype)
        for _ in range(2):
            torch.mm(a, b, out=out)
        calls, begun = 0, _now(device)
        while _now(device) - begun < seconds / len(shapes):
            for _ in range(10 if device.type == "cuda" else 1):
                torch.mm(a, b, out=out)
                calls += 1
        best = max(best, 2 * n * d * v * calls / (_now(device) - begun) / 1e12)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
