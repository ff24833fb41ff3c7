"""The op under an LM head whose rows are split over a process group: each process projects onto its own slice.

A slice yields its own log-sum-exp, entropy and, where the label lies in it, the label's logit; two all-reduces of a few
numbers a row make those of the whole vocabulary. Handed to the op's backward in place of the slice's own, they turn its
gradients into those of the whole: with p_v = exp(z_v - lse), d loss / d z_v of one column reads nothing of the others.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fastpo.kernels.autograd import (
    Operands,
    Plan,
    Statistics,
    check_values,
    for_backward,
    linear_statistics,
    statistics_gradients,
)
from fastpo.kernels.chunked import logit_sums
from fastpo.kernels.tiles import LOWEST, LogitTransform, Needs, Problem, accumulator_dtype, segment_sum

# torch 2.13 has new names for these and warns of the old ones.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

IGNORED = -1  # labels here count from the first row of a slice, where a caller's ignore_index may be a column


class _Slice(NamedTuple):
    """Rows [start, start + size) of the head's V, which this process holds."""

    group: dist.ProcessGroup
    start: int
    size: int


def sharded_statistics(operands: Operands, labels: Tensor, ends: Tensor | None, plan: Plan) -> Statistics:
    """`linear_statistics` of M rows under a head of which each process of a group holds a part. A collective call.

    Args:
        operands: hidden (M, D), a plain tensor: each process has rows of its own, of which M may differ; or a
            replicated DTensor on weight's mesh: all have the same. weight (V, D), a DTensor, Shard(0) over one
            dimension of its mesh and replicated over others; bias (V,) likewise, or None; ref_hidden as hidden; no
            adapter.
        labels: (M,) int64 in [0, V), or plan.ignore_index; a plain tensor.
        ends, plan: as in `linear_statistics`.

    Returns:
        Statistics of this process's rows as plain tensors, without those fields that only a backward reads. Gradients
        of weight and bias are summed over the losses of the processes whose rows are their own; the loss of rows that
        all have is one loss.

    Raises:
        ValueError: weight or bias is sharded in another way, or as `linear_statistics`.
    """
    hidden, bias, ref_hidden = operands.hidden, operands.bias, operands.ref_hidden
    weight = cast(DTensor, operands.weight)
    part, dim = _slice_of(weight, bias)
    local_weight, local_bias = weight.to_local(), None if bias is None else cast(DTensor, bias).to_local()
    nothing_counts = torch.full_like(labels, plan.ignore_index)
    check_values(nothing_counts, ends, None, weight.shape[0], plan.ignore_index)
    keep = labels != plan.ignore_index
    own_rows = not isinstance(hidden, DTensor)
    if own_rows:
        count, most = _row_counts(keep, part.group)
        rows = _AllRows.apply(hidden[keep], most, part.group)
        targets = _all_gather(_padded(labels[keep], most, plan.ignore_index), part.group)
        refs = None if ref_hidden is None else _all_gather(_padded(ref_hidden[keep], most), part.group)
    else:
        from_each = [Partial() if i == dim else Replicate() for i in range(weight.device_mesh.ndim)]
        rows, targets = cast(DTensor, hidden).to_local(grad_placements=from_each), labels
        refs = None if ref_hidden is None else cast(DTensor, ref_hidden).to_local()
    check_values(targets, None, None, weight.shape[0], plan.ignore_index)  # a wrong label of one stops all
    values = _Sharded.apply(rows, local_weight, local_bias, targets, refs, plan, part)
    if own_rows:
        values = [x.new_zeros(labels.shape).masked_scatter(keep, x) for x in _OwnRows.apply(count, part.group, *values)]
    found = dict(zip(_names(plan, refs), values, strict=True))
    if ends is not None:
        found |= {_SUM_OF[name]: segment_sum(x, ends) for name, x in found.items() if name in _SUM_OF}
    absent = found["logps"].new_empty(0)
    return Statistics(*(found.get(name, absent) for name in Statistics._fields))


def sharded_mean_logits(operands: Operands, keep: Tensor, transform: LogitTransform) -> Tensor:
    """`fastpo.kernels.mean_logits` (M,) under such a head, with the operands of `sharded_statistics`. Collective.

    Args:
        keep: (M,) bool, a plain tensor: the rows that count.
    """
    weight, bias = cast(DTensor, operands.weight), cast(DTensor | None, operands.bias)
    part, _ = _slice_of(weight, bias)
    hidden, own_rows = operands.hidden, not isinstance(operands.hidden, DTensor)
    count, most = _row_counts(keep, part.group)
    rows = _all_gather(_padded(hidden[keep], most), part.group) if own_rows else cast(DTensor, hidden).to_local()
    sums = rows.new_zeros(rows.shape[0], dtype=accumulator_dtype(rows.dtype))
    if part.size and rows.shape[0]:
        local_bias = None if bias is None else bias.to_local()
        sums = logit_sums(Problem(rows, weight.to_local(), local_bias, keep, transform))
    dist.all_reduce(sums, group=part.group)
    means = sums / weight.shape[0]
    if not own_rows:
        return means.masked_fill_(~keep, 0)
    first = part.group.rank() * most
    return means.new_zeros(keep.shape).masked_scatter(keep, means[first : first + count])


_SUM_OF = {
    "logps": "seq_logps",
    "entropy": "seq_entropy",
    "kl": "seq_kl",
    "ref_logps": "ref_seq_logps",
    "ref_entropy": "ref_seq_entropy",
}


def _names(plan: Plan, ref_hidden: Tensor | None) -> list[str]:
    """Which of `Statistics` there are, for tokens."""
    reference = ["ref_logps", "ref_entropy", "ref_lse"] if ref_hidden is not None else []
    return ["logps", "entropy", "max_logit", "label_logit", "lse", *reference, *["kl"] * plan.kl]


def _slice_of(weight: DTensor, bias: Tensor | None) -> tuple[_Slice, int]:
    """What this process holds of the head, and the dimension of its mesh over which it is split."""
    placements = weight.placements
    split = [i for i, placement in enumerate(placements) if placement == Shard(0)]
    if len(split) != 1 or not all(x.is_replicate() for i, x in enumerate(placements) if i not in split):
        raise ValueError(f"weight must be sharded by rows over one dimension of its mesh, got placements {placements}")
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != placements):
        raise ValueError(
            f"bias must be sharded as weight, {placements}, got {getattr(bias, 'placements', type(bias).__name__)}"
        )
    mesh, (dim,) = weight.device_mesh, split
    chunk = -(-weight.shape[0] // mesh.size(dim))  # as torch.chunk splits: the last ones may be smaller, or empty
    start = min(mesh.get_local_rank(dim) * chunk, weight.shape[0])
    return _Slice(mesh.get_group(dim), start, min(chunk, weight.shape[0] - start)), dim


class _Sharded(torch.autograd.Function):
    """Statistics of the whole vocabulary, each (M,); gradients of this process's slice, of hidden a summand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ref_hidden: Tensor | None,
        plan: Plan,
        part: _Slice,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        counts, column = labels != plan.ignore_index, labels - part.start
        here = counts & (column >= 0) & (column < part.size)
        ctx.plan = plan = plan._replace(ignore_index=IGNORED, static=False)
        # A label that lies elsewhere: any row will do to get at the slice's log-sum-exp.
        asked = torch.where(counts, torch.where(here, column, 0), IGNORED)
        if part.size:
            below = linear_statistics(Operands(hidden, weight, bias, None, None, ref_hidden), asked, None, None, plan)
        else:
            below = _nothing(hidden, labels, plan)
        stats = _combined(below, here, counts, part.group, plan.kl, ref_hidden is not None)
        if plan.mode == "frozen" and part.size:
            unit = _whole_unit(below, stats.lse, weight, asked, here, plan)
            stats = stats._replace(unit=unit)
        # One beyond the slice is no column: the backward then adds nothing for the label.
        placed = torch.where(counts, torch.where(here, column, part.size), IGNORED)
        kept = stats._replace(stash=below.stash, stash_peak=below.stash_peak, keep=below.keep)
        operands = Operands(hidden, weight, bias, None, None, ref_hidden)
        ctx.save_for_backward(*operands, placed, None, None, *for_backward(kept))
        ctx.names = _names(plan, ref_hidden)
        out = tuple(getattr(stats, name) for name in ctx.names)
        ctx.mark_non_differentiable(*(x for name, x in zip(ctx.names, out, strict=True) if name not in _DIFFERENTIABLE))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *_ = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs = Needs(needs_hidden, needs_weight, needs_bias, projected=False, lora_b=False)
        found: tuple[Tensor | None, ...]
        upstream = dict.fromkeys(Statistics._fields) | dict(zip(ctx.names, grads, strict=True))
        if weight.shape[0]:
            found = statistics_gradients(Statistics(**cast(Any, upstream)), ctx.saved_tensors, needs, ctx.plan)
        else:
            both = zip((hidden, weight, bias), needs, strict=False)
            found = tuple(torch.zeros_like(x) if wanted else None for x, wanted in both)
        return *found[:3], None, None, None, None


_DIFFERENTIABLE = ("logps", "entropy", "kl")


def _nothing(hidden: Tensor, labels: Tensor, plan: Plan) -> Statistics:
    """Statistics of a slice without columns."""
    zeros = hidden.new_zeros(labels.shape, dtype=accumulator_dtype(hidden.dtype))
    none = zeros.new_empty(0)
    last = [zeros + LOWEST, zeros, *[zeros + LOWEST] * 2]
    return Statistics(*[zeros] * 3, *[none] * 3, *[zeros] * 2, *[none] * 2, *last, *[none] * 4)


def _combined(
    below: Statistics, here: Tensor, counts: Tensor, group: dist.ProcessGroup, kl: bool, reference: bool
) -> Statistics:
    """Per-token statistics of the whole vocabulary from those of the slices, 0 where a row does not count."""
    models = ["", "ref_"] if reference else [""]
    slices = [tuple(getattr(below, model + name) for name in ("logps", "entropy", "lse")) for model in models]
    peaks = torch.stack([*(lse for _, _, lse in slices), below.max_logit])
    dist.all_reduce(peaks, dist.ReduceOp.MAX, group)
    parts = []
    for (logps, entropy, lse), peak in zip(slices, peaks, strict=False):
        # Everything relative to the greatest slice, so that large logits cancel nothing.
        depth = lse - peak
        share = depth.exp()
        parts += [share, share * (depth - entropy), torch.where(here, logps + depth, 0)]
    if kl:
        gap = below.kl + (below.lse - peaks[0]) - (below.ref_lse - peaks[1])
        parts.append(parts[0] * gap)
    parts.append(torch.where(here, below.label_logit, 0))
    sums = torch.stack(parts)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    found = {"max_logit": peaks[-1], "label_logit": sums[-1]}
    for model, peak, (mass, moment, label) in zip(
        models, peaks[:-1], sums[: 3 * len(models)].unflatten(0, (-1, 3)), strict=True
    ):
        log_mass = mass.log()
        found[model + "logps"], found[model + "entropy"] = label - log_mass, log_mass - moment / mass
        found[model + "lse"] = peak + log_mass
    if kl:
        found["kl"] = sums[-2] / sums[0] - sums[0].log() + sums[3].log()
    none = peaks.new_empty(0)
    found = {name: torch.where(counts, x, 0) for name, x in found.items()}
    return Statistics(*(found.get(name, none) for name in Statistics._fields))


def _whole_unit(below: Statistics, lse: Tensor, weight: Tensor, asked: Tensor, here: Tensor, plan: Plan) -> Tensor:
    """This slice's summand of d logp / d hidden (K, D), for the K rows that count, in place of the slice's own.

    The slice has at W[label] - E with E the mean of W under its softmax; the whole wants W[label] of the slice that
    holds the label, less each slice's E times its share of the softmax mass.
    """
    where = (asked != IGNORED).nonzero()[:, 0]
    transform = LogitTransform(plan.scale, plan.softcap, plan.temperature)
    share = (below.lse - lse)[where].exp()
    slope = torch.full_like(share, transform.gain)
    if transform.softcap is not None:
        slope.mul_(transform.slope_((below.logps + below.lse)[where]))
    missing = (here[where].to(share.dtype) - share) * slope
    unit = below.unit.mul_(share[:, None])
    for first in range(0, where.shape[0], 1024):  # a block of the labels' rows of the head at a time
        rows = slice(first, first + 1024)
        unit[rows].addcmul_(weight[asked[where[rows]]].to(unit.dtype), missing[rows, None])
    return unit


class _AllRows(torch.autograd.Function):
    """(K, D) rows of each process -> (P most, D) of all, zeros after each one's K; K may differ."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
        ctx.count, ctx.most, ctx.group = rows.shape[0], most, group
        return _all_gather(_padded(rows, most), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad.new_empty((ctx.most, *grad.shape[1:]))
        _REDUCE_SCATTER(own, grad.contiguous(), group=ctx.group)
        return own[: ctx.count], None, None


class _OwnRows(torch.autograd.Function):
    """Each (P most,) of all rows -> (K,) of this process's; the reverse of `_AllRows`."""

    @staticmethod
    def forward(ctx: Any, count: int, group: dist.ProcessGroup, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.most = group, values[0].shape[0] // group.size()
        first = group.rank() * ctx.most
        return tuple(x[first : first + count].clone() for x in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *(None if x is None else _all_gather(_padded(x, ctx.most), ctx.group) for x in grads)


def _row_counts(keep: Tensor, group: dist.ProcessGroup) -> tuple[int, int]:
    """How many rows count here, and on the process with the most."""
    count = keep.sum()
    most = count.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    return int(count), max(int(most), 1)


def _padded(x: Tensor, rows: int, value: float = 0) -> Tensor:
    return torch.cat((x, x.new_full((rows - x.shape[0], *x.shape[1:]), value)))


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    _ALL_GATHER(out, x.contiguous(), group=group)
    return out
