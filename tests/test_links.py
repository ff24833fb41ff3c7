"""Losses at their extremes: |z| up to 1e4 and beyond, in value and in slope, against the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from preference_oracle import (
    DIVERGENCES,
    LINK_SLOPES,
    LINKS,
    PER_TOKEN,
    RESPONSE_LOSSES,
    Array,
    Objective,
    log_odds,
    log_phi,
    mills,
    sigmoid,
    smoothed,
    softplus,
)
from test_losses import HEAD, loss_at, stats

from fastpo import PreferenceConfig, preference_loss
from fastpo.links import log_ndtr

SCALES = np.array([0.5, 5.0, 30.0, 100.0, 1e3, 1e4])
LADDER = np.concatenate([-SCALES[::-1], [0.0], SCALES])
DTYPES = [torch.float64, torch.float32]
# What each response loss is in its two log-ratios, at b = 1: derivative in the chosen one, in the rejected one
RESPONSE_SLOPES = {
    "nca_pair": lambda c, r: (-sigmoid(-c) + sigmoid(c) / 2, sigmoid(r) / 2),
    "bco_pair": lambda c, r: (-sigmoid(-c), sigmoid(r)),
    "sppo_hard": lambda c, r: (2 * (c - 0.5), 2 * (r + 0.5)),
    "apo_zero": lambda c, r: (-sigmoid(c) * sigmoid(-c), sigmoid(r) * sigmoid(-r)),
    "apo_down": lambda c, r: (
        sigmoid(c) * sigmoid(-c) - sigmoid(c - r) * sigmoid(r - c),
        sigmoid(c - r) * sigmoid(r - c),
    ),
}


# sigmoid(z) rounds to 1 and its slope to 0: what is left of these is right to one rounding of 1, not to its digits.
SATURATING = ("exo_pair", "discopop", "apo_zero", "apo_down")


def assert_exact(got: Any, want: Array, dtype: torch.dtype, loss: str = "") -> None:
    """To the dtype's precision, infinities included."""
    got, info = got.detach().numpy(), torch.finfo(dtype)
    rtol, atol = 1e-10 if dtype == torch.float64 else 1e-5, info.eps * 32 if loss in SATURATING else info.tiny
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_allclose(got, want.astype(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("link", [link for link in LINKS if link != "disco"])
def test_links_are_exact_up_to_z_of_1e4(link: str, eps: float, dtype: torch.dtype) -> None:
    fields = {"pref_loss_type": link, "beta": 1.0, "label_smoothing": eps or 1e-3 * (link == "exo_pair")}
    ladder = LADDER / 5 if link in PER_TOKEN else LADDER  # responses have five tokens
    out, chosen_grad, rejected_grad = loss_at(LADDER, dtype, **fields)
    objective = Objective(**fields)
    value = smoothed(LINKS, link, ladder, np.ones(13), objective, mirror=1.0)
    slope = smoothed(LINK_SLOPES, link, ladder, np.ones(13), objective, mirror=-1.0)
    slope = slope / 5 if link in PER_TOKEN else slope
    gradients = torch.tensor(chosen_grad), torch.tensor(rejected_grad)
    for got, want in [(out.losses, value), (gradients[0], slope), (gradients[1], -slope)]:
        assert link == "exponential" or got.isfinite().all()
        assert_exact(got, want, dtype, link)


@pytest.mark.parametrize("tau", [0.01, 0.05, 2.0])
def test_discopop_is_never_no_number(tau: float) -> None:
    fields = {"pref_loss_type": "discopop", "beta": 1.0, "discopop_tau": tau}
    out, chosen_grad, _ = loss_at(LADDER, **fields)
    assert (out.losses[0].item() == math.inf) is (tau > 1)
    finite = out.losses.isfinite()  # a gradient is a number where its loss is finite
    for got, table in ((out.losses, LINKS), (torch.tensor(chosen_grad)[finite], LINK_SLOPES)):
        want = smoothed(table, "discopop", LADDER, np.ones(13), Objective(**fields), mirror=1.0)
        assert_exact(got, want[-len(got) :], torch.float64, "discopop")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", [1.0, 0.25, 1e-6, 0.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_disco_is_exact_down_to_the_smallest_variance(variance: float, eps: float, dtype: torch.dtype) -> None:
    """The floor is 1e-6: z of 1e4 is then zeta of 1e7."""
    chosen, rejected = stats(np.minimum(LADDER, 0), dtype=dtype), stats(-np.maximum(LADDER, 0), dtype=dtype)
    spread = [torch.full((13,), share * variance, dtype=dtype, requires_grad=True) for share in (0.25, 0.75)]
    config = PreferenceConfig(
        **HEAD, pref_loss_type="disco", beta=1.0, reference_free=True, label_smoothing=eps, variance_floor=1e-6
    )
    out = preference_loss(chosen, rejected, config, chosen_variance=spread[0], rejected_variance=spread[1])
    total = max(variance, 1e-6)
    zeta, objective, one = LADDER / math.sqrt(total), Objective(label_smoothing=eps), np.ones(13)
    value = smoothed(LINKS, "disco", zeta, one, objective, mirror=1.0)
    slope = smoothed(LINK_SLOPES, "disco", zeta, one, objective, mirror=-1.0)
    out.losses.sum().backward()
    by_variance = slope * -zeta / (2 * total) * (variance > 0)
    assert_exact(out.losses, value, dtype)
    assert_exact(chosen.logps.grad, slope / math.sqrt(total), dtype)
    assert_exact(rejected.logps.grad, -slope / math.sqrt(total), dtype)
    if variance != 1e-6:  # at the floor itself either side's derivative will do
        assert_exact(spread[0].grad, by_variance, dtype)
        assert_exact(spread[1].grad, by_variance, dtype)
    assert out.losses.isfinite().all() and all(x.grad.isfinite().all() for x in (*spread, chosen.logps))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_log_ndtr_has_the_mills_ratio_for_a_gradient(dtype: torch.dtype) -> None:
    """Laplace: density/Phi at -t is t + 1/t - 2/t^3 + ...; torch's own backward is 4 % off at -1000."""
    points = np.array([-1e4, -1000.0, -64.0, -8.0, -3.0, -0.5, 0.0, 0.5, 3.0, 8.0, 64.0, 1e4])
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    y = log_ndtr(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    rtol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    at = x.detach().double().numpy()
    with np.errstate(under="ignore"):
        np.testing.assert_allclose(y.detach().double(), log_phi(at), rtol=rtol * 10, atol=torch.finfo(dtype).tiny)
        np.testing.assert_allclose(x.grad.double(), mills(at), rtol=rtol, atol=torch.finfo(dtype).tiny)
    if dtype == torch.float64:
        assert x.grad[:2].tolist() == pytest.approx([1e4 + 1e-4, 1e3 + 1e-3 - 2e-9], rel=1e-13)


def responses_at(c: Any, r: Any, dtype: Any = torch.float64, **fields: Any) -> tuple[Any, Array, Array]:
    """Loss of pairs with log-ratios c and r at b = 1; its gradients in them."""
    sides = []
    for ratio in (c, r):
        sides.append(stats(np.minimum(ratio, 0), dtype=dtype))
        sides.append(stats(-np.maximum(ratio, 0), dtype=dtype))
    config = PreferenceConfig(**{"beta": 1.0, **fields})
    out = preference_loss(sides[0], sides[2], config, ref_chosen=sides[1], ref_rejected=sides[3])
    out.losses.sum().backward()
    return out.losses, sides[0].logps.grad, sides[2].logps.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", RESPONSE_LOSSES)
def test_response_losses_are_exact_up_to_1e4(loss: str, dtype: torch.dtype) -> None:
    c, r = (x.ravel() for x in np.meshgrid(LADDER, LADDER))
    losses, by_chosen, by_rejected = responses_at(c, r, dtype, pref_loss_type=loss)
    assert losses.isfinite().all()
    assert_exact(losses, RESPONSE_LOSSES[loss](c, r, np.ones(c.size)), dtype, loss)
    for got, want in zip((by_chosen, by_rejected), RESPONSE_SLOPES[loss](c, r), strict=True):
        assert_exact(got, want + 0 * c, dtype, loss)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_sorted_losses_are_exact_up_to_1e4(loss: str, eps: float) -> None:
    # In falling order, so that the sort turns both sides round: pair i meets the gradient of rank 12 - i.
    losses, by_chosen, by_rejected = responses_at(
        LADDER[::-1].copy(), np.zeros(13), pref_loss_type=loss, label_smoothing=eps
    )
    slope = -(1 - eps) * sigmoid(-LADDER) + eps * sigmoid(LADDER)
    # Above 0 it is the reference that moves: aot sorts it apart from the policy.
    policy, reference = np.sort(np.minimum(LADDER, 0)), np.sort(-np.maximum(LADDER, 0))
    delta = LADDER if loss == "aot_unpaired" else policy - reference
    assert_exact(losses, (1 - eps) * softplus(-delta) + eps * softplus(delta), torch.float64)
    if loss == "aot_unpaired":
        assert_exact(by_chosen, slope[::-1], torch.float64)
        assert by_rejected.sum().item() == pytest.approx(-slope.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orpo_is_exact_from_certain_to_hopeless(dtype: torch.dtype) -> None:
    """d log-odds / d mean = 1/(1 - p)."""
    certain = [1e-12, 1e-6, 1e-4] if dtype == torch.float64 else [1e-6, 1e-4]
    means = -np.array([*certain, 1e-2, 0.5, math.log(2), 0.9, 1.1, 5.0, 30.0, 100.0, 1e3, 1e4])
    w, r = (x.ravel() for x in np.meshgrid(means, means))
    chosen, rejected = stats(5 * w, dtype=dtype), stats(5 * r, dtype=dtype)
    out = preference_loss(chosen, rejected, PreferenceConfig(pref_loss_type="orpo", beta=0.3))
    out.losses.sum().backward()
    z = log_odds(w) - log_odds(r)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    for got, want in [
        (out.losses, -w + 0.3 * softplus(-z)),
        (chosen.logps.grad, (-1 + 0.3 * sigmoid(-z) / np.expm1(w)) / 5),
        (rejected.logps.grad, -0.3 * sigmoid(-z) / np.expm1(r) / 5),
    ]:
        assert got.isfinite().all()
        np.testing.assert_allclose(got.detach(), want, rtol=rtol, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("link", [link for link in LINKS if link != "disco"])
def test_divergences_give_no_nan_at_1e4(link: str, divergence: str, dtype: torch.dtype) -> None:
    """Where e^-h overflows a score is as good as infinite, but two such scores still compare.

    A gradient is a number where its loss is finite.
    """
    c, r = (x.ravel() for x in np.meshgrid(LADDER, LADDER))
    fields = {"pref_loss_type": link, "f_divergence_type": divergence}
    fields |= {"label_smoothing": 0.1} if link == "exo_pair" else {}
    losses, by_chosen, by_rejected = responses_at(c, r, dtype, **fields)
    broken = losses.isnan() | losses.isfinite() & (by_chosen + by_rejected).isnan()
    assert not broken.any(), list(zip(c[broken].tolist(), r[broken].tolist(), strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_exact_where_they_are_finite(divergence: str) -> None:
    c, r = (x.ravel() for x in np.meshgrid(LADDER[2:-2], LADDER[2:-2]))  # up to 100, at b = 1e-2
    losses, by_chosen, _ = responses_at(c, r, f_divergence_type=divergence, beta=1e-2)
    g, alpha = DIVERGENCES[divergence], 0.5
    slopes = {"reverse_kl": lambda h: 1 + 0 * h, "forward_kl": lambda h: np.exp(-h), "js": lambda h: sigmoid(-h)}
    slopes |= {"js_divergence": slopes["js"], "alpha": lambda h: np.exp((alpha - 1) * h)}
    slopes |= {"alpha_divergence": slopes["alpha"]}
    z = 1e-2 * (g(c, alpha) - g(r, alpha))
    np.testing.assert_allclose(losses.detach(), softplus(-z), rtol=1e-10, atol=1e-300)
    # expm1's slope is e^x - 1 + 1
    np.testing.assert_allclose(by_chosen, -1e-2 * sigmoid(-z) * slopes[divergence](c), rtol=1e-9, atol=1e-14)
