"""PPO's formulas: against slow loops, against the exact objective of a two-token policy, at the edges."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from fastpo import linear_logps
from fastpo.architecture import add_value_head
from fastpo.backbone import Wanted, install_stats_forward, model_stats
from fastpo.policy_gradient import (
    clipped_loss,
    clipped_tokens,
    dual_beta_loss,
    gae,
    group_advantages,
    risk_adjusted,
    token_kl,
    token_rewards,
    value_loss,
    whitened,
)
from fastpo.stages import ppo_stage
from fastpo.types import LossOutput, StepTotals

EXACT = {"rtol": 1e-12, "atol": 1e-12}


# --- slow loops -------------------------------------------------------------------------------------------------------


class Drawn:
    """Tensors (R, T) in float64 that are NaN where the mask, with holes and empty rows, is 0."""

    def __init__(self, seed: int, groups: int, n: int, width: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.rng, self.n, self.rows, self.width = rng, n, groups * n, width
        self.mask = (torch.rand(self.rows, width, generator=rng) < 0.7).long()
        self.mask[torch.rand(self.rows, generator=rng) < 0.25] = 0

    def tensor(self, size: float = 1.0) -> Tensor:
        values = size * torch.randn(self.rows, self.width, generator=self.rng, dtype=torch.float64)
        return values.masked_fill(self.mask == 0, torch.nan)

    def row(self) -> Tensor:
        return torch.randn(self.rows, generator=self.rng, dtype=torch.float64)

    def tokens(self) -> list[list[int]]:
        """Positions of each row's tokens."""
        return [np.flatnonzero(row).tolist() for row in self.mask.numpy()]


DRAWN = st.builds(Drawn, st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 4), st.integers(1, 6))


def assert_equal(found: Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), want, **EXACT)


@drawn(40)
@given(case=DRAWN, per_row=st.booleans())
def test_token_kl_and_rewards(case: Drawn, per_row: bool) -> None:
    logps, ref_logps, rewards = case.tensor(2.0), case.tensor(2.0), case.row()
    beta = case.row().exp() if per_row else torch.tensor(0.3, dtype=torch.float64)
    for estimator in ("k1", "k3"):
        kl = token_kl(logps, ref_logps, case.mask, estimator)
        want_kl, want = np.zeros(kl.shape), np.zeros(kl.shape)
        for i, tokens in enumerate(case.tokens()):
            for t in tokens:
                ratio = math.exp(ref_logps[i, t] - logps[i, t])
                want_kl[i, t] = -math.log(ratio) if estimator == "k1" else ratio - 1 - math.log(ratio)
                want[i, t] = -float(beta[i] if per_row else beta) * want_kl[i, t]
            if tokens:
                want[i, tokens[-1]] += float(rewards[i])
        assert_equal(kl, want_kl)
        assert_equal(token_rewards(rewards, kl, beta, case.mask.bool()), want)


@drawn(60)
@given(case=DRAWN)
def test_group_advantages(case: Drawn) -> None:
    rewards = case.tensor()
    want = {kind: np.zeros(rewards.shape) for kind in ("rloo", "grpo")}
    tokens = case.tokens()
    for start in range(0, case.rows, case.n):
        present = [i for i in range(start, start + case.n) if tokens[i]]
        returns = {i: sum(float(rewards[i, t]) for t in tokens[i]) for i in present}
        for i in present:
            others = [returns[j] for j in present if j != i]
            if others:
                want["rloo"][i, tokens[i]] = returns[i] - np.mean(others)
                spread = np.std(list(returns.values()), ddof=1)
                want["grpo"][i, tokens[i]] = (returns[i] - np.mean(list(returns.values()))) / (spread + 1e-4)
    for kind, expected in want.items():
        assert_equal(group_advantages(rewards, case.mask, case.n, kind), expected)


@drawn(60)
@given(case=DRAWN, gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0]))
def test_gae(case: Drawn, gamma: float, lam: float) -> None:
    rewards, values = case.tensor(), case.tensor()
    want = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for i, tokens in enumerate(case.tokens()):
        v = [float(values[i, t]) for t in tokens] + [0.0]
        deltas = [float(rewards[i, t]) + gamma * v[k + 1] - v[k] for k, t in enumerate(tokens)]
        for k, t in enumerate(tokens):
            want[0][i, t] = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(tokens)))
            want[1][i, t] = want[0][i, t] + v[k]
    advantages, returns = gae(rewards, values.requires_grad_(), case.mask, gamma, lam)
    assert not advantages.requires_grad and not returns.requires_grad
    assert_equal(advantages, want[0])
    assert_equal(returns, want[1])


@drawn(60)
@given(case=DRAWN, high=st.sampled_from([None, 0.28, 3.0]))
def test_clipped_loss_and_its_gradient(case: Drawn, high: float | None) -> None:
    logps, old_logps, advantages = case.tensor(0.3), case.tensor(0.3), case.tensor()
    leaf = logps.clone().requires_grad_()
    losses, share = clipped_loss(leaf, old_logps, advantages, case.mask, 0.2, high)
    want, slope, clipped, count = np.zeros(losses.shape), np.zeros(losses.shape), 0, 0
    for i, tokens in enumerate(case.tokens()):
        for t in tokens:
            ratio, a = math.exp(logps[i, t] - old_logps[i, t]), float(advantages[i, t])
            bounded = min(max(ratio, 0.8), 1 + (0.2 if high is None else high))
            want[i, t] = -min(ratio * a, bounded * a)
            slope[i, t] = 0 if bounded * a < ratio * a else -ratio * a
            clipped, count = clipped + (bounded * a < ratio * a), count + 1
    assert_equal(losses, want)
    assert float(share) == pytest.approx(clipped / max(count, 1)) and not share.requires_grad
    losses.sum().backward()
    assert leaf.grad is not None
    assert_equal(leaf.grad, slope)


@drawn(40)
@given(case=DRAWN, epsilon=st.sampled_from([None, 0.2]))
def test_value_loss_and_whitened(case: Drawn, epsilon: float | None) -> None:
    values, old_values, returns = case.tensor(), case.tensor(), case.tensor()
    found = value_loss(values, old_values, returns, case.mask, epsilon)
    want, seen = np.zeros(found.shape), []
    for i, tokens in enumerate(case.tokens()):
        for t in tokens:
            v, old, goal = float(values[i, t]), float(old_values[i, t]), float(returns[i, t])
            near = v if epsilon is None else min(max(v, old - epsilon), old + epsilon)
            want[i, t] = 0.5 * max((v - goal) ** 2, (near - goal) ** 2)
            seen.append(v)
    assert_equal(found, want)
    found = whitened(values, case.mask)
    if len(seen) > 1:
        assert found[case.mask == 1].numpy() == pytest.approx((np.array(seen) - np.mean(seen)) / np.std(seen), rel=1e-5)
    assert not found[case.mask == 0].any() and found.isfinite().all()


def test_what_is_a_constant_gets_no_gradient() -> None:
    """Rewards, advantages and returns; old log-probs and values: gradients reach logps, values and log s alone."""
    x = {name: torch.rand(4, 3, requires_grad=True) for name in ("logps", "old", "kl", "advantages", "returns")}
    r, mask = torch.rand(4, requires_grad=True), torch.ones(4, 3)
    rewards = token_rewards(r, x["kl"], r, mask)
    assert not rewards.requires_grad
    for kind in ("rloo", "grpo"):
        assert not group_advantages(x["kl"], mask, 2, kind).requires_grad
    losses = clipped_loss(x["logps"], x["old"], x["advantages"], mask, 0.2)[0].sum()
    losses = losses + value_loss(x["logps"], x["old"], x["returns"], mask, 0.2).sum()
    losses.backward()
    assert {name for name, value in x.items() if value.grad is not None} == {"logps"}


def test_risk_adjusted() -> None:
    mean, variance = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.25])
    assert risk_adjusted(mean, variance, 0.5).tolist() == [0.0, 1.75]
    assert risk_adjusted(mean, torch.tensor([torch.inf, 1.0]), 0).tolist() == [1.0, 2.0]


# --- edges ------------------------------------------------------------------------------------------------------------

EXTREMES = [-math.inf, -1e30, -1e4, -89.0, -0.3, 0.0, 0.3, 89.0, 1e4, 1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_never_make_nan(dtype: torch.dtype) -> None:
    pairs = list(itertools.product(EXTREMES, [-2.0, -0.0, 0.0, 2.0]))
    difference, advantages = torch.tensor(pairs, dtype=dtype).T[:, None].unbind()
    logps = difference.clone().requires_grad_()
    losses, _ = clipped_loss(logps, torch.zeros_like(logps), advantages, torch.ones_like(logps), 0.2)
    losses.sum().backward()
    assert not losses.isnan().any() and not logps.grad.isnan().any() and losses.dtype == dtype
    overflows = (advantages < 0) & (difference.exp() == torch.inf)
    assert torch.equal(losses == torch.inf, overflows) and torch.equal(logps.grad.isfinite(), ~overflows)
    assert not (losses == -torch.inf).any()
    # The policy may give up a token altogether; the reference may never have had it.
    for estimator in ("k1", "k3"):
        for sign in (1, -1):
            kl = token_kl(sign * difference, torch.zeros_like(difference), torch.ones_like(difference), estimator)
            assert not kl.isnan().any()
            assert estimator == "k1" or (kl >= 0).all()


def test_beta_zero_forms_no_penalty() -> None:
    kl, mask = torch.tensor([[torch.inf, 1.0], [2.0, 1.0]]), torch.ones(2, 2)
    found = token_rewards(torch.tensor([3.0, 4.0]), kl, torch.tensor([0.0, 0.5]), mask)
    assert found.tolist() == [[0.0, 3.0], [-1.0, 3.5]]


def test_equal_returns_and_lone_completions_have_no_advantage() -> None:
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]])
    rewards = torch.tensor([[1.0, 1.0], [2.0, 0.0], [5.0, 5.0], [7.0, 7.0]])
    for kind in ("rloo", "grpo"):
        assert not group_advantages(rewards, mask, 2, kind).any()


def test_nothing_to_learn_from() -> None:
    logps, mask = torch.randn(4, 3, requires_grad=True), torch.zeros(4, 3)
    rewards = token_rewards(torch.ones(4), torch.ones(4, 3), torch.tensor(1.0), mask)
    advantages = group_advantages(rewards, mask, 2, "grpo")
    output = ppo_stage(
        logps, logps.detach(), advantages, mask, epsilon=0.2, beta=0.1, kl=torch.ones(4, 3), values=logps,
        old_values=logps.detach(), returns=gae(rewards, logps, mask, 1.0, 0.95)[1],
    )  # fmt: skip
    output.loss.backward()
    assert output.loss == 0 and not logps.grad.any() and not output.losses.any()
    assert all(value == 0 for name, value in output.metrics.items() if not name.startswith("beta"))


def test_a_nan_is_not_lost() -> None:
    logps, others = torch.tensor([[0.0, torch.nan]]), torch.zeros(1, 2)
    assert clipped_loss(logps, others, others + 1, torch.ones(1, 2), 0.2)[0].isnan().tolist() == [[False, True]]
    assert token_kl(logps, others, torch.ones(1, 2), "k3").isnan().tolist() == [[False, True]]


RT = torch.zeros(4, 3)
R = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_kl(RT, RT, RT, "k2"), "estimator must be one of k1, k3, got 'k2'"),
        (lambda: token_kl(RT, RT[:, 1:], RT, "k1"), r"ref_logps must have mask's shape \(4, 3\), got \(4, 2\)"),
        (lambda: token_kl(R, R, R, "k1"), r"mask must have shape \(R, T\), got \(4,\)"),
        (lambda: token_rewards(RT, RT, R, RT), r"rewards must have shape \(4,\), got \(4, 3\)"),
        (lambda: token_rewards(R, RT, R[:2], RT), r"beta must have shape \(\) or \(4,\), got \(2,\)"),
        (lambda: risk_adjusted(R, R, -0.5), "risk_aversion must be a finite number >= 0, got -0.5"),
        (lambda: risk_adjusted(R, R, math.nan), "risk_aversion must be a finite number >= 0, got nan"),
        (lambda: risk_adjusted(R, RT, 1.0), r"variance must have mean's shape \(4,\), got \(4, 3\)"),
        (lambda: group_advantages(RT, RT, 2, "ppo"), "kind must be one of rloo, grpo, got 'ppo'"),
        (lambda: group_advantages(RT, RT, 1, "rloo"), "num_generations must be >= 2 and divide the 4 rows, got 1"),
        (lambda: group_advantages(RT, RT, 3, "rloo"), "num_generations must be >= 2 and divide the 4 rows, got 3"),
        (lambda: gae(RT, RT, RT, 1.1, 1.0), r"gamma must be in \[0, 1\], got 1.1"),
        (lambda: gae(RT, RT, RT, 1.0, -1), r"lam must be in \[0, 1\], got -1"),
        (lambda: clipped_loss(RT, RT, RT, RT, 1.0), r"epsilon must be in \(0, 1\), got 1.0"),
        (lambda: clipped_loss(RT, RT, RT, RT, 0.2, 0.0), "epsilon_high must be > 0 or None, got 0.0"),
        (lambda: clipped_loss(RT, RT, R, RT, 0.2), r"advantages must have mask's shape"),
        (lambda: value_loss(RT, RT, RT, RT, 0.0), "epsilon must be > 0 or None, got 0.0"),
        (lambda: dual_beta_loss(R, 0.1, R, -1.0), "kl_target must be a finite number >= 0, got -1.0"),
        (lambda: dual_beta_loss(R, 0.1, torch.zeros(6), 1.0), r"kl must be \(B,\) or \(B \* n,\) .* got \(6,\)"),
        (lambda: stage(values=RT), "values must come with old_values and returns, got None"),
        (lambda: stage(kl_target=1.0, kl=RT), "kl_target must come with log_s and kl"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def stage(**arguments: Any) -> LossOutput:
    return ppo_stage(RT, RT, RT, RT + 1, epsilon=0.2, beta=0.1, **arguments)


# --- the dual loss and the stage --------------------------------------------------------------------------------------


def test_the_dual_loss_raises_s_where_the_kl_is_above_its_target() -> None:
    log_s = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    kl = torch.tensor([3.0, 5.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)  # of two completions each
    losses = dual_beta_loss(log_s, 0.2, kl, 2.0)
    assert losses.tolist() == pytest.approx([-math.exp(0.5) * 0.2 * 2.0, -math.exp(-0.5) * 0.2 * -1.5])
    losses.sum().backward()
    assert kl.grad is None and log_s.grad is not None
    assert log_s.grad.tolist() == pytest.approx(losses.tolist())  # d exp(l)/dl = exp(l)
    assert log_s.grad[0] < 0 < log_s.grad[1]


def ragged_step(seed: int = 0) -> dict[str, Any]:
    """Arguments of `ppo_stage`, 6 rows."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 0, 2, 4])[:, None]).long()
    names = ("logps", "old_logps", "advantages", "kl", "values", "old_values", "returns")
    found = {name: 0.5 * torch.randn(6, 5, generator=rng, dtype=torch.float64) for name in names}
    log_s = torch.randn(6, generator=rng, dtype=torch.float64)
    return {**found, "mask": mask, "log_s": log_s}


STEP = {"epsilon": 0.2, "beta": 0.1, "s_max": 4.0, "kl_target": 0.5, "vf_coef": 0.3, "vf_epsilon": 0.2}


def test_micro_batches_give_the_gradient_of_the_whole_step() -> None:
    whole = ragged_step()
    leaves = [whole[name].requires_grad_() for name in ("logps", "values", "log_s")]
    once = ppo_stage(**whole, **STEP)
    want = torch.autograd.grad(once.loss, leaves)
    totals = StepTotals(torch.tensor(6.0), whole["mask"].sum().double())
    parts = [
        ppo_stage(**{name: x[rows] for name, x in whole.items()}, **STEP, totals=totals)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), once.loss, **EXACT)
    for a, b in zip(torch.autograd.grad(sum(part.loss for part in parts), leaves), want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    torch.testing.assert_close(torch.cat([part.losses for part in parts]), once.losses, **EXACT)


def test_completions_left_out_of_the_loss_count_in_the_dual_loss() -> None:
    given = ragged_step()
    some = {**given, "mask": given["mask"] * torch.tensor([1, 0, 1, 1, 0, 1])[:, None]}
    log_s, found = given["log_s"].requires_grad_(), []
    for arguments in (given, some):
        found.append(torch.autograd.grad(ppo_stage(**arguments, **STEP).loss, log_s)[0])
    assert torch.equal(*found) and found[0].all()


def test_what_the_stage_reports() -> None:
    given = ragged_step(1)
    output, kept = ppo_stage(**given, **STEP), given["mask"].bool()
    inputs = [given[name] for name in ("logps", "old_logps", "advantages", "mask")]
    policy, share = clipped_loss(*inputs, 0.2)
    values = value_loss(given["values"], given["old_values"], given["returns"], given["mask"], 0.2)
    dual = dual_beta_loss(given["log_s"], 0.1, given["kl"].sum(1), 0.5)
    metrics = output.metrics
    want = {
        "policy_loss": policy[kept].mean(), "value_loss": values[kept].mean(), "dual_loss": dual.mean(),
        "kl": given["kl"][kept].mean(), "clip_ratio/region_mean": share,
        "beta/mean": (0.1 * given["log_s"].exp()).mean(), "log_s/mean": given["log_s"].mean(),
    }  # fmt: skip
    for name, value in want.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-12), name
    both = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
    assert 0 < metrics["clip_ratio/low_mean"] < both and both.item() == pytest.approx(share.item())
    mean = (policy[kept] + 0.3 * values[kept]).mean() + dual.mean()
    assert output.loss.item() == pytest.approx(mean.item(), rel=1e-12)
    per_row = (policy + 0.3 * values).sum(1) / given["mask"].sum(1).clamp(min=1)
    torch.testing.assert_close(output.losses, per_row, **EXACT)
    assert output.losses.shape == output.margins.shape == output.chosen_rewards.shape == (6,)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    plain = ppo_stage(*inputs, epsilon=0.2, beta=0.1)
    assert plain.loss.item() == pytest.approx(policy[kept].mean().item(), rel=1e-12)
    assert set(plain.metrics) == {
        "policy_loss", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "beta/mean", "beta/std", "beta/min", "beta/max",
    }  # fmt: skip


# --- a two-token language model, against finite differences -----------------------------------------------------------


def two_token_model(seed: int) -> Any:
    """GPT-2 in float64 with a vocabulary of two tokens, 290 parameters, and a value head."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8, "vocab_size": 2, "initializer_range": 0.5}
    config = GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).double()
    install_stats_forward(model)
    add_value_head(model, None)
    model.value_head.double()
    torch.nn.init.normal_(model.value_head.linear.weight)
    return model


def plain_logps(model: Any, ids: Tensor) -> np.ndarray:
    """(R, T) log-prob of each token from the model's own logits; 0 at the first."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits.numpy()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = np.take_along_axis(log_probs[:, :-1], ids[:, 1:, None].numpy(), axis=-1)[..., 0]
    return np.pad(found, ((0, 0), (1, 0)))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("kind", ["rloo", "grpo", "gae"])
def test_gradient_of_a_two_token_model_against_finite_differences(kind: str, estimator: str) -> None:
    """Autograd through model, head and stage, against central differences of the loss written out in numpy."""
    model, reference, old = two_token_model(0), two_token_model(1), two_token_model(0)
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 2, (6, 7), generator=rng)
    mask = ((torch.arange(7) >= 2) & (torch.arange(7) < torch.tensor([7, 6, 3, 7, 5, 4])[:, None])).long()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    with torch.no_grad():
        before, of_reference = (model_stats(x, batch, Wanted(tokens=True, values=True)) for x in (old, reference))
        for parameter in model.parameters():  # the policy has moved since, out of the clip's range
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    kl = token_kl(before.token_logps, of_reference.token_logps, mask, estimator)
    beta = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.2, 0.2], dtype=torch.float64)
    rewards = token_rewards(torch.randn(6, generator=rng, dtype=torch.float64), kl, beta, mask)
    given: dict[str, Any] = {"kl": kl, "kl_target": 0.4, "beta": 0.1, "epsilon": 0.1, "epsilon_high": 0.15}
    if kind == "gae":
        advantages, returns = gae(rewards, before.token_values, mask, 0.98, 0.9)
        given |= {"old_values": before.token_values, "returns": returns, "vf_coef": 0.7, "vf_epsilon": 0.1}
    else:
        advantages = group_advantages(rewards, mask, 3, kind)
    log_s = torch.randn(6, generator=rng, dtype=torch.float64).requires_grad_()

    now = model_stats(model, batch, Wanted(tokens=True, values=kind == "gae"))
    output = ppo_stage(
        now.token_logps, before.token_logps, advantages, mask, log_s=log_s, values=now.token_values, **given
    )  # fmt: skip
    parameters = {name: p for name, p in model.named_parameters() if kind == "gae" or "value_head" not in name}
    grads = torch.autograd.grad(output.loss, [*parameters.values(), log_s])
    clipped = clipped_tokens(now.token_logps, before.token_logps, advantages, mask, 0.1, 0.15)
    assert (clipped & (advantages > 0)).any() and (clipped & (advantages < 0)).any() and (~clipped & mask.bool()).any()

    old_logps, a, kept = plain_logps(old, ids), advantages.numpy(), mask.numpy() == 1

    def loss() -> float:
        ratio = np.exp(plain_logps(model, ids) - old_logps)
        tokens = -np.minimum(ratio * a, np.clip(ratio, 0.9, 1.15) * a)
        if kind == "gae":
            hidden = model.transformer(input_ids=ids).last_hidden_state.detach()
            head = model.value_head.linear
            v = np.pad((hidden @ head.weight[0] + head.bias).detach().numpy()[:, :-1], ((0, 0), (1, 0)))
            near = before.token_values.numpy() + np.clip(v - before.token_values.numpy(), -0.1, 0.1)
            goal = returns.numpy()
            tokens = tokens + 0.7 * 0.5 * np.maximum((v - goal) ** 2, (near - goal) ** 2)
        excess = (kl.numpy() * kept).sum(1) - 0.4
        return float(tokens[kept].mean() - (np.exp(log_s.detach().numpy()) * 0.1 * excess).mean())

    assert output.loss.item() == pytest.approx(loss(), rel=1e-12)
    # A clip's corner within the step of a difference would spoil it.
    h = 1e-5
    for (name, parameter), grad in zip([*parameters.items(), ("log_s", log_s)], grads, strict=True):
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            at = flat[i].item()
            sides = []
            for x in (at + h, at - h):
                flat[i] = x
                sides.append(loss())
            flat[i] = at
            want = (sides[0] - sides[1]) / (2 * h)
            assert grad.view(-1)[i].item() == pytest.approx(want, rel=1e-6, abs=1e-9), (name, i)


# --- a two-token policy, every outcome counted ------------------------------------------------------------------------

LENGTH = 2
COMPLETIONS = list(itertools.product((0, 1), repeat=LENGTH))  # y
NODES = {(): 0, (0,): 1, (1,): 2}
BETAS = (0.3, 0.6)  # of the two prompts: per-prompt KL
REWARDS = np.array([[1.0, -0.5, 0.3, 2.0], [0.2, 0.9, -1.0, 0.4]])  # of a prompt's completions


class Policy:
    """Logits of a state (prompt, tokens so far) are its embedding times a head, as in a language model."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(2, len(NODES), 3, generator=rng, dtype=torch.float64)
        self.head = torch.randn(2, 3, generator=rng, dtype=torch.float64)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.embedding, self.head]

    def logps(self, prompt: int, completions: list[tuple[int, ...]]) -> Tensor:
        """(R, LENGTH) by the fused head."""
        nodes = torch.tensor([[NODES[y[:t]] for t in range(LENGTH)] for y in completions])
        labels = torch.tensor(completions)
        return linear_logps(self.embedding[prompt][nodes], self.head, labels).logps

    def probabilities(self, prompt: int) -> np.ndarray:
        """(4,) of the completions, (4, LENGTH) of their tokens given those before, in numpy."""
        logits = np.exp(self.embedding[prompt].detach().numpy() @ self.head.detach().numpy().T)
        p = logits / logits.sum(-1, keepdims=True)
        return np.array([[p[NODES[y[:t]], y[t]] for t in range(LENGTH)] for y in COMPLETIONS])


def objective(policy: Policy, reference: Policy, prompts: list[int]) -> float:
    """Mean over the prompts of E[r] - beta(x) KL(pi || ref), exactly."""
    found = []
    for x in prompts:
        p, q = (model.probabilities(x).prod(axis=1) for model in (policy, reference))
        found.append((p * (REWARDS[x] - BETAS[x] * np.log(p / q))).sum())
    return float(np.mean(found))


def finite_differences(f: Callable[[], float], parameters: list[Tensor], h: float = 1e-5) -> np.ndarray:
    found = []
    for parameter in parameters:
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            at, sides = flat[i].item(), []
            for x in (at + h, at - h):
                flat[i] = x
                sides.append(f())
            flat[i] = at
            found.append((sides[0] - sides[1]) / (2 * h))
    return np.array(found)


def expected_gradient(policy: Policy, reference: Policy, prompts: list[int], n: int, kind: str, kl: str) -> np.ndarray:
    """Of the stage's loss on policy, over every batch of n completions of each prompt."""
    for parameter in policy.parameters:
        parameter.requires_grad_()
    table = {x: (policy.logps(x, COMPLETIONS), reference.logps(x, COMPLETIONS).detach()) for x in prompts}
    chances = {x: policy.probabilities(x).prod(axis=1) for x in prompts}
    value_of = torch.randn(2, len(NODES), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    beta = torch.tensor([BETAS[x] for x in prompts for _ in range(n)], dtype=torch.float64)
    mask, total, certainty = torch.ones(n * len(prompts), LENGTH), torch.zeros(()), 0.0
    groups = itertools.product(range(len(COMPLETIONS)), repeat=n)
    for batch in itertools.product(list(groups), repeat=len(prompts)):
        chance = math.prod(chances[x][y] for x, group in zip(prompts, batch, strict=True) for y in group)
        logps, ref_logps = (
            torch.cat([table[x][side][list(group)] for x, group in zip(prompts, batch, strict=True)]) for side in (0, 1)
        )
        scores = torch.tensor([REWARDS[x][y] for x, group in zip(prompts, batch, strict=True) for y in group])
        rewards = token_rewards(scores, token_kl(logps, ref_logps, mask, kl), beta, mask)
        if kind == "gae":
            values = torch.stack([
                torch.stack([value_of[x, NODES[COMPLETIONS[y][:t]]] for t in range(LENGTH)])
                for x, group in zip(prompts, batch, strict=True) for y in group
            ])  # fmt: skip
            advantages, _ = gae(rewards, values, mask, 1.0, 1.0)
        else:
            advantages = group_advantages(rewards, mask, n, kind)
        total = total + chance * ppo_stage(logps, logps.detach(), advantages, mask, epsilon=0.2, beta=0.1).loss
        certainty += chance
    assert certainty == pytest.approx(1.0)
    grads = torch.autograd.grad(total, policy.parameters)
    return torch.cat([grad.flatten() for grad in grads]).numpy()


@pytest.mark.parametrize(("kind", "n", "prompts"), [("rloo", 2, [0, 1]), ("rloo", 3, [1]), ("gae", 1, [0, 1])])
def test_the_expected_gradient_is_that_of_the_objective(kind: str, n: int, prompts: list[int]) -> None:
    """Of E[r] - beta(x) KL(pi || ref), divided by the tokens of a completion; no sampling, no tolerance for noise."""
    policy, reference = Policy(0), Policy(1)
    found = expected_gradient(policy, reference, prompts, n, kind, "k1")
    want = -finite_differences(lambda: objective(policy, reference, prompts), policy.parameters) / LENGTH
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-9)
    assert np.abs(want).max() > 0.05


@pytest.mark.parametrize(("kind", "kl"), [("grpo", "k1"), ("rloo", "k3")])
def test_the_standard_deviation_and_k3_do_not_give_it(kind: str, kl: str) -> None:
    policy, reference = Policy(0), Policy(1)
    found = expected_gradient(policy, reference, [0, 1], 2, kind, kl)
    want = -finite_differences(lambda: objective(policy, reference, [0, 1]), policy.parameters) / LENGTH
    cosine = found @ want / np.linalg.norm(found) / np.linalg.norm(want)
    assert cosine < 0.98 and np.linalg.norm(found - want) > 0.2 * np.linalg.norm(want)


def test_what_k3_pays_for_as_a_reward() -> None:
    """The gradient of KL(pi || ref) - KL(ref || pi) of a single token, as `token_kl` says."""
    theta, q = torch.tensor([0.4, -0.7, 0.1], dtype=torch.float64), np.array([0.5, 0.2, 0.3])

    def both() -> float:
        p = np.exp(theta.detach().numpy())
        p = p / p.sum()
        return float((p * np.log(p / q)).sum() - (q * np.log(q / p)).sum())

    want = finite_differences(both, [theta])
    logps = theta.requires_grad_().log_softmax(0)
    paid = token_kl(logps[:, None], torch.tensor(q).log()[:, None], torch.ones(3, 1), "k3")[:, 0].detach()
    (found,) = torch.autograd.grad((logps.exp().detach() * paid * logps).sum(), theta)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-7)
