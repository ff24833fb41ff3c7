"""What every contender is, the eager ones, and the bare matrix products that none can do without.

A contender turns (K, D) rows, the head and (K,) labels into log-probs or a loss; everything else is common.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import BARE_UNITS, WORKS, Problem, Spec, dpo_loss, sequence_sums


class Outcome(NamedTuple):
    """What a run leaves besides the gradients; None where the contender has no such thing."""

    loss: Tensor | None  # -logps.sum(), or the DPO loss
    logps: Tensor | None = None  # (K,)
    entropy: Tensor | None = None  # (K,)


class Contender:
    """One method; subclasses give `token_logps`, or `token_loss` and `step_loss` as well where they have better."""

    package = "torch"  # the distribution whose version counts
    entropy = False  # the entropy is computed along
    full_logits = False  # holds (tokens, vocabulary) logits
    summed = False  # a token work gives the gradient of a summed loss alone: not that of any function of log-probs
    compiles = False  # the first call compiles
    per_shape = False  # and so does the first at every shape
    fp32_statistics = False  # exact from low-precision inputs: the gate asks more of it
    works: tuple[str, ...] = WORKS

    def missing(self, device: torch.device, spec: Spec) -> str | None:
        """Why it cannot do `spec` here, or None."""
        if spec.work not in self.works:
            return f"does not do {spec.work}"
        return self.unavailable(device)

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def token_outcome(self, problem: Problem) -> Outcome:
        rows, labels = problem.rows(problem.hidden)
        logps, entropy = self.token_logps(rows, problem.weight, labels)
        return Outcome(-logps.sum(), logps, entropy)

    def step_loss(self, problem: Problem) -> Tensor:
        def sums(states: Tensor, weight: Tensor) -> Tensor:
            rows, labels = problem.rows(states)
            return sequence_sums(self.token_logps(rows, weight, labels)[0], problem)

        with torch.no_grad():
            reference = sums(problem.reference, problem.weight.detach())
        return dpo_loss(sums(problem.hidden, problem.weight), reference)

    def sequence_logps(self, problem: Problem) -> Tensor | None:
        """(S,) sums, with the precision that a user of this method gets; None where there are none."""
        rows, labels = problem.rows(problem.hidden)
        return sequence_sums(self.token_logps(rows, problem.weight, labels)[0], problem)

    def run(self, problem: Problem) -> Outcome:
        """The whole work of `problem`, backward included."""
        if problem.spec.work == "forward":
            with torch.no_grad():
                return self.token_outcome(problem)
        outcome = Outcome(self.step_loss(problem)) if problem.spec.is_dpo else self.token_outcome(problem)
        assert outcome.loss is not None
        outcome.loss.backward()
        return outcome


class BareGemm(Contender):
    """The matrix products alone, tile by tile; no result."""

    def sequence_logps(self, problem: Problem) -> Tensor | None:
        return None

    def run(self, problem: Problem) -> Outcome:
        rows, _ = problem.rows(problem.hidden.detach())
        weight = problem.weight.detach()
        step = 16384 if weight.is_cuda else 2048
        tile = rows.new_empty(rows.shape[0], step)
        grad_hidden = torch.zeros_like(rows)
        grad_weight = torch.empty_like(weight) if problem.spec.trains_head else None
        projections = BARE_UNITS[problem.spec.work] - (problem.spec.work != "forward") - problem.spec.trains_head
        for first in range(0, weight.shape[0], step):
            w = weight[first : first + step]
            product = tile[:, : w.shape[0]]
            for _ in range(projections):
                torch.mm(rows, w.t(), out=product)
            if problem.spec.work != "forward":
                grad_hidden.addmm_(product, w)
            if grad_weight is not None:
                torch.mm(product.t(), rows, out=grad_weight[first : first + step])
        if problem.spec.work != "forward":
            whole = grad_hidden.shape[0] == problem.labels.numel()
            problem.hidden.grad = grad_hidden.view_as(problem.hidden) if whole else torch.zeros_like(problem.hidden)
            problem.weight.grad = grad_weight
        return Outcome(None)


class Eager(Contender):
    """Full logits in the inputs' dtype, log-softmax in fp32; log-probs only, unless the entropy is asked for."""

    full_logits = True

    def __init__(self, *, entropy: bool = False) -> None:
        self.entropy = entropy

    def token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        log_probs = F.log_softmax(hidden @ weight.t(), -1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1) if self.entropy else None
        return log_probs.gather(-1, labels[:, None])[:, 0], entropy


class CompiledEager(Eager):
    compiles = per_shape = True
    works = ("forward", "frozen", "trainable")

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(super().token_logps)

    def token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self._compiled(hidden, weight, labels)
        return result
