"""The one place that says how close is close enough."""

import torch
from torch import Tensor

# A few roundings at the size of the largest logit: below this, comparing two fp32 errors compares luck.
ROUNDINGS = 8


def assert_stats_close(name: str, value: Tensor, truth: Tensor, eager: Tensor, max_logit: float) -> None:
    """Hold fp32 statistics to float64 `truth`: an absolute bound, and at most twice the error of eager fp32."""
    error = _max_error(value, truth)
    bound = 1e-5 * max(1.0, max_logit / 20)
    assert error <= bound, f"{name}: error {error:.2e} exceeds {bound:.2e} (max |logit| {max_logit:.1f})"
    floor = ROUNDINGS * torch.finfo(torch.float32).eps * max(1.0, max_logit)
    allowed = 2 * _max_error(eager, truth) + floor
    assert error <= allowed, f"{name}: error {error:.2e} exceeds twice eager's, {allowed:.2e}"


def assert_grads_close(name: str, grad: Tensor, truth: Tensor, scale: float = 0.0, rtol: float = 1e-4) -> None:
    """Relative error of the whole gradient; `scale` is a norm below which the gradient is rounding noise."""
    error = (grad.double() - truth.double()).norm().item()
    size = max(truth.double().norm().item(), scale)
    assert error <= rtol * size, f"{name}: relative error {error / max(size, 1e-300):.2e} exceeds {rtol:.0e}"


def _max_error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth.double()).abs().max().item() if value.numel() else 0.0
