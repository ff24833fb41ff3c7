"""Links f(z): a comparison score z (B,) becomes a loss (B,). Pure functions, stable for |z| up to 1e4 and beyond.

To add one: write the function, add its line to `LINKS`, add its row to the tests. A leaf: torch only.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LinkParams(NamedTuple):
    """What a link may need beside z: beta_eff, () or (B,), and the hinge's offset."""

    beta: Tensor
    hinge_delta: float


def sigmoid(z: Tensor, params: LinkParams) -> Tensor:
    """-log sigmoid(z): Bradley-Terry, as in DPO (arXiv:2305.18290, eq. 7)."""
    return -F.logsigmoid(z)


def hinge(z: Tensor, params: LinkParams) -> Tensor:
    """max(0, delta - z): SLiC (arXiv:2305.10425) and RSO's hinge (arXiv:2309.06657)."""
    return F.relu(params.hinge_delta - z)


def ipo(z: Tensor, params: LinkParams) -> Tensor:
    """(z - 1/2)^2 / beta^2, which is (h - 1/(2 beta))^2 of IPO (arXiv:2310.12036, eq. 17) where z = beta h."""
    return ((z - 0.5) / params.beta) ** 2


def ipo_scaled(z: Tensor, params: LinkParams) -> Tensor:
    """(z - 1/2)^2: IPO's optimum with a gradient scale that does not reward a growing beta."""
    return (z - 0.5) ** 2


def square(z: Tensor, params: LinkParams) -> Tensor:
    """(z - 1)^2: the squared loss of the GPO family (arXiv:2402.05749, table 1)."""
    return (z - 1) ** 2


def truncated_square(z: Tensor, params: LinkParams) -> Tensor:
    """max(0, delta - z)^2: the truncated quadratic of the GPO family."""
    return F.relu(params.hinge_delta - z) ** 2


def exponential(z: Tensor, params: LinkParams) -> Tensor:
    """exp(-z): the exponential loss of the GPO family; +inf for z far below 0."""
    return torch.exp(-z)


def savage(z: Tensor, params: LinkParams) -> Tensor:
    """sigmoid(-z)^2: the Savage loss of the GPO family."""
    # sigmoid(-z) rounds to 1 below 0 and its gradient to 0; the logarithm keeps both.
    return torch.exp(2 * F.logsigmoid(-z))


def cauchy(z: Tensor, params: LinkParams) -> Tensor:
    """-log(1/2 + atan(z)/pi): the Cauchy distribution in place of the logistic one."""
    # 1/2 + atan(z)/pi = atan2(1, -z)/pi cancels on neither side; each half sees only its own sign of z, so that
    # the one not taken has a finite gradient.
    lower = -torch.log(torch.atan2(torch.ones_like(z), -z.clamp(max=0)) / math.pi)
    upper = -torch.log1p(-torch.atan2(torch.ones_like(z), z.clamp(min=0)) / math.pi)
    return torch.where(z < 0, lower, upper)


Link = Callable[[Tensor, LinkParams], Tensor]

LINKS: dict[str, Link] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_scaled": ipo_scaled,
    "square": square,
    "truncated_square": truncated_square,
    "exponential": exponential,
    "savage": savage,
    "cauchy": cauchy,
}
