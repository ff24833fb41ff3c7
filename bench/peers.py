"""The peers, each called the way that suits it best: completion tokens only, and no entropy where it costs.

A library that is told of a summed loss may form its gradients ahead of the backward. That is less than log-probs with
any gradient behind them, which is what a preference loss needs, so such a call is a contender of its own, marked.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contender import Contender, Outcome
from bench.problem import BETA, IGNORE, Problem

TOKEN_WORKS = ("forward", "frozen", "trainable")


class TorchLinearCrossEntropy(Contender):
    """`torch.nn.functional.linear_cross_entropy` with 256-row chunks."""

    def unavailable(self, device: torch.device) -> str | None:
        return None if hasattr(F, "linear_cross_entropy") else f"not in torch {torch.__version__}"

    def _nll(self, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
        result: Tensor = F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=options)
        return result

    def token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return -self._nll(hidden, weight, labels, "none"), None


class TorchSummedLinearCrossEntropy(TorchLinearCrossEntropy):
    """The same with its summed loss, for which it forms the gradients in the forward."""

    summed = True
    works = ("frozen", "trainable")

    def token_outcome(self, problem: Problem) -> Outcome:
        rows, labels = problem.rows(problem.hidden)
        return Outcome(self._nll(rows, problem.weight, labels, "sum"))


class TrlFusedHead(Contender):
    """TRL's `ChunkedLogProbFunction`, which its DPOTrainer calls through `add_fused_lm_head`."""

    package = "trl"

    def unavailable(self, device: torch.device) -> str | None:
        return None if find_spec("trl") else "trl is not installed"

    def token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        wanted = ("log_probs",)
        arguments = (hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, wanted)
        return ChunkedLogProbFunction.apply(*arguments)[0], None


class LigerLinearCrossEntropy(Contender):
    """`LigerFusedLinearCrossEntropyLoss`: gradients in the forward, a summed loss."""

    package = "liger_kernel"
    summed = True
    works = TOKEN_WORKS

    def unavailable(self, device: torch.device) -> str | None:
        if not find_spec("liger_kernel"):
            return "liger-kernel is not installed"
        return None if device.type == "cuda" else "its Triton kernels need a GPU"

    def token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, labels), None

    def token_outcome(self, problem: Problem) -> Outcome:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        if problem.spec.work == "forward":
            return super().token_outcome(problem)
        rows, labels = problem.rows(problem.hidden)
        return Outcome(LigerFusedLinearCrossEntropyLoss(reduction="sum")(problem.weight, rows, labels))


class LigerChunkedDpo(Contender):
    """`LigerFusedLinearDPOLoss`: a pair a chunk, forward and backward at once; it projects what lies between."""

    package = "liger_kernel"
    works = ("dpo_frozen", "dpo_trainable")
    compiles = True

    def unavailable(self, device: torch.device) -> str | None:
        return None if find_spec("liger_kernel") else "liger-kernel is not installed"

    def step_loss(self, problem: Problem) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        # Columns that are prompt in every sequence need no projecting.
        first = int((problem.labels != IGNORE).any(0).nonzero()[0, 0]) if problem.spec.completion_fraction < 1 else 0
        hidden, reference, labels = (x[:, first:] for x in (problem.hidden, problem.reference, problem.labels))
        loss: Tensor = LigerFusedLinearDPOLoss(beta=BETA)(
            problem.weight, hidden, labels, ref_input=reference, ref_weight=problem.weight.detach()
        )[0]
        return loss

    def sequence_logps(self, problem: Problem) -> Tensor | None:
        return None


class CutCrossEntropy(Contender):
    """Apple's CCE; on a CPU its `torch_compile` implementation, which holds the logits."""

    package = "cut_cross_entropy"

    def __init__(self, *, exact: bool = False) -> None:
        self.filter = None if exact else "high"
        self.on_gpu = torch.cuda.is_available()
        self.full_logits = self.compiles = not self.on_gpu

    def unavailable(self, device: torch.device) -> str | None:
        if not find_spec("cut_cross_entropy"):
            return "cut-cross-entropy is not installed"
        if self.filter is None and device.type == "cpu":
            return "its kernels need a GPU"
        return None

    def _nll(self, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if hidden.is_cuda else "torch_compile"
        result: Tensor = linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, filter_eps=self.filter, impl=impl
        )
        return result

    def token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return -self._nll(hidden, weight, labels, "none"), None
