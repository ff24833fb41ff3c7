"""What the chunked and the fused implementation share: the logit transform, fp32-accumulating products, one guard."""

from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """logits = softcap * tanh(scale * x / softcap) / temperature of the raw projection x = hidden @ weight.T + bias."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def gain(self) -> float:
        """d logits / d x where the softcap does not bend."""
        return self.scale / self.temperature

    def apply_(self, x: Tensor) -> Tensor:
        """Turn raw projections into logits, in place."""
        if self.softcap is not None:
            x.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.gain != 1.0:
            x.mul_(self.gain)
        return x

    def slope_(self, logits: Tensor) -> Tensor:
        """Turn logits into (d logits / d x) / gain = 1 - tanh^2, in place; only for a softcap."""
        assert self.softcap is not None
        return logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)


def refuse_double_backward() -> None:
    """Called first in a backward: autograd records there only for create_graph=True, and would record wrongly."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_logps is differentiable once; for create_graph=True use impl='reference'")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as an operand of `mm_into`: CUDA multiplies 16-bit operands into fp32 itself, a CPU cannot."""
    return x if x.is_cuda else x.to(dtype)


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's precision; a, b: out's dtype, or 16-bit on CUDA."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
