"""Token statistics in plain PyTorch: GEMM tiles and an online softmax; the logits never exist whole.

Three ways to a gradient. Where only the hidden states need one (a frozen LM head), the forward also accumulates
E_t = sum_v p_tv W_v, so that d logp_t / d h_t = W[y_t] - E_t is at hand and the backward is a row scale: two GEMM
units in all. Otherwise the backward needs the logits once more: it recomputes each tile from the saved log-sum-exp
(four units with a trainable head), or reads exp(z - m) where the forward has stashed it (three).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.kernels.tiles import (
    LOWEST,
    Answer,
    Gradients,
    InputGradients,
    LogitTransform,
    Needs,
    Problem,
    RowStats,
    Stash,
    accumulator_dtype,
    finish_unit_,
    mm_into,
    segment_sum,
    upcast,
)

# Elements of one logits tile. CPU: two tiles of 16 MB stay near the cache, and GEMMs of this size run at full speed.
CPU_TILE, CUDA_TILE = 1 << 22, 1 << 25
MAX_ROWS = {"cpu": 2048, "cuda": 8192}
MAX_COLS = 8192
# Columns in a block of certified skipping; tiles are multiples of it.
BLOCK = 256
LOG2E = math.log2(math.e)


class _Tile(NamedTuple):
    rows: slice
    cols: slice
    number: int  # of the column tile
    weight: Tensor  # (C, W) the slice of the LM head, upcast where the device needs it
    bias: Tensor | None  # (C,)
    buffers: Tensor  # (2 to 4, R, C), to be overwritten


def _tiles(problem: Problem, *, buffers: int, split: int = 0) -> Iterator[_Tile]:
    """Walk the (N, V) plane, vocabulary outside, so that a slice of the head is read (and upcast) once.

    No tile has rows on both sides of row `split`.
    """
    hidden, n, v = problem.hidden, problem.hidden.shape[0], problem.weight.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    rows, cols = _tile_shape(problem)
    starts = sorted({*range(0, split, rows), *range(split, n, rows)})
    space = torch.empty(buffers, rows * cols, dtype=dtype, device=hidden.device)
    for number, v0 in enumerate(range(0, v, cols)):
        col = slice(v0, min(v0 + cols, v))
        width = col.stop - col.start
        weight, bias = problem.head(col)
        weight, bias = upcast(weight, dtype), None if bias is None else bias.to(dtype)
        for n0, n1 in zip(starts, [*starts[1:], n], strict=True):
            tile = space[:, : (n1 - n0) * width].view(buffers, n1 - n0, width)
            yield _Tile(slice(n0, n1), col, number, weight, bias, tile)


def _tile_shape(problem: Problem) -> tuple[int, int]:
    n, v = problem.hidden.shape[0], problem.weight.shape[0]
    on_gpu = problem.hidden.is_cuda
    rows = min(n, MAX_ROWS["cuda" if on_gpu else "cpu"])
    cols = max(BLOCK, (CUDA_TILE if on_gpu else CPU_TILE) // rows // BLOCK * BLOCK)
    return rows, min(v, MAX_COLS, cols)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, out: Tensor) -> Tensor:
    mm_into(out, upcast(hidden, out.dtype), weight.t())
    if bias is not None:
        out.add_(bias)
    transform.apply_(out)
    # A bias of -inf must give p log p = 0 * LOWEST = 0, not 0 * inf.
    return out if bias is None else out.clamp_(min=LOWEST)


def _label_columns(labels: Tensor, rows: slice | Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Each row's label as a column of the tile, and whether it lies there; both (R, 1)."""
    column = labels[rows, None] - cols.start
    width = cols.stop - cols.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


class _Online:
    """The online softmax of N rows: running maximum m, sum e^d, sum e^d d with d = z - m, and the label's logit."""

    def __init__(self, labels: Tensor, dtype: torch.dtype) -> None:
        self.labels = labels
        self.peak = torch.full(labels.shape, LOWEST, dtype=dtype, device=labels.device)
        self.mass = torch.zeros_like(self.peak)
        self.moment = torch.zeros_like(self.peak)
        self.label_logit = torch.full_like(self.peak, math.nan)

    def add(self, tile: _Tile, z: Tensor, p: Tensor) -> Tensor:
        """Take in a tile's logits; z (R, C) becomes scratch, p (R, C) becomes e^(z - m). Returns the decay (R,)."""
        rows = tile.rows
        column, inside = _label_columns(self.labels, rows, tile.cols)
        at_label = z.gather(1, column)
        self.label_logit[rows] = torch.where(inside, at_label, self.label_logit[rows, None])[:, 0]
        old = self.peak[rows]
        new = torch.maximum(old, z.amax(1))
        shift = old - new
        decay = shift.exp()
        # Base 2: on a CPU exp2 takes a quarter of exp's time.
        z.sub_(new[:, None]).mul_(LOG2E)
        torch.exp2(z, out=p)
        tile_moment = torch.mul(p, z, out=z).sum(1) / LOG2E
        self.moment[rows] = (self.moment[rows] + self.mass[rows] * shift) * decay + tile_moment
        self.mass[rows] = self.mass[rows] * decay + p.sum(1)
        self.peak[rows] = new
        return decay

    def result(self, offsets: Tensor) -> RowStats:
        log_mass = self.mass.log()
        logps = torch.where(self.label_logit <= LOWEST, -math.inf, (self.label_logit - self.peak) - log_mass)
        entropy = log_mass - self.moment / self.mass
        # Rows that do not count are in no sum; whoever asked sets their own statistics to 0.
        seq_logps, seq_entropy = (segment_sum(torch.where(self.labels >= 0, x, 0), offsets) for x in (logps, entropy))
        lse = self.peak + log_mass
        return RowStats(logps, entropy, lse, seq_logps, seq_entropy, self.peak, self.label_logit)


def block_shape(hidden: Tensor) -> tuple[int, int]:
    """Rows and columns of a block of certified skipping."""
    return 1, BLOCK


def width_step(hidden: Tensor) -> int:
    """Rows that an adapter makes wider get a multiple of it as their width."""
    return 1


def stash_step(hidden: Tensor) -> int:
    """Columns for which a stash has room for a peak; tiles have at least as many."""
    return BLOCK


def forward(
    problem: Problem,
    offsets: Tensor,
    *,
    unit: bool = False,
    kl: bool = False,
    stash_rows: int = 0,
    block_mass: bool = False,
) -> Answer:
    """Statistics of N rows in one walk over the vocabulary; what else is wanted comes from the same tiles."""
    n, v, transform = problem.hidden.shape[0], problem.weight.shape[0], problem.transform
    dtype = accumulator_dtype(problem.hidden.dtype)
    policy = _Online(problem.labels, dtype)
    reference = None if problem.ref_hidden is None else _Online(problem.labels, dtype)
    cross = torch.zeros_like(policy.mass)  # sum e^(z - m) (z - z_ref)
    expected = problem.hidden.new_zeros(problem.hidden.shape, dtype=dtype) if unit else None
    stash = _new_stash(problem, stash_rows) if stash_rows else None
    blocks = torch.empty(-(-v // BLOCK), n, dtype=dtype, device=problem.hidden.device) if block_mass else None

    for tile in _tiles(problem, buffers=4 if kl else 2, split=stash_rows):
        rows, (z, p) = tile.rows, tile.buffers[:2]
        if reference is not None:
            assert problem.ref_hidden is not None
            z_ref = tile.buffers[2] if kl else z
            _logits(problem.ref_hidden[rows], tile.weight, tile.bias, transform, z_ref)
            if not kl:
                reference.add(tile, z_ref, p)
        _logits(problem.hidden[rows], tile.weight, tile.bias, transform, z)
        slope = transform.slope_(z.clone()) if expected is not None and transform.softcap is not None else None
        gap = torch.sub(z, tile.buffers[2], out=tile.buffers[3]) if kl else None
        decay = policy.add(tile, z, p)
        if gap is not None:
            assert reference is not None
            cross[rows] = cross[rows] * decay + gap.mul_(p).sum(1)
            reference.add(tile, tile.buffers[2], gap)
        if stash is not None and rows.stop <= stash_rows:
            stash.scaled[rows, tile.cols] = p
            stash.peak[tile.number, rows] = policy.peak[rows]
        if blocks is not None:
            first = tile.cols.start // BLOCK
            mass = _block_sums(p)
            blocks[first : first + mass.shape[1], rows] = (mass.log() + policy.peak[rows, None]).t()
        if expected is not None:
            if slope is not None:
                p.mul_(slope)
            mm_into(expected[rows].mul_(decay[:, None]), p.to(tile.weight.dtype), tile.weight, accumulate=True)

    stats = policy.result(offsets)
    ref_stats = None if reference is None else reference.result(offsets)
    if blocks is not None:
        blocks = blocks.sub_(stats.lse).exp_()
    if expected is not None:
        finish_unit_(expected, problem, policy.mass, policy.label_logit)
    divergence = seq_divergence = None
    if kl:
        assert ref_stats is not None
        divergence = cross / policy.mass - (stats.lse - ref_stats.lse)
        seq_divergence = segment_sum(torch.where(problem.labels >= 0, divergence, 0), offsets)
    return Answer(stats, ref_stats, divergence, seq_divergence, expected, stash, blocks)


def logit_sums(problem: Problem) -> Tensor:
    """(N,) sum of each row's logits over the head's columns; a product of the plane's size only under a softcap."""
    hidden, transform = problem.hidden, problem.transform
    n, v, dtype = hidden.shape[0], problem.weight.shape[0], accumulator_dtype(hidden.dtype)
    sums = hidden.new_zeros(n, dtype=dtype)
    if transform.softcap is not None:
        for tile in _tiles(problem, buffers=1):
            z = _logits(hidden[tile.rows], tile.weight, tile.bias, transform, tile.buffers[0])
            sums[tile.rows] += z.sum(1)
        return sums
    head_sum, bias_sum = hidden.new_zeros(hidden.shape[1], dtype=dtype), hidden.new_zeros((), dtype=dtype)
    rows, cols = _tile_shape(problem)
    for first in range(0, v, cols):
        weight, bias = problem.head(slice(first, first + cols))
        head_sum += weight.sum(0, dtype=dtype)
        if bias is not None:
            bias_sum += bias.sum(dtype=dtype)
    for first in range(0, n, rows):  # a block at a time: it is upcast
        here = slice(first, first + rows)
        torch.mv(hidden[here].to(dtype), head_sum, out=sums[here])
    return sums.add_(bias_sum).mul_(transform.gain)


def _new_stash(problem: Problem, rows: int) -> Stash:
    v, dtype = problem.weight.shape[0], accumulator_dtype(problem.hidden.dtype)
    scaled = problem.hidden.new_empty((rows, v))
    return Stash(scaled, problem.hidden.new_zeros((-(-v // BLOCK), rows), dtype=dtype))


def _block_sums(p: Tensor) -> Tensor:
    """(R, C) -> (R, C / BLOCK) sums over blocks of columns, the last one perhaps narrower."""
    whole = p.shape[1] // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(1, (-1, BLOCK)).sum(2)
    return sums if whole == p.shape[1] else torch.cat((sums, p[:, whole:].sum(1, keepdim=True)), 1)


def backward(
    problem: Problem,
    policy: RowStats,
    reference: RowStats | None,
    kl: Tensor | None,
    grads: Gradients,
    needs: Needs,
    *,
    stash: Stash | None = None,
    keep: Tensor | None = None,
) -> InputGradients:
    """Gradients of the inputs that need one."""
    dtype = accumulator_dtype(problem.hidden.dtype)
    out = _Sums(problem, needs, dtype)
    if keep is not None:
        _backward_kept(problem, policy, grads, keep, out)
        return out.result()
    stashed = 0 if stash is None else stash.scaled.shape[0]
    for tile in _tiles(problem, buffers=3 if grads.kl is not None else 2, split=stashed):
        rows, (z, p) = tile.rows, tile.buffers[:2]
        if stash is not None and rows.stop <= stashed:
            # log p from a rounded p: its error is absolute, 2^-9 in bf16, and only the entropy's gradient and a
            # softcap's slope read it.
            z.copy_(stash.scaled[rows, tile.cols]).clamp_(min=torch.finfo(torch.float32).tiny).log_()
            z.add_(stash.peak[tile.number, rows, None])
        else:
            _logits(problem.hidden[rows], tile.weight, tile.bias, problem.transform, z)
        z_ref = None
        if grads.kl is not None:
            assert problem.ref_hidden is not None
            z_ref = _logits(problem.ref_hidden[rows], tile.weight, tile.bias, problem.transform, tile.buffers[2])
        grad = _logits_grad(problem, policy, reference, kl, grads, rows, tile.cols, z, p, z_ref)
        out.add(tile.weight, grad, rows, tile.cols, upcast(problem.hidden[rows], dtype))
    return out.result()


def _backward_kept(problem: Problem, policy: RowStats, grads: Gradients, keep: Tensor, out: "_Sums") -> None:
    """Block by block, with the rows that keep it gathered."""
    n, v = problem.hidden.shape[0], problem.weight.shape[0]
    dtype = accumulator_dtype(problem.hidden.dtype)
    space = torch.empty(2, n * min(v, BLOCK), dtype=dtype, device=problem.hidden.device)
    for index, v0 in enumerate(range(0, v, BLOCK)):
        cols = slice(v0, min(v0 + BLOCK, v))
        rows = keep[index].nonzero()[:, 0]
        weight, bias = problem.head(cols)
        weight, bias = upcast(weight, dtype), None if bias is None else bias.to(dtype)
        hidden = upcast(problem.hidden[rows], dtype)
        z, p = space[:, : rows.shape[0] * weight.shape[0]].view(2, rows.shape[0], weight.shape[0])
        _logits(hidden, weight, bias, problem.transform, z)
        grad = _logits_grad(problem, policy, None, None, grads, rows, cols, z, p, None)
        out.add(weight, grad, rows, cols, hidden)


class _Sums:
    """Where the gradients of the rows, of the head's parts and of the bias gather."""

    def __init__(self, problem: Problem, needs: Needs, dtype: torch.dtype) -> None:
        hidden, bias = problem.hidden, problem.bias
        self.order, self.dtype, self.n = problem.order, dtype, hidden.shape[0]
        self.columns = needs.columns(problem.weight.shape[1])
        self.rows = hidden.new_zeros(hidden[:, self.columns].shape, dtype=dtype) if needs.rows else None
        self.parts = problem.head_parts(needs)
        self.bias = None if bias is None or not needs.bias else bias.new_empty(bias.shape)
        # fp32 sums of the present columns' gradients; the head's are written in place where its dtype allows it.
        self.in_place = hidden.dtype == dtype and self.order is None
        self.d_parts: dict[str, Tensor] = {}
        self.d_bias: Tensor | None = None

    def result(self) -> InputGradients:
        return InputGradients(self.rows, bias=self.bias, **{name: part.grad for name, part in self.parts.items()})

    def add(self, weight: Tensor, grad: Tensor, rows: slice | Tensor, cols: slice, hidden: Tensor) -> None:
        """Push d loss / d x (R, C) of a tile on. A gathered tile (rows is a tensor) is all there is of its columns."""
        first = isinstance(rows, Tensor) or rows.start == 0
        if first:
            self._open(weight, cols)
        if self.d_bias is not None:
            self.d_bias += grad.sum(0)
        grad = grad.to(weight.dtype)
        if self.rows is not None and isinstance(rows, Tensor):
            gathered = self.rows[rows]
            mm_into(gathered, grad, weight[:, self.columns], accumulate=True)
            self.rows[rows] = gathered
        elif self.rows is not None:
            mm_into(self.rows[rows], grad, weight[:, self.columns], accumulate=True)
        for name, part in self.parts.items():
            mm_into(self.d_parts[name], grad.t(), hidden[:, part.columns], accumulate=not first)
        if isinstance(rows, Tensor) or rows.stop == self.n:
            self._close(cols)

    def _open(self, weight: Tensor, cols: slice) -> None:
        for name, part in self.parts.items():
            here = part.grad[cols]
            self.d_parts[name] = here if self.in_place else torch.empty_like(here, dtype=self.dtype)
        if self.bias is not None:
            self.d_bias = weight.new_zeros(weight.shape[0], dtype=self.dtype)

    def _close(self, cols: slice) -> None:
        which = cols if self.order is None else self.order[cols]
        for name, part in self.parts.items():
            if not self.in_place:
                part.grad[which] = self.d_parts[name].to(part.grad.dtype)
        if self.bias is not None and self.d_bias is not None:
            self.bias[which] = self.d_bias.to(self.bias.dtype)


def _logits_grad(
    problem: Problem,
    policy: RowStats,
    reference: RowStats | None,
    kl: Tensor | None,
    grads: Gradients,
    rows: slice | Tensor,
    cols: slice,
    z: Tensor,
    p: Tensor,
    z_ref: Tensor | None,
) -> Tensor:
    """d loss / d x (R, C) from logits z, with p as the result's buffer and z, z_ref as scratch.

    g (1[v = y] - p) - g_H p (log p + H) + g_K p (log p - log q - K), times d z / d x.
    """
    transform = problem.transform
    slope = None if transform.softcap is None else transform.slope_(z.clone())
    factor = None  # of p
    if z_ref is not None:
        assert reference is not None and kl is not None and grads.kl is not None
        offset = reference.lse[rows] - policy.lse[rows] - kl[rows]
        factor = torch.sub(z, z_ref, out=z_ref).add_(offset[:, None]).mul_(grads.kl[rows, None])
    z.sub_(policy.lse[rows, None]).mul_(LOG2E)
    torch.exp2(z, out=p)
    if grads.entropy is not None:
        surplus = z.div_(LOG2E).add_(policy.entropy[rows, None]).mul_(-grads.entropy[rows, None])
        factor = surplus if factor is None else factor.add_(surplus)
    if grads.logps is not None:
        g = grads.logps[rows, None]
        p.mul_(-g if factor is None else factor.sub_(g))
        column, inside = _label_columns(problem.labels, rows, cols)
        p.scatter_add_(1, column, torch.where(inside, g, 0))
    elif factor is not None:
        p.mul_(factor)
    if slope is not None:
        p.mul_(slope)
    return p if transform.gain == 1.0 else p.mul_(transform.gain)
