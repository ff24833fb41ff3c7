"""Stages: statistics of a batch become the loss of that stage."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from fastpo.config import PreferenceConfig
from fastpo.losses import gaussian_prior, preference_loss, reward_model_loss, spread
from fastpo.policy_gradient import clipped_loss, clipped_tokens, dual_beta_loss, value_loss
from fastpo.regularizers import regularizer_loss
from fastpo.schedules import RunningMeans
from fastpo.scores import per_length
from fastpo.types import AnySequenceStats, LossOutput, StepTotals

STAGES = ("sft", "rm", "dpo", "ppo")
# Stages in which a head has something to do.
HEAD_STAGES = {"beta_head": ("dpo", "ppo"), "disco_head": ("rm", "dpo")}
RUNAWAY = 10.0  # where an s(x) without a bound is no longer sane
# s(x) is counted in these seven bins, of which one is around 1, where every run starts; the outer two are open.
HISTOGRAM_EDGES = tuple(4.0 ** (k / 7) for k in range(-7, 8, 2))
HISTOGRAM = "beta/histogram"
HISTOGRAM_NAMES = tuple(f"{HISTOGRAM}/{low:.2f}-{high:.2f}" for low, high in pairwise(HISTOGRAM_EDGES))


def dpo_stage(
    policy: AnySequenceStats,
    reference: AnySequenceStats | None,
    config: PreferenceConfig,
    *,
    vocab_size: int,
    beta: float | None = None,
    log_s: Tensor | None = None,
    variance: Tensor | None = None,
    context_scale: Tensor | None = None,
    pair_weight: Tensor | None = None,
    prompt_entropy: Tensor | None = None,
    confidence: Tensor | None = None,
    features: Tensor | None = None,
    totals: StepTotals | None = None,
    state: RunningMeans | None = None,
) -> LossOutput:
    """Preference loss of 2B rows, the B chosen first, with the weighted regularisers and priors of the heads.

    Args:
        policy: statistics of the 2B rows under the policy.
        reference: the same under the reference, or None where the objective reads none.
        config: the objective.
        vocab_size: rows of the LM head.
        beta: the base value at this step; None: `config.beta`.
        log_s: (B,) of the Beta head; None: beta is fixed.
        variance: (2B,) of the Disco head, where the objective compares Gaussians.
        context_scale: (B,) phi(x) of the dataset's own.
        pair_weight: (B,) weights of the dataset's own.
        prompt_entropy, confidence, features: (B,), (B,), (B, F), as in `regularizer_loss`.
        totals: what to divide by; None: this batch alone.
        state: running means, updated in place.
    """
    chosen, rejected = policy.split()
    ref_chosen, ref_rejected = (None, None) if reference is None else reference.split()
    variances = (None, None) if variance is None else variance.chunk(2)
    base = config.beta if beta is None else beta
    output = preference_loss(
        chosen, rejected, config, ref_chosen=ref_chosen, ref_rejected=ref_rejected,
        beta=base if log_s is None else base * log_s.exp(), context_scale=context_scale,
        chosen_variance=variances[0], rejected_variance=variances[1], vocab_size=vocab_size,
        pair_weight=pair_weight, totals=totals, state=state,
    )  # fmt: skip
    extra, metrics = output.loss.new_zeros(()), dict(output.metrics)
    if log_s is not None:
        extra, found = regularizer_loss(
            log_s, config, prompt_entropy=prompt_entropy, confidence=confidence, features=features, state=state
        )
        metrics |= {**found, **_spread_of_s(log_s, config.beta_head.s_max)}
    if variance is not None:
        means = torch.cat((output.chosen_rewards, output.rejected_rewards))
        prior = gaussian_prior(means, variance).mean()
        extra = extra + config.disco_prior_weight * prior
        metrics["disco/prior"] = prior.detach()
    if variance is not None and log_s is not None:
        # s and the variances scale the same z: without a gauge they would drift together.
        gauge = torch.add(*variance.chunk(2)).clamp(min=config.variance_floor).log().mean()
        extra = extra + gauge.square()
        metrics["disco/log_variance"] = gauge.detach()
    share = 1 if totals is None else len(output.losses) / totals.rows.to(extra)
    return output._replace(loss=output.loss + share * extra, metrics=metrics)


@torch.no_grad()
def _spread_of_s(log_s: Tensor, s_max: float | None) -> dict[str, Tensor]:
    """Share of the batch in each bin of s(x) = beta_eff/beta, and of those that ran away; as meters average them."""
    bound = 0.9 * math.log(RUNAWAY if s_max is None else s_max)
    below = [(log_s <= math.log(edge)).float().mean() for edge in HISTOGRAM_EDGES[1:-1]]
    counts = [high - low for low, high in pairwise([torch.zeros_like(below[0]), *below, torch.ones_like(below[0])])]
    runaway = (log_s.abs() > bound).float().mean()
    return {"log_s/mean": log_s.mean(), "log_s/runaway": runaway, **dict(zip(HISTOGRAM_NAMES, counts, strict=True))}


def rm_stage(
    chosen_mean: Tensor,
    rejected_mean: Tensor,
    config: PreferenceConfig,
    *,
    chosen_variance: Tensor | None = None,
    rejected_variance: Tensor | None = None,
    margin: Tensor | None = None,
    center_rewards_coefficient: float | None = None,
    totals: StepTotals | None = None,
) -> LossOutput:
    """Loss of a reward model on B pairs, with the prior of Gaussian rewards and the centring of all.

    Args:
        chosen_mean, rejected_mean, config, chosen_variance, rejected_variance, margin: as in `reward_model_loss`; with
            variances comes `config.disco_prior_weight` times the mean of `gaussian_prior`.
        center_rewards_coefficient: weight of the mean of (r_w + r_l)^2 (arXiv:2312.09244, eq. 2); None: without.
        totals: what to divide by; None: this batch alone.

    Raises:
        TypeError, ValueError: as `reward_model_loss`.
    """
    variances = {"chosen_variance": chosen_variance, "rejected_variance": rejected_variance}
    output = reward_model_loss(chosen_mean, rejected_mean, config, margin=margin, **variances)
    loss, metrics = output.loss, dict(output.metrics)
    if chosen_variance is not None and rejected_variance is not None:
        means, variance = torch.cat((chosen_mean, rejected_mean)), torch.cat((chosen_variance, rejected_variance))
        prior = gaussian_prior(means, variance).mean()
        loss = loss + config.disco_prior_weight * prior
        metrics["disco/prior"] = prior.detach()
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * (chosen_mean + rejected_mean).square().mean()
    if totals is not None:
        loss = len(output.losses) / totals.rows.to(loss) * loss
    return output._replace(loss=loss, metrics=metrics)


def sft_stage(policy: AnySequenceStats, *, totals: StepTotals | None = None) -> LossOutput:
    """Negative log-likelihood of the completions: mean over the step's tokens; `losses` are means per row."""
    losses = -per_length(policy.logps, policy, per_token=True)
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


def ppo_stage(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    kl: Tensor | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    vf_coef: float = 0.5,
    vf_epsilon: float | None = None,
    beta: float | Tensor,
    log_s: Tensor | None = None,
    s_max: float | None = None,
    kl_target: float | None = None,
    totals: StepTotals | None = None,
) -> LossOutput:
    """Clipped policy loss of R completions, with the loss of the values and the dual loss of s(x) where they are given.

    A mean over the tokens of the optimiser step, so that every token counts the same whatever its micro-batch and the
    length of its completion; the dual loss is a mean over its rows. The penalty on the KL is in the advantages.

    Args:
        logps: (R, T) log-prob of each token under the policy, differentiable.
        old_logps, advantages, mask, epsilon, epsilon_high: as in `clipped_loss`.
        kl: (R, T) of each token when it was sampled, as of `token_kl`; for the metrics and the dual loss, which reads
            it outside the mask too.
        values: (R, T) of the value head, differentiable; None: advantages come from groups.
        old_values, returns: (R, T) as in `value_loss`, with values.
        vf_coef, vf_epsilon: weight of the value loss, and its clip.
        beta: the base value at this step, or one of each row (R,).
        log_s: (R,) of the Beta head, for each row's prompt; None: beta is fixed.
        s_max: bound of s(x), for its metrics.
        kl_target: in nats a completion: s(x) is trained by the dual loss; None: it is frozen.
        totals: what to divide by; None: this batch alone.

    Returns:
        LossOutput: losses (R,) are means over the row's tokens, without the dual loss; there are no pairs, so that
        rewards and margins are 0.

    Raises:
        ValueError: an argument is misshapen, out of range, or missing beside another.
    """
    kept = mask.bool()
    count = kept.sum().clamp(min=1)
    losses, clip_ratio = clipped_loss(logps, old_logps, advantages, mask, epsilon, epsilon_high)
    clipped = clipped_tokens(logps, old_logps, advantages, mask, epsilon, epsilon_high)
    metrics = {
        "policy_loss": losses.sum() / count,
        "clip_ratio/low_mean": (clipped & (advantages < 0)).sum() / count,
        "clip_ratio/high_mean": (clipped & (advantages > 0)).sum() / count,
        "clip_ratio/region_mean": clip_ratio,
        **spread("beta", (torch.zeros_like(logps[:, 0]) if log_s is None else log_s.detach()).exp() * beta),
        **({} if log_s is None else _spread_of_s(log_s, s_max)),
    }
    if kl is not None:
        metrics["kl"] = torch.where(kept, kl, 0).sum() / count
    if values is not None:
        if old_values is None or returns is None:
            raise ValueError("values must come with old_values and returns, got None")
        errors = value_loss(values, old_values, returns, mask, vf_epsilon)
        metrics["value_loss"] = errors.sum() / count
        losses = losses + vf_coef * errors
    loss = losses.sum() / (count if totals is None else totals.tokens)
    if kl_target is not None:
        if log_s is None or kl is None:
            raise ValueError("kl_target must come with log_s and kl, of which the dual loss is made, got None")
        # A completion that the mask leaves out of the loss has its KL all the same.
        dual = dual_beta_loss(log_s, beta, kl.sum(dim=1), kl_target)
        metrics["dual_loss"] = dual.mean()
        loss = loss + dual.sum() / (len(dual) if totals is None else totals.rows)
    losses = losses.sum(dim=1) / kept.sum(dim=1).clamp(min=1)
    zeros = torch.zeros_like(losses)
    return LossOutput(loss, losses, zeros, zeros, zeros, {name: value.detach() for name, value in metrics.items()})
