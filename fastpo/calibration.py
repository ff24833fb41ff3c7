"""How far the probabilities of a reward model hold: their logarithm on a pair, and the calibration error of many."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.links import log_ndtr


def log_preference(difference: Tensor, variance: Tensor | None = None) -> Tensor:
    """log P(chosen is preferred to rejected) (N,), in nats: log sigma(d), or log Phi(d / sqrt(variance)).

    Args:
        difference: (N,) of the rewards, or of their means: d = r_w - r_l, without a margin.
        variance: (N,) of the difference of Gaussian rewards, > 0; None: rewards are scalars.
    """
    return F.logsigmoid(difference) if variance is None else log_ndtr(difference / variance.sqrt())


def expected_calibration_error(probability: Tensor, bins: int = 10) -> float:
    """ECE: the mean over pairs of |accuracy - confidence| of their bin (Guo et al., arXiv:1706.04599, eq. 3).

    Confidence is max(p, 1 - p), in bins of equal width from 1/2 to 1, of which each holds its lower end. A pair with
    p > 1/2 counts as right, one at exactly 1/2 as half right: who tosses a coin is calibrated.

    Args:
        probability: (N,) P(chosen is preferred), N >= 1; NaN among them gives NaN.
        bins: how many.

    Raises:
        ValueError: probability has another shape, or bins is below 1.
    """
    if probability.dim() != 1 or len(probability) == 0:
        raise ValueError(f"probability must have shape (N,) with N >= 1, got {tuple(probability.shape)}")
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins!r}")
    p = probability.double()
    confidence = torch.maximum(p, 1 - p)
    right = (p > 0.5).double() + (p == 0.5).double() / 2
    inner = torch.linspace(0.5, 1, bins + 1, dtype=torch.float64, device=p.device)[1:-1]
    of_bin = torch.bucketize(confidence, inner, right=True)
    # Of a bin, count * |accuracy - confidence| is |sum of right - sum of confidence|.
    gaps = torch.zeros(bins, dtype=torch.float64, device=p.device).index_add(0, of_bin, right - confidence)
    return (gaps.abs().sum() / len(p)).item()
