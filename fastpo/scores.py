"""From sequence statistics to a pair's scores, contextual scale and weight. Pure functions of (B,) tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.config import PreferenceConfig
from fastpo.links import DIVERGENCES
from fastpo.types import AnySequenceStats, ExtendedSequenceStats


class PairScores(NamedTuple):
    """Scores (B,) of the responses of B pairs.

    Attributes:
        chosen, rejected: a(y) log pi(y) under the policy.
        ref_chosen, ref_rejected: a(y) A log pi_ref(y); 0 where the reference is left out.
        h: the difference of chosen and rejected, each a(y) g(log pi - A log pi_ref), g of the f-divergence.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    h: Tensor


def pair_scores(
    chosen: AnySequenceStats,
    rejected: AnySequenceStats,
    reference: tuple[AnySequenceStats, AnySequenceStats] | None,
    config: PreferenceConfig,
    per_token: bool,
) -> PairScores:
    """Scores of policy and reference; per_token says whether a(y) = 1/max(|y|, 1) or 1."""

    def score(stats: AnySequenceStats) -> Tensor:
        return per_length(desensitized(stats, config.ld_alpha), stats, per_token)

    own_w, own_l = score(chosen), score(rejected)
    weight = config.reference_weight
    if weight == 0 or reference is None:
        nothing = torch.zeros_like(own_w)
        return PairScores(own_w, own_l, nothing, nothing, own_w - own_l)
    ref_w, ref_l = (score(stats) if weight == 1 else weight * score(stats) for stats in reference)
    if config.f_divergence_type == "reverse_kl":
        return PairScores(own_w, own_l, ref_w, ref_l, (own_w - own_l) - (ref_w - ref_l))
    diverge = DIVERGENCES[config.f_divergence_type]
    sides = []
    for own, other in zip((chosen, rejected), reference, strict=True):
        log_ratio = desensitized(own, config.ld_alpha) - desensitized(other, config.ld_alpha)
        sides.append(per_length(diverge(log_ratio, config.f_alpha_divergence_coef), own, per_token))
    return PairScores(own_w, own_l, ref_w, ref_l, sides[0] - sides[1])


def per_length(values: Tensor, stats: AnySequenceStats, per_token: bool) -> Tensor:
    """values (B,) divided by the lengths, at least 1, or as they are."""
    return values / stats.lengths.clamp(min=1).to(values.dtype) if per_token else values


def desensitized(stats: AnySequenceStats, ld_alpha: float | None) -> Tensor:
    """Summed log-probs (B,), of the tokens beyond the shorter response ld_alpha of it: LD-DPO (arXiv:2409.06411)."""
    if ld_alpha is None or ld_alpha == 1:
        return stats.logps
    assert isinstance(stats, ExtendedSequenceStats) and stats.shared_logps is not None
    if ld_alpha == 0:
        return stats.shared_logps
    return ld_alpha * stats.logps + (1 - ld_alpha) * stats.shared_logps


def on_policy_weight(chosen: AnySequenceStats, rejected: AnySequenceStats) -> Tensor:
    """exp of both responses' mean over tokens of (log p - log sum_v p_v^2): WPO (arXiv:2406.11827, eq. 2). Detached."""

    def mean(stats: AnySequenceStats) -> Tensor:
        assert isinstance(stats, ExtendedSequenceStats) and stats.log_sum_sq_probs is not None
        return per_length((stats.logps - stats.log_sum_sq_probs.to(stats.logps)).detach(), stats, True)

    return torch.exp(mean(chosen) + mean(rejected))


def mallows_scale(chosen: AnySequenceStats, rejected: AnySequenceStats, coef: float, vocab_size: int) -> Tensor:
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
