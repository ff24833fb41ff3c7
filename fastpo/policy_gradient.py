"""What PPO computes of tokens: KL estimates, rewards, advantages, the clipped losses. Pure functions.

Everywhere (R, T) are R completions in padded rows: a tensor holds at t what belongs to the token at position t, and
mask (R, T), bool or integer, is 1 on the tokens of the completion. Outside the mask results are 0, and what the other
arguments hold there is not read. Results keep the inputs' dtype.

The penalty beta_eff(x) * KL is part of the reward, not of the loss, for every kind of advantage: so it is weighed by
the same advantages as r(x, y), and a per-prompt beta needs nothing further. (GRPO's paper, arXiv:2402.03300, adds it to
the loss instead.)
"""

import math

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k3")
GROUP_ADVANTAGES = ("rloo", "grpo")
LEAST_STD = 1e-4  # of GRPO, as TRL has it
LEAST_VARIANCE = 1e-8


def token_kl(logps: Tensor, ref_logps: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Estimate (R, T), in nats, of KL(policy || reference) at each token that the policy sampled.

    k1 is log pi - log ref, whose sum is the log-ratio of the sequence; it may be negative. k3 is exp(d) - 1 - d with
    d = log ref - log pi, never negative. Both are unbiased at the policy that sampled, but as rewards only k1 is: what
    it pays for has the gradient of KL(pi || ref), whereas k3's is that of KL(pi || ref) - KL(ref || pi), next to
    nothing while the two are close.

    Args:
        logps: (R, T) log-prob of each token under the policy.
        ref_logps: (R, T) under the reference.
        mask: (R, T).
        estimator: "k1" or "k3".

    Raises:
        ValueError: another estimator; shapes that differ.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")
    _check_tokens(mask, logps=logps, ref_logps=ref_logps)
    difference = ref_logps - logps
    if estimator == "k1":
        return _within(mask, -difference)
    # A log-prob of -inf under the policy gives +inf, not inf - inf.
    difference = difference.clamp(max=torch.finfo(difference.dtype).max)
    return _within(mask, torch.expm1(difference) - difference)


def token_rewards(rewards: Tensor, kl: Tensor, beta: Tensor, mask: Tensor) -> Tensor:
    """(R, T) -beta * kl at each token, plus r(x, y) at the last one; a constant.

    An empty completion has no token to be rewarded for: its row is 0, and `group_advantages` leaves it out.

    Args:
        rewards: (R,) r(x, y).
        kl: (R, T) as of `token_kl`.
        beta: () or (R,) beta_eff(x). At 0 there is no penalty, not even for an infinite kl.
        mask: (R, T).

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_tokens(mask, kl=kl)
    _check_rows(mask, rewards=rewards)
    if beta.shape not in ((), mask.shape[:1]):
        raise ValueError(f"beta must have shape () or ({len(mask)},), got {tuple(beta.shape)}")
    rewards, kl, beta = rewards.detach(), kl.detach(), beta.detach().to(kl).expand(len(mask))[:, None]
    found = _within(mask.bool() & (beta != 0), -beta * kl)
    return found + torch.where(_last(mask), rewards[:, None].to(found), 0)


def risk_adjusted(mean: Tensor, variance: Tensor, risk_aversion: float) -> Tensor:
    """(R,) mu - kappa * sigma: the reward of a Gaussian reward model that is paid for its doubt.

    Args:
        mean: (R,) mu.
        variance: (R,) sigma^2.
        risk_aversion: kappa >= 0; at 0 the mean alone.

    Raises:
        ValueError: kappa is negative or not finite; shapes that differ.
    """
    if not 0 <= risk_aversion < math.inf:
        raise ValueError(f"risk_aversion must be a finite number >= 0, got {risk_aversion!r}")
    if mean.shape != variance.shape:
        raise ValueError(f"variance must have mean's shape {tuple(mean.shape)}, got {tuple(variance.shape)}")
    return mean if risk_aversion == 0 else mean - risk_aversion * variance.sqrt()


def group_advantages(token_rewards: Tensor, mask: Tensor, num_generations: int, kind: str) -> Tensor:
    """(R, T) advantage of each completion against the others of its prompt, the same at all its tokens; a constant.

    With G a completion's return, the sum of its rewards:

        rloo    G - mean of the other completions' returns (arXiv:2402.14740), which leaves the gradient unbiased
        grpo    (G - mean of the group)/(standard deviation + 1e-4), that of the sample, with n - 1, as in TRL

    A completion without a token takes no part in its group; a group in which fewer than two have one gives 0.

    Args:
        token_rewards: (R, T) as of `token_rewards`; the rows of one prompt are consecutive.
        mask: (R, T).
        num_generations: n >= 2 rows of each prompt.
        kind: "rloo" or "grpo".

    Raises:
        ValueError: another kind; n < 2, or no divisor of R; shapes that differ.
    """
    if kind not in GROUP_ADVANTAGES:
        raise ValueError(f"kind must be one of {', '.join(GROUP_ADVANTAGES)}, got {kind!r}")
    _check_tokens(mask, token_rewards=token_rewards)
    if num_generations < 2 or len(mask) % num_generations:
        raise ValueError(f"num_generations must be >= 2 and divide the {len(mask)} rows, got {num_generations}")
    present = mask.bool().any(dim=1).view(-1, num_generations)
    returns = _within(mask, token_rewards.detach()).sum(dim=1).view_as(present)
    count = present.sum(dim=1, keepdim=True)
    centred = _within(present, returns - returns.sum(dim=1, keepdim=True) / count.clamp(min=1))
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        # n/(n - 1) (G - mean of all) is G - mean of the others.
        advantages = centred * count / others
    else:
        advantages = centred / ((centred.square().sum(dim=1, keepdim=True) / others).sqrt() + LEAST_STD)
    return _within(mask, advantages.view(-1, 1).expand_as(token_rewards))


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (arXiv:1506.02438) and the returns that the values are to learn; constants.

    With t' the token after t in the mask, and V and A beyond the last one 0:

        A_t = r_t + gamma V_t' - V_t + gamma lam A_t'        return_t = A_t + V_t

    Args:
        token_rewards: (R, T) as of `token_rewards`.
        values: (R, T) estimate before the token at t.
        mask: (R, T).
        gamma: discount of the future, in [0, 1].
        lam: in [0, 1]: 1 trusts what was returned, 0 the values.

    Returns:
        advantages (R, T), returns (R, T).

    Raises:
        ValueError: gamma or lam out of range; shapes that differ.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    _check_tokens(mask, token_rewards=token_rewards, values=values)
    kept, values = mask.bool(), _within(mask, values.detach())
    token_rewards = token_rewards.detach()
    advantages = torch.zeros_like(values)
    later_value = later = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        found = token_rewards[:, t] + gamma * later_value - values[:, t] + gamma * lam * later
        later = torch.where(kept[:, t], found, later)
        later_value = torch.where(kept[:, t], values[:, t], later_value)
        advantages[:, t] = torch.where(kept[:, t], found, 0)
    return advantages, advantages + values


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """(R, T) advantages shifted and scaled to mean 0 and standard deviation 1 over the tokens of the mask.

    Args:
        advantages: (R, T).
        mask: (R, T).

    Raises:
        ValueError: shapes that differ.
    """
    _check_tokens(mask, advantages=advantages)
    count = mask.bool().sum().clamp(min=1)
    centred = _within(mask, advantages - _within(mask, advantages).sum() / count)
    return centred * torch.rsqrt(centred.square().sum() / count + LEAST_VARIANCE)


def clipped_tokens(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> Tensor:
    """(R, T) bool: where the clip takes the gradient away; arguments as in `clipped_loss`.

    That is where the ratio has left [1 - epsilon, 1 + epsilon_high] on the side to which the advantage drives it.

    Raises:
        ValueError: as `clipped_loss`.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), got {epsilon!r}")
    if epsilon_high is not None and not epsilon_high > 0:
        raise ValueError(f"epsilon_high must be > 0 or None, got {epsilon_high!r}")
    _check_tokens(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    log_ratio = logps.detach() - old_logps
    high = (log_ratio > math.log1p(_high(epsilon, epsilon_high))) & (advantages > 0)
    low = (log_ratio < math.log1p(-epsilon)) & (advantages < 0)
    return mask.bool() & (high | low)


def clipped_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's loss of each token (arXiv:1707.06347, eq. 7), with ratio = exp(log pi - log pi_old) of that token:

        -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)

    No log-ratio makes it NaN: it is finite, or +inf where A < 0 and the ratio overflows.

    Args:
        logps: (R, T) log-prob of each token, differentiable.
        old_logps: (R, T) when the tokens were sampled.
        advantages: (R, T) A.
        mask: (R, T).
        epsilon: in (0, 1).
        epsilon_high: > 0; None: epsilon.

    Returns:
        losses (R, T), and the share () of the mask's tokens whose ratio is clipped.

    Raises:
        ValueError: epsilon or epsilon_high out of range; shapes that differ.
    """
    clipped = clipped_tokens(logps, old_logps, advantages, mask, epsilon, epsilon_high)
    advantages = advantages.detach()
    # exp() of a ratio that is not used could overflow, and its gradient be 0 * inf.
    used = mask.bool() & ~clipped & (advantages != 0)
    ratio = torch.where(used, logps - old_logps.detach(), 0).exp()
    bound = torch.full_like(ratio, 1 - epsilon).masked_fill(advantages > 0, 1 + _high(epsilon, epsilon_high))
    losses = _within(mask, -advantages * torch.where(clipped, bound, ratio))
    return losses, clipped.sum() / mask.bool().sum().clamp(min=1)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, epsilon: float | None) -> Tensor:
    """(R, T) squared error of the values, halved; clipped, the larger of that and of clip(V, V_old +- epsilon)'s.

    Args:
        values: (R, T), differentiable.
        old_values: (R, T) when the tokens were sampled.
        returns: (R, T) as of `gae`.
        mask: (R, T).
        epsilon: > 0, in units of the reward; None: no clipping.

    Raises:
        ValueError: epsilon out of range; shapes that differ.
    """
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon must be > 0 or None, got {epsilon!r}")
    _check_tokens(mask, values=values, old_values=old_values, returns=returns)
    old_values, returns = old_values.detach(), returns.detach()
    errors = (values - returns).square()
    if epsilon is not None:
        near = old_values + (values - old_values).clamp(-epsilon, epsilon)
        errors = torch.maximum(errors, (near - returns).square())
    return _within(mask, errors / 2)


def dual_beta_loss(log_s: Tensor, beta: float | Tensor, kl: Tensor, kl_target: float) -> Tensor:
    """(B,) -s * beta * (KL - KL_target) of each prompt: what trains s(x) where rewards do not.

    Its gradient reaches s alone: descent raises s(x), and so the penalty, of prompts whose KL is above the target, and
    lowers it below.

    Args:
        log_s: (B,) log s(x), differentiable.
        beta: the base value, or one of each prompt (B,): beta_eff(x) = beta * s(x).
        kl: (B,) KL of a prompt's completions in nats, summed over their tokens; or (B * n,) of n completions each,
            those of one prompt consecutive, of which the mean counts. k1 and k3 both estimate it.
        kl_target: in nats a completion, >= 0.

    Raises:
        ValueError: kl_target is negative or not finite; shapes that do not fit.
    """
    if not 0 <= kl_target < math.inf:
        raise ValueError(f"kl_target must be a finite number >= 0, got {kl_target!r}")
    if log_s.dim() != 1 or kl.dim() != 1 or len(log_s) == 0 or len(kl) % len(log_s):
        raise ValueError(f"kl must be (B,) or (B * n,) with log_s's B, got {tuple(kl.shape)} and {tuple(log_s.shape)}")
    excess = kl.detach().to(log_s).view(len(log_s), -1).mean(dim=1) - kl_target
    return -log_s.exp() * beta * excess


def _high(epsilon: float, epsilon_high: float | None) -> float:
    return epsilon if epsilon_high is None else epsilon_high


def _within(mask: Tensor, values: Tensor) -> Tensor:
    # By `where`, not by multiplication: nothing that is masked need be finite.
    return torch.where(mask.bool(), values, 0)


def _last(mask: Tensor) -> Tensor:
    """(R, T) bool: the last token of each row's mask."""
    later = mask.bool().flip(1).cumsum(dim=1).flip(1)
    return mask.bool() & (later == 1)


def _check_tokens(mask: Tensor, **tensors: Tensor) -> None:
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape (R, T), got {tuple(mask.shape)}")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} must have mask's shape {tuple(mask.shape)}, got {tuple(tensor.shape)}")


def _check_rows(mask: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(mask)},), got {tuple(tensor.shape)}")
