"""`linear_logps`, `linear_sequence_stats` and their joint forms: validate, plan, call the op."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, cast

import torch
from torch import Tensor

from fastpo.kernels.autograd import OPS_IN_PYTHON, Plan, Statistics, check_values, linear_statistics
from fastpo.kernels.tiles import LogitTransform, segment_sum
from fastpo.reference import linear_kl_reference, linear_logps_reference, log_sum_sq_probs_reference
from fastpo.types import ExtendedSequenceStats, ExtendedTokenStats, JointStats, SequenceStats, TokenStats

Impl = Literal["auto", "fused", "chunked", "reference"]
Mode = Literal["auto", "no_grad", "frozen", "lean", "stash"]
IMPLEMENTATIONS = ("auto", "fused", "chunked", "reference")
MODES = ("auto", "no_grad", "frozen", "lean", "stash")
EXTRAS = ("log_sum_sq_probs",)
# The custom ops of the head, and the Python code of each.
HEAD_OPS = OPS_IN_PYTHON
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Options(NamedTuple):
    """The keywords that every function here takes."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    impl: Impl = "auto"
    mode: Mode = "auto"
    memory_budget: int | None = None
    skip_mass: float = 0.0
    vocab_order: Tensor | None = None


class HeadOptions(TypedDict, total=False):
    """Keywords of the joint functions, as in `linear_logps`."""

    ignore_index: int
    logit_scale: float
    softcap: float | None
    temperature: float
    impl: Impl
    mode: Mode
    memory_budget: int | None


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
    mode: Mode = "auto",
    memory_budget: int | None = None,
    skip_mass: float = 0.0,
    vocab_order: Tensor | None = None,
    extras: Sequence[str] = (),
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
        mode: how the gradient is computed. One GEMM unit is 2 N D V operations.
            "no_grad": 1 unit; the result is detached.
            "frozen": 2 units; for hidden alone. The gradient of the log-probs is ready after the forward, which keeps
                an fp32 (N, D) tensor; one that reaches the entropy is recomputed, 2 further units.
            "lean": 4 units (3 without weight's gradient); the backward recomputes the logits by tiles.
            "stash": 3 units (2 without weight's gradient) on the rows whose V exponentials, in hidden's dtype, fit
                `memory_budget`; the rest as lean.
            "auto": no_grad where nothing wants a gradient, frozen where only hidden does, else stash where a
                `memory_budget` is given, else lean.
        memory_budget: bytes that may be kept from forward to backward for "stash".
        skip_mass: tau in [0, 1). Above 0, the backward leaves out blocks of the vocabulary in which a row has a
            softmax mass of at most tau in all; the forward's results stay exact. With g the gradient of the row's
            log-prob and gain = logit_scale / temperature, the error of hidden's gradient is at most
            gain * |g| * tau * max_v |weight_v| in that row, and that of weight's gradient, summed over its rows'
            norms, gain * tau * sum_t |g_t| |hidden_t|; where the entropy carries a gradient g_H too, read |g| as
            |g| + |g_H| (log(V / tau) + entropy). "auto" is then lean. 0: exact.
        vocab_order: (V,) int64 permutation of the vocabulary, say by falling frequency, in which `skip_mass` forms
            its blocks: the more the likely tokens lie together, the more is left out. Not read for skip_mass = 0.
        extras: further constants for 1 GEMM unit more: "log_sum_sq_probs", log sum_v p_v^2 (WPO's weights).

    Returns:
        TokenStats(logps (...), entropy (...)) in nats, fp32 (float64 for float64 inputs); both differentiable once in
        hidden, weight and bias (any number of times with "reference"). With extras, ExtendedTokenStats.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or range, a label is outside [0, V) (under
            CUDA-graph capture its result is NaN instead), or the mode cannot give the gradients that are wanted.
        RuntimeError: the implementation asked for cannot run here.
    """
    options = _Options(
        ignore_index, logit_scale, softcap, temperature, impl, mode, memory_budget, skip_mass, vocab_order
    )
    _check_extras(extras)
    stats = _statistics(hidden, None, weight, labels, bias, None, False, options)
    found = TokenStats(stats.logps.view(labels.shape), stats.entropy.view(labels.shape))
    if not extras:
        return found
    squares = _log_sum_sq_probs(hidden, weight, labels, bias, stats, options)
    # Typed for the many who pass no extras and unpack two.
    return cast(TokenStats, ExtendedTokenStats(*found, squares.view(labels.shape)))


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
    mode: Mode = "auto",
    memory_budget: int | None = None,
    skip_mass: float = 0.0,
    vocab_order: Tensor | None = None,
    extras: Sequence[str] = (),
) -> SequenceStats:
    """Summed log-probability, length and mean entropy of each sequence, without logits in memory.

    Args:
        hidden: (B, T, D) padded, or (N, D) packed together with cu_seqlens.
        weight: (V, D).
        labels: (B, T) or (N,) int64, already aligned, `ignore_index` where a token does not count.
        bias: (V,) or None.
        cu_seqlens: (B+1,) integer, 0 first and N last, not decreasing: sequence i is rows cu_seqlens[i] to
            cu_seqlens[i+1].
        ignore_index and all that follow: as in `linear_logps`.

    Returns:
        SequenceStats(logps (B,), lengths (B,) int64, entropy (B,)); an empty sequence gives 0, 0, 0. With extras,
        ExtendedSequenceStats.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logps`.
    """
    options = _Options(
        ignore_index, logit_scale, softcap, temperature, impl, mode, memory_budget, skip_mass, vocab_order
    )
    _check_extras(extras)
    ends = _sequence_ends(hidden, cu_seqlens)
    stats = _statistics(hidden, None, weight, labels, bias, ends, False, options)
    found = _sequences(stats.seq_logps, stats.seq_entropy, _lengths(labels, ends, ignore_index))
    if not extras:
        return found
    squares = _log_sum_sq_probs(hidden, weight, labels, bias, stats, options)
    return cast(SequenceStats, ExtendedSequenceStats(*found, segment_sum(squares, ends)))


def joint_linear_logps(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    kl: bool = False,
    **options: Unpack[HeadOptions],
) -> JointStats[TokenStats]:
    """`linear_logps` of a policy and of its reference in one pass, for models that share one LM head.

    Args:
        hidden: (..., D) of the policy.
        ref_hidden: (..., D) of the reference on the same tokens; a constant, as is all that comes from it.
        weight, labels, bias: as in `linear_logps`.
        kl: also compute KL(policy || reference) over the vocabulary at each token, exactly.
        **options: as in `linear_logps`; there is no skipping here.

    Returns:
        JointStats(policy, reference: TokenStats, kl (...) or None).

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logps`.
    """
    chosen = _joint_options("joint_linear_logps", options)
    stats = _statistics(hidden, ref_hidden, weight, labels, bias, None, kl, chosen)
    policy, reference, divergence = (
        [x.view(labels.shape) for x in group]
        for group in ((stats.logps, stats.entropy), (stats.ref_logps, stats.ref_entropy), (stats.kl,) * kl)
    )
    return JointStats(TokenStats(*policy), TokenStats(*reference), divergence[0] if kl else None)


def joint_linear_sequence_stats(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    kl: bool = False,
    **options: Unpack[HeadOptions],
) -> JointStats[SequenceStats]:
    """`linear_sequence_stats` of a policy and of its reference in one pass, for models that share one LM head.

    Args:
        hidden, weight, labels, bias, cu_seqlens: as in `linear_sequence_stats`.
        ref_hidden, kl, **options: as in `joint_linear_logps`.

    Returns:
        JointStats(policy, reference: SequenceStats, kl (B,) summed over each sequence, or None).

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logps`.
    """
    chosen = _joint_options("joint_linear_sequence_stats", options)
    ends = _sequence_ends(hidden, cu_seqlens)
    stats = _statistics(hidden, ref_hidden, weight, labels, bias, ends, kl, chosen)
    lengths = _lengths(labels, ends, chosen.ignore_index)
    policy = _sequences(stats.seq_logps, stats.seq_entropy, lengths)
    return JointStats(
        policy, _sequences(stats.ref_seq_logps, stats.ref_seq_entropy, lengths), stats.seq_kl if kl else None
    )


def _joint_options(function: str, options: HeadOptions) -> _Options:
    for name in options:
        if name not in HeadOptions.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return _Options(**options)


def _lengths(labels: Tensor, ends: Tensor, ignore_index: int) -> Tensor:
    counted_before = torch.nn.functional.pad((labels.reshape(-1) != ignore_index).cumsum(0), (1, 0))
    return counted_before[ends].diff()


def _sequences(logps: Tensor, entropy: Tensor, lengths: Tensor) -> SequenceStats:
    return SequenceStats(logps, lengths, entropy / lengths.clamp(min=1).to(entropy.dtype))


def _statistics(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ends: Tensor | None,
    kl: bool,
    options: _Options,
) -> Statistics:
    transform = _check_options(options)
    _check_tensors(hidden, ref_hidden, weight, labels, bias, options.vocab_order)
    impl = _choose_impl(options.impl, hidden)
    mode = _choose_mode(options, impl, hidden, weight, bias)
    rows = hidden.reshape(-1, hidden.shape[-1])
    ref_rows = None if ref_hidden is None else ref_hidden.detach().reshape(rows.shape)
    rows, ref_rows, weight, bias = _autocast(rows, ref_rows, weight, bias)
    order = options.vocab_order if options.skip_mass > 0 else None
    inputs = (rows, weight, labels.reshape(-1), bias, ref_rows, ends)
    with (
        torch.autocast(rows.device.type, enabled=False),
        torch.set_grad_enabled(torch.is_grad_enabled() and mode != "no_grad"),
    ):
        if impl == "reference":
            stats = _reference_statistics(*inputs, transform, options.ignore_index, kl)
        else:
            plan = Plan(
                *transform, options.ignore_index, impl, mode, options.memory_budget or 0, float(options.skip_mass), kl,
                static=torch.compiler.is_compiling(),
            )  # fmt: skip
            stats = linear_statistics(*inputs, order, plan)
    constants = {name: getattr(stats, name).detach() for name in Statistics._fields if name.startswith("ref_")}
    return stats._replace(**constants)


@torch.no_grad()
def _log_sum_sq_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, stats: Statistics, options: _Options
) -> Tensor:
    """log sum_v p_v^2 of each row (M,), 0 where it is ignored.

    It is the log-sum-exp of the doubled logits less twice that of the logits, so one more forward at half the
    temperature does: no kernel has to know of it.
    """
    halved = options._replace(temperature=options.temperature / 2, mode="auto", skip_mass=0.0, memory_budget=None)
    if options.impl != "reference":
        doubled = _statistics(hidden.detach(), None, weight, labels, bias, None, False, halved)
        return doubled.lse - 2 * stats.lse
    keep = labels.reshape(-1) != options.ignore_index
    rows = hidden.reshape(-1, hidden.shape[-1])[keep]
    logit_options = {name: getattr(options, name) for name in ("logit_scale", "softcap", "temperature")}
    squares = log_sum_sq_probs_reference(rows, weight, bias, **logit_options)
    return squares.new_zeros(keep.shape).masked_scatter(keep, squares)


def _reference_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ends: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    kl: bool,
) -> Statistics:
    """The eager oracle, on the rows that count."""
    check_values(labels, ends, None, weight.shape[0], ignore_index)
    keep = labels != ignore_index
    logit_options: dict[str, Any] = {
        "logit_scale": transform.scale,
        "softcap": transform.softcap,
        "temperature": transform.temperature,
    }
    none = hidden.new_empty(0)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).masked_scatter(keep, values)

    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = [spread(s) for s in linear_logps_reference(x[keep], weight, labels[keep], bias, **logit_options)]
        sums = [none if ends is None else segment_sum(s, ends) for s in tokens]
        return tokens[0], tokens[1], sums[0], sums[1]

    logps, entropy, seq_logps, seq_entropy = both(hidden)
    reference = (none,) * 4 if ref_hidden is None else both(ref_hidden)
    divergence = seq_divergence = none
    if kl:
        assert ref_hidden is not None
        divergence = spread(linear_kl_reference(hidden[keep], ref_hidden[keep], weight, bias, **logit_options))
        seq_divergence = none if ends is None else segment_sum(divergence, ends)
    return Statistics(logps, entropy, divergence, seq_logps, seq_entropy, seq_divergence, *reference, *[none] * 6)


def _autocast(
    hidden: Tensor, ref_hidden: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Under autocast, the operands that `torch.nn.functional.linear` would multiply there."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, ref_hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    rest = (None if x is None else x.to(dtype) for x in (ref_hidden, bias))
    return hidden.to(dtype), next(rest), weight.to(dtype), next(rest)


def _choose_impl(impl: Impl, hidden: Tensor) -> Impl:
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


def _choose_mode(options: _Options, impl: Impl, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Mode:
    mode, skips = options.mode, options.skip_mass > 0
    wants_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if impl == "reference" and (mode not in ("auto", "no_grad") or skips):
        raise ValueError(f"impl='reference' knows no mode and no skip_mass, got mode={mode!r}, skip_mass={skips}")
    if mode == "auto":
        if not torch.is_grad_enabled() or not (wants_head or hidden.requires_grad):
            return "no_grad"
        if skips:
            return "lean"
        if not wants_head:
            return "frozen"
        return "lean" if options.memory_budget is None else "stash"
    if mode == "frozen" and wants_head and torch.is_grad_enabled():
        raise ValueError("mode='frozen' gives no gradient to weight and bias, of which one requires it")
    return mode


def _check_extras(extras: Sequence[str]) -> None:
    if isinstance(extras, str) or any(name not in EXTRAS for name in extras):
        raise ValueError(f"extras must be a sequence of names from {', '.join(EXTRAS)}, got {extras!r}")


def _check_options(options: _Options) -> LogitTransform:
    _, scale, softcap, temperature, impl, mode, budget, skip_mass, _ = options
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value!r}")
    if not math.isfinite(scale):
        raise ValueError(f"logit_scale must be finite, got {scale!r}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
        raise ValueError(f"memory_budget must be a whole number of bytes >= 0, got {budget!r}")
    if mode == "stash" and budget is None:
        raise ValueError("mode='stash' needs memory_budget, the bytes that it may keep; got None")
    if not 0 <= skip_mass < 1:
        raise ValueError(f"skip_mass must lie in [0, 1), got {skip_mass!r}")
    if skip_mass > 0 and (mode in ("frozen", "stash") or budget is not None):
        raise ValueError(
            f"skip_mass recomputes what it does not skip: it goes with mode='lean' and no memory_budget, "
            f"got mode={mode!r}, memory_budget={budget!r}"
        )
    return LogitTransform(float(scale), None if softcap is None else float(softcap), float(temperature))


def _check_tensors(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    vocab_order: Tensor | None,
) -> None:
    named = {"hidden": hidden, "weight": weight, "labels": labels}
    optional = {"ref_hidden": ref_hidden, "bias": bias, "vocab_order": vocab_order}
    named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be float64, float32, float16 or bfloat16, got {hidden.dtype}")
    for name in ("labels", "vocab_order"):
        if name in named and named[name].dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {named[name].dtype}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have shape (..., D) with at least 2 dimensions, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    vocab_size = weight.shape[0]
    expected = {
        "labels": hidden.shape[:-1],
        "ref_hidden": hidden.shape,
        "bias": (vocab_size,),
        "vocab_order": (vocab_size,),
    }
    for name, shape in expected.items():
        if name in named and named[name].shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(named[name].shape)}")
    autocast = torch.is_autocast_enabled(hidden.device.type)  # then all are cast to one dtype
    for name in ("ref_hidden", "weight", "bias"):
        if name in named and named[name].dtype != hidden.dtype and not autocast:
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype}, got {named[name].dtype}")


def _sequence_ends(hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B+1,) int64 boundaries of the sequences in the flattened rows; the op checks their values."""
    if cu_seqlens is None:
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise ValueError(
                f"hidden must have shape (B, T, D) without cu_seqlens, got {tuple(getattr(hidden, 'shape', ()))}"
            )
        batch, length = hidden.shape[:2]
        return torch.arange(batch + 1, device=hidden.device) * length
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {getattr(cu_seqlens, 'dtype', cu_seqlens)}")
    if hidden.dim() != 2 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have shape (B+1,) and hidden (N, D), got {tuple(cu_seqlens.shape)} and "
            f"{tuple(hidden.shape)}"
        )
    return cu_seqlens.to(device=hidden.device, dtype=torch.int64)
