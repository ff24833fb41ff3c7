"""Staged beta and running means: closed forms at, between, before and after the points; bad schedules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastpo import PreferenceConfig
from fastpo.schedules import INTERPOLATIONS, check_beta_schedule, running_mean, scheduled_beta

POINTS = [[0.1, 0.5], [0.3, 0.1], [0.8, 0.9]]
KINDS = ("step", "linear", "cosine")


def schedule(kind: str, points: Any = POINTS) -> dict[str, Any]:
    return {"points": points, "interpolation": kind}


def eased(start: float, end: float, t: float) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * t)) / 2


# Fraction of training -> beta of step, linear, cosine
BETAS: dict[float, tuple[float, float, float]] = {
    0.0: (0.5, 0.5, 0.5),
    0.1: (0.5, 0.5, 0.5),
    0.15: (0.5, 0.4, eased(0.5, 0.1, 0.25)),
    0.2: (0.5, 0.3, 0.3),
    0.29: (0.5, 0.12, eased(0.5, 0.1, 0.95)),
    0.3: (0.1, 0.1, 0.1),
    0.4: (0.1, 0.26, eased(0.1, 0.9, 0.2)),
    0.55: (0.1, 0.5, 0.5),
    0.8: (0.9, 0.9, 0.9),
    1.0: (0.9, 0.9, 0.9),
}


def test_every_interpolation_has_its_column() -> None:
    assert tuple(INTERPOLATIONS) == KINDS


@pytest.mark.parametrize("fraction", BETAS)
def test_beta_at_between_before_and_after_the_points(fraction: float) -> None:
    for kind, want in zip(KINDS, BETAS[fraction], strict=True):
        beta = scheduled_beta(schedule(kind), fraction)
        assert isinstance(beta, float) and beta == pytest.approx(want, rel=1e-12), kind


def test_linear_is_numpys_interpolation() -> None:
    fractions = np.linspace(0, 1, 201)
    got = [scheduled_beta(schedule("linear"), fraction) for fraction in fractions]
    np.testing.assert_allclose(got, np.interp(fractions, *np.transpose(POINTS)), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_is_approached_from_the_left(kind: str) -> None:
    before = scheduled_beta(schedule(kind), math.nextafter(0.3, 0))
    assert before == pytest.approx(0.5 if kind == "step" else 0.1, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_point_holds_throughout(kind: str) -> None:
    assert [scheduled_beta(schedule(kind, ((0.4, 2),)), fraction) for fraction in (0.0, 0.4, 1.0)] == [2.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_training_may_be_points(kind: str) -> None:
    whole = schedule(kind, [[0, 1], [1, 3]])
    check_beta_schedule(whole)
    assert [scheduled_beta(whole, fraction) for fraction in (0, 0.5, 1)] == [1, 1 if kind == "step" else 2, 3]


@pytest.mark.parametrize(
    ("mentions", "bad"),
    [
        ("points", {}),
        ("points", {"interpolation": "linear"}),
        ("steps", schedule("linear") | {"steps": 3}),
        ("interpolation quadratic cosine", schedule("quadratic")),
        ("interpolation None", schedule(None)),
        *(
            (f"points {points!r}", schedule("linear", points))
            for points in (
                [], None, 0.1, "ab", [0.1, 0.5], [[0.1]], [[0.1, 0.2, 0.3]], {0.1: 0.5}, [["0", "1"]],
                [[0.5, 0.1], [0.2, 0.3]], [[0.5, 0.1], [0.5, 0.3]], [[-0.1, 0.1]], [[0.5, 0.1], [1.1, 0.3]],
                [[0.0, 0.0]], [[0.0, -0.1]], [[0.0, math.inf]], [[0.0, math.nan]], [[math.nan, 0.1]], [[False, True]],
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_schedule_is_refused(mentions: str, bad: dict[str, Any]) -> None:
    for check in (check_beta_schedule, lambda bad: PreferenceConfig(beta_schedule=bad)):
        with pytest.raises(ValueError, match="beta_schedule") as error:
            check(bad)
        assert all(word in str(error.value) for word in mentions.split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_schedule_is_a_config(kind: str) -> None:
    assert PreferenceConfig(beta_schedule=schedule(kind)).beta_schedule == schedule(kind)


def test_running_mean_starts_at_the_first_batch_and_includes_the_last() -> None:
    state: dict[str, Any] = {"other": torch.tensor(7.0)}
    values = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0, 10.0)]
    got = [running_mean(state, "a", value) for value in values]
    second = 0.99 * 3 - 0.01
    assert [mean.item() for mean in got] == pytest.approx([3, second, 0.99 * second + 0.1], rel=1e-14)
    assert not any(mean.requires_grad for mean in (*got, *state.values()))
    assert state["a"].item() == got[-1].item() and state["other"].item() == 7
    assert running_mean(state, "other", torch.tensor(1.0), decay=0.5).item() == 4


def test_running_mean_without_state_is_the_value_detached() -> None:
    value = torch.tensor(2.5, requires_grad=True)
    mean = running_mean(None, "a", value)
    assert mean.item() == 2.5 and not mean.requires_grad


def test_a_restored_state_may_have_another_dtype() -> None:
    mean = running_mean({"a": torch.tensor(1.0)}, "a", torch.tensor(2.0, dtype=torch.float64))
    assert mean.dtype == torch.float64 and mean.item() == pytest.approx(1.01, rel=1e-14)
