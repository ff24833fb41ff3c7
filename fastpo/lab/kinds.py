"""Kinds of context, each with its planted label reliability and difficulty: what the planted tasks have in common.

A pair is two responses whose true rewards are known. A rater mistakes the worse for the better with the probability
of the kind, and may look at lengths instead of rewards. Held-out pairs know both: which response is better, and
whether a rater said so.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple, TypeVar

Response = TypeVar("Response", bound=Sized)

FLIPS = (0.0, 0.15, 0.3, 0.45)
# What two responses of an easy and of a hard kind differ by, in deviations of one part's value.
EASY_GAP, HARD_GAP = (0.5, math.inf), (0.1, 0.5)


class Kind(NamedTuple):
    """A kind of context.

    Attributes:
        name: of the kind.
        flip: probability that a label is the wrong way round.
        hard: whether the responses of a pair are nearly as good as each other.
    """

    name: str
    flip: float
    hard: bool

    @property
    def reliability(self) -> float:
        """Probability of a right label, length bias aside."""
        return 1 - self.flip


def make_kinds(names: Sequence[str], flips: Sequence[float], rng: random.Random) -> list[Kind]:
    """Each name with a flip probability, easy or hard: all combinations, dealt out at random.

    Raises:
        ValueError: flips are not in [0, 0.5], or are more than half as many as the names.
    """
    if not flips or len(flips) > len(names) // 2 or not all(0 <= flip <= 0.5 for flip in flips):
        raise ValueError(f"flips must be 1 to {len(names) // 2} probabilities in [0, 0.5], got {flips!r}")
    dealt = itertools.cycle(itertools.product(flips, (False, True)))
    return [Kind(name, *next(dealt)) for name in rng.sample(names, len(names))]


def draw_pair(
    kind: Kind, draw: Callable[[], Response], reward: Callable[[Response], float]
) -> tuple[Response, Response]:
    """The better and the worse of two responses whose rewards differ by as much as the kind says."""
    low, high = HARD_GAP if kind.hard else EASY_GAP
    while True:
        first, second = draw(), draw()
        gap = reward(first) - reward(second)
        if low <= abs(gap) < high:
            return (first, second) if gap > 0 else (second, first)


def rater_agrees(kind: Kind, better: Sized, worse: Sized, length_bias: float, rng: random.Random) -> bool:
    """Whether a rater takes the better response.

    With probability length_bias a rater takes the longer one, if there is one, without a look at rewards; either way
    the label is then flipped with the kind's probability.
    """
    by_length = rng.random() < length_bias and len(better) != len(worse)
    right = len(better) > len(worse) if by_length else True
    return right != (rng.random() < kind.flip)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {size!r}")


def check_probability(name: str, value: Any) -> None:
    """Raise ValueError for a value that is no probability."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def as_flips(value: Any) -> tuple[float, ...]:
    """Flip probabilities, from a tuple or, as YAML writes it, a list.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"flips must be a list of probabilities, got {value!r}")
    for flip in value:
        check_probability("flips", flip)
    return tuple(value)
