"""The one differentiable op over both implementations: which rows count, what is saved, which gradient goes where.

It is registered with torch.library, with shapes for fake tensors, so that torch.compile keeps it whole. Its backward
is an op of its own, without a gradient: statistics are differentiable once.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels import chunked
from fastpo.kernels.skipping import kept_blocks
from fastpo.kernels.tiles import (
    Answer,
    Gradients,
    InputGradients,
    LogitTransform,
    Needs,
    Problem,
    RowStats,
    Stash,
    accumulator_dtype,
    capturing,
    join,
    refuse_double_backward,
)


class Plan(NamedTuple):
    """How a call is computed; plain numbers, because they travel through an op's schema.

    Attributes:
        scale, softcap, temperature: the logit transform.
        ignore_index: the label of rows that do not count.
        impl: chunked | fused.
        mode: no_grad | frozen | lean | stash.
        memory_budget: bytes that a stash may take.
        skip_mass: softmax mass that a backward may leave out of each row.
        kl: whether to compute KL(policy || reference).
        static: whether every saved tensor's shape follows from the inputs' shapes, as a compiler wants it.
    """

    scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    impl: str
    mode: str
    memory_budget: int
    skip_mass: float
    kl: bool
    static: bool


class Operands(NamedTuple):
    """What is multiplied, in one dtype; first those that may want a gradient, in the order of `Needs`.

    Attributes:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        projected, lora_b: (M, r) and (V, r) of the head's adapter, or both None.
        ref_hidden: (M, D) or None; None where there is an adapter, which a reference would not have.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    projected: Tensor | None
    lora_b: Tensor | None
    ref_hidden: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self[: len(Needs._fields)]


class Statistics(NamedTuple):
    """What the op returns for M rows in S sequences; absent ones have no elements. Then, what its backward needs."""

    logps: Tensor  # (M,)
    entropy: Tensor  # (M,)
    kl: Tensor  # (M,)
    seq_logps: Tensor  # (S,)
    seq_entropy: Tensor  # (S,)
    seq_kl: Tensor  # (S,)
    ref_logps: Tensor  # (M,)
    ref_entropy: Tensor  # (M,)
    ref_seq_logps: Tensor  # (S,)
    ref_seq_entropy: Tensor  # (S,)
    max_logit: Tensor  # (M,)
    label_logit: Tensor  # (M,)
    lse: Tensor  # (M,)
    ref_lse: Tensor  # (M,)
    unit: Tensor  # (rows that count, or M, W) with W as `Problem` says
    stash: Tensor  # (stashed rows, V)
    stash_peak: Tensor  # (column tiles, stashed rows)
    keep: Tensor  # (blocks, row groups) bool


def linear_statistics(
    operands: Operands, labels: Tensor, ends: Tensor | None, order: Tensor | None, plan: Plan
) -> Statistics:
    """Statistics of M rows, and their sums over S sequences.

    Args:
        operands: see `Operands`.
        labels: (M,) int64 in [0, V), or plan.ignore_index.
        ends: (S+1,) int64: sequence i is rows ends[i] to ends[i+1]. None: no sequences.
        order: (V,) int64 permutation, or None.
        plan: see `Plan`.

    Returns:
        Statistics, fp32 (float64 for float64 inputs); the policy's are differentiable once.

    Raises:
        ValueError: a label, `ends` or `order` is out of range (not under CUDA-graph capture, where nothing may
            synchronise: there, such a label's result is NaN).
    """
    return Statistics(*_linear_statistics(*operands, labels, ends, order, *plan))


def _implementation(name: str) -> Any:
    return chunked if name == "chunked" else importlib.import_module("fastpo.kernels.fused")


def check_values(labels: Tensor, ends: Tensor | None, order: Tensor | None, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError for what only the tensors' contents can tell; waits for the device once."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    flags = [wrong.any()]
    if ends is not None:
        flags.append((ends[0] != 0) | (ends[-1] != labels.shape[0]) | (ends.diff() < 0).any())
    if order is not None:
        flags.append((order.sort().values != torch.arange(vocab_size, device=order.device)).any())
    if not bool(torch.stack(flags).any()):
        return
    if flags[0]:
        raise ValueError(
            f"labels must lie in [0, {vocab_size}) or equal ignore_index={ignore_index}, got {labels[wrong][0].item()}"
        )
    if ends is not None and flags[1]:
        raise ValueError(
            f"cu_seqlens must start at 0, not decrease and end at N = {labels.shape[0]}, got {ends.tolist()}"
        )
    raise ValueError(f"vocab_order must be a permutation of 0 .. {vocab_size - 1}, got {order}")


class _Rows(NamedTuple):
    """The rows that count: packed, or all of them, of which some are masked."""

    where: Tensor | None  # (K,) int64, where the packed rows were
    masked: bool  # whether rows that do not count are among them
    labels: Tensor  # (K,) int64 columns, as `Problem` wants them
    offsets: Tensor  # (S+1,) int64 boundaries of the sequences in these rows

    def take(self, x: Tensor) -> Tensor:
        return x if self.where is None else x[self.where]

    def mask(self, x: Tensor) -> Tensor:
        """(K, ...) with 0 in the rows that do not count."""
        return torch.where((self.labels >= 0).view(-1, *[1] * (x.dim() - 1)), x, 0) if self.masked else x

    def spread(self, x: Tensor, m: int) -> Tensor:
        """(K, ...) back to (M, ...), 0 in the rows that do not count."""
        if self.where is None:
            return self.mask(x)
        return x.new_zeros((m, *x.shape[1:])).index_copy_(0, self.where, x)

    def gradient(self, tokens: Tensor | None, sequences: Tensor | None) -> Tensor | None:
        """(K,) upstream gradient of each row's statistic: its own (M,) plus its sequence's (S,)."""
        total = None if tokens is None else self.take(tokens)
        if sequences is not None:
            lengths, count = self.offsets.diff(), self.labels.shape[0]
            spread = sequences.repeat_interleave(lengths, output_size=count)
            total = spread if total is None else total + spread
        return None if total is None else self.mask(total).contiguous()


def _rows(labels: Tensor, ends: Tensor | None, order: Tensor | None, vocab_size: int, ignore_index: int) -> _Rows:
    counts = labels != ignore_index
    where, masked, offsets = None, False, labels.new_zeros(1) if ends is None else ends
    if capturing():
        possible = (labels >= 0) & (labels < vocab_size)
        labels, masked = torch.where(counts, torch.where(possible, labels, vocab_size), -1), True
    elif not bool(counts.all()):
        where = counts.nonzero()[:, 0]
        offsets = F.pad(counts.cumsum(0), (1, 0))[offsets]
        labels = labels[where]
    if order is not None:
        column_of = torch.empty(vocab_size + 2, dtype=torch.int64, device=labels.device)
        column_of[order] = torch.arange(vocab_size, device=labels.device)
        column_of[vocab_size], column_of[-1] = vocab_size, -1
        labels = column_of[labels]
    return _Rows(where, masked, labels, offsets)


def _problem(rows: _Rows, operands: Operands, order: Tensor | None, plan: Plan) -> Problem:
    transform = LogitTransform(plan.scale, plan.softcap, plan.temperature)
    # What lies in a padding row, NaN included, must not reach d weight.
    hidden, projected, reference = (
        None if x is None else rows.mask(rows.take(x))
        for x in (operands.hidden, operands.projected, operands.ref_hidden)
    )
    assert hidden is not None
    if projected is not None:
        assert reference is None
        hidden = join(hidden, projected, _width(operands, plan))
    return Problem(hidden, operands.weight, operands.bias, rows.labels, transform, reference, order, operands.lora_b)


def _width(operands: Operands, plan: Plan) -> int:
    """W, the columns of a row as `Problem` has it."""
    d = operands.hidden.shape[1]
    if operands.projected is None:
        return d
    step = _implementation(plan.impl).width_step(operands.hidden)
    return -(-(d + operands.projected.shape[1]) // step) * step


def _shapes(
    operands: Operands, sequences: int, rows: int, plan: Plan
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of `Statistics`, for `rows` rows that count."""
    hidden = operands.hidden
    m, v, dtype = hidden.shape[0], operands.weight.shape[0], accumulator_dtype(hidden.dtype)
    block_rows, block_cols = _implementation(plan.impl).block_shape(hidden)
    peaks = -(-v // _implementation(plan.impl).stash_step(hidden))
    stash_row = v * hidden.element_size() + peaks * dtype.itemsize
    stashed = min(rows, plan.memory_budget // stash_row) if plan.mode == "stash" else 0
    own, refs, kl = (True, operands.ref_hidden is not None, plan.kl)
    wanted: dict[str, tuple[bool, tuple[int, ...], torch.dtype]] = {
        "logps": (own, (m,), dtype),
        "entropy": (own, (m,), dtype),
        "kl": (kl, (m,), dtype),
        "seq_logps": (own, (sequences,), dtype),
        "seq_entropy": (own, (sequences,), dtype),
        "seq_kl": (kl, (sequences,), dtype),
        "ref_logps": (refs, (m,), dtype),
        "ref_entropy": (refs, (m,), dtype),
        "ref_seq_logps": (refs, (sequences,), dtype),
        "ref_seq_entropy": (refs, (sequences,), dtype),
        "max_logit": (own, (m,), dtype),
        "label_logit": (own, (m,), dtype),
        "lse": (own, (m,), dtype),
        "ref_lse": (refs, (m,), dtype),
        "unit": (plan.mode == "frozen", (rows, _width(operands, plan)), dtype),
        "stash": (stashed > 0, (stashed, v), hidden.dtype),
        "stash_peak": (stashed > 0, (peaks, stashed), dtype),
        "keep": (_skips(plan), (-(-v // block_cols), -(-rows // block_rows)), torch.bool),
    }
    return {name: (shape if is_wanted else (0,), dtype) for name, (is_wanted, shape, dtype) in wanted.items()}


def _skips(plan: Plan) -> bool:
    return plan.mode == "lean" and plan.skip_mass > 0


@torch.library.custom_op("fastpo::linear_statistics", mutates_args=())
def _linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projected: Tensor | None,
    lora_b: Tensor | None,
    ref_hidden: Tensor | None,
    labels: Tensor,
    ends: Tensor | None,
    order: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str,
    mode: str,
    memory_budget: int,
    skip_mass: float,
    kl: bool,
    static: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    plan = Plan(scale, softcap, temperature, ignore_index, impl, mode, memory_budget, skip_mass, kl, static)
    operands = Operands(hidden, weight, bias, projected, lora_b, ref_hidden)
    m, v, engine = labels.shape[0], weight.shape[0], _implementation(impl)
    if not capturing():
        check_values(labels, ends, order, v, ignore_index)
    rows = _rows(labels, ends, order, v, ignore_index)
    count, sequences = rows.labels.shape[0], rows.offsets.shape[0] - 1
    shapes = _shapes(operands, sequences, m if static else count, plan)
    if count == 0:
        return cast(Any, tuple(hidden.new_zeros(shape, dtype=dtype) for shape, dtype in shapes.values()))
    problem = _problem(rows, operands, order, plan)
    stash_rows = min(shapes["stash"][0][0], count)
    answer: Answer = engine.forward(
        problem, rows.offsets, unit=mode == "frozen", kl=kl, stash_rows=stash_rows, block_mass=_skips(plan)
    )
    keep = None
    if answer.block_mass is not None:
        block_rows, block_cols = engine.block_shape(hidden)
        keep = kept_blocks(answer.block_mass, rows.labels, skip_mass, block_cols, block_rows)
    # A row's statistics go back to where the row was; what only the backward reads stays packed.
    parts = {"": answer.policy} | ({} if answer.reference is None else {"ref_": answer.reference})
    found: dict[str, Tensor | None] = {
        **{prefix + name: rows.spread(getattr(part, name), m) for prefix, part in parts.items() for name in _PER_ROW},
        **{prefix + name: getattr(part, name) for prefix, part in parts.items() for name in _PER_SEQUENCE},
        **{name: rows.spread(getattr(answer.policy, name), m) for name in ("max_logit", "label_logit")},
        "kl": None if answer.kl is None else rows.spread(answer.kl, m),
        "seq_kl": answer.seq_kl,
        "unit": answer.unit,
        "stash": None if answer.stash is None else answer.stash.scaled,
        "stash_peak": None if answer.stash is None else answer.stash.peak,
        "keep": keep,
    }
    return cast(Any, tuple(_fit(found.get(name), hidden, *shapes[name]) for name in Statistics._fields))


_PER_ROW, _PER_SEQUENCE = ("logps", "entropy", "lse"), ("seq_logps", "seq_entropy")


def _fit(x: Tensor | None, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x, with zeros after it where a static shape is larger; an empty tensor for None."""
    if x is None:
        return like.new_empty(shape, dtype=dtype)
    if x.shape == shape:
        return x
    out = x.new_zeros(shape)
    out[tuple(slice(size) for size in x.shape)] = x
    return out


@_linear_statistics.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    operands, (labels, ends, _, *plan) = _parse(args)
    sequences = 0 if ends is None else ends.shape[0] - 1
    # Saved tensors have their static shapes here: fake tensors know no labels.
    shapes = _shapes(operands, sequences, labels.shape[0], Plan(*plan))
    return tuple(operands.hidden.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values())


def _parse(args: tuple[Any, ...]) -> tuple[Operands, tuple[Any, ...]]:
    """The op's arguments: the operands, and the rest."""
    count = len(Operands._fields)
    return Operands(*args[:count]), args[count:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    operands, (labels, ends, order, *plan) = _parse(inputs)
    ctx.save_for_backward(*operands, labels, ends, order, *for_backward(Statistics(*output)))
    ctx.plan = Plan(*plan)


def for_backward(stats: Statistics) -> tuple[Tensor, ...]:
    """Of what the op returns, what its backward reads, in the backward's order."""
    saved = (stats.logps, stats.entropy, stats.kl, stats.ref_logps, stats.ref_entropy, stats.lse, stats.ref_lse)
    return *saved, stats.unit, stats.stash, stats.stash_peak, stats.keep


def statistics_gradients(
    upstream: Statistics, saved: Sequence[Tensor | None], needs: Needs, plan: Plan
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, in the order of `Needs`; None where not needed.

    Args:
        upstream: gradients of the policy's statistics, None where none arrived.
        saved: `Operands`, labels, ends, order, then `for_backward`.
        needs, plan: see there.
    """
    refuse_double_backward()
    operands, rest = _parse(tuple(saved))
    out = _linear_statistics_backward(
        *operands, *needs, *rest,
        *(upstream.logps, upstream.entropy, upstream.kl, upstream.seq_logps, upstream.seq_entropy, upstream.seq_kl),
        *plan,
    )  # fmt: skip
    return tuple(x if wanted else None for x, wanted in zip(out, needs, strict=True))


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
    wanted = statistics_gradients(Statistics(*cast(Any, grads)), ctx.saved_tensors, needs, ctx.plan)
    return *wanted, *[None] * (len(ctx.needs_input_grad) - len(wanted))


_linear_statistics.register_autograd(_gradients, setup_context=_setup_context)


@torch.library.custom_op("fastpo::linear_statistics_backward", mutates_args=())
def _linear_statistics_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projected: Tensor | None,
    lora_b: Tensor | None,
    ref_hidden: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_projected: bool,
    needs_lora_b: bool,
    labels: Tensor,
    ends: Tensor | None,
    order: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    kl_value: Tensor,
    ref_logps: Tensor,
    ref_entropy: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    unit: Tensor,
    stash: Tensor,
    stash_peak: Tensor,
    keep: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_seq_logps: Tensor | None,
    grad_seq_entropy: Tensor | None,
    grad_seq_kl: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    impl: str,
    mode: str,
    memory_budget: int,
    skip_mass: float,
    kl: bool,
    static: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `Operands.differentiable`; an empty tensor for those that are not needed."""
    plan = Plan(scale, softcap, temperature, ignore_index, impl, mode, memory_budget, skip_mass, kl, static)
    operands = Operands(hidden, weight, bias, projected, lora_b, ref_hidden)
    needs = Needs(needs_hidden, needs_weight, needs_bias, needs_projected, needs_lora_b)
    rows = _rows(labels, ends, order, weight.shape[0], ignore_index)
    count = rows.labels.shape[0]
    nothing = hidden.new_empty(0)
    if count == 0:
        return cast(Any, tuple(_zero_gradients(operands, needs)))
    grads = Gradients(
        rows.gradient(grad_logps, grad_seq_logps),
        rows.gradient(grad_entropy, grad_seq_entropy),
        rows.gradient(grad_kl, grad_seq_kl),
    )
    found = InputGradients()
    from_unit = None
    if mode == "frozen" and grads.logps is not None:
        from_unit = unit[:count, needs.columns(hidden.shape[1])] * grads.logps[:, None]
        grads = grads._replace(logps=None)
    if any(grad is not None for grad in grads):
        problem = _problem(rows, operands, order, plan)
        policy = RowStats(rows.take(logps), rows.take(entropy), rows.take(lse), *[nothing] * 4)
        reference = None
        if ref_hidden is not None:
            reference = RowStats(rows.take(ref_logps), rows.take(ref_entropy), rows.take(ref_lse), *[nothing] * 4)
        found = _implementation(impl).backward(
            problem, policy, reference, rows.take(kl_value) if kl else None, grads, needs,
            stash=Stash(stash[:count], stash_peak[:, :count]) if stash.numel() else None,
            keep=keep if keep.numel() else None,
        )  # fmt: skip
    if from_unit is not None:
        found = found._replace(rows=from_unit if found.rows is None else found.rows.add_(from_unit))
    d_hidden, d_projected = _split(found.rows, operands, needs, rows)
    wanted = (d_hidden, found.weight, found.bias, d_projected, found.lora_b)
    return cast(Any, tuple(hidden.new_empty(0) if x is None else x for x in wanted))


def _split(d_rows: Tensor | None, operands: Operands, needs: Needs, rows: _Rows) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden (M, D) and projected (M, r) from those of the rows that count."""
    if d_rows is None:
        return None, None
    dtype, (m, d) = operands.hidden.dtype, operands.hidden.shape
    if operands.projected is None:
        return rows.spread(d_rows.to(dtype), m), None
    r, left = operands.projected.shape[1], d if needs.hidden else 0
    # Copies: an op's results share no memory, and lie as its fake ones do.
    d_hidden = rows.spread(d_rows[:, :d].to(dtype, copy=True), m) if needs.hidden else None
    d_projected = rows.spread(d_rows[:, left : left + r].to(dtype, copy=True), m) if needs.projected else None
    return d_hidden, d_projected


def _zero_gradients(operands: Operands, needs: Needs) -> Iterator[Tensor]:
    for x, wanted in zip(operands.differentiable, needs, strict=True):
        yield x.new_zeros(x.shape) if wanted and x is not None else operands.hidden.new_empty(0)


@_linear_statistics_backward.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    operands, rest = _parse(args)
    return tuple(_zero_gradients(operands, Needs(*rest[: len(Needs._fields)])))


# The ops' own code, for tensors without data: what it allocates shows nowhere else.
OPS_IN_PYTHON = {op._opoverload: op._init_fn for op in (_linear_statistics, _linear_statistics_backward)}
