"""The policy that preference optimisation aims at, pi*(y|x) = pi_ref(y|x) exp(r / beta(x)) / Z(x), over candidates.

It is the maximiser of E[r] - beta KL(pi || pi_ref) (arXiv:2305.18290, eq. 4). Over candidates drawn from pi_ref their
own frequency is pi_ref, and what remains of pi* are self-normalised importance weights softmax(r / beta).
"""

import math
import random

import torch
from torch import Tensor

from fastpo.rejection_sampling import check_beta


def tilted_weights(rewards: Tensor, beta: float, log_ratios: Tensor | None = None) -> Tensor:
    """Weights (N,) float64 of N candidates under pi*, which sum to 1.

    Args:
        rewards: (N,) floating-point.
        beta: in units of reward; of this prompt.
        log_ratios: (N,) log pi_ref - log q of candidates drawn from another policy q; None: they are from pi_ref.

    Raises:
        ValueError: a shape is another, a value not finite, or beta not > 0.
    """
    check_beta(beta)
    _check("rewards", rewards, None)
    # Differences first: a small beta must not make infinities of large rewards that are alike.
    logits = (rewards.double() - rewards.double().max()) / beta
    if log_ratios is not None:
        _check("log_ratios", log_ratios, len(rewards))
        logits = logits + log_ratios.double()
    return logits.softmax(dim=0)


def risk_adjusted(rewards: Tensor, sigmas: Tensor, risk_aversion: float) -> Tensor:
    """r = mu - kappa sigma (N,) of Gaussian rewards, kappa being `risk_aversion`."""
    return rewards - risk_aversion * sigmas


def expected_reward(rewards: Tensor, weights: Tensor) -> float:
    """Mean of rewards (N,) under weights (N,)."""
    return float(rewards.double() @ weights)


def divergence(weights: Tensor) -> float:
    """KL in nats of weights (N,) from equal ones, at most log N: what the candidates say of KL(pi* || pi_ref)."""
    return float(torch.special.xlogy(weights, weights).sum()) + math.log(len(weights))


def effective_sample_size(weights: Tensor) -> float:
    """Of weights (N,): 1 where one candidate has all the weight, N where all have the same."""
    return float(1 / weights.square().sum())


def draw(weights: Tensor, generator: random.Random) -> int:
    """The position of a candidate drawn by its weight."""
    return generator.choices(range(len(weights)), weights.tolist())[0]


def _check(name: str, value: Tensor, number: int | None) -> None:
    if value.dim() != 1 or len(value) == 0 or number not in (None, len(value)):
        wanted = "(N,) with N >= 1" if number is None else (number,)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if not value.is_floating_point() or not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite floating-point numbers, got {value}")
