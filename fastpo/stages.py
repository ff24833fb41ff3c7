"""Stages: statistics of a batch become the loss of that stage."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.config import PreferenceConfig
from fastpo.losses import preference_loss
from fastpo.types import LossOutput, SequenceStats

STAGES = ("sft", "dpo")


class StepTotals(NamedTuple):
    """What one optimiser step averages over, as float tensors: all micro-batches, per process.

    With P processes whose gradients are averaged, the totals are those of all processes divided by P, so that
    micro-batches of any sizes on any number of processes give the gradient of the one large batch.
    """

    rows: Tensor
    tokens: Tensor


def split_pair(stats: SequenceStats) -> tuple[SequenceStats, SequenceStats]:
    """Chosen and rejected halves of the statistics of 2B rows."""
    chosen, rejected = zip(*(field.chunk(2) for field in stats), strict=True)
    return SequenceStats(*chosen), SequenceStats(*rejected)


def dpo_stage(
    policy: SequenceStats,
    reference: SequenceStats | None,
    config: PreferenceConfig,
    *,
    vocab_size: int,
    context_scale: Tensor | None = None,
    totals: StepTotals | None = None,
) -> LossOutput:
    """Preference loss of 2B rows, the B chosen first.

    Args:
        policy: statistics of the 2B rows under the policy.
        reference: the same under the reference, or None where the objective reads none.
        config: the objective.
        vocab_size: rows of the LM head.
        context_scale: (B,) phi(x) of the dataset's own.
        totals: what to divide by; None: this batch alone.
    """
    chosen, rejected = split_pair(policy)
    ref_chosen, ref_rejected = (None, None) if reference is None else split_pair(reference)
    output = preference_loss(
        chosen, rejected, config, ref_chosen=ref_chosen, ref_rejected=ref_rejected,
        context_scale=context_scale, vocab_size=vocab_size,
    )  # fmt: skip
    if totals is None:
        return output
    loss = output.losses.sum() / totals.rows
    if config.sft_weight != 0 and config.sft_reduction == "token":
        loss = loss - config.sft_weight * chosen.logps.sum() / totals.tokens
    return output._replace(loss=loss)


def sft_stage(policy: SequenceStats, *, totals: StepTotals | None = None) -> LossOutput:
    """Negative log-likelihood of the completions: mean over the step's tokens; `losses` are means per row."""
    lengths = policy.lengths.clamp(min=1).to(policy.logps.dtype)
    losses = -policy.logps / lengths
    tokens = policy.lengths.sum().clamp(min=1) if totals is None else totals.tokens
    loss = -policy.logps.sum() / tokens
    with torch.no_grad():
        metrics = {
            "logps/chosen": policy.logps.mean(),
            "entropy/chosen": policy.entropy.mean(),
            "nll/chosen": losses.mean(),
        }
    zeros = torch.zeros_like(losses)
    return LossOutput(loss, losses, zeros, zeros, zeros, {name: value.detach() for name, value in metrics.items()})
