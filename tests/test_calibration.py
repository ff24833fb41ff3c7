"""Calibration error and log-likelihood against a slow reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.calibration import expected_calibration_error, log_preference


def slow_ece(probabilities: list[float], bins: int) -> float:
    """Bin by bin, as the definition has it."""
    edges = [0.5 + 0.5 * i / bins for i in range(bins + 1)]
    total = 0.0
    for i in range(bins):
        confidences, right = [], []
        for p in probabilities:
            confidence = max(p, 1 - p)
            last = i == bins - 1
            if edges[i] <= confidence and (confidence < edges[i + 1] or last):
                confidences.append(confidence)
                right.append(1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0)
        if confidences:
            gap = abs(sum(right) / len(right) - sum(confidences) / len(confidences))
            total += len(right) / len(probabilities) * gap
    return total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 12))
def test_ece_is_the_slow_one(probabilities: list[float], bins: int) -> None:
    # Off the edges between bins, where rounding decides.
    probabilities = [p for p in probabilities if abs((max(p, 1 - p) - 0.5) * 2 * bins % 1) > 1e-9] or [0.5]
    found = expected_calibration_error(torch.tensor(probabilities, dtype=torch.float64), bins)
    assert found == pytest.approx(slow_ece(probabilities, bins), abs=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "ece"),
    [
        ([0.5, 0.5], 0.0),  # who tosses a coin is calibrated
        ([1.0, 1.0], 0.0),
        ([0.0], 1.0),  # sure, and wrong
        ([0.92, 0.92, 0.92, 0.08], 0.17),  # three of four, said to be 92 of 100
        ([5 / 6] * 5 + [1 / 6], 0.0),  # five of six, said to be so
        ([0.77, 0.23, 0.97, 0.97], 0.5 * 0.27 + 0.5 * 0.03),  # a gap a bin, which do not cancel
    ],
)
def test_ece_by_hand(probabilities: list[float], ece: float) -> None:
    assert expected_calibration_error(torch.tensor(probabilities)) == pytest.approx(ece, abs=1e-6)


def test_ece_does_not_average_over_batches() -> None:
    p = torch.tensor([5 / 6] * 5 + [1 / 6])
    assert expected_calibration_error(p) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(p[:5]) == pytest.approx(1 / 6, abs=1e-6)


def test_what_is_no_number_gives_none() -> None:
    assert math.isnan(expected_calibration_error(torch.tensor([0.3, math.nan])))


def test_log_preference_against_float64_formulas() -> None:
    d = torch.tensor([-3.0, -0.2, 0.0, 0.7, 40.0], dtype=torch.float64)
    variance = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    for i, x in enumerate(d.tolist()):
        assert log_preference(d)[i].item() == pytest.approx(-math.log1p(math.exp(-x)), rel=1e-12)
        phi = 0.5 * math.erfc(-x / math.sqrt(2 * variance[i].item()))
        assert log_preference(d, variance)[i].item() == pytest.approx(math.log(phi), rel=1e-9, abs=1e-300)


def test_bad_arguments_are_named() -> None:
    for bad in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"probability must have shape \(N,\)"):
            expected_calibration_error(bad)
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        expected_calibration_error(torch.ones(2), bins=0)
