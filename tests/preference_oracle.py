"""Independent float64 evaluation of the one formula of MATH.md: numpy only, written to be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Responses:
    """One side of B pairs, (B,) each: summed log-probs, token counts, mean entropy per token in nats.

    `shared`: log-probs of the tokens within the shorter response; `log_sum_sq`: sum over tokens of log sum_v p_v^2.
    """

    logps: Array
    lengths: NDArray[np.int64]
    entropy: Array
    shared: Array | None = None
    log_sum_sq: Array | None = None


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
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    batch_beta_coef: float = 0.0
    discopop_tau: float = 0.05
    hinge_delta: float = 1.0
    variance_floor: float = 1e-6
    add_disco_head: bool = False  # says that `disco` may be used; no part of the formula

    @property
    def weights(self) -> dict[str, float]:
        link = self.pref_loss_type
        return {link: 1.0} if isinstance(link, str) else dict(link)


@dataclass(frozen=True)
class Evaluation:
    """`losses` (B,) per pair; `token_sft` () enters the batch loss only; `phi` None: nothing scales.

    `z` and `h` are those of the first loss, `b` the beta it met. `surprise` is gap minus running mean, `on_policy`
    WPO's weights: constants, which `evaluate` can be given so that differences leave them alone.
    """

    loss: float
    losses: Array
    token_sft: float
    z: Array
    h: Array
    b: Array
    phi: Array | None
    chosen_rewards: Array
    rejected_rewards: Array
    gap: float
    surprise: float
    on_policy: Array


def sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -z))


def softplus(z: Array) -> Array:
    return np.logaddexp(0.0, z)


def cauchy(z: Array) -> Array:
    # 1/2 + atan(z)/pi is the angle of (-z, 1) over pi; above 0 its complement keeps the digits.
    complement = np.arctan2(1.0, np.abs(z)) / np.pi
    return np.where(z > 0, -np.log1p(-complement), -np.log(complement))


def mills(z: Array) -> Array:
    """density(z)/Phi(z) of the normal distribution."""
    # Below -3 by Laplace's continued fraction t + 1/(t + 2/(t + ...)), t = -z; above it nothing cancels in erfc.
    t, fraction = np.maximum(-z, 3.0), np.zeros_like(z)
    for k in range(160, 0, -1):
        fraction = k / (t + fraction)
    density = np.exp(-(np.maximum(z, -3.0) ** 2) / 2) / math.sqrt(2 * math.pi)
    erfc = np.array([math.erfc(-max(x, -3.0) / math.sqrt(2)) for x in np.ravel(z)]).reshape(np.shape(z))
    return np.where(z < -3, t + fraction, density / (erfc / 2))


def log_phi(z: Array) -> Array:
    """log Phi(z): log density - log Mills ratio below -3; above, the complement's erfc, which is exact."""
    below = np.minimum(z, -3.0)
    upper = np.array([math.erfc(max(x, -3.0) / math.sqrt(2)) / 2 for x in np.ravel(z)]).reshape(np.shape(z))
    return np.where(z < -3, -(below**2) / 2 - math.log(2 * math.pi) / 2 - np.log(mills(below)), np.log1p(-upper))


def relative_entropy(z: Array, eps: float) -> Array:
    """KL of (sigma(z), sigma(-z)) from (1-eps, eps)."""
    chosen = sigmoid(z) * (-softplus(-z) - math.log(1 - eps))
    return chosen + sigmoid(-z) * (-softplus(z) - math.log(eps))


def discopop(z: Array, tau: float) -> Array:
    # q e^-z with q = 1/(1 + e^(-z/tau)), as one exponential.
    return sigmoid(-z / tau) * softplus(-z) + np.exp(-softplus(-z / tau) - z)


def discopop_slope(z: Array, tau: float) -> Array:
    q_by_exp, not_q = np.exp(-softplus(-z / tau) - z), sigmoid(-z / tau)
    q = sigmoid(z / tau)
    return -not_q * q / tau * softplus(-z) - not_q * sigmoid(-z) + q_by_exp * (not_q / tau - 1)


ZLink = Callable[[Array, Array, Objective], Array]

# (z, b, objective) -> f(z) and df/dz at fixed b; z is zeta for disco
_ROWS: dict[str, tuple[ZLink, ZLink]] = {
    "sigmoid": (lambda z, b, o: softplus(-z), lambda z, b, o: -sigmoid(-z)),
    "sigmoid_norm": (lambda z, b, o: softplus(-z), lambda z, b, o: -sigmoid(-z)),
    "hinge": (
        lambda z, b, o: np.maximum(0.0, o.hinge_delta - z),
        lambda z, b, o: np.where(z < o.hinge_delta, -1.0, 0.0),
    ),
    "ipo": (lambda z, b, o: ((z - 0.5) / b) ** 2, lambda z, b, o: 2.0 * (z - 0.5) / b**2),
    "ipo_norm": (lambda z, b, o: ((z - 0.5) / b) ** 2, lambda z, b, o: 2.0 * (z - 0.5) / b**2),
    "ipo_scaled": (lambda z, b, o: (z - 0.5) ** 2, lambda z, b, o: 2.0 * (z - 0.5)),
    "square": (lambda z, b, o: (z - 1.0) ** 2, lambda z, b, o: 2.0 * (z - 1.0)),
    "truncated_square": (
        lambda z, b, o: np.maximum(0.0, o.hinge_delta - z) ** 2,
        lambda z, b, o: -2.0 * np.maximum(0.0, o.hinge_delta - z),
    ),
    "exponential": (lambda z, b, o: np.exp(-z), lambda z, b, o: -np.exp(-z)),
    "savage": (lambda z, b, o: sigmoid(-z) ** 2, lambda z, b, o: -2.0 * sigmoid(-z) ** 2 * sigmoid(z)),
    "cauchy": (lambda z, b, o: cauchy(z), lambda z, b, o: -1.0 / ((1.0 + z**2) * np.arctan2(1.0, -z))),
    "disco": (lambda z, b, o: -log_phi(z), lambda z, b, o: -mills(z)),
    "discopop": (lambda z, b, o: discopop(z, o.discopop_tau), lambda z, b, o: discopop_slope(z, o.discopop_tau)),
    # sigma' = sigma(z) sigma(-z), and the two log sigma' cancel: sigma(z) sigma(-z) (z - logit(1 - eps))
    "exo_pair": (
        lambda z, b, o: relative_entropy(z, o.label_smoothing),
        lambda z, b, o: sigmoid(z) * sigmoid(-z) * (z - math.log((1 - o.label_smoothing) / o.label_smoothing)),
    ),
    "robust": (
        lambda z, b, o: (
            ((1 - o.label_smoothing) * softplus(-z) - o.label_smoothing * softplus(z)) / (1 - 2 * o.label_smoothing)
        ),
        lambda z, b, o: (
            (-(1 - o.label_smoothing) * sigmoid(-z) - o.label_smoothing * sigmoid(z)) / (1 - 2 * o.label_smoothing)
        ),
    ),
}
LINKS = {name: value for name, (value, _) in _ROWS.items()}
LINK_SLOPES = {name: slope for name, (_, slope) in _ROWS.items()}

SMOOTHED_INSIDE = ("exo_pair", "robust")
PER_TOKEN = ("sigmoid_norm", "ipo_norm", "orpo")

# (log-ratio of chosen, of rejected, b) -> loss
RESPONSE_LOSSES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "nca_pair": lambda c, r, b: softplus(-b * c) + softplus(b * c) / 2 + softplus(b * r) / 2,
    "bco_pair": lambda c, r, b: softplus(-b * c) + softplus(b * r),
    "sppo_hard": lambda c, r, b: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda c, r, b: sigmoid(-b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b: sigmoid(b * c) + sigmoid(-b * (c - r)),
}
SORTED_LOSSES = ("aot", "aot_unpaired")

# log pi - log ref, alpha -> what takes its place in f-DPO
DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda h, alpha: h,
    "forward_kl": lambda h, alpha: 1 - np.exp(-h),
    "js_divergence": lambda h, alpha: np.log(2) - softplus(-h),
    "alpha_divergence": lambda h, alpha: (np.exp((alpha - 1) * h) - 1) / (alpha - 1),
}
DIVERGENCES |= {"js": DIVERGENCES["js_divergence"], "alpha": DIVERGENCES["alpha_divergence"]}


def smoothed(table: Mapping[str, ZLink], name: str, z: Array, b: Array, objective: Objective, mirror: float) -> Array:
    """(1-eps)*g(z) + mirror*eps*g(-z), g a link (mirror=1) or its slope (mirror=-1); as it is if eps acts inside."""
    eps = objective.label_smoothing
    with np.errstate(over="ignore", under="ignore"):
        value = table[name](z, b, objective)
        if eps and name not in SMOOTHED_INSIDE:
            value = (1 - eps) * value + mirror * eps * table[name](-z, b, objective)
    return value


def total(side: Responses, o: Objective) -> Array:
    """Log-prob of a response; LD-DPO counts the tokens beyond the shorter one ld_alpha."""
    return side.logps if o.ld_alpha is None else side.shared + o.ld_alpha * (side.logps - side.shared)


def lengthwise(lengths: tuple[Array, Array], per_token: bool) -> tuple[Array, Array]:
    """a(y) of chosen and rejected."""
    return (1 / lengths[0], 1 / lengths[1]) if per_token else (np.ones(len(lengths[0])), np.ones(len(lengths[1])))


def on_policy_weights(chosen: Responses, rejected: Responses) -> Array:
    """WPO: the product of both responses' exp of the mean over tokens of log p - log sum_v p_v^2."""
    means = [(side.logps - side.log_sum_sq) / np.maximum(side.lengths, 1) for side in (chosen, rejected)]
    return np.exp(means[0] + means[1])


def log_odds(mean: Array) -> Array:
    """log p - log(1 - p) of p = e^mean."""
    return mean - np.log(-np.expm1(mean))


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
    chosen_variance: Array | None = None,
    rejected_variance: Array | None = None,
    vocab_size: int | None = None,
    pair_weight: Array | None = None,
    totals: tuple[float, float] | None = None,
    running_gap: float | None = None,
    constants: Evaluation | None = None,
) -> Evaluation:
    """The objective for B pairs; `beta` is beta_eff(x), `context_scale` a phi(x) of the caller's own.

    `running_gap` is beta-DPO's running mean before this batch, `totals` the step's rows and chosen tokens.
    """
    o, pairs = objective, len(chosen.logps)
    one, lengths = np.ones(pairs), (np.maximum(chosen.lengths, 1), np.maximum(rejected.lengths, 1))
    base = b = one * (o.beta if beta is None else beta)
    comparisons = [name for name in o.weights if name != "sft"]
    w, r = total(chosen, o), total(rejected, o)
    no_reference = o.reference_free or ref_chosen is None or set(comparisons) == {"orpo"}
    ref_w, ref_r = (0 * one, 0 * one) if no_reference else (total(ref_chosen, o), total(ref_rejected, o))

    # A reward is per token where the comparison is: sigmoid_norm = sigmoid + length normalisation.
    a_w, a_r = lengthwise(lengths, o.length_normalization or (bool(comparisons) and set(comparisons) <= set(PER_TOKEN)))
    ratio_w, ratio_r = a_w * (w - ref_w), a_r * (r - ref_r)
    gap = float((base * (ratio_w - ratio_r)).mean())
    surprise = 0.0 if running_gap is None else gap - (0.9 * running_gap + 0.1 * gap)
    if constants is not None:
        surprise = constants.surprise
    if o.batch_beta_coef:
        b = np.maximum(base * (1 + o.batch_beta_coef * surprise), 1e-3)

    mix = 0.0 if o.reference_free else 1.0 if o.reference_mix is None else o.reference_mix
    margin = o.home_advantage * (1.0 if o.reference_mix is None else 1.0 - o.reference_mix)
    phi = context_scale
    if phi is None and o.contextual_scaling == "mallows":
        phi = mallows_phi(ref_chosen, ref_rejected, vocab_size, o.contextual_scaling_coef)
    variance = None if chosen_variance is None else np.maximum(chosen_variance + rejected_variance, o.variance_floor)

    def scores(per_token: bool) -> tuple[Array, Array, Array]:
        """h and z of the pair, and the log-ratio of each response."""
        a_w, a_r = lengthwise(lengths, per_token)
        c, d = w - mix * ref_w if mix else w, r - mix * ref_r if mix else r
        diverge = DIVERGENCES[o.f_divergence_type]
        h = a_w * diverge(c, o.f_alpha_divergence_coef) - a_r * diverge(d, o.f_alpha_divergence_coef)
        z = b * h - margin if o.margin_units == "reward" else b * (h - margin)
        return h, z if phi is None else phi * z, np.stack((a_w * c, a_r * d))

    def compare(name: str) -> Array:
        _, z, (c, d) = scores(o.length_normalization or name in PER_TOKEN)
        if name in RESPONSE_LOSSES:
            return RESPONSE_LOSSES[name](c, d, b)
        if name in SORTED_LOSSES:
            policy, reference = a_w * w - a_r * r, mix * (a_w * ref_w - a_r * ref_r)
            left, right = (policy, reference) if name == "aot" else (c, d)
            delta = b * (np.sort(left) - np.sort(right))
            return (1 - o.label_smoothing) * softplus(-delta) + o.label_smoothing * softplus(delta)
        if name == "orpo":
            mean_w, mean_r = w / lengths[0], r / lengths[1]
            return -mean_w + b * softplus(-(log_odds(mean_w) - log_odds(mean_r)))
        if name == "sft":
            return 0 * one
        return smoothed(LINKS, name, z / np.sqrt(variance) if name == "disco" else z, b, o, mirror=1.0)

    losses = sum(weight * compare(name) for name, weight in o.weights.items() if weight)
    if o.sft_weight and o.sft_reduction != "token":
        losses = losses + o.sft_weight * -chosen.logps / (lengths[0] if o.sft_reduction == "mean" else 1)
    own = one if pair_weight is None else pair_weight
    on_policy = on_policy_weights(chosen, rejected) if o.use_weighting else one
    on_policy = on_policy if constants is None else constants.on_policy
    losses = losses * own * on_policy

    rows, tokens = (pairs, max(chosen.lengths.sum(), 1)) if totals is None else totals
    token_weight = o.weights.get("sft", 0.0) + (o.sft_weight if o.sft_reduction == "token" else 0.0)
    token_sft = token_weight * -(on_policy * own * chosen.logps).sum() / tokens if token_weight else 0.0

    h, z, _ = scores(o.length_normalization or next(iter(o.weights)) in PER_TOKEN)
    return Evaluation(
        loss=float(losses.sum() / rows + token_sft), losses=losses, token_sft=float(token_sft), z=z, h=h, b=b, phi=phi,
        chosen_rewards=b * ratio_w, rejected_rewards=b * ratio_r, gap=gap, surprise=surprise, on_policy=on_policy,
    )  # fmt: skip
