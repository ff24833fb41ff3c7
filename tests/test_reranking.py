"""pi* over candidates: against the exact distribution of a small discrete case, and the one that maximises its aim."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rejection_sampling import FAILS, PASSES, p_value
from torch import Tensor

from fastpo.rejection_sampling import row_generator
from fastpo.reranking import divergence, draw, effective_sample_size, expected_reward, risk_adjusted, tilted_weights

REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
ANOTHER = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)


def exact(beta: float) -> Tensor:
    tilted = REFERENCE * (VALUES / beta).exp()
    return tilted / tilted.sum()


def of_outcomes(outcomes: list[int], weights: Tensor) -> Tensor:
    return torch.zeros(4, dtype=torch.float64).index_add_(0, torch.tensor(outcomes), weights)


@pytest.mark.parametrize("beta", [0.4, 1.0])
@pytest.mark.parametrize("policy", [REFERENCE, ANOTHER])
def test_weights_of_many_candidates_are_the_tilted_reference(beta: float, policy: Tensor) -> None:
    outcomes = random.Random(0).choices(range(4), policy.tolist(), k=40_000)
    rewards, log_ratios = VALUES[outcomes], (REFERENCE / policy).log()[outcomes]
    weights = tilted_weights(rewards, beta, log_ratios)
    torch.testing.assert_close(of_outcomes(outcomes, weights), exact(beta), rtol=0, atol=0.01)
    assert expected_reward(rewards, weights) == pytest.approx(float(exact(beta) @ VALUES), abs=0.02)
    if policy is REFERENCE:
        torch.testing.assert_close(tilted_weights(rewards, beta), weights)
        kl = float((exact(beta) * (exact(beta) / REFERENCE).log()).sum())
        assert divergence(weights) == pytest.approx(kl, abs=0.01)
    else:
        plain = of_outcomes(outcomes, tilted_weights(rewards, beta))
        assert float((plain - exact(beta)).abs().max()) > 0.1


def test_draws_follow_the_weights() -> None:
    weights = tilted_weights(VALUES, 0.5)
    seen = [draw(weights, row_generator(0, run)) for run in range(8_000)]
    assert p_value(seen, dict(enumerate(weights.tolist()))) > PASSES
    assert p_value(seen, dict(enumerate(tilted_weights(VALUES, 0.6).tolist()))) < FAILS


def test_nothing_is_better_by_its_own_aim() -> None:
    """pi* maximises E[r] - beta KL; the value there is beta log E_ref[exp(r / beta)]."""
    rewards, beta = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.3

    def aim(weights: Tensor) -> float:
        return expected_reward(rewards, weights) - beta * divergence(weights)

    best = aim(tilted_weights(rewards, beta))
    assert best == pytest.approx(beta * float((rewards / beta).exp().mean().log()), rel=1e-12)
    assert best > max(aim(tilted_weights(rewards, other)) for other in (0.29, 0.31))
    assert best > aim(torch.full((9,), 1 / 9, dtype=torch.float64))


@given(
    rewards=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20), beta=st.sampled_from([1e-3, 0.5, 1e4]),
    index=st.integers(0, 99),
)  # fmt: skip
def test_invariants(rewards: list[float], beta: float, index: int) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    weights = tilted_weights(values, beta)
    number = len(rewards)
    assert float(weights.sum()) == pytest.approx(1) and weights.dtype == torch.float64
    assert float(weights[values.argmax()]) == float(weights.max()) > 0
    assert -1e-9 <= divergence(weights) <= math.log(number) + 1e-9
    assert 1 - 1e-9 <= effective_sample_size(weights) <= number * (1 + 1e-9)
    assert min(rewards) - 1e-6 <= float(values.mean()) - 1e-6 <= expected_reward(values, weights) <= max(rewards) + 1e-6
    assert float(weights[draw(weights, row_generator(0, index))]) > 0


def test_the_ends_of_beta() -> None:
    for rewards in ([1e8, 1e8 + 1, -1e300], [5e299, 1e300, -1e308]):
        assert tilted_weights(torch.tensor(rewards, dtype=torch.float64), 1e-12).tolist() == [0.0, 1.0, 0.0]
    alike = tilted_weights(torch.full((5,), 3.0), 1e-3)
    assert alike.tolist() == pytest.approx([0.2] * 5)
    assert divergence(alike) == pytest.approx(0, abs=1e-12) and effective_sample_size(alike) == pytest.approx(5)
    one = tilted_weights(torch.tensor([7.0]), 0.5)
    assert (one.tolist(), divergence(one), effective_sample_size(one)) == ([1.0], 0.0, 1.0)


def test_weights_that_are_nothing_are_never_drawn() -> None:
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    assert Counter(draw(weights, row_generator(0, run)) for run in range(500)).keys() == {1, 3}


def test_risk_adjusted() -> None:
    found = risk_adjusted(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]), 0.5)
    assert found.tolist() == [0.75, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2), 0.5), r"rewards must have shape \(N,\) with N >= 1, got \(2, 2\)"),
        ((torch.ones(0), 0.5), r"rewards must have shape \(N,\) with N >= 1, got \(0,\)"),
        ((torch.tensor([1.0, math.nan]), 0.5), "rewards must be finite floating-point numbers"),
        ((torch.tensor([1, 2]), 0.5), "rewards must be finite floating-point numbers"),
        ((torch.ones(2), 0.0), "beta must be a finite number > 0, got 0.0"),
        ((torch.ones(2), 0.5, torch.zeros(3)), r"log_ratios must have shape \(2,\), got \(3,\)"),
        ((torch.ones(2), 0.5, torch.tensor([0.0, -math.inf])), "log_ratios must be finite"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tilted_weights(*arguments)
