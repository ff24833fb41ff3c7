"""Token statistics in plain PyTorch: GEMM tiles and an online softmax; the logits never exist whole.

Two ways to a gradient. Where only the hidden states need one (a frozen LM head), the forward also accumulates
E_t = sum_v p_tv W_v, so that d logp_t / d h_t = W[y_t] - E_t is at hand and the backward is a row scale: two GEMM
units in all. Otherwise, and for the entropy's gradient, the backward recomputes each tile from the saved
log-sum-exp.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels.tiles import LogitTransform, accumulator_dtype, mm_into, refuse_double_backward, upcast

# Elements of one logits tile. CPU: two tiles of 16 MB stay near the cache, and GEMMs of this size run at full speed.
CPU_TILE, CUDA_TILE = 1 << 22, 1 << 25
MAX_ROWS = {"cpu": 2048, "cuda": 8192}
MAX_COLS = 8192
# Stands for "no logit seen yet": finite, so that differences of two of them are 0 rather than NaN.
LOWEST = -1e30
LOG2E = math.log2(math.e)


def linear_logps_chunked(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and entropies of N rows, tile by tile.

    Args:
        hidden: (N, D).
        weight: (V, D), hidden's dtype.
        labels: (N,) int64, all in [0, V).
        bias: (V,) or None.
        transform: from raw projections to logits.

    Returns:
        logps (N,), entropy (N,): fp32, or float64 for float64 inputs; differentiable once.
    """
    return _LinearLogps.apply(hidden, weight, labels, bias, transform)


class _Tile(NamedTuple):
    rows: slice
    cols: slice
    weight: Tensor  # (C, D) the slice of the LM head, upcast where the device needs it
    bias: Tensor | None  # (C,)
    hidden: Tensor  # (R, D)
    logits: Tensor  # (R, C) buffer, to be overwritten
    spare: Tensor  # (R, C) buffer


def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[_Tile]:
    """Walk the (N, V) plane, vocabulary outside, so that a slice of the head is read (and upcast) once."""
    n, v = hidden.shape[0], weight.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    rows = min(n, MAX_ROWS.get(hidden.device.type, MAX_ROWS["cuda"]))
    cols = min(v, MAX_COLS, max(256, (CUDA_TILE if hidden.is_cuda else CPU_TILE) // max(rows, 1)))
    buffers = torch.empty(2, rows * cols, dtype=dtype, device=hidden.device)
    for v0 in range(0, v, cols):
        col = slice(v0, min(v0 + cols, v))
        width = col.stop - col.start
        w = upcast(weight[col], dtype)
        b = None if bias is None else bias[col].to(dtype)
        for n0 in range(0, n, rows):
            row = slice(n0, min(n0 + rows, n))
            height = row.stop - row.start
            logits, spare = buffers[:, : height * width].view(2, height, width)
            yield _Tile(row, col, w, b, upcast(hidden[row], dtype), logits, spare)


def _logits_(tile: _Tile, transform: LogitTransform) -> Tensor:
    """Fill the tile's buffer with logits."""
    mm_into(tile.logits, tile.hidden, tile.weight.t())
    if tile.bias is not None:
        tile.logits.add_(tile.bias)
    return transform.apply_(tile.logits)


def _label_columns(labels: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """Each row's label as a column of the tile, and whether it lies there; both (R, 1)."""
    column = labels[tile.rows, None] - tile.cols.start
    width = tile.cols.stop - tile.cols.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, transform: LogitTransform, unit_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """logps, entropy, lse (N,) and, with `unit_grad`, d logp / d hidden (N, D)."""
    n, dtype = hidden.shape[0], accumulator_dtype(hidden.dtype)
    peak = hidden.new_full((n,), LOWEST, dtype=dtype)  # running maximum m
    mass, moment, label_logit = hidden.new_zeros((3, n), dtype=dtype)  # sum e^d, sum e^d d with d = z - m; z_label
    label_slope = torch.ones_like(mass)
    expected = hidden.new_zeros(hidden.shape, dtype=dtype) if unit_grad else None
    for tile in _tiles(hidden, weight, bias):
        z = _logits_(tile, transform)
        column, inside = _label_columns(labels, tile)
        at_label = z.gather(1, column)
        label_logit[tile.rows] = torch.where(inside, at_label, label_logit[tile.rows, None])[:, 0]

        old = peak[tile.rows]
        new = torch.maximum(old, z.amax(1))
        shift = old - new
        decay = shift.exp()
        slope = None if expected is None or transform.softcap is None else transform.slope_(z.clone())
        # Base 2: on a CPU exp2 takes a quarter of exp's time.
        z.sub_(new[:, None]).mul_(LOG2E)
        if bias is not None:
            z.clamp_(min=LOWEST)  # a bias of -inf must give 0 * LOWEST = 0, not 0 * inf
        p = torch.exp2(z, out=tile.spare)
        tile_moment = torch.mul(p, z, out=z).sum(1) / LOG2E
        moment[tile.rows] = (moment[tile.rows] + mass[tile.rows] * shift) * decay + tile_moment
        mass[tile.rows] = mass[tile.rows] * decay + p.sum(1)
        peak[tile.rows] = new
        if expected is not None:
            if slope is not None:
                at_label = slope.gather(1, column)
                label_slope[tile.rows] = torch.where(inside, at_label, label_slope[tile.rows, None])[:, 0]
                p.mul_(slope)
            rows = expected[tile.rows].mul_(decay[:, None])
            mm_into(rows, p.to(tile.weight.dtype), tile.weight, accumulate=True)
    log_mass = mass.log()
    logps = (label_logit - peak) - log_mass
    entropy = log_mass - moment / mass
    if expected is not None:
        expected.div_(mass[:, None]).neg_()
        _add_label_rows_(expected, weight, labels, label_slope)
        if transform.gain != 1.0:
            expected.mul_(transform.gain)
    return logps, entropy, peak + log_mass, expected


def _add_label_rows_(out: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> None:
    """out[t] += scale[t] * weight[labels[t]], a block of rows at a time."""
    for first in range(0, out.shape[0], 1024):
        rows = slice(first, first + 1024)
        out[rows].addcmul_(weight[labels[rows]].to(out.dtype), scale[rows, None])


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, transform: LogitTransform
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        needs_hidden, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        unit_grad = needs_hidden and not needs_weight and not needs_bias
        logps, entropy, lse, unit = _forward(hidden, weight, labels, bias, transform, unit_grad)
        ctx.transform = transform
        ctx.save_for_backward(hidden, weight, labels, bias, lse, entropy, unit)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, labels, bias, lse, entropy, unit = ctx.saved_tensors
        d_hidden = None
        if unit is not None:
            if grad_logps is not None:
                d_hidden = unit * grad_logps[:, None]
                grad_logps = None
            if grad_entropy is None:
                return None if d_hidden is None else d_hidden.to(hidden.dtype), None, None, None, None
        d_hidden, d_weight, d_bias = _backward(
            hidden, weight, labels, bias, ctx.transform, lse, entropy, grad_logps, grad_entropy, d_hidden,
            ctx.needs_input_grad[1], ctx.needs_input_grad[3],
        )  # fmt: skip
        return d_hidden.to(hidden.dtype), d_weight, None, d_bias, None


def _backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    lse: Tensor,
    entropy: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    d_hidden: Tensor | None,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Recompute each tile and push its gradient on. d_hidden (N, D), when given, is added to."""
    dtype = accumulator_dtype(hidden.dtype)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if d_hidden is None else d_hidden
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needs_weight else None
    d_bias = hidden.new_zeros(weight.shape[0], dtype=dtype) if needs_bias else None
    zero = torch.zeros_like(lse)
    g, g_h = zero if grad_logps is None else grad_logps, grad_entropy
    slice_grad = d_hidden  # stands for the (C, D) accumulator of the present vocabulary slice
    for tile in _tiles(hidden, weight, bias):
        grad = _logits_grad_(tile, labels, transform, lse, entropy, g, g_h)
        if d_bias is not None:
            d_bias[tile.cols] += grad.sum(0)
        grad = grad.to(tile.weight.dtype)
        mm_into(d_hidden[tile.rows], grad, tile.weight, accumulate=True)
        if d_weight is not None:
            first, last = tile.rows.start == 0, tile.rows.stop == hidden.shape[0]
            if first:
                target = d_weight[tile.cols]
                slice_grad = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
            mm_into(slice_grad, grad.t(), tile.hidden, accumulate=not first)
            if last and d_weight.dtype != dtype:
                d_weight[tile.cols] = slice_grad
    return d_hidden, d_weight, None if bias is None or d_bias is None else d_bias.to(bias.dtype)


def _logits_grad_(
    tile: _Tile,
    labels: Tensor,
    transform: LogitTransform,
    lse: Tensor,
    entropy: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """d loss / d x of the tile, (R, C):  g (1[v = y] - p) - g_H p (log p + H), times d z / d x."""
    g = grad_logps[tile.rows, None]
    z = _logits_(tile, transform)
    slope = None if transform.softcap is None else transform.slope_(z.clone())
    z.sub_(lse[tile.rows, None]).mul_(LOG2E)
    if tile.bias is not None:
        z.clamp_(min=LOWEST)
    p = torch.exp2(z, out=tile.spare)
    if grad_entropy is None:
        p.mul_(-g)
    else:
        surplus = z.div_(LOG2E).add_(entropy[tile.rows, None])  # log p + H
        p.mul_(surplus.mul_(grad_entropy[tile.rows, None]).add_(g)).neg_()
    column, inside = _label_columns(labels, tile)
    p.scatter_add_(1, column, torch.where(inside, g, 0))
    if slope is not None:
        p.mul_(slope)
    return p if transform.gain == 1.0 else p.mul_(transform.gain)
