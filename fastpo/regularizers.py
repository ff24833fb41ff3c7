"""Regularisers of the Beta head: what keeps s(x) sane. Pure functions of log s (B,).

To add one: write the function, add its line to `REGULARIZERS`, add its row to the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.schedules import RunningMeans, running_mean

if TYPE_CHECKING:
    from fastpo.config import PreferenceConfig

LOG_RANGE = math.log(4)  # `range` leaves s in [1/4, 4] alone
ENTROPY_GAIN = 0.5  # k: how much log s answers to log(-log Hbar)
FREE_VARIANCE = 0.5  # of log s, which `global` leaves alone
KERNEL_WIDTH = 0.5  # of `smooth`, in distances of unit features


class Context(NamedTuple):
    """What a regulariser may need beside log s.

    Attributes:
        prompt_entropy: (B,) Hbar(x), the reference's mean entropy over the prompt divided by log V.
        confidence: (B,) c in [0, 1], how sure the labels are.
        features: (B, F) prompt features.
        bound: log s_max, inf without one.
        direction: +1 where a familiar prompt shall get the larger beta, -1 for the opposite.
        state: running means, or None: each batch for itself.
    """

    prompt_entropy: Tensor | None
    confidence: Tensor | None
    features: Tensor | None
    bound: float
    direction: int
    state: RunningMeans | None


def pointwise(log_s: Tensor, context: Context) -> Tensor:
    """mean l^2."""
    return log_s.square().mean()


def range_(log_s: Tensor, context: Context) -> Tensor:
    """mean[relu(l - log s_hi)^2 + relu(log s_lo - l)^2] with s in [1/4, 4] free."""
    return F.relu(log_s.abs() - LOG_RANGE).square().mean()


def entropy(log_s: Tensor, context: Context) -> Tensor:
    """mean (l - t)^2, t = clip(k (log(-log Hbar) - its running mean), +-log s_max): familiar prompts, larger s."""
    assert context.prompt_entropy is not None
    # 1 - 1e-6 would round to 1 in 16 bits.
    share = context.prompt_entropy.detach().to(torch.promote_types(log_s.dtype, torch.float32))
    familiarity = torch.log(-torch.log(share.clamp(1e-6, 1 - 1e-6))).to(log_s)
    centred = familiarity - running_mean(context.state, "entropy", familiarity.mean())
    target = (context.direction * ENTROPY_GAIN * centred).clamp(-context.bound, context.bound)
    return (log_s - target).square().mean()


def confidence(log_s: Tensor, context: Context) -> Tensor:
    """mean (l - t)^2, t = -log 2 (c - its running mean): pairs that are sure leave the reference further."""
    assert context.confidence is not None
    sure = context.confidence.detach().to(log_s)
    target = -math.log(2) * (sure - running_mean(context.state, "confidence", sure.mean()))
    return (log_s - target).square().mean()


def global_(log_s: Tensor, context: Context) -> Tensor:
    """(mean l)^2 + relu(Var l - 0.5), population variance; with a state its moments are running means."""
    mean, square = (
        # The value of the running mean, the gradient of this batch's.
        running_mean(context.state, name, moment) + (moment - moment.detach())
        for name, moment in (("global/mean", log_s.mean()), ("global/square", log_s.square().mean()))
    )
    return mean.square() + F.relu(square - mean.square() - FREE_VARIANCE)


def smooth(log_s: Tensor, context: Context) -> Tensor:
    """sum_{i != j} w_ij (l_i - l_j)^2 / sum_{i != j} w_ij, w = exp(-|f_i - f_j|^2/(2 width^2)); 0 for one row."""
    assert context.features is not None
    unit = F.normalize(context.features.detach().to(log_s), dim=-1)
    # Unit vectors: |f_i - f_j|^2 = 2 - 2 f_i f_j. The diagonal adds 0 above and must not count below.
    weight = torch.exp((unit @ unit.T - 1) / KERNEL_WIDTH**2) * (
        1 - torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    )
    return (weight * (log_s[:, None] - log_s).square()).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


class Regularizer(NamedTuple):
    """A line of `REGULARIZERS`: the function, its default weight, and the argument that it cannot do without."""

    penalty: Callable[[Tensor, Context], Tensor]
    weight: float = 0.0  # 0: only where `regularizers` names it
    needs: str | None = None


REGULARIZERS: dict[str, Regularizer] = {
    "pointwise": Regularizer(pointwise, 0.1),
    "range": Regularizer(range_, 1.0),
    "entropy": Regularizer(entropy, 0.1, needs="prompt_entropy"),
    "confidence": Regularizer(confidence, 0.1, needs="confidence"),
    "global": Regularizer(global_, 1.0),
    "smooth": Regularizer(smooth, 0.01, needs="features"),
}


def label_confidence(score_chosen: Tensor, score_rejected: Tensor) -> Tensor:
    """c = 2 |sigmoid(score_chosen - score_rejected) - 1/2| in [0, 1], (B,): how sure rewards (B,) are of the label."""
    return 2 * (torch.sigmoid(score_chosen - score_rejected) - 0.5).abs()


def regularizer_loss(
    log_s: Tensor,
    config: PreferenceConfig,
    *,
    prompt_entropy: Tensor | None = None,
    confidence: Tensor | None = None,
    features: Tensor | None = None,
    state: RunningMeans | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the regularisers of log s; the dpo stage adds it to the loss, `preference_loss` does not.

    `config.regularizers` names them with their weights. None: under ``dynamic_scaling`` the default weights of those
    whose argument is given, else none.

    Args:
        log_s: (B,) log s(x), differentiable.
        config: the objective; its `beta_head_config` holds s_max and the direction.
        prompt_entropy: (B,) Hbar(x), mean entropy of the reference over the prompt divided by log V, for `entropy`.
        confidence: (B,) in [0, 1], for `confidence`; see `label_confidence`.
        features: (B, F) prompt features, for `smooth`.
        state: running means, updated in place; pass the same dictionary at every step. None: the batch's own means.

    Returns:
        loss () and metrics: ``regularizers/<name>`` unweighted and ``regularizers/loss``, detached ().

    Raises:
        TypeError, ValueError: an argument is missing or misshapen; the message names it.
    """
    if not isinstance(log_s, Tensor) or log_s.dim() != 1 or len(log_s) == 0 or not log_s.is_floating_point():
        raise ValueError(f"log_s must be a floating-point tensor of shape (B,), got {_shown(log_s)}")
    given = {"prompt_entropy": prompt_entropy, "confidence": confidence, "features": features}
    for name, value in given.items():
        dims = 2 if name == "features" else 1
        if value is not None and (not isinstance(value, Tensor) or value.dim() != dims or len(value) != len(log_s)):
            wanted = f"({len(log_s)}, F)" if dims == 2 else f"({len(log_s)},)"
            raise ValueError(f"{name} must be a tensor of shape {wanted}, got {_shown(value)}")
    if not hasattr(config, "regularizer_weights"):
        raise TypeError(f"config must be a PreferenceConfig, got {type(config).__name__}")
    head = config.beta_head
    context = Context(
        prompt_entropy, confidence, features, math.inf if head.s_max is None else math.log(head.s_max),
        1 if head.direction == "familiar" else -1, state,
    )  # fmt: skip
    total, metrics = log_s.new_zeros(()), {}
    for name, weight in config.regularizer_weights.items():
        regularizer = REGULARIZERS[name]
        if regularizer.needs is not None and given[regularizer.needs] is None:
            if config.regularizers is None:
                continue
            raise ValueError(f"regularizers names {name!r}, which needs {regularizer.needs}, got None")
        penalty = regularizer.penalty(log_s, context)
        total = total + weight * penalty
        metrics[f"regularizers/{name}"] = penalty.detach()
    if metrics:
        metrics["regularizers/loss"] = total.detach()
    return total, metrics


def _shown(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
