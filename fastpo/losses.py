"""`preference_loss`, one formula for every preference objective, and `reward_model_loss`. Pure functions."""

from typing import Any

import torch
from torch import Tensor

from fastpo.config import PreferenceConfig
from fastpo.links import LINKS, LinkParams, scaled
from fastpo.loss_inputs import (
    Reference,
    beta_tensor,
    check_column,
    check_extras,
    check_reward_config,
    check_rewards,
    check_stats,
    context_scale_of,
    summed_variance,
    usable_reference,
)
from fastpo.schedules import RunningMeans, running_mean
from fastpo.scores import PairScores, desensitized, on_policy_weight, pair_scores, per_length
from fastpo.types import AnySequenceStats, LossOutput, StepTotals

LOWEST_BETA = 1e-3
GAP_DECAY = 0.9  # of beta-DPO's running mean


def preference_loss(
    chosen: AnySequenceStats,
    rejected: AnySequenceStats,
    config: PreferenceConfig,
    *,
    ref_chosen: AnySequenceStats | None = None,
    ref_rejected: AnySequenceStats | None = None,
    beta: float | Tensor | None = None,
    context_scale: Tensor | None = None,
    chosen_variance: Tensor | None = None,
    rejected_variance: Tensor | None = None,
    vocab_size: int | None = None,
    pair_weight: Tensor | None = None,
    totals: StepTotals | None = None,
    state: RunningMeans | None = None,
) -> LossOutput:
    """The preference loss of B pairs.

    With a(y) the length normalisation, D the score difference of policy or reference, A the reference's weight, b the
    beta of each pair, m the margin and phi the contextual scale:

        h    = D_pi - A D_ref
        z    = phi (b h - m)     or, in log-ratio units,     phi b (h - m)
        loss = (1 - eps) f(z) + eps f(-z) + sft_weight SFT

    A sum of several losses f has them weighted; those that are no function of z (see `fastpo.links`) take the
    log-ratios of the responses. This covers DPO (arXiv:2305.18290), IPO, SLiC, SimPO, Mallows-DPO, RainbowPO
    (arXiv:2410.04203) and the rest of `fastpo methods`. A term whose coefficient is 0 is not formed. The result keeps
    the inputs' dtype. Regularisers of s(x) and the prior of Gaussian rewards are not part of it: add
    `regularizer_loss` and `config.disco_prior_weight` times the mean of `gaussian_prior`, as the trainer does.

    Args:
        chosen: the policy's statistics of the chosen responses, fields of shape (B,).
        rejected: the policy's statistics of the rejected responses.
        config: what is optimised.
        ref_chosen: the reference's statistics of the chosen responses; never read with `reference_free`.
        ref_rejected: the reference's statistics of the rejected responses.
        beta: None (`config.beta`), a positive number, or a (B,) tensor beta_eff(x), differentiable; one number for
            ``aot`` and ``aot_unpaired``. What `beta_mode` and `beta_schedule` make of it is the caller's, or trainer's.
        context_scale: (B,) phi(x) of the caller's own, taken as it is and detached; it wins over
            `config.contextual_scaling`.
        chosen_variance: (B,) variance of the chosen reward, differentiable, for `pref_loss_type` ``disco``.
        rejected_variance: (B,) of the rejected reward.
        vocab_size: V, rows of the LM head; needed where phi(x) is computed.
        pair_weight: (B,) weight >= 0 of each pair in the mean, detached; it is not normalised.
        totals: rows and chosen tokens of the whole optimiser step, to divide by; None: of this batch.
        state: running means for `batch_beta_coef`, updated in place; None: each batch is its own mean, so that its
            gap does not move beta.

    Returns:
        LossOutput; rewards are b a(y) (log pi - log ref), detached.

    Raises:
        TypeError, ValueError: an argument is missing, misshapen or out of range; the message names it.
    """
    if not isinstance(config, PreferenceConfig):
        raise TypeError(f"config must be a PreferenceConfig, got {type(config).__name__}")
    check_stats("chosen", chosen, None)
    batch = chosen.logps.shape
    check_stats("rejected", rejected, batch)
    for name, value in (("context_scale", context_scale), ("pair_weight", pair_weight)):
        check_column(name, value, config, batch)
    reference = usable_reference(config, ref_chosen, ref_rejected, batch, chosen.logps.dtype)
    check_extras(config, chosen=chosen, rejected=rejected, reference=reference)
    variance = summed_variance(config, chosen_variance, rejected_variance, chosen.logps)
    b = beta_tensor(config, beta, chosen.logps)
    phi = context_scale_of(config, context_scale, reference, chosen.logps, vocab_size)
    rewards = _log_ratios(config, chosen, rejected, reference)
    if config.batch_beta_coef != 0:
        b = _batch_beta(b, rewards, config, state)

    losses, scores = torch.zeros_like(chosen.logps), {}
    for name, factor in config.loss_weights.items():
        per_token = config.length_normalization or LINKS[name].normalized
        if per_token not in scores:
            scores[per_token] = pair_scores(chosen, rejected, reference, config, per_token)
        losses = losses + factor * _comparison(name, scores[per_token], b, phi, variance, config)
    if config.sft_weight != 0 and config.sft_reduction != "token":
        losses = losses - config.sft_weight * per_length(chosen.logps, chosen, config.sft_reduction == "mean")

    weight = _pair_weights(chosen, rejected, config, pair_weight)
    if weight is not None:
        losses = _weighted(weight, losses)
    loss = losses.mean() if totals is None else losses.sum() / totals.rows.to(losses)
    token_weight = config.loss_weights.get("sft", 0.0) + (config.sft_reduction == "token") * config.sft_weight
    if token_weight != 0:
        tokens = chosen.lengths.sum().clamp(min=1) if totals is None else totals.tokens
        logps = chosen.logps if weight is None else _weighted(weight, chosen.logps)
        loss = loss - token_weight * logps.sum() / tokens.to(loss)

    with torch.no_grad():
        chosen_rewards, rejected_rewards = b * rewards[0], b * rewards[1]
        metrics = {
            **_reward_metrics(chosen_rewards, rejected_rewards),
            "logps/chosen": chosen.logps.mean(),
            "logps/rejected": rejected.logps.mean(),
            "entropy/chosen": chosen.entropy.mean(),
            "entropy/rejected": rejected.entropy.mean(),
            **spread("beta", b),
            **({} if phi is None else spread("phi", phi)),
            **({} if variance is None else spread("variance", variance)),
            **({} if weight is None else spread("pair_weight", weight)),
        }
    return LossOutput(loss, losses, chosen_rewards, rejected_rewards, chosen_rewards - rejected_rewards, metrics)


def reward_model_loss(
    chosen_mean: Tensor,
    rejected_mean: Tensor,
    config: PreferenceConfig,
    *,
    chosen_variance: Tensor | None = None,
    rejected_variance: Tensor | None = None,
    margin: Tensor | None = None,
) -> LossOutput:
    """The loss of a reward model on B pairs: f(z) with z = mu_w - mu_l - m, label smoothing as in `preference_loss`.

    With ``sigmoid`` this is Bradley-Terry's softplus(-(r_w - r_l - m)); with ``disco`` the rewards are Gaussian and z
    is divided by sqrt(var_w + var_l). beta is not used. The result keeps the inputs' dtype. The prior of Gaussian
    rewards is not part of it: add `config.disco_prior_weight` times the mean of `gaussian_prior`.

    Args:
        chosen_mean: (B,) reward of the chosen responses, or its mean; differentiable.
        rejected_mean: (B,) of the rejected responses.
        config: `pref_loss_type`, `home_advantage` and what f reads.
        chosen_variance: (B,) variance of the chosen reward, differentiable, for ``disco``.
        rejected_variance: (B,) of the rejected reward.
        margin: (B,) m of each pair, detached, in place of `home_advantage`.

    Returns:
        LossOutput; the rewards are the means, detached.

    Raises:
        TypeError, ValueError: an argument is missing or misshapen, or config sets what no reward model has.
    """
    if not isinstance(config, PreferenceConfig):
        raise TypeError(f"config must be a PreferenceConfig, got {type(config).__name__}")
    check_reward_config(config)
    for name, value in (("chosen_mean", chosen_mean), ("rejected_mean", rejected_mean), ("margin", margin)):
        check_rewards(name, value, chosen_mean)
    variance = summed_variance(config, chosen_variance, rejected_variance, chosen_mean)
    m = config.home_advantage if margin is None else margin.detach().to(chosen_mean)
    z = chosen_mean - rejected_mean - m
    losses = torch.zeros_like(z)
    nothing = torch.zeros_like(z)  # no policy, no reference
    sides = nothing, nothing, nothing, nothing
    params = LinkParams(torch.ones_like(z), *sides, **_link_options(config), variance=variance)
    for name, weight in config.loss_weights.items():
        losses = losses + weight * _smoothed(name, z, params, config.label_smoothing)
    with torch.no_grad():
        rewards = chosen_mean.detach(), rejected_mean.detach()
        metrics = _reward_metrics(*rewards) | ({} if variance is None else spread("variance", variance))
    return LossOutput(losses.mean(), losses, *rewards, rewards[0] - rewards[1], metrics)


def gaussian_prior(mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) = (variance + mean^2 - 1 - log variance)/2 (B,), in nats; arguments (B,).

    It pins the scale that means and standard deviations of rewards share.
    """
    return (variance + mean.square() - 1 - variance.log()) / 2


def _comparison(
    name: str, scores: PairScores, b: Tensor, phi: Tensor | None, variance: Tensor | None, config: PreferenceConfig
) -> Tensor:
    """(B,) values of one loss."""
    m = config.margin
    z = scaled(b, scores.h) - m if config.margin_units == "reward" else scaled(b, scores.h - m)
    if phi is not None:
        z = phi * z
    own = scores.chosen, scores.rejected, scores.ref_chosen, scores.ref_rejected
    return _smoothed(name, z, LinkParams(b, *own, **_link_options(config), variance=variance), config.label_smoothing)


def _link_options(config: PreferenceConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("label_smoothing", "hinge_delta", "discopop_tau")}


def _smoothed(name: str, z: Tensor, params: LinkParams, eps: float) -> Tensor:
    """(1 - eps) f(z) + eps f(-z), where f is not one that uses eps itself."""
    link = LINKS[name]
    if eps == 0 or link.of != "score":
        return link.f(z, params)
    return (1 - eps) * link.f(z, params) + eps * link.f(-z, params)


def _pair_weights(
    chosen: AnySequenceStats, rejected: AnySequenceStats, config: PreferenceConfig, own: Tensor | None
) -> Tensor | None:
    """(B,) the caller's weights times those of WPO, detached; None: all 1."""
    weight = None if own is None else own.detach().to(chosen.logps)
    if not config.use_weighting:
        return weight
    on_policy = on_policy_weight(chosen, rejected)
    return on_policy if weight is None else weight * on_policy


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """A pair of weight 0 is left out, even where its value is infinite."""
    return torch.where(weight == 0, torch.zeros_like(values), weight * values)


@torch.no_grad()
def _log_ratios(
    config: PreferenceConfig, chosen: AnySequenceStats, rejected: AnySequenceStats, reference: Reference | None
) -> tuple[Tensor, Tensor]:
    """a(y) (log pi - log ref) of chosen and rejected, (B,): what rewards are made of, mixing ignored."""
    sides = []
    for own, other in zip((chosen, rejected), reference or (None, None), strict=True):
        score = desensitized(own, config.ld_alpha)
        score = score if other is None else score - desensitized(other, config.ld_alpha)
        sides.append(per_length(score, own, config.per_token))
    return sides[0], sides[1]


def _batch_beta(
    b: Tensor, log_ratios: tuple[Tensor, Tensor], config: PreferenceConfig, state: RunningMeans | None
) -> Tensor:
    """max(b (1 + a (gap - its running mean)), 1e-3), gap the batch's mean reward margin (arXiv:2407.08639, eq. 6)."""
    gap = (b * (log_ratios[0] - log_ratios[1])).mean().detach()
    surprise = gap - running_mean(state, "gap", gap, GAP_DECAY)
    return (b * (1 + config.batch_beta_coef * surprise)).clamp(min=LOWEST_BETA)


def _reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (margins > 0).to(margins.dtype).mean(),
        "rewards/margins": margins.mean(),
    }


def spread(name: str, values: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}/mean": values.mean(),
        f"{name}/std": values.std(correction=0),
        f"{name}/min": values.min(),
        f"{name}/max": values.max(),
    }
