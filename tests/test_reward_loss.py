"""`reward_model_loss` against MATH.md's rm semantics, and the Gaussian prior."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo import PreferenceConfig, gaussian_prior, reward_model_loss
from fastpo.stages import rm_stage

DISCO = {"add_disco_head": True, "pref_loss_type": "disco"}
CHOSEN, REJECTED = [1.2, -0.3, 0.0, 2.5, -4.0], [0.4, 0.9, 0.0, -1.0, 3.0]
VARIANCES = [0.5, 1.0, 0.2, 0.01, 2.0], [0.3, 0.7, 0.2, 0.02, 0.5]


def leaf(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def loss_of(fields: dict[str, Any], **kwargs: Any) -> Any:
    if fields.get("pref_loss_type") == "disco":
        kwargs = {"chosen_variance": leaf(VARIANCES[0]), "rejected_variance": leaf(VARIANCES[1])} | kwargs
    return reward_model_loss(leaf(CHOSEN), leaf(REJECTED), PreferenceConfig(**fields), **kwargs)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("margin", [None, [0.0, 0.5, 1.0, -0.2, 2.0]])
@pytest.mark.parametrize("name", ["sigmoid", "disco"])
def test_values(name: str, margin: list[float] | None, eps: float) -> None:
    """beta is not used: 0.7 is no default."""
    fields = {**(DISCO if name == "disco" else {}), "home_advantage": 0.3, "label_smoothing": eps, "beta": 0.7}
    out = loss_of(fields, margin=None if margin is None else torch.tensor(margin))
    want = []
    for i, (w, r) in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        # A margin of fp32 is rounded; what arrives is what counts.
        z = w - r - (0.3 if margin is None else torch.tensor(margin)[i].item())
        if name == "disco":
            z /= math.sqrt(VARIANCES[0][i] + VARIANCES[1][i])
        f = (lambda x: -math.log(phi(x))) if name == "disco" else (lambda x: softplus(-x))
        want.append((1 - eps) * f(z) + eps * f(-z))
    torch.testing.assert_close(out.losses, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert out.loss.item() == pytest.approx(sum(want) / 5, rel=1e-10)
    assert out.chosen_rewards.tolist() == CHOSEN and out.rejected_rewards.tolist() == REJECTED
    assert not out.chosen_rewards.requires_grad and not any(x.requires_grad for x in out.metrics.values())
    assert out.metrics["rewards/accuracies"] == pytest.approx(0.4)  # the tie is not one


@pytest.mark.parametrize("fields", [{}, DISCO, {"pref_loss_type": {"sigmoid": 0.5, "hinge": 2.0}}], ids=str)
def test_gradients(fields: dict[str, Any]) -> None:
    given = [leaf(x) for x in (CHOSEN, REJECTED, *VARIANCES)]

    def loss(w: Tensor, r: Tensor, var_w: Tensor, var_r: Tensor) -> Tensor:
        variances = {"chosen_variance": var_w, "rejected_variance": var_r} if fields == DISCO else {}
        return reward_model_loss(w, r, PreferenceConfig(**fields), **variances).losses

    assert torch.autograd.gradcheck(loss, given, rtol=1e-6, atol=1e-9)


def test_float32_stays_float32() -> None:
    out = reward_model_loss(
        leaf(CHOSEN, torch.float32), leaf(REJECTED, torch.float32), PreferenceConfig(), margin=torch.ones(5).double()
    )
    assert out.losses.dtype == out.loss.dtype == torch.float32


def test_a_margin_of_whole_numbers_is_a_margin() -> None:
    whole, real = (
        loss_of({}, margin=torch.tensor([1, 0, 2, 3, 1], dtype=dtype)).losses for dtype in (None, torch.float64)
    )
    assert torch.equal(whole, real)


def test_a_margin_carries_no_gradient() -> None:
    margin = torch.ones(5, requires_grad=True)
    loss_of({}, margin=margin).loss.backward()
    assert margin.grad is None


@pytest.mark.parametrize(
    ("word", "fields", "kwargs"),
    [
        ("length_normalization", {"length_normalization": True}, {}),
        ("contextual_scaling", {"contextual_scaling": "mallows"}, {}),
        ("beta_mode", {"add_beta_head": True, "beta_mode": "dynamic_scaling"}, {}),
        ("sft_weight", {"sft_weight": 0.1}, {}),
        ("margin_units", {"margin_units": "logratio"}, {}),
        *(("pref_loss_type", {"pref_loss_type": name}, {}) for name in ("ipo", "nca_pair", "aot", "orpo", "sft")),
        ("chosen_variance", {}, {"chosen_variance": torch.ones(5)}),
        ("rejected_variance", DISCO, {"rejected_variance": None}),
        ("rejected_variance", DISCO, {"rejected_variance": torch.ones(1)}),
        ("margin", {}, {"margin": torch.ones(1)}),
        ("margin", {}, {"margin": 0.5}),
    ],
    ids=str,
)
def test_bad_calls_name_the_argument(word: str, fields: dict[str, Any], kwargs: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        loss_of(fields, **kwargs)


@pytest.mark.parametrize(
    ("word", "means"),
    [
        ("chosen_mean", (torch.ones(2, 1), torch.ones(2, 1))),
        ("chosen_mean", (torch.ones(0), torch.ones(0))),
        ("chosen_mean", ([1.0], torch.ones(1))),
        ("rejected_mean", (torch.ones(2), torch.ones(1))),
        ("rejected_mean", (torch.ones(2), torch.ones(2).double())),
        ("rejected_mean", (torch.ones(2), torch.ones(2).long())),
    ],
)
def test_bad_means_are_named(word: str, means: tuple[Any, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        reward_model_loss(*means, PreferenceConfig())


def test_gaussian_prior_is_the_divergence_from_the_standard_normal() -> None:
    mean, variance = leaf([0.0, 0.5, -2.0]), leaf([1.0, 0.3, 4.0])
    standard = torch.distributions.Normal(torch.zeros(3).double(), torch.ones(3).double())
    want = torch.distributions.kl_divergence(torch.distributions.Normal(mean, variance.sqrt()), standard)
    torch.testing.assert_close(gaussian_prior(mean, variance), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("center", [None, 0.2])
@pytest.mark.parametrize("name", ["sigmoid", "disco"])
def test_the_stage_adds_prior_and_centring(name: str, center: float | None) -> None:
    fields = {**DISCO, "disco_prior_weight": 0.3} if name == "disco" else {}
    means, variances = [leaf(CHOSEN), leaf(REJECTED)], [leaf(x) for x in VARIANCES]
    given = dict(zip(("chosen_variance", "rejected_variance"), variances, strict=True)) if fields else {}
    margin = torch.full((5,), 0.1).double()
    config = PreferenceConfig(**fields)
    out = rm_stage(*means, config, margin=margin, center_rewards_coefficient=center, **given)
    plain = reward_model_loss(*means, config, margin=margin, **given)
    prior = sum(gaussian_prior(m, v).mean() for m, v in zip(means, variances, strict=True)) / 2
    want = plain.loss + (0.3 * prior if fields else 0) + (center or 0) * (means[0] + means[1]).square().mean()
    torch.testing.assert_close(out.loss, want)
    assert torch.equal(out.losses, plain.losses) and not any(x.requires_grad for x in out.metrics.values())
    leaves = [*means, *(variances if fields else [])]
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)
