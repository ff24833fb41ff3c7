"""Links: comparison scores become a loss (B,) of each pair. Pure functions, stable for |z| up to 1e4 and beyond.

To add one: write the function, add its line to `LINKS`, add its row to the tests. The first line of its docstring,
formula and source, is what `fastpo explain` prints. A leaf: torch only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LinkParams(NamedTuple):
    """What a link may need beside z.

    Attributes:
        beta: beta_eff, () or (B,).
        chosen: (B,) the policy's score of the chosen response, a log pi; `rejected` likewise.
        ref_chosen: (B,) what the reference subtracts from it, a A log ref; 0 where it subtracts nothing.
        label_smoothing: eps, for the links that use it inside.
        variance: (B,) variance of the comparison, for `disco`.
        hinge_delta, discopop_tau: as in `PreferenceConfig`.
    """

    beta: Tensor
    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    label_smoothing: float
    hinge_delta: float
    discopop_tau: float
    variance: Tensor | None

    @property
    def chosen_ratio(self) -> Tensor:
        """(B,) h of the chosen response: a (log pi - A log ref)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """(B,) h of the rejected response."""
        return self.rejected - self.ref_rejected


def scaled(beta: Tensor, x: Tensor) -> Tensor:
    """beta x. Where a log-prob is -inf the loss is at a limit and beta moves it no more: 0, not 0 * inf."""
    return _constant_at_limits(beta, x) * x


def _constant_at_limits(parameter: Tensor, x: Tensor) -> Tensor:
    if not parameter.requires_grad:
        return parameter
    return torch.where(x.isinf(), parameter.detach(), parameter)


# --- functions of z -------------------------------------------------------------------------------------------------


def sigmoid(z: Tensor, params: LinkParams) -> Tensor:
    """-log sigmoid(z): Bradley-Terry, as in DPO (arXiv:2305.18290, eq. 7)."""
    return -F.logsigmoid(z)


def hinge(z: Tensor, params: LinkParams) -> Tensor:
    """max(0, delta - z): SLiC (arXiv:2305.10425) and RSO's hinge (arXiv:2309.06657)."""
    return F.relu(params.hinge_delta - z)


def ipo(z: Tensor, params: LinkParams) -> Tensor:
    """(z - 1/2)^2 / beta^2, which is (h - 1/(2 beta))^2 of IPO (arXiv:2310.12036, eq. 17) where z = beta h."""
    return ((z - 0.5) / _constant_at_limits(params.beta, z)) ** 2


def ipo_scaled(z: Tensor, params: LinkParams) -> Tensor:
    """(z - 1/2)^2: IPO's optimum with a gradient scale that does not reward a growing beta."""
    return (z - 0.5) ** 2


def square(z: Tensor, params: LinkParams) -> Tensor:
    """(z - 1)^2: the squared loss of the GPO family (arXiv:2402.05749, table 1)."""
    return (z - 1) ** 2


def truncated_square(z: Tensor, params: LinkParams) -> Tensor:
    """max(0, delta - z)^2: the truncated quadratic of the GPO family."""
    return F.relu(params.hinge_delta - z) ** 2


def exponential(z: Tensor, params: LinkParams) -> Tensor:
    """exp(-z): the exponential loss of the GPO family; +inf for z far below 0."""
    return torch.exp(-z)


def savage(z: Tensor, params: LinkParams) -> Tensor:
    """sigmoid(-z)^2: the Savage loss of the GPO family."""
    # sigmoid(-z) rounds to 1 below 0 and its gradient to 0; the logarithm keeps both.
    return torch.exp(2 * F.logsigmoid(-z))


def cauchy(z: Tensor, params: LinkParams) -> Tensor:
    """-log(1/2 + atan(z)/pi): the Cauchy distribution in place of the logistic one."""
    # 1/2 + atan(z)/pi = atan2(1, -z)/pi cancels on neither side; each half sees only its own sign of z, so that
    # the one not taken has a finite gradient.
    lower = -torch.log(torch.atan2(torch.ones_like(z), -z.clamp(max=0)) / math.pi)
    upper = -torch.log1p(-torch.atan2(torch.ones_like(z), z.clamp(min=0)) / math.pi)
    return torch.where(z < 0, lower, upper)


def exo_pair(z: Tensor, params: LinkParams) -> Tensor:
    """KL((sigmoid(z), sigmoid(-z)) || (1 - eps, eps)): EXO for two responses (arXiv:2402.00856, eq. 16)."""
    eps, z = params.label_smoothing, _finite(z)
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-eps))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(eps))


def robust(z: Tensor, params: LinkParams) -> Tensor:
    """[-(1-eps) log sigmoid(z) + eps log sigmoid(-z)]/(1-2 eps): unbiased under flips (arXiv:2403.00409, eq. 5)."""
    eps = params.label_smoothing
    clean = -(1 - eps) * F.logsigmoid(z)
    return clean if eps == 0 else (clean + eps * F.logsigmoid(-z)) / (1 - 2 * eps)


def discopop(z: Tensor, params: LinkParams) -> Tensor:
    """(1-q) softplus(-z) + q e^-z, q = sigmoid(z/tau): DiscoPOP (arXiv:2406.08414, eq. 5)."""
    z = _finite(z)
    gate = z / params.discopop_tau
    # q e^-z as one exponential: far below 0 the factors are 0 and infinity.
    return torch.sigmoid(-gate) * F.softplus(-z) + torch.exp(F.logsigmoid(gate) - z)


def _finite(z: Tensor) -> Tensor:
    """A probability of 0 times an infinite logarithm would be no number."""
    return z.clamp(torch.finfo(z.dtype).min, torch.finfo(z.dtype).max)


def disco(z: Tensor, params: LinkParams) -> Tensor:
    """-log Phi(z / sqrt(variance)): two Gaussian rewards compared, Phi(x) = (1 + erf(x / sqrt 2))/2."""
    assert params.variance is not None
    return -log_ndtr(z / _constant_at_limits(params.variance, z).sqrt())


def log_ndtr(x: Tensor) -> Tensor:
    """log Phi(x) with a gradient that holds in the tails; fp32 or wider inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _LogNdtr.apply(wide).to(x.dtype)


class _LogNdtr(torch.autograd.Function):
    """torch's own gradient is wrong in the lower tail; here it is the Mills ratio."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.special.log_ndtr(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * _MillsRatio.apply(*ctx.saved_tensors)


class _MillsRatio(torch.autograd.Function):
    """r(x) = phi(x)/Phi(x) of the normal distribution, with r' = -r (x + r)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # Through erfcx it neither over- nor underflows in the lower tail; in the upper one erfcx is infinite and r 0.
        return math.sqrt(2 / math.pi) / torch.special.erfcx(-x / math.sqrt(2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        ratio = _MillsRatio.apply(x)
        return -gradient * ratio * (x + ratio)


# --- functions of each response -------------------------------------------------------------------------------------


def nca_pair(z: Tensor, params: LinkParams) -> Tensor:
    """-log sigmoid(b h_w) - log sigmoid(-b h_w)/2 - log sigmoid(-b h_l)/2: NCA (arXiv:2402.05369)."""
    chosen, rejected = scaled(params.beta, params.chosen_ratio), scaled(params.beta, params.rejected_ratio)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(z: Tensor, params: LinkParams) -> Tensor:
    """-log sigmoid(b h_w) - log sigmoid(-b h_l): BCO on pairs, without its reward shift (arXiv:2404.04656)."""
    chosen, rejected = scaled(params.beta, params.chosen_ratio), scaled(params.beta, params.rejected_ratio)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(z: Tensor, params: LinkParams) -> Tensor:
    """(h_w - 1/(2b))^2 + (h_l + 1/(2b))^2: SPPO with hard labels (arXiv:2405.00675, eq. 4.7)."""
    chosen, rejected = params.chosen_ratio, params.rejected_ratio
    target = 0.5 / _constant_at_limits(params.beta, chosen - rejected)
    return (chosen - target) ** 2 + (rejected + target) ** 2


def apo_zero(z: Tensor, params: LinkParams) -> Tensor:
    """1 - sigmoid(b h_w) + sigmoid(b h_l): APO for data better than the model (arXiv:2408.06266, eq. 7)."""
    chosen, rejected = scaled(params.beta, params.chosen_ratio), scaled(params.beta, params.rejected_ratio)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(z: Tensor, params: LinkParams) -> Tensor:
    """sigmoid(b h_w) + 1 - sigmoid(b (h_w - h_l)): APO for data worse than the model (arXiv:2408.06266, eq. 8)."""
    difference = params.chosen_ratio - params.rejected_ratio
    return torch.sigmoid(scaled(params.beta, params.chosen_ratio)) + torch.sigmoid(-scaled(params.beta, difference))


# --- functions of the sorted batch ----------------------------------------------------------------------------------


def aot(z: Tensor, params: LinkParams) -> Tensor:
    """Smoothed logistic loss of sorted policy differences against sorted reference ones (arXiv:2406.05882)."""
    policy, reference = params.chosen - params.rejected, params.ref_chosen - params.ref_rejected
    difference = policy.sort().values - reference.sort().values
    return _logistic(scaled(params.beta, difference), params.label_smoothing)


def aot_unpaired(z: Tensor, params: LinkParams) -> Tensor:
    """Smoothed logistic loss of the sorted chosen log-ratios against the sorted rejected ones (arXiv:2406.05882)."""
    chosen, rejected = params.chosen_ratio.sort().values, params.rejected_ratio.sort().values
    return _logistic(scaled(params.beta, chosen - rejected), params.label_smoothing)


def _logistic(z: Tensor, eps: float) -> Tensor:
    return -F.logsigmoid(z) if eps == 0 else -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


# --- functions of the policy alone ----------------------------------------------------------------------------------


def orpo(z: Tensor, params: LinkParams) -> Tensor:
    """-m_w + b softplus(-(logodds(m_w) - logodds(m_l))), m the mean log-probs: ORPO (arXiv:2403.07691, eq. 6)."""
    chosen, rejected = params.chosen, params.rejected
    return -chosen + scaled(params.beta, F.softplus(_log_odds(rejected) - _log_odds(chosen)))


def _log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p); a certain response, or an empty one, counts as p = 1 - eps of the dtype."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # Each form of log(1 - e^x) keeps its digits on its own side of log 2.
    near = torch.log(-torch.expm1(logp.clamp(min=-1)))
    far = torch.log1p(-torch.exp(logp.clamp(max=-0.5)))
    return logp - torch.where(logp > -math.log(2), near, far)


def sft(z: Tensor, params: LinkParams) -> Tensor:
    """-log pi(y_w), mean over the batch's chosen tokens as in TRL: part of the reduced loss, 0 of each pair here."""
    return torch.zeros_like(params.chosen)


# --- f-divergences --------------------------------------------------------------------------------------------------


def forward_kl(h: Tensor, alpha: float) -> Tensor:
    """1 - e^-h."""
    return -_expm1(-h)


def js_divergence(h: Tensor, alpha: float) -> Tensor:
    """log 2 + log sigmoid(h)."""
    return math.log(2) + F.logsigmoid(h)


def alpha_divergence(h: Tensor, alpha: float) -> Tensor:
    """(e^((alpha-1) h) - 1)/(alpha - 1), and h in the limit of alpha = 1."""
    return h if alpha == 1 else _expm1((alpha - 1) * h) / (alpha - 1)


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1, kept so small that a link can square it: the difference of two infinities would be no number."""
    return torch.expm1(x.clamp(max=math.log(torch.finfo(x.dtype).max) / 2 - 1))


# f'(pi/pi_ref) of h = log pi - log pi_ref, in place of h itself (f-DPO, arXiv:2309.16240, table 1); alpha for the last.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda h, alpha: h,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "js": js_divergence,
    "alpha_divergence": alpha_divergence,
    "alpha": alpha_divergence,
}


# --- the table ------------------------------------------------------------------------------------------------------

# What a loss is a function of -> the options of `PreferenceConfig` that form it.
_BETA = {"batch_beta_coef", "beta_schedule"}
_RESPONSES = _BETA | {"reference_mix", "reference_free", "ld_alpha", "length_normalization"}
_SCORE = _RESPONSES | {"home_advantage", "contextual_scaling", "f_divergence_type"}
FORMED_BY = {
    "score": frozenset(_SCORE | {"label_smoothing"}),  # z of a pair; smoothed from outside, (1-eps) f(z) + eps f(-z)
    "noisy score": frozenset(_SCORE | {"label_smoothing"}),  # z of a pair; uses eps inside
    "responses": frozenset(_RESPONSES),  # the log-ratio of each response
    "sorted batch": frozenset(_RESPONSES | {"label_smoothing"}),  # log-ratios torn from their pairs
    # mean log-probs under the policy, of which these two are true anyway
    "policy": frozenset(_BETA | {"reference_free", "length_normalization"}),
    "chosen": frozenset(),  # log-probs of the chosen response
}


@dataclass(frozen=True)
class Link:
    """A line of `LINKS`.

    Attributes:
        f: (z, params) -> loss (B,).
        of: what f is a function of, a key of `FORMED_BY`.
        normalized: scores are per token whatever `length_normalization` says.
        options: further fields of `PreferenceConfig` that f alone reads.
        fixed_beta: why beta cannot be learned with it; empty where it can.
    """

    f: Callable[[Tensor, LinkParams], Tensor]
    of: str = "score"
    normalized: bool = False
    options: tuple[str, ...] = ()
    fixed_beta: str = ""


_TO_INFINITY = "it drives s(x) to infinity where h < 0: use 'ipo_scaled'"
_SORTED = "it sorts the pairs apart, and s(x) belongs to a pair"

LINKS: dict[str, Link] = {
    "sigmoid": Link(sigmoid),
    "sigmoid_norm": Link(sigmoid, normalized=True),
    "hinge": Link(hinge, options=("hinge_delta",)),
    "ipo": Link(ipo, fixed_beta=_TO_INFINITY),
    "ipo_norm": Link(ipo, normalized=True, fixed_beta=_TO_INFINITY),
    "ipo_scaled": Link(ipo_scaled),
    "square": Link(square),
    "truncated_square": Link(truncated_square, options=("hinge_delta",)),
    "exponential": Link(exponential),
    "savage": Link(savage),
    "cauchy": Link(cauchy),
    "disco": Link(disco, options=("variance_floor", "disco_prior_weight")),
    "discopop": Link(discopop, options=("discopop_tau",)),
    "exo_pair": Link(exo_pair, of="noisy score"),
    "robust": Link(robust, of="noisy score"),
    "nca_pair": Link(nca_pair, of="responses"),
    "bco_pair": Link(bco_pair, of="responses"),
    "sppo_hard": Link(sppo_hard, of="responses", fixed_beta="its target 1/(2b) drives s(x) to infinity, as ipo's does"),
    "apo_zero": Link(apo_zero, of="responses"),
    "apo_down": Link(apo_down, of="responses"),
    "aot": Link(aot, of="sorted batch", fixed_beta=_SORTED),
    "aot_unpaired": Link(aot_unpaired, of="sorted batch", fixed_beta=_SORTED),
    "orpo": Link(
        orpo, of="policy", normalized=True, fixed_beta="beta weighs its second term, so that s(x) would go to 0"
    ),
    "sft": Link(sft, of="chosen"),
}
