"""From sequence statistics to the score difference h and the contextual scale phi. Pure functions of (B,) tensors."""

import math

import torch
from torch import Tensor

from fastpo.types import SequenceStats


def response_score(stats: SequenceStats, length_normalization: bool) -> Tensor:
    """a(y) * sum log pi(y) with a(y) = 1/max(|y|, 1) under length normalisation, else 1. Shape (B,)."""
    if not length_normalization:
        return stats.logps
    return stats.logps / stats.lengths.clamp(min=1).to(stats.logps.dtype)


def score_difference(chosen: SequenceStats, rejected: SequenceStats, length_normalization: bool) -> Tensor:
    """D = a_w sum log pi(y_w) - a_l sum log pi(y_l). Shape (B,)."""
    return response_score(chosen, length_normalization) - response_score(rejected, length_normalization)


def mallows_scale(chosen: SequenceStats, rejected: SequenceStats, coef: float, vocab_size: int) -> Tensor:
    """phi(x) = -kappa log clip((Hbar_w + Hbar_l)/2, 1e-6, 1) with Hbar = H_ref / log V. Detached, shape (B,).

    A high dispersion (reference entropy) gives a small weight. An empty response is left out of the mean; where both
    are empty phi = kappa. Source: Mallows-DPO (arXiv:2405.14953), read with the division by length.

    Args:
        chosen: the reference's statistics of the chosen responses.
        rejected: the reference's statistics of the rejected responses.
        coef: kappa.
        vocab_size: V, the number of rows of the LM head.
    """
    has_tokens = torch.stack((chosen.lengths > 0, rejected.lengths > 0))
    entropy = torch.stack((chosen.entropy, rejected.entropy)).detach() / math.log(vocab_size)
    count = has_tokens.sum(0)
    dispersion = torch.where(has_tokens, entropy, 0).sum(0) / count.clamp(min=1)
    return torch.where(count > 0, -coef * torch.log(dispersion.clamp(1e-6, 1)), coef)
