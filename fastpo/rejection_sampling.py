"""Statistical rejection sampling (RSO, arXiv:2309.06657): candidates of one prompt to some of them, and to pairs."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Accepted(NamedTuple):
    """Candidates by position, in the order in which they were accepted, and how many trials that took."""

    positions: list[int]
    trials: int


def row_generator(seed: int, index: int) -> random.Random:
    """Random numbers of one prompt, which depend on no other."""
    return random.Random(f"{seed}/{index}")


def accept(rewards: Sequence[float], beta: float, num_samples: int, generator: random.Random) -> Accepted:
    """Candidates of one prompt, accepted without replacement, num_samples of them or as many as there are.

    A trial draws one of the remaining candidates, each as likely, and accepts it with probability
    exp((r - r_max) / beta), r_max the largest of their rewards (arXiv:2309.06657). So the next one accepted has the
    distribution softmax(r / beta) over those that remain, and the order is Plackett-Luce with the weights
    exp(r / beta). For candidates drawn from pi_ref the first one comes, as they grow many, from
    pi_ref exp(r / beta) / Z. To try candidates in the order of the file instead would favour the earlier ones.

    The best that remains is always accepted when it is drawn: a trial succeeds with probability 1/N or more, however
    small beta is.

    Args:
        rewards: of N candidates. Equal candidates stand there as often as they were drawn.
        beta: in units of reward; of this prompt.
        num_samples: how many to accept.
        generator: see `row_generator`.

    Raises:
        ValueError: beta is not > 0, num_samples not >= 1, a reward not finite, or beta or a reward no number.
    """
    check_beta(beta)
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples!r}")
    for reward in rewards:
        if not math.isfinite(reward):
            raise ValueError(f"rewards must be finite, got {reward!r}")
    remaining, accepted, trials = list(range(len(rewards))), list[int](), 0
    while remaining and len(accepted) < num_samples:
        best = max(rewards[position] for position in remaining)
        while True:
            trials += 1
            drawn = int(generator.random() * len(remaining))
            if generator.random() < math.exp((rewards[remaining[drawn]] - best) / beta):
                break
        accepted.append(remaining.pop(drawn))
    return Accepted(accepted, trials)


def is_beta(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf


def check_beta(value: Any) -> None:
    """Raise ValueError for what is no beta."""
    if not is_beta(value):
        raise ValueError(f"beta must be a finite number > 0, got {value!r}")


class RankedPair(NamedTuple):
    """Positions of the candidate with the higher and the one with the lower reward."""

    chosen: int
    rejected: int


def first_round(
    accepted: Sequence[int], rewards: Sequence[float], responses: Sequence[Any], generator: random.Random
) -> list[RankedPair]:
    """K accepted candidates paired at random: K/2 pairs, less those of equal rewards or equal responses.

    Args:
        accepted: K positions.
        rewards, responses: of all N candidates.
        generator: see `row_generator`.
    """
    order = _shuffled(accepted, generator)
    met = (_ranked(a, b, rewards, responses) for a, b in zip(order[::2], order[1::2], strict=False))
    return [pair for pair in met if pair is not None]


def tournament(
    accepted: Sequence[int], rewards: Sequence[float], responses: Sequence[Any], generator: random.Random
) -> list[RankedPair]:
    """Of candidates paired at random the better ones meet again, until one is left: K - 1 pairs, less the equal ones.

    Where their number is odd one goes on by itself. Arguments as in `first_round`.
    """
    order, pairs = _shuffled(accepted, generator), list[RankedPair]()
    while len(order) > 1:
        winners = order[len(order) // 2 * 2 :]
        for a, b in zip(order[::2], order[1::2], strict=False):
            winners.append(a if rewards[a] >= rewards[b] else b)
            pair = _ranked(a, b, rewards, responses)
            if pair is not None:
                pairs.append(pair)
        order = winners
    return pairs


RANKINGS: dict[
    str, Callable[[Sequence[int], Sequence[float], Sequence[Any], random.Random], list[RankedPair]]
] = {"first_round": first_round, "tournament": tournament}  # fmt: skip


def _ranked(a: int, b: int, rewards: Sequence[float], responses: Sequence[Any]) -> RankedPair | None:
    if rewards[a] == rewards[b] or responses[a] == responses[b]:
        return None
    return RankedPair(a, b) if rewards[a] > rewards[b] else RankedPair(b, a)


def _shuffled(positions: Sequence[int], generator: random.Random) -> list[int]:
    # By random() alone, whose numbers every version of Python repeats.
    return sorted(positions, key=lambda _: generator.random())
