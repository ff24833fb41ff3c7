"""What the chunked and the fused implementation share: the problem, its answer, and products that keep fp32."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Before torch 2.12, addmm with an out_dtype wants the sum itself in the operands' dtype.
_ADDS_INTO_FP32 = TorchVersion(torch.__version__) >= "2.12"


# Stands for -inf and for "no logit seen yet": finite, so that differences of two of them are 0 rather than NaN.
LOWEST = -1e30


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


class Problem(NamedTuple):
    """N rows through one LM head.

    With an adapter of rank r, a row is [hidden | projected | 0] and the head [weight | lora_b | 0], W >= D + r columns
    wide; else W = D.

    Attributes:
        hidden: (N, W) rows, N > 0.
        weight: (V, D), hidden's dtype.
        bias: (V,) or None.
        labels: (N,) int64 columns of the plane in [0, V). Below 0: the row does not count; V: its result is NaN.
        transform: from raw projections to logits.
        ref_hidden: (N, W) rows of the reference model under the same head, or None. Never differentiated.
        order: (V,) int64: column j of the plane is row order[j] of the head. None: as they are.
        lora_b: (V, r), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    transform: LogitTransform
    ref_hidden: Tensor | None = None
    order: Tensor | None = None
    lora_b: Tensor | None = None

    def head(self, cols: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """The head (C, W) and bias (C,) of some columns; with an adapter, a copy."""
        which = cols if self.order is None else self.order[cols]
        weight = self.weight[which]
        if self.lora_b is not None:
            weight = join(weight, self.lora_b[which], self.hidden.shape[1])
        return weight, None if self.bias is None else self.bias[which]

    def head_parts(self, needs: "Needs") -> dict[str, "HeadPart"]:
        """Which of "weight" and "lora_b" want a gradient, and room for it."""
        d = self.weight.shape[1]
        parts = {}
        if needs.weight:
            parts["weight"] = HeadPart(self.weight.new_empty(self.weight.shape), slice(0, d))
        if needs.lora_b:
            assert self.lora_b is not None
            parts["lora_b"] = HeadPart(self.lora_b.new_empty(self.lora_b.shape), slice(d, d + self.lora_b.shape[1]))
        return parts


class HeadPart(NamedTuple):
    """The gradient (V, C) of weight or lora_b, to be filled, and which of a row's W columns belong to it."""

    grad: Tensor
    columns: slice


def join(left: Tensor, right: Tensor, width: int) -> Tensor:
    """[left | right | 0], (R, width)."""
    rest = width - left.shape[1] - right.shape[1]
    return torch.cat((left, right, left.new_zeros((left.shape[0], rest))), 1)


class RowStats(NamedTuple):
    """Log-probability of the label, entropy and log-sum-exp of N rows, each (N,) fp32 (float64 for float64).

    What a backward does not read: seq_*, their sums over S sequences, (S,); and (N,) the largest logit and the label's,
    which are the same number where they are the same logit.
    """

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    seq_logps: Tensor
    seq_entropy: Tensor
    max_logit: Tensor
    label_logit: Tensor


class Stash(NamedTuple):
    """What lets a backward skip the projection of the first S rows.

    Attributes:
        scaled: (S, V) exp(logit - peak) in the inputs' dtype: relative precision does not depend on the logit's size.
        peak: (T, S) fp32, what was subtracted in each column tile, or step of columns.
    """

    scaled: Tensor
    peak: Tensor


class Answer(NamedTuple):
    """What a forward computes; None where it was not asked for.

    Attributes:
        policy, reference: statistics of `hidden` and `ref_hidden`.
        kl, seq_kl: (N,) KL(policy || reference) over the vocabulary, and its sums (S,).
        unit: (N, W) d logp / d row.
        stash: see `Stash`.
        block_mass: (V / block, N) softmax mass of each block of columns.
    """

    policy: RowStats
    reference: RowStats | None = None
    kl: Tensor | None = None
    seq_kl: Tensor | None = None
    unit: Tensor | None = None
    stash: Stash | None = None
    block_mass: Tensor | None = None


class Gradients(NamedTuple):
    """Upstream gradients of N rows' statistics, each (N,) or None."""

    logps: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    projected: bool
    lora_b: bool

    @property
    def rows(self) -> bool:
        return self.hidden or self.projected

    def columns(self, d: int) -> slice:
        """The columns of a row to compute it for; next to hidden's d, projected's cost nothing."""
        return slice(0 if self.hidden else d, None)


class InputGradients(NamedTuple):
    """What a backward computes; None where it is not needed.

    Attributes:
        rows: (N, those of W columns that `Needs.columns` names) in the accumulator's dtype.
        bias, weight, lora_b: (V,), (V, D) and (V, r) in the inputs' dtype.
    """

    rows: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None
    lora_b: Tensor | None = None


def capturing() -> bool:
    """Whether a CUDA graph is being recorded: then nothing may depend on what a tensor holds."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_double_backward() -> None:
    """Called first in a backward: autograd records there only for create_graph=True, and would record wrongly."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_logps is differentiable once; for create_graph=True use impl='reference'")


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """(N,) -> (S,): sums of rows offsets[i] to offsets[i+1]."""
    # Thousands of nats: fp32 partial sums would round away what the tokens are exact to.
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0).to(values.dtype)


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
    elif accumulate and _ADDS_INTO_FP32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def finish_unit_(expected: Tensor, problem: Problem, mass: Tensor, label_logit: Tensor) -> None:
    """Turn sum_v e^(z - m) head_v, (N, W), into d logp / d row, in place; mass (N,) = sum_v e^(z - m)."""
    assert problem.order is None  # an order belongs to a backward that skips
    transform = problem.transform
    expected.div_(mass[:, None]).neg_()
    at_label = torch.ones_like(mass) if transform.softcap is None else transform.slope_(label_logit.clone())
    labels = problem.labels.clamp(0, problem.weight.shape[0] - 1)
    for first in range(0, labels.shape[0], 1024):  # a block of the labels' rows of the head at a time
        rows = slice(first, first + 1024)
        head, _ = problem.head(labels[rows])
        expected[rows].addcmul_(head.to(expected.dtype), at_label[rows, None])
    if transform.gain != 1.0:
        expected.mul_(transform.gain)
