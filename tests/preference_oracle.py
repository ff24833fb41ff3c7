"""Independent float64 evaluation of the one formula of MATH.md: numpy only, written to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Responses:
    """One side of B pairs: summed log-probs (B,), token counts (B,), mean entropy per token in nats (B,)."""

    logps: Array
    lengths: NDArray[np.int64]
    entropy: Array


@dataclass(frozen=True)
class Objective:
    """The fields of MATH.md that enter the formula, at the defaults it states."""

    pref_loss_type: str | Mapping[str, float] = "sigmoid"
    beta: float = 0.1
    length_normalization: bool = False
    home_advantage: float = 0.0
    margin_units: str = "reward"
    reference_mix: float | None = None
    reference_free: bool = False
    contextual_scaling: str = "none"
    contextual_scaling_coef: float = 1.0
    sft_weight: float = 0.0
    sft_reduction: str = "mean"
    label_smoothing: float = 0.0
    hinge_delta: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """`losses` (B,) per pair; `token_sft` () enters the batch loss only; `phi` None: nothing scales."""

    losses: Array
    token_sft: float
    z: Array
    h: Array
    phi: Array | None
    chosen_rewards: Array
    rejected_rewards: Array

    @property
    def loss(self) -> float:
        return float(self.losses.mean() + self.token_sft)


def sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -z))


def cauchy(z: Array) -> Array:
    # 1/2 + atan(z)/pi is the angle of (-z, 1) over pi; above 0 its complement keeps the digits.
    complement = np.arctan2(1.0, np.abs(z)) / np.pi
    return np.where(z > 0, -np.log1p(-complement), -np.log(complement))


# (z, b, delta) -> f(z)
LINKS: dict[str, Callable[[Array, Array, float], Array]] = {
    "sigmoid": lambda z, b, delta: np.logaddexp(0.0, -z),
    "hinge": lambda z, b, delta: np.maximum(0.0, delta - z),
    "ipo": lambda z, b, delta: ((z - 0.5) / b) ** 2,
    "ipo_scaled": lambda z, b, delta: (z - 0.5) ** 2,
    "square": lambda z, b, delta: (z - 1.0) ** 2,
    "truncated_square": lambda z, b, delta: np.maximum(0.0, delta - z) ** 2,
    "exponential": lambda z, b, delta: np.exp(-z),
    "savage": lambda z, b, delta: sigmoid(-z) ** 2,
    "cauchy": lambda z, b, delta: cauchy(z),
}

# (z, b, delta) -> df/dz at fixed b
LINK_SLOPES: dict[str, Callable[[Array, Array, float], Array]] = {
    "sigmoid": lambda z, b, delta: -sigmoid(-z),
    "hinge": lambda z, b, delta: np.where(z < delta, -1.0, 0.0),
    "ipo": lambda z, b, delta: 2.0 * (z - 0.5) / b**2,
    "ipo_scaled": lambda z, b, delta: 2.0 * (z - 0.5),
    "square": lambda z, b, delta: 2.0 * (z - 1.0),
    "truncated_square": lambda z, b, delta: -2.0 * np.maximum(0.0, delta - z),
    "exponential": lambda z, b, delta: -np.exp(-z),
    "savage": lambda z, b, delta: -2.0 * sigmoid(-z) ** 2 * sigmoid(z),
    "cauchy": lambda z, b, delta: -1.0 / ((1.0 + z**2) * np.arctan2(1.0, -z)),
}


def smoothed(table: Mapping[str, Callable], z: Array, b: Array, objective: Objective, mirror: float) -> Array:
    """(1-eps)*g(z) + mirror*eps*g(-z), g the weighted sum of links (mirror=1) or their slopes (mirror=-1)."""
    link = objective.pref_loss_type
    weights = {link: 1.0} if isinstance(link, str) else link
    eps, total = objective.label_smoothing, np.zeros_like(z)
    with np.errstate(over="ignore"):
        for name, weight in weights.items():
            value = table[name](z, b, objective.hinge_delta)
            if eps:
                value = (1 - eps) * value + mirror * eps * table[name](-z, b, objective.hinge_delta)
            total = total + weight * value
    return total


def mallows_phi(ref_chosen: Responses, ref_rejected: Responses, vocab_size: int, kappa: float) -> Array:
    """phi = -kappa*log(clip(dispersion)); an empty response is left out, two empty ones give kappa."""
    phi = np.empty(len(ref_chosen.logps))
    for i in range(len(phi)):
        sides = [r.entropy[i] / np.log(vocab_size) for r in (ref_chosen, ref_rejected) if r.lengths[i] > 0]
        phi[i] = -kappa * np.log(np.clip(np.mean(sides), 1e-6, 1.0)) if sides else kappa
    return phi


def evaluate(
    chosen: Responses,
    rejected: Responses,
    objective: Objective,
    *,
    ref_chosen: Responses | None = None,
    ref_rejected: Responses | None = None,
    beta: float | Array | None = None,
    context_scale: Array | None = None,
    vocab_size: int | None = None,
) -> Evaluation:
    """The objective for B pairs; `beta` is beta_eff(x), `context_scale` a phi(x) of the caller's own."""
    o = objective
    one = np.ones(len(chosen.logps))
    b = one * (o.beta if beta is None else beta)
    a_w = 1.0 / np.maximum(chosen.lengths, 1) if o.length_normalization else one
    a_l = 1.0 / np.maximum(rejected.lengths, 1) if o.length_normalization else one

    mix = 0.0 if o.reference_free else 1.0 if o.reference_mix is None else o.reference_mix
    h = a_w * chosen.logps - a_l * rejected.logps
    if mix:
        h = h - mix * (a_w * ref_chosen.logps - a_l * ref_rejected.logps)
    m = o.home_advantage * (1.0 if o.reference_mix is None else 1.0 - o.reference_mix)
    z = b * h - m if o.margin_units == "reward" else b * (h - m)

    phi = context_scale
    if phi is None and o.contextual_scaling == "mallows":
        phi = mallows_phi(ref_chosen, ref_rejected, vocab_size, o.contextual_scaling_coef)
    if phi is not None:
        z = phi * z

    losses, token_sft = smoothed(LINKS, z, b, o, mirror=1.0), 0.0
    if o.sft_weight:
        if o.sft_reduction == "token":
            token_sft = o.sft_weight * -chosen.logps.sum() / max(chosen.lengths.sum(), 1)
        else:
            per_token = np.maximum(chosen.lengths, 1) if o.sft_reduction == "mean" else 1
            losses = losses + o.sft_weight * -chosen.logps / per_token

    no_reference = o.reference_free or ref_chosen is None
    ref_w, ref_l = (0.0, 0.0) if no_reference else (ref_chosen.logps, ref_rejected.logps)
    return Evaluation(
        losses,
        float(token_sft),
        z,
        h,
        phi,
        b * a_w * (chosen.logps - ref_w),
        b * a_l * (rejected.logps - ref_l),
    )
