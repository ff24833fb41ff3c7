"""The correctness gate: a contender is timed only where its results and gradients agree with float64."""

from typing import Any

import torch

from bench.contender import Contender, Outcome
from bench.measure import largest, relative
from bench.problem import Exact, Problem, Spec, exact, make_problem

# Nats of a log-prob (logits reach 20, which bf16 rounds by up to 0.06), and relative error of a gradient or a DPO loss.
TOLERANCES = {"float32": (1e-3, 1e-3), "float16": (0.05, 0.05), "bfloat16": (0.25, 0.1), "float64": (1e-6, 1e-6)}
# From contenders that keep fp32 statistics, whatever the inputs; a stash may hold bf16 probabilities.
STRICT = (1e-3, 1e-2)


def check(contender: Contender, work: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """{"ok", "errors": {name: number}, "reason"} of one contender and work, on a small problem."""
    problem = make_problem(Spec(work, 192, 128, 2048, dtype, completion_fraction=0.75), device, seed=1)
    try:
        outcome = contender.run(problem)
    except Exception as error:  # a peer's failure is a result, not ours to raise
        return {"ok": False, "errors": {}, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    if outcome.loss is None:  # bare products have no result
        return {"ok": True, "errors": {}, "reason": ""}
    nats, share = STRICT if contender.fp32_statistics else TOLERANCES[dtype]
    limits = {"logps": nats, "entropy": 5 * nats, "loss": share, "hidden_grad": share, "weight_grad": share}
    errors = _errors(problem, outcome, exact(problem))
    wrong = [f"{name} {error:.1e} > {limits[name]:.0e}" for name, error in errors.items() if not error <= limits[name]]
    return {"ok": not wrong, "errors": errors, "reason": ", ".join(wrong)}


def _errors(problem: Problem, outcome: Outcome, truth: Exact) -> dict[str, float]:
    assert outcome.loss is not None
    errors = {"loss": relative(outcome.loss, truth.loss)}
    if outcome.logps is not None:
        errors["logps"] = largest(outcome.logps, truth.logps)
    if outcome.entropy is not None:
        errors["entropy"] = largest(outcome.entropy, truth.entropy)
    for name, tensor, grad in (
        ("hidden_grad", problem.hidden, truth.hidden_grad),
        ("weight_grad", problem.weight, truth.weight_grad),
    ):
        if grad is not None:
            errors[name] = float("inf") if tensor.grad is None else relative(tensor.grad, grad)
    return errors
