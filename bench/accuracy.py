"""Error of sequence log-probs against float64, from bf16 inputs at the full vocabulary.

What training reads are sums over a completion. Rounding the logits to bf16 leaves an error in each token's log-prob,
and the sum keeps it; fp32 accumulators do not round.
"""

from pathlib import Path
from typing import Any

import torch

from bench.contender import Contender
from bench.measure import largest
from bench.problem import Spec, make_problem, sequence_sums, truth_of_rows


def write_truth(spec: Spec, device: torch.device, path: Path) -> dict[str, Any]:
    """Computes the float64 sequence log-probs once, by slices, for every contender to be compared with."""
    problem = make_problem(spec, device, seed=2)
    rows, labels = problem.rows(problem.hidden)
    truth = truth_of_rows(rows, problem.weight, labels, grad=False)
    sums = sequence_sums(truth.logps, problem)
    torch.save({"sums": sums.cpu(), "logps": truth.logps.cpu()}, path)
    lengths = torch.bincount(problem.sequence_of_row())
    return {
        "sequences": sums.numel(),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "mean_logp": float(truth.logps.mean()),
        "mean_entropy": float(truth.entropy.mean()),
        "dtype": spec.dtype,
        "tokens": int(lengths.sum()),
        "hidden": spec.hidden,
        "vocab": spec.vocab,
    }


def sequence_error(contender: Contender, spec: Spec, device: torch.device, path: Path) -> dict[str, float] | None:
    """Root mean square and largest error of the sequences' log-probs, in nats; None where a contender has none."""
    problem = make_problem(spec, device, seed=2)
    with torch.no_grad():
        sums = contender.sequence_logps(problem)
    return None if sums is None else errors_of(sums, torch.load(path)["sums"].to(device))


def errors_of(sums: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    difference = sums.double() - truth
    return {"rms": float(difference.square().mean().sqrt()), "max": largest(sums, truth)}
