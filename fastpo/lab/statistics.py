"""Means, paired differences and corrected p-values over a few seeds: pure functions of sequences of floats."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95
DIGITS = 12  # beyond which two differences of floats are the same number


class Interval(NamedTuple):
    """A mean and its t-interval.

    Attributes:
        mean: of the values.
        low, high: ends of the interval; None for fewer than two values.
        n: number of values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def holds_zero(self) -> bool:
        """Whether zero is inside, or nothing is known of where it is."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


class Difference(NamedTuple):
    """Paired differences of two methods.

    Attributes:
        interval: of their mean.
        p_t: of the two-sided paired t-test; None for one pair.
        p_wilcoxon: of Wilcoxon's two-sided signed-rank test; None for one pair.
    """

    interval: Interval
    p_t: float | None
    p_wilcoxon: float | None


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of independent values.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values must be finite numbers, at least one, got {list(values)!r}")
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, None, n)
    half = _quantile(n - 1) * _standard_error(values, mean)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(values: Sequence[float], against: Sequence[float]) -> Difference:
    """Mean of values[i] - against[i] with its interval and tests; none of these where all differ by the same.

    Raises:
        ValueError: the lengths differ, there are no pairs, or a value is not finite.
    """
    if len(values) != len(against):
        raise ValueError(f"values and against must be pairs, got {len(values)} and {len(against)}")
    differences = [round(a - b, DIGITS) for a, b in zip(values, against, strict=True)]
    interval = mean_interval(differences)
    if interval.n < 2:
        return Difference(interval, None, None)
    if len(set(differences)) == 1 and differences[0]:  # by chance, of a few: no spread to judge by
        return Difference(Interval(interval.mean, None, None, interval.n), None, None)
    return Difference(interval, _p_t(differences, interval.mean), _p_wilcoxon(differences))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p-values, in the order given; None stays None and does not count as a test.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[index] = largest
    return adjusted


@cache
def _quantile(freedom: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def _standard_error(values: Sequence[float], mean: float) -> float:
    n = len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _p_t(differences: Sequence[float], mean: float) -> float:
    if not any(differences):
        return 1.0
    return float(2 * stats.t.sf(abs(mean) / _standard_error(differences, mean), len(differences) - 1))


def _p_wilcoxon(differences: Sequence[float]) -> float:
    moved = [difference for difference in differences if difference]
    return float(stats.wilcoxon(moved).pvalue) if moved else 1.0
