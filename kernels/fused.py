"""Launchers of the Triton kernels: statistics in one pass, gradients by vocabulary slices.

The forward never stores a logit. With a frozen head it goes by slices: a slice's e^(z - m) in the inputs' dtype, and a
GEMM that adds it to E_t = sum_v p_tv W_v. The backward makes the gradient of the logits a slice at a time, from
recomputed tiles, from a stash, or, when it skips, from the kept tiles alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpo.kernels import backward_kernels, forward_kernels
from fastpo.kernels.autotune import fastest
from fastpo.kernels.configs import (
    DECAY,
    FAMILIES,
    PASS,
    PASS_WARPS,
    REDUCE,
    SUM_ROWS,
    Family,
    TileConfig,
    candidates,
    hardware_family,
    kept_constexprs,
    skipping_config,
)
from fastpo.kernels.tiles import (
    LOWEST,
    Answer,
    Gradients,
    InputGradients,
    Needs,
    Problem,
    RowStats,
    Stash,
    capturing,
    finish_unit_,
    mm_into,
)

# Elements of one slice of the plane, 128 MB in 16-bit: each slice reads and writes the (N, D) sums, so few, wide ones.
SLICE_ELEMENTS = 1 << 26
MAX_COLS = 1 << 14
# Slices start at multiples of it, and so at a tile's first column.
SLICE_STEP = 256


def interpreting() -> bool:
    """Whether Triton runs in its interpreter (TRITON_INTERPRET=1 when it was imported), which takes CPU tensors."""
    return not isinstance(forward_kernels.forward_kernel, triton.JITFunction)


def block_shape(hidden: Tensor) -> tuple[int, int]:
    """Rows and columns of a block of certified skipping."""
    config = skipping_config(_family(hidden), hidden.dtype)
    return config.BLOCK_N, config.BLOCK_V


def width_step(hidden: Tensor) -> int:
    """Rows that an adapter makes wider get a multiple of it as their width: what TMA and unmasked loads read."""
    return _family(hidden).wide[0].BLOCK_D


def stash_step(hidden: Tensor) -> int:
    """Columns that share a peak in a stash: every tile is a multiple of it."""
    family = _family(hidden)
    if hidden.dtype == torch.float32:
        return min(family.single.BLOCK_V, family.single_small.BLOCK_V)
    return min(config.BLOCK_V for config in (*family.wide, family.square, family.dual, family.small))


def forward(
    problem: Problem,
    offsets: Tensor,
    *,
    unit: bool = False,
    kl: bool = False,
    stash_rows: int = 0,
    block_mass: bool = False,
) -> Answer:
    """Statistics of N rows; what else is wanted comes from the same tiles.

    The reference's rows, where there are any, run in the same launch: below the policy's, or, for the KL, beside them.
    """
    with _device_of(problem.hidden):
        return _forward(problem, offsets, unit, kl, stash_rows, block_mass)


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
    with _device_of(problem.hidden):
        return _backward(problem, policy, reference, kl, grads, needs, stash, keep)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _family(x: Tensor) -> Family:
    return FAMILIES[hardware_family(x.device)]


def _operand(x: Tensor) -> Tensor:
    """Rows that lie one after another. The interpreter multiplies bf16 wrongly, so it gets fp32."""
    x = x.float() if interpreting() else x
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


class _Slice(NamedTuple):
    """Some columns of the plane."""

    cols: slice
    weight: Tensor  # (C, W)
    bias: Tensor | None  # (C,)


def _slices(problem: Problem, width: int) -> Iterator[_Slice]:
    v = problem.weight.shape[0]
    for first in range(0, v, width):
        cols = slice(first, min(first + width, v))
        weight, bias = problem.head(cols)
        yield _Slice(cols, _operand(weight), bias)


def _slice_width(problem: Problem) -> int:
    n, v = problem.hidden.shape[0], problem.weight.shape[0]
    return min(v, MAX_COLS, max(SLICE_STEP, SLICE_ELEMENTS // n // SLICE_STEP * SLICE_STEP))


class _Launch:
    """What launches with a product have in common: the tile, how operands are read, and the logit transform."""

    def __init__(self, problem: Problem, *, products: int, skips: bool) -> None:
        family, hidden, weight = _family(problem.hidden), problem.hidden, problem.weight
        self.problem, self.persistent = problem, family.persistent
        self.dtype = torch.float32 if interpreting() else hidden.dtype
        row_bytes = hidden.shape[1] * self.dtype.itemsize
        self.tma = family.tma and row_bytes % 16 == 0 and (interpreting() or hidden.dtype != torch.float32)
        even = self.tma or hidden.shape[1] % family.wide[0].BLOCK_D == 0
        light = even and problem.bias is None and problem.transform.softcap is None
        self.candidates = candidates(family, hidden.dtype, light=light, products=products)
        if skips:
            self.candidates = (skipping_config(family, hidden.dtype),)
        self.key = f"{self.dtype}, D={hidden.shape[1]}, V={weight.shape[0]}, N=2^{hidden.shape[0].bit_length()}"

    def choose(self, kernel: str, launch: Callable[[TileConfig], None]) -> TileConfig:
        return fastest(self.candidates, f"{kernel}, {self.key}", launch, may_measure=not capturing())

    def arguments(self, config: TileConfig, part: _Slice, rows: dict[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of a kernel over `rows`, name -> (N, W), and a slice of the head."""
        hidden, operands = rows["hidden"], {**rows, "weight": part.weight}
        # The slices of a head whose rows TMA can read, it can read too; only a caller's offset can break that.
        tma = self.tma and all(x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in operands.values())
        height = {"weight": config.BLOCK_V}
        transform = self.problem.transform
        return {
            **{
                name: TensorDescriptor.from_tensor(x, [height.get(name, config.BLOCK_N), config.BLOCK_D]) if tma else x
                for name, x in operands.items()
            },
            "bias": part.weight if part.bias is None else part.bias,
            "N": hidden.shape[0],
            "V": part.weight.shape[0],
            "D": hidden.shape[1],
            **{f"stride_{name[0]}{'v' if name == 'weight' else 'n'}": x.stride(0) for name, x in operands.items()},
            "scale": transform.scale,
            "softcap": 1.0 if transform.softcap is None else transform.softcap,
            "inv_temperature": 1.0 / transform.temperature,
            "EVEN_D": tma or hidden.shape[1] % config.BLOCK_D == 0,
            "HAS_BIAS": part.bias is not None,
            "HAS_SOFTCAP": transform.softcap is not None,
            "TMA": tma,
            **config.constexprs(),
            **config.options(),
        }

    def grid(self, arguments: dict[str, Any], *, persistent: bool) -> tuple[int]:
        tiles = triton.cdiv(arguments["N"], arguments["BLOCK_N"]) * triton.cdiv(arguments["V"], arguments["BLOCK_V"])
        if not persistent:
            return (tiles,)
        device = self.problem.hidden.device
        programs = 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
        return (min(tiles, programs),)


class _Partials(NamedTuple):
    """What the forward writes for R rows in T column tiles: max, mass and moment (T, R), and label logits (R,)."""

    tiles: Tensor  # (3, T, R)
    label_logit: Tensor

    @classmethod
    def new(cls, like: Tensor, tiles: int, rows: int) -> "_Partials":
        # NaN is what a label that no tile owns keeps.
        label_logit = like.new_full((rows,), torch.nan, dtype=torch.float32)
        return cls(like.new_empty((3, tiles, rows), dtype=torch.float32), label_logit)

    def arguments(self, tiles: slice, prefix: str = "") -> dict[str, Tensor]:
        names = ("part_max", "part_sum", "part_moment")
        parts = {prefix + name: part[tiles] for name, part in zip(names, self.tiles, strict=True)}
        return {**parts, prefix + "label_logit": self.label_logit}


class _UnitGradient:
    """E_t = sum_v p_tv head_v, gathered slice by slice, and from it d logp / d row."""

    def __init__(self, problem: Problem, dtype: torch.dtype, width: int) -> None:
        hidden = problem.hidden
        self.problem = problem
        self.expected = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        self.running = hidden.new_full((hidden.shape[0],), LOWEST, dtype=torch.float32)  # the largest logit so far
        self.buffer = hidden.new_empty(hidden.shape[0] * width, dtype=dtype)

    def room(self, part: _Slice) -> Tensor:
        """(N, C) where the forward is to leave e^(z - m) of a slice."""
        n, width = self.expected.shape[0], part.weight.shape[0]
        return self.buffer[: n * width].view(n, width)

    def add(self, part: _Slice, peak: Tensor, tile: int) -> None:
        """Take in that slice; peak (T, N) is the m of its tiles of so many columns."""
        scaled = self.room(part)
        n, width = scaled.shape
        new = torch.maximum(self.running, peak.amax(0))
        backward_kernels.decay_rows_kernel[(n,)](
            self.expected, (self.running - new).exp(), self.expected.shape[1], self.expected.stride(0), **DECAY,
            num_warps=PASS_WARPS,
        )  # fmt: skip
        block = {"BLOCK_R": PASS["BLOCK_R"], "BLOCK_C": min(PASS["BLOCK_C"], tile)}
        backward_kernels.settle_kernel[(triton.cdiv(n, block["BLOCK_R"]), triton.cdiv(width, block["BLOCK_C"]))](
            scaled, peak, new, n, width, scaled.stride(0), peak.stride(0), **block, TILE_V=tile, num_warps=PASS_WARPS
        )
        mm_into(self.expected, scaled, part.weight, accumulate=True)
        self.running = new

    def finish(self, lse: Tensor, label_logit: Tensor) -> Tensor:
        finish_unit_(self.expected, self.problem, (lse - self.running).exp(), label_logit)
        return self.expected


def _forward(problem: Problem, offsets: Tensor, unit: bool, kl: bool, stash_rows: int, block_mass: bool) -> Answer:
    n, v = problem.hidden.shape[0], problem.weight.shape[0]
    launch = _Launch(problem, products=2 if kl else 1, skips=block_mass)
    # A row that counts has its column; -1 does not count, and -2 gives NaN: both are no tile's.
    labels = torch.where(problem.labels < v, problem.labels, -2).to(torch.int32)
    rows = {"hidden": _operand(problem.hidden)}
    if problem.ref_hidden is not None and kl:
        rows["ref_hidden"] = _operand(problem.ref_hidden)
    elif problem.ref_hidden is not None:
        rows["hidden"] = torch.cat((rows["hidden"], _operand(problem.ref_hidden)))
        labels = torch.cat((labels, labels))
    # In one launch, unless the head cannot be read where it lies or each slice is multiplied on.
    where_it_lies = problem.order is None and problem.lora_b is None and problem.weight.stride(1) == 1
    in_one = not unit and where_it_lies
    width = v if in_one else _slice_width(problem)
    config = launch.choose("joint forward" if kl else "forward", lambda tile: _trial(launch, tile, rows, labels, kl))

    tiles = triton.cdiv(v, config.BLOCK_V)
    partials = _Partials.new(labels, tiles, labels.shape[0])
    ref_partials = _Partials.new(labels, tiles, n) if kl else None
    part_gap = torch.empty_like(partials.tiles[0]) if kl else None
    gradient = _UnitGradient(problem, launch.dtype, width) if unit else None
    stash = problem.hidden.new_empty((stash_rows, v)) if stash_rows else None
    for part in _slices(problem, width):
        here = slice(part.cols.start // config.BLOCK_V, triton.cdiv(part.cols.stop, config.BLOCK_V))
        room = None if stash is None else stash[:, part.cols]
        room = room if gradient is None else gradient.room(part)
        _launch_forward(
            launch, config, part, rows, labels - part.cols.start,
            partials.arguments(here), None if ref_partials is None else ref_partials.arguments(here, "ref_"),
            None if part_gap is None else part_gap[here], room,
            slope=unit and problem.transform.softcap is not None,
        )  # fmt: skip
        if gradient is not None:
            gradient.add(part, partials.tiles[0, here, :n], config.BLOCK_V)

    (policy, *below), gap = _reduce(partials, part_gap, labels, offsets, n)
    reference = below[0] if below else None
    divergence = seq_divergence = None
    if ref_partials is not None:
        (reference,), _ = _reduce(ref_partials, None, labels, offsets, n)
        divergence = gap - (policy.lse - reference.lse)
        seq_divergence = _sequence_sums(divergence, labels, offsets)
    return Answer(
        policy, reference, divergence, seq_divergence,
        unit=None if gradient is None else gradient.finish(policy.lse, partials.label_logit[:n]),
        stash=None if stash is None else Stash(stash, _peaks(partials.tiles[0, :, :stash_rows], problem, config)),
        block_mass=(partials.tiles[0] - policy.lse).exp_().mul_(partials.tiles[1]) if block_mass else None,
    )  # fmt: skip


def _peaks(peak: Tensor, problem: Problem, config: TileConfig) -> Tensor:
    """(tiles, S) to (steps, S): a tile's peak for each of its steps of columns."""
    step = stash_step(problem.hidden)
    return peak.repeat_interleave(config.BLOCK_V // step, 0)[: triton.cdiv(problem.weight.shape[0], step)].contiguous()


def _trial(launch: _Launch, config: TileConfig, rows: dict[str, Tensor], labels: Tensor, kl: bool) -> None:
    """A forward over the first columns, for the clock."""
    problem = launch.problem
    part = next(_slices(problem, _slice_width(problem)))
    tiles = triton.cdiv(part.weight.shape[0], config.BLOCK_V)
    partials, reference = (_Partials.new(labels, tiles, labels.shape[0]).arguments(slice(None)) for _ in range(2))
    reference = {"ref_" + name: x for name, x in reference.items()}
    gap = torch.empty_like(partials["part_max"])
    _launch_forward(launch, config, part, rows, labels, partials, reference if kl else None, gap, None, slope=False)


def _launch_forward(
    launch: _Launch,
    config: TileConfig,
    part: _Slice,
    rows: dict[str, Tensor],
    labels: Tensor,
    partials: dict[str, Tensor],
    ref_partials: dict[str, Tensor] | None,
    part_gap: Tensor | None,
    scaled: Tensor | None,
    slope: bool,
) -> None:
    arguments = launch.arguments(config, part, rows)
    arguments |= {
        "labels": labels,
        **partials,
        "stash": part.weight if scaled is None else scaled,
        "stride_sn": 0 if scaled is None else scaled.stride(0),
        "stash_rows": 0 if scaled is None else scaled.shape[0],
        "STASH": scaled is not None,
        "SLOPE": slope,
        "PERSISTENT": launch.persistent,
    }
    grid = launch.grid(arguments, persistent=launch.persistent)
    if ref_partials is None:
        forward_kernels.forward_kernel[grid](**arguments)
    else:
        forward_kernels.joint_forward_kernel[grid](**arguments, **ref_partials, part_gap=part_gap)


def _reduce(
    partials: _Partials, part_gap: Tensor | None, labels: Tensor, offsets: Tensor, n: int
) -> tuple[list[RowStats], Tensor]:
    """Statistics of each n rows that the partials hold, and the mean gap to the reference's logits."""
    _, tiles, rows = partials.tiles.shape
    # Apart, not slices of one tensor: autograd refuses in-place changes of such views.
    outputs = [torch.empty_like(partials.label_logit) for _ in range(5)]
    forward_kernels.reduce_kernel[(triton.cdiv(rows, REDUCE["BLOCK_R"]),)](
        *partials.tiles, partials.tiles if part_gap is None else part_gap, partials.label_logit, *outputs,
        rows, tiles, **REDUCE, HAS_GAP=part_gap is not None, num_warps=PASS_WARPS,
    )  # fmt: skip
    *stats, gap = outputs
    found = []
    for first in range(0, rows, n):
        logps, entropy, lse, max_logit, label_logit = (
            x if rows == n else x[first : first + n].clone() for x in (*stats, partials.label_logit)
        )
        seq_logps, seq_entropy = (_sequence_sums(x, labels, offsets) for x in (logps, entropy))
        found.append(RowStats(logps, entropy, lse, seq_logps, seq_entropy, max_logit, label_logit))
    return found, gap


def _sequence_sums(values: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
    sequences = offsets.shape[0] - 1
    sums = torch.empty(sequences, dtype=values.dtype, device=values.device)
    if sequences:
        forward_kernels.sequence_sum_kernel[(sequences,)](
            values, labels, offsets, sums, BLOCK_R=SUM_ROWS, num_warps=PASS_WARPS
        )
    return sums


def _backward(
    problem: Problem,
    policy: RowStats,
    reference: RowStats | None,
    kl: Tensor | None,
    grads: Gradients,
    needs: Needs,
    stash: Stash | None,
    keep: Tensor | None,
) -> InputGradients:
    n = problem.hidden.shape[0]
    launch = _Launch(problem, products=1 if grads.kl is None else 2, skips=keep is not None)
    hidden = _operand(problem.hidden)
    ref_hidden = None if problem.ref_hidden is None or grads.kl is None else _operand(problem.ref_hidden)
    labels = problem.labels.to(torch.int32)
    columns, head_parts = needs.columns(problem.weight.shape[1]), problem.head_parts(needs)
    d_rows = hidden.new_zeros(hidden[:, columns].shape, dtype=torch.float32) if needs.rows else None
    d_bias = problem.bias.new_empty(problem.bias.shape) if needs.bias and problem.bias is not None else None
    width = _slice_width(problem)
    buffer = hidden.new_empty(n * width)
    # The KL's gradient reads the reference's logits, which are in no stash.
    stash = stash if grads.kl is None else None
    stashed = 0 if stash is None else stash.scaled.shape[0]
    per_row = {
        "lse": policy.lse, "entropy": policy.entropy, "ref_lse": policy.lse if reference is None else reference.lse,
        "kl": policy.lse if kl is None else kl,
        **{f"grad_{name}": policy.lse if x is None else x for name, x in grads._asdict().items()},
    }  # fmt: skip
    flags = {"HAS_LOGPS": grads.logps is not None, "HAS_ENTROPY": grads.entropy is not None}

    def recompute(config: TileConfig, part: _Slice, out: Tensor, kept: Tensor | None) -> None:
        rest = slice(stashed, None)
        rows = {"hidden": hidden[rest], "ref_hidden": hidden[rest] if ref_hidden is None else ref_hidden[rest]}
        arguments = launch.arguments(config, part, rows)
        arguments |= {name: x[rest] for name, x in per_row.items()} | flags
        backward_kernels.backward_kernel[launch.grid(arguments, persistent=False)](
            labels=labels[rest], keep=labels if kept is None else kept,
            stride_keep=0 if kept is None else kept.stride(0), grad_x=out[rest],
            first_col=part.cols.start, stride_gn=out.stride(0),
            HAS_KL=grads.kl is not None, SKIPS=kept is not None, **arguments,
        )  # fmt: skip

    def trial(config: TileConfig) -> None:
        part = next(_slices(problem, width))
        recompute(config, part, buffer[: n * part.weight.shape[0]].view(n, -1), None)

    config = launch.choose("backward", trial) if stashed < n else launch.candidates[0]
    for part in _slices(problem, width):
        out = buffer[: n * part.weight.shape[0]].view(n, -1)
        kept = None
        if keep is not None:
            kept = keep[part.cols.start // config.BLOCK_V : triton.cdiv(part.cols.stop, config.BLOCK_V)].to(torch.int8)
            if d_bias is not None:
                out.zero_()  # its sum over rows reads the tiles that nothing writes
        if stash is not None:
            _from_stash(problem, stash, labels, per_row, flags, part, out)
        if stashed < n:
            recompute(config, part, out, kept)
        which = part.cols if problem.order is None else problem.order[part.cols]
        if kept is None:
            if d_rows is not None:
                mm_into(d_rows, out, part.weight[:, columns], accumulate=True)
            for head in head_parts.values():
                slice_grad = torch.empty_like(head.grad[part.cols], dtype=torch.float32)
                mm_into(slice_grad, out.t(), hidden[:, head.columns])
                head.grad[which] = slice_grad.to(head.grad.dtype)
        else:
            if d_rows is not None:
                _kept_hidden(out, part.weight[:, columns], kept, d_rows, config)
            for head in head_parts.values():
                head.grad[which] = _kept_weight(out, hidden[:, head.columns], kept, head.grad.dtype, config)
        if d_bias is not None:
            d_bias[which] = out.sum(0, dtype=torch.float32).to(d_bias.dtype)
    return InputGradients(d_rows, bias=d_bias, **{name: head.grad for name, head in head_parts.items()})


def _from_stash(
    problem: Problem,
    stash: Stash,
    labels: Tensor,
    per_row: dict[str, Tensor],
    flags: dict[str, bool],
    part: _Slice,
    out: Tensor,
) -> None:
    """d loss / d x of a slice of the stashed rows."""
    scaled, step, transform = stash.scaled[:, part.cols], stash_step(problem.hidden), problem.transform
    n, width = scaled.shape
    peak = stash.peak[part.cols.start // step :]
    grid = (triton.cdiv(n, PASS["BLOCK_R"]), triton.cdiv(width, PASS["BLOCK_C"]))
    backward_kernels.stash_backward_kernel[grid](
        scaled, peak, labels, per_row["lse"], per_row["entropy"], per_row["grad_logps"], per_row["grad_entropy"], out,
        part.cols.start, n, width, scaled.stride(0), peak.stride(0), out.stride(0),
        transform.scale, 1.0 if transform.softcap is None else transform.softcap, 1.0 / transform.temperature,
        **PASS, TILE_V=step, HAS_SOFTCAP=transform.softcap is not None, **flags, num_warps=PASS_WARPS,
    )  # fmt: skip


def _kept_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of keep (A, B): how many are kept, (A,), and which, first in (A, B)."""
    return keep.sum(1), keep.sort(dim=1, descending=True, stable=True).indices.contiguous()


def _kept_hidden(grad_x: Tensor, weight: Tensor, keep: Tensor, out: Tensor, config: TileConfig) -> None:
    """out (N, D) += grad_x (N, C) @ weight (C, D) over the kept tiles."""
    counts, tiles = _kept_lists(keep.t())
    shape = kept_constexprs(config)
    grid = (tiles.shape[0], triton.cdiv(weight.shape[1], shape["BLOCK_D"]))
    backward_kernels.kept_hidden_kernel[grid](
        grad_x, weight, counts, tiles, out, *grad_x.shape, weight.shape[1],
        grad_x.stride(0), weight.stride(0), tiles.stride(0), out.stride(0), **shape, **config.options(),
    )  # fmt: skip


def _kept_weight(grad_x: Tensor, hidden: Tensor, keep: Tensor, dtype: torch.dtype, config: TileConfig) -> Tensor:
    """grad_x (N, C).T @ hidden (N, D) over the kept tiles."""
    counts, tiles = _kept_lists(keep)
    shape = kept_constexprs(config)
    out = hidden.new_empty((grad_x.shape[1], hidden.shape[1]), dtype=dtype)
    grid = (tiles.shape[0], triton.cdiv(hidden.shape[1], shape["BLOCK_D"]))
    backward_kernels.kept_weight_kernel[grid](
        grad_x, hidden, counts, tiles, out, *grad_x.shape, hidden.shape[1],
        grad_x.stride(0), hidden.stride(0), tiles.stride(0), out.stride(0), **shape, **config.options(),
    )  # fmt: skip
    return out
