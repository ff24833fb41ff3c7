"""Who is compared: fastpo in each of its modes, the peers and the bare matrix products, by name."""

from typing import Any

import torch
from torch import Tensor

import fastpo
from bench.contender import BareGemm, CompiledEager, Contender, Eager, Outcome
from bench.peers import (
    CutCrossEntropy,
    LigerChunkedDpo,
    LigerLinearCrossEntropy,
    TorchLinearCrossEntropy,
    TorchSummedLinearCrossEntropy,
    TrlFusedHead,
)
from bench.problem import BETA, IGNORE, WORKS, Problem

FROZEN_WORKS = ("frozen", "dpo_frozen")
TRAINABLE_WORKS = ("trainable", "dpo_trainable")


class Fastpo(Contender):
    """fastpo in one mode; `share` is the part of the rows whose probabilities the stash has room for."""

    package = "fastpo"
    entropy = True
    fp32_statistics = True

    def __init__(
        self, mode: str, works: tuple[str, ...] = WORKS, *, share: float = 0, skip_mass: float = 0, impl: str = "auto"
    ) -> None:
        self.mode, self.works, self.share, self.skip_mass, self.impl = mode, works, share, skip_mass, impl

    def unavailable(self, device: torch.device) -> str | None:
        return "a second implementation for a GPU" if self.impl != "auto" and device.type == "cpu" else None

    def _options(self, problem: Problem) -> dict[str, Any]:
        options: dict[str, Any] = {"impl": self.impl, "mode": self.mode}
        if self.share:
            rows = int((problem.labels != IGNORE).sum())
            options["memory_budget"] = int(self.share * rows * problem.spec.vocab) * problem.hidden.element_size()
        return options

    def _skipping(self) -> dict[str, Any]:
        return {"skip_mass": self.skip_mass} if self.skip_mass else {}

    def token_outcome(self, problem: Problem) -> Outcome:
        logps, entropy = fastpo.linear_logps(
            problem.hidden, problem.weight, problem.labels, **self._options(problem), **self._skipping()
        )
        if problem.spec.completion_fraction == 1:
            return Outcome(-logps.sum(), logps.flatten(), entropy.flatten())
        keep = problem.labels != IGNORE
        return Outcome(-logps.sum(), logps[keep], entropy[keep])

    def step_loss(self, problem: Problem) -> Tensor:
        hidden, reference, weight, labels = problem.hidden, problem.reference, problem.weight, problem.labels
        options = self._options(problem)
        if self.skip_mass:  # which goes with one set of rows only
            with torch.no_grad():
                ref = fastpo.linear_sequence_stats(reference, weight, labels)
            policy = fastpo.linear_sequence_stats(hidden, weight, labels, **options, **self._skipping())
        else:
            policy, ref, _ = fastpo.joint_linear_sequence_stats(hidden, reference, weight, labels, **options)
        chosen, rejected = policy.split()
        ref_chosen, ref_rejected = ref.split()
        config = fastpo.PreferenceConfig(beta=BETA)
        loss: Tensor = fastpo.preference_loss(
            chosen, rejected, config, ref_chosen=ref_chosen, ref_rejected=ref_rejected
        ).loss
        return loss

    def sequence_logps(self, problem: Problem) -> Tensor | None:
        return fastpo.linear_sequence_stats(
            problem.hidden, problem.weight, problem.labels, **self._options(problem)
        ).logps


CONTENDERS: dict[str, Contender] = {
    "bare GEMM": BareGemm(),
    "fastpo no_grad": Fastpo("no_grad", ("forward",)),
    "fastpo frozen": Fastpo("frozen", FROZEN_WORKS),
    "fastpo lean": Fastpo("lean", TRAINABLE_WORKS),
    "fastpo stash": Fastpo("stash", TRAINABLE_WORKS, share=0.5),
    "fastpo skip 1e-3": Fastpo("lean", TRAINABLE_WORKS, skip_mass=1e-3),
    "fastpo chunked": Fastpo("auto", WORKS, impl="chunked"),
    "torch linear_cross_entropy": TorchLinearCrossEntropy(),
    "torch linear_cross_entropy, summed": TorchSummedLinearCrossEntropy(),
    "TRL fused head": TrlFusedHead(),
    "Liger linear_cross_entropy": LigerLinearCrossEntropy(),
    "Liger chunked DPO": LigerChunkedDpo(),
    "Apple CCE": CutCrossEntropy(),
    "Apple CCE, no filter": CutCrossEntropy(exact=True),
    "eager": Eager(),
    "eager with entropy": Eager(entropy=True),
    "eager, torch.compile": CompiledEager(),
}
