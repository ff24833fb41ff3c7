"""Values over the course of training: staged beta, running means. A leaf: torch only.

To add an interpolation: write the function from (start, end, t in [0, 1]) to the value, add its line to
`INTERPOLATIONS`, add its row to the tests.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

INTERPOLATIONS: dict[str, Callable[[float, float, float], float]] = {
    "step": lambda start, end, t: start,
    "linear": lambda start, end, t: start + (end - start) * t,
    "cosine": lambda start, end, t: end + (start - end) * (1 + math.cos(math.pi * t)) / 2,
}

# What the regularisers and batch beta remember from batch to batch: running means by name, () tensors.
RunningMeans = dict[str, Tensor]


def scheduled_beta(schedule: dict[str, Any], fraction: float) -> float:
    """beta after this fraction of training.

    Args:
        schedule: {"points": [[fraction, beta], ...], "interpolation": one of `INTERPOLATIONS`}; before the first
            point its beta holds, after the last one that of the last.
        fraction: of training, in [0, 1].
    """
    points = schedule["points"]
    after = bisect_right([at for at, _ in points], fraction)
    if after in (0, len(points)):
        return float(points[max(after - 1, 0)][1])
    (left, start), (right, end) = points[after - 1 : after + 1]
    interpolate = INTERPOLATIONS[schedule.get("interpolation", "linear")]
    return float(interpolate(start, end, (fraction - left) / (right - left)))


def check_beta_schedule(schedule: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: an unknown key or interpolation, or points that are not rising fractions with betas > 0.
    """
    unknown = [key for key in schedule if key not in ("points", "interpolation")]
    if unknown or "points" not in schedule:
        raise ValueError(f"beta_schedule must have points, and may have interpolation, got {schedule!r}")
    kind = schedule.get("interpolation", "linear")
    if kind not in list(INTERPOLATIONS):
        raise ValueError(f"beta_schedule's interpolation must be one of {', '.join(INTERPOLATIONS)}, got {kind!r}")
    points = schedule["points"]
    pairs = isinstance(points, list | tuple) and points and all(_is_point(point) for point in points)
    fractions = [at for at, _ in points] if pairs else []
    if not pairs or any(a >= b for a, b in pairwise(fractions)):
        raise ValueError(
            "beta_schedule's points must be [fraction of training, beta] with rising fractions in [0, 1] and betas "
            f"> 0, got {points!r}"
        )


def _is_point(point: Any) -> bool:
    numbers = isinstance(point, list | tuple) and len(point) == 2 and all(type(x) in (int, float) for x in point)
    return bool(numbers) and 0 <= point[0] <= 1 and 0 < point[1] < math.inf


def running_mean(state: RunningMeans | None, name: str, value: Tensor, decay: float = 0.99) -> Tensor:
    """The mean over batches of a () value, this one included; the first initialises it. Detached.

    Without a state, the value itself.
    """
    value = value.detach()
    if state is None:
        return value
    if name in state:
        value = decay * state[name].to(value) + (1 - decay) * value
    state[name] = value
    return state[name]  # a state of several processes keeps their mean
