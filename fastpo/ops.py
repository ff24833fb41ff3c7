"""`linear_logps` and `linear_sequence_stats`: validate, keep the labelled rows, choose an implementation, call it."""

import importlib.util
import math
from typing import Literal

import torch
from torch import Tensor

from fastpo.kernels.chunked import linear_logps_chunked
from fastpo.kernels.tiles import LogitTransform
from fastpo.reference import linear_logps_reference
from fastpo.types import SequenceStats, TokenStats

Impl = Literal["auto", "fused", "chunked", "reference"]
IMPLEMENTATIONS = ("auto", "fused", "chunked", "reference")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> TokenStats:
    """Per-token log-probability of the label and entropy over the vocabulary, without logits in memory.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature; without a softcap,
    logit_scale * (hidden @ weight.T + bias) / temperature.

    Args:
        hidden: (..., D) fp32, bf16, fp16 or float64; any strides.
        weight: (V, D) the LM head, hidden's dtype; any strides.
        labels: (...) int64, already aligned: hidden[t] predicts labels[t].
        bias: (V,), hidden's dtype, or None.
        ignore_index: rows with this label are not projected; their results are exactly 0.
        logit_scale, softcap, temperature: as above; softcap and temperature > 0.
        impl: "fused" (Triton), "chunked" (plain PyTorch tiles), "reference" (eager, full logits), or "auto": fused on
            a GPU, else chunked. An implementation asked for by name never falls back to another.

    Returns:
        TokenStats(logps (...), entropy (...)) in nats, fp32 (float64 for float64 inputs); both differentiable once in
        hidden, weight and bias (any number of times with "reference").

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or range, or a label is outside [0, V).
        RuntimeError: the implementation asked for cannot run here.
    """
    transform = _check_transform(logit_scale, softcap, temperature)
    _check_tensors(hidden, weight, labels, bias)
    keep = _labelled_rows(labels, weight.shape[0], ignore_index)
    logps, entropy, _, _ = _row_stats(hidden, weight, labels, bias, keep, None, transform, impl)
    return TokenStats(_scatter(logps, keep, labels.shape), _scatter(entropy, keep, labels.shape))


def linear_sequence_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> SequenceStats:
    """Summed log-probability, length and mean entropy of each sequence, without logits in memory.

    Args:
        hidden: (B, T, D) padded, or (N, D) packed together with cu_seqlens.
        weight: (V, D).
        labels: (B, T) or (N,) int64, already aligned, `ignore_index` where a token does not count.
        bias: (V,) or None.
        cu_seqlens: (B+1,) integer, 0 first and N last, not decreasing: sequence i is rows cu_seqlens[i] to
            cu_seqlens[i+1].
        ignore_index, logit_scale, softcap, temperature, impl: as in `linear_logps`.

    Returns:
        SequenceStats(logps (B,), lengths (B,) int64, entropy (B,)); an empty sequence gives 0, 0, 0.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logps`.
    """
    transform = _check_transform(logit_scale, softcap, temperature)
    _check_tensors(hidden, weight, labels, bias)
    ends = _sequence_ends(hidden, cu_seqlens)
    keep = _labelled_rows(labels, weight.shape[0], ignore_index)
    # Row counts before each sequence's start: offsets into the labelled rows alone.
    kept_before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    offsets = kept_before[ends]
    lengths = offsets.diff()
    _, _, logps, entropy = _row_stats(hidden, weight, labels, bias, keep, offsets, transform, impl)
    return SequenceStats(logps, lengths, entropy / lengths.clamp(min=1).to(entropy.dtype))


def _row_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    keep: Tensor,
    offsets: Tensor | None,
    transform: LogitTransform,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps and entropy of the kept rows (K,), and their sums between offsets (empty without offsets)."""
    impl = _choose(impl, hidden)
    rows, row_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if not bool(keep.all()):
        rows, row_labels = rows[keep], row_labels[keep]
    rows, weight, bias = _autocast(rows, weight, bias)
    if rows.shape[0] == 0:
        # Nothing to project; the products keep the result attached to the graph with zero gradients.
        empty = (rows.sum(-1) * weight[0, 0] * (1 if bias is None else bias[0])).to(_stats_dtype(rows))
        sums = empty.sum() + empty.new_zeros(0 if offsets is None else offsets.shape[0] - 1)
        return empty, empty, sums, sums
    with torch.autocast(rows.device.type, enabled=False):
        if impl == "fused":
            from fastpo.kernels import fused

            return fused.linear_logps_fused(rows, weight, row_labels, bias, transform, offsets)
        if impl == "chunked":
            logps, entropy = linear_logps_chunked(rows, weight, row_labels, bias, transform)
        else:
            logps, entropy = linear_logps_reference(
                rows, weight, row_labels, bias,
                logit_scale=transform.scale, softcap=transform.softcap, temperature=transform.temperature,
            )  # fmt: skip
    return logps, entropy, _segment_sum(logps, offsets), _segment_sum(entropy, offsets)


def _segment_sum(values: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        return values.new_empty(0)
    # Thousands of nats: fp32 partial sums would round away what the tokens are exact to.
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0).to(values.dtype)


def _scatter(values: Tensor, keep: Tensor, shape: torch.Size) -> Tensor:
    if values.shape[0] == keep.shape[0]:
        return values.view(shape)
    return values.new_zeros(keep.shape).masked_scatter(keep, values).view(shape)


def _stats_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, the operands that `torch.nn.functional.linear` would multiply there."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _choose(impl: Impl, hidden: Tensor) -> Impl:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    double = hidden.dtype == torch.float64
    has_triton = importlib.util.find_spec("triton") is not None
    if impl == "auto":
        return "fused" if hidden.is_cuda and has_triton and not double else "chunked"
    if impl == "fused":
        if double:
            raise RuntimeError("impl='fused' does not take float64; use impl='chunked' or 'reference'")
        if not has_triton:
            raise RuntimeError("impl='fused' needs triton, which is not installed")
        from fastpo.kernels import fused

        if not hidden.is_cuda and not fused.interpreting():
            raise RuntimeError(f"impl='fused' needs a GPU (or TRITON_INTERPRET=1), got tensors on {hidden.device}")
    return impl


def _check_transform(logit_scale: float, softcap: float | None, temperature: float) -> LogitTransform:
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value!r}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale!r}")
    return LogitTransform(float(logit_scale), softcap, float(temperature))


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    named = {"hidden": hidden, "weight": weight, "labels": labels, **({} if bias is None else {"bias": bias})}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be float64, float32, float16 or bfloat16, got {hidden.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have shape (..., D) with at least 2 dimensions, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    autocast = torch.is_autocast_enabled(hidden.device.type)  # then all are cast to one dtype
    for name in ("weight", "bias"):
        if name in named and named[name].dtype != hidden.dtype and not autocast:
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype}, got {named[name].dtype}")


def _labelled_rows(labels: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    """Mask of the flattened rows that count; raises where such a row's label is outside the vocabulary."""
    labels = labels.reshape(-1)
    keep = labels != ignore_index
    wrong = keep & ((labels < 0) | (labels >= vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"labels must lie in [0, {vocab_size}) or equal ignore_index={ignore_index}, got {labels[wrong][0].item()}"
        )
    return keep


def _sequence_ends(hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B+1,) int64 boundaries of the sequences in the flattened rows."""
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(f"hidden must have shape (B, T, D) without cu_seqlens, got {tuple(hidden.shape)}")
        batch, length = hidden.shape[:2]
        return torch.arange(batch + 1, device=hidden.device) * length
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {getattr(cu_seqlens, 'dtype', cu_seqlens)}")
    if hidden.dim() != 2 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have shape (B+1,) and hidden (N, D), got {tuple(cu_seqlens.shape)} and "
            f"{tuple(hidden.shape)}"
        )
    ends = cu_seqlens.to(device=hidden.device, dtype=torch.int64)
    if int(ends[0]) != 0 or int(ends[-1]) != hidden.shape[0] or bool((ends.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must start at 0, not decrease and end at N = {hidden.shape[0]}, got {cu_seqlens.tolist()}"
        )
    return ends
