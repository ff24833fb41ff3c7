"""`linear_logps`, `linear_sequence_stats` and their joint forms: validate, plan, call the op."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from fastpo.kernels.autograd import OPS_IN_PYTHON, Operands, Plan, Statistics, check_values, linear_statistics
from fastpo.kernels.mean_logits import mean_logits
from fastpo.kernels.tiles import LogitTransform, segment_sum
from fastpo.op_checks import (
    HeadOptions,
    Impl,
    Mode,
    Options,
    check_extras,
    check_options,
    check_tensors,
    sequence_ends,
)
from fastpo.reference import extras_reference, linear_kl_reference, linear_logps_reference
from fastpo.types import ExtendedSequenceStats, ExtendedTokenStats, JointStats, SequenceStats, TokenStats

# The custom ops of the head, and the Python code of each.
HEAD_OPS = OPS_IN_PYTHON


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    lora: tuple[Tensor, Tensor] | None = None,
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

    logits = softcap * tanh(logit_scale * x / softcap) / temperature; without a softcap, logit_scale * x / temperature,
    where x = hidden @ weight.T + projected @ lora_B.T + bias.

    Args:
        hidden: (..., D) fp32, bf16, fp16 or float64; any strides.
        weight: (V, D) the LM head, hidden's dtype; any strides.
        labels: (...) int64, already aligned: hidden[t] predicts labels[t].
        bias: (V,), hidden's dtype, or None.
        lora: the head's adapter: projected (..., r) = scaling * dropout(hidden) @ lora_A.T, through which autograd
            reaches lora_A and hidden, and lora_B (V, r); both in hidden's dtype. The head is never merged with it, and
            joined with it only a slice of the vocabulary at a time. None: no adapter.
        ignore_index: rows with this label are not projected; their results are exactly 0.
        logit_scale, softcap, temperature: as above; softcap and temperature > 0.
        impl: "fused" (Triton), "chunked" (plain PyTorch tiles), "reference" (eager, full logits), or "auto": fused on
            a GPU, else chunked. An implementation asked for by name never falls back to another.
        mode: how the gradient is computed. One GEMM unit is 2 N D V operations.
            "no_grad": 1 unit; the result is detached.
            "frozen": 2 units; for hidden and projected alone. The gradient of the log-probs is ready after the
                forward, which keeps an fp32 (N, D + r) tensor; one that reaches the entropy is recomputed, 2 further
                units.
            "lean": 4 units; the backward recomputes the logits by tiles. One less without weight's gradient (lora_B's
                is next to nothing), and one less without hidden's.
            "stash": 3 units (less, as in lean) on the rows whose V exponentials, in hidden's dtype, fit
                `memory_budget`; the rest as lean.
            "auto": no_grad where nothing wants a gradient, frozen where only hidden and projected do, else stash where
                a `memory_budget` is given, else lean.
        memory_budget: bytes that may be kept from forward to backward for "stash".
        skip_mass: tau in [0, 1). Above 0, the backward leaves out blocks of the vocabulary in which a row has a
            softmax mass of at most tau in all; the forward's results stay exact. With g the gradient of the row's
            log-prob and gain = logit_scale / temperature, the error of hidden's gradient is at most
            gain * |g| * tau * max_v |weight_v| in that row, and that of weight's gradient, summed over its rows'
            norms, gain * tau * sum_t |g_t| |hidden_t|; where the entropy carries a gradient g_H too, read |g| as
            |g| + |g_H| (log(V / tau) + entropy). For projected and lora_B read lora_B as weight and projected as
            hidden. "auto" is then lean. 0: exact.
        vocab_order: (V,) int64 permutation of the vocabulary, say by falling frequency, in which `skip_mass` forms
            its blocks: the more the likely tokens lie together, the more is left out. Not read for skip_mass = 0.
        extras: further constants. "log_sum_sq_probs", log sum_v p_v^2 (WPO's weights), for 1 GEMM unit more.
            "is_top1", whether no logit is larger than the label's: a tie counts; for nothing more. "mean_logits", the
            mean of the logits over the vocabulary, for one reading of the head, or under a softcap 1 GEMM unit more.

    Returns:
        TokenStats(logps (...), entropy (...)) in nats, fp32 (float64 for float64 inputs); both differentiable once in
        hidden, weight, bias, projected and lora_B (any number of times with "reference"). With extras,
        ExtendedTokenStats.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or range, a label is outside [0, V) (under
            CUDA-graph capture its result is NaN instead), or the mode cannot give the gradients that are wanted.
        RuntimeError: the implementation asked for cannot run here.
    """
    options = Options(
        ignore_index, logit_scale, softcap, temperature, impl, mode, memory_budget, skip_mass, vocab_order
    )
    check_extras(extras)
    stats = _statistics(hidden, None, weight, labels, bias, lora, None, False, options)
    found = TokenStats(stats.logps.view(labels.shape), stats.entropy.view(labels.shape))
    if not extras:
        return found
    further = _extras(extras, hidden, weight, labels, bias, lora, stats, options)
    # Typed for the many who pass no extras and unpack two.
    return cast(TokenStats, ExtendedTokenStats(*found, **{name: x.view(labels.shape) for name, x in further.items()}))


def linear_sequence_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
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
        lora, with projected (B, T, r) or (N, r), and all that follow: as in `linear_logps`.

    Returns:
        SequenceStats(logps (B,), lengths (B,) int64, entropy (B,)); an empty sequence gives 0, 0, 0. With extras,
        ExtendedSequenceStats.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logps`.
    """
    options = Options(
        ignore_index, logit_scale, softcap, temperature, impl, mode, memory_budget, skip_mass, vocab_order
    )
    check_extras(extras)
    ends = sequence_ends(hidden, cu_seqlens)
    stats = _statistics(hidden, None, weight, labels, bias, lora, ends, False, options)
    found = _sequences(stats.seq_logps, stats.seq_entropy, _counts(labels.reshape(-1) != ignore_index, ends))
    return _extended(found, ends, _extras(extras, hidden, weight, labels, bias, lora, stats, options))


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
    stats = _statistics(hidden, ref_hidden, weight, labels, bias, None, None, kl, chosen)
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
    extras: Sequence[str] = (),
    **options: Unpack[HeadOptions],
) -> JointStats[SequenceStats]:
    """`linear_sequence_stats` of a policy and of its reference in one pass, for models that share one LM head.

    Args:
        hidden, weight, labels, bias, cu_seqlens, extras: as in `linear_sequence_stats`; extras of the policy alone.
        ref_hidden, kl, **options: as in `joint_linear_logps`.

    Returns:
        JointStats(policy, reference: SequenceStats, kl (B,) summed over each sequence, or None).

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_logps`.
    """
    chosen = _joint_options("joint_linear_sequence_stats", options)
    check_extras(extras)
    ends = sequence_ends(hidden, cu_seqlens)
    stats = _statistics(hidden, ref_hidden, weight, labels, bias, None, ends, kl, chosen)
    lengths = _counts(labels.reshape(-1) != chosen.ignore_index, ends)
    further = _extras(extras, hidden, weight, labels, bias, None, stats, chosen)
    return JointStats(
        _extended(_sequences(stats.seq_logps, stats.seq_entropy, lengths), ends, further),
        _sequences(stats.ref_seq_logps, stats.ref_seq_entropy, lengths),
        stats.seq_kl if kl else None,
    )


def _joint_options(function: str, options: HeadOptions) -> Options:
    for name in options:
        if name not in HeadOptions.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return Options(**options)


def _counts(flags: Tensor, ends: Tensor) -> Tensor:
    """(S,) int64 how many of flags (M,) bool are set in each sequence."""
    return torch.nn.functional.pad(flags.cumsum(0), (1, 0))[ends].diff()


def _sequences(logps: Tensor, entropy: Tensor, lengths: Tensor) -> SequenceStats:
    return SequenceStats(logps, lengths, entropy / lengths.clamp(min=1).to(entropy.dtype))


def _statistics(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    ends: Tensor | None,
    kl: bool,
    options: Options,
) -> Statistics:
    check_options(options)
    check_tensors(hidden, ref_hidden, weight, labels, bias, lora, options.vocab_order)
    impl = _choose_impl(options.impl, hidden)
    projected, lora_b = (None, None) if lora is None else lora
    mode = _choose_mode(options, impl, rows=(hidden, projected), head=(weight, bias, lora_b))
    transform = _transform(options)
    operands = _operands(hidden, ref_hidden, weight, bias, lora)
    order = options.vocab_order if options.skip_mass > 0 else None
    with (
        torch.autocast(hidden.device.type, enabled=False),
        torch.set_grad_enabled(torch.is_grad_enabled() and mode != "no_grad"),
    ):
        if hasattr(weight, "device_mesh"):  # a DTensor, whose module takes a second to import
            stats = _sharded(operands, labels.reshape(-1), ends, order, _plan(options, transform, impl, mode, kl))
        elif impl == "reference":
            stats = _reference_statistics(operands, labels.reshape(-1), ends, transform, options.ignore_index, kl)
        else:
            stats = linear_statistics(
                operands, labels.reshape(-1), ends, order, _plan(options, transform, impl, mode, kl)
            )
    constants = {name: getattr(stats, name).detach() for name in Statistics._fields if name.startswith("ref_")}
    return stats._replace(**constants)


def _plan(options: Options, transform: LogitTransform, impl: Impl, mode: Mode, kl: bool) -> Plan:
    return Plan(
        *transform, options.ignore_index, impl, mode, options.memory_budget or 0, float(options.skip_mass), kl,
        static=torch.compiler.is_compiling(),
    )  # fmt: skip


def _sharded(operands: Operands, labels: Tensor, ends: Tensor | None, order: Tensor | None, plan: Plan) -> Statistics:
    """Under a head that is split over processes; see `fastpo.vocab_parallel`."""
    from fastpo.kernels.sharded import sharded_statistics

    if plan.impl == "reference" or order is not None or operands.lora_b is not None:
        raise ValueError(
            "a weight that is sharded over processes takes impl='fused' or 'chunked', and neither lora nor "
            f"vocab_order, got impl={plan.impl!r}{', a lora' * (operands.lora_b is not None)}"
            f"{', a vocab_order' * (order is not None)}"
        )
    return sharded_statistics(operands, labels, ends, plan)


def _extended(found: SequenceStats, ends: Tensor, further: dict[str, Tensor]) -> SequenceStats:
    """With the sums of extras (M,) over each sequence, where there are some."""
    if not further:
        return found
    sums = {name: segment_sum(x, ends) for name, x in further.items() if name != "is_top1"}
    if "is_top1" in further:
        sums["top1"] = _counts(further["is_top1"], ends)
    return cast(SequenceStats, ExtendedSequenceStats(*found, **sums))


@torch.no_grad()
def _extras(
    names: Sequence[str],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    stats: Statistics,
    options: Options,
) -> dict[str, Tensor]:
    """Name -> (M,) of each row, 0 or False where it is ignored."""
    if not names:
        return {}
    keep, transform = labels.reshape(-1) != options.ignore_index, _transform(options)
    operands = _operands(hidden, None, weight, bias, lora)
    if options.impl == "reference":
        return _reference_extras(names, operands, labels.reshape(-1), keep, transform)
    found = {}
    if "log_sum_sq_probs" in names:
        # The log-sum-exp of the doubled logits less twice that of the logits: no kernel has to know of it.
        halved = options._replace(temperature=options.temperature / 2, mode="auto", skip_mass=0.0, memory_budget=None)
        doubled = _statistics(hidden.detach(), None, weight, labels, bias, lora, None, False, halved)
        found["log_sum_sq_probs"] = doubled.lse - 2 * stats.lse
    if "is_top1" in names:
        found["is_top1"] = keep & (stats.label_logit >= stats.max_logit)
    if "mean_logits" in names:
        with torch.autocast(hidden.device.type, enabled=False):
            found["mean_logits"] = _mean_logits(operands, keep, transform)
    return found


def _mean_logits(operands: Operands, keep: Tensor, transform: LogitTransform) -> Tensor:
    if hasattr(operands.weight, "device_mesh"):
        from fastpo.kernels.sharded import sharded_mean_logits

        return sharded_mean_logits(operands, keep, transform)
    return mean_logits(*operands.differentiable, keep, *transform)


def _reference_statistics(
    operands: Operands,
    labels: Tensor,
    ends: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    kl: bool,
) -> Statistics:
    """The eager oracle, on the rows that count."""
    hidden, weight, bias, projected, lora_b, ref_hidden = operands
    check_values(labels, ends, None, weight.shape[0], ignore_index)
    keep = labels != ignore_index
    logit_options = _logit_options(transform)
    none = hidden.new_empty(0)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).masked_scatter(keep, values)

    def both(x: Tensor, lora: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = linear_logps_reference(x[keep], weight, labels[keep], bias, lora, **logit_options)
        tokens = [spread(s) for s in found]
        sums = [none if ends is None else segment_sum(s, ends) for s in tokens]
        return tokens[0], tokens[1], sums[0], sums[1]

    lora = None if projected is None or lora_b is None else (projected[keep], lora_b)
    logps, entropy, seq_logps, seq_entropy = both(hidden, lora)
    reference = (none,) * 4 if ref_hidden is None else both(ref_hidden, None)
    divergence = seq_divergence = none
    if kl:
        assert ref_hidden is not None
        divergence = spread(linear_kl_reference(hidden[keep], ref_hidden[keep], weight, bias, **logit_options))
        seq_divergence = none if ends is None else segment_sum(divergence, ends)
    return Statistics(logps, entropy, divergence, seq_logps, seq_entropy, seq_divergence, *reference, *[none] * 8)


def _reference_extras(
    names: Sequence[str], operands: Operands, labels: Tensor, keep: Tensor, transform: LogitTransform
) -> dict[str, Tensor]:
    hidden, weight, bias, projected, lora_b, _ = operands
    lora = None if projected is None or lora_b is None else (projected[keep], lora_b)
    every = extras_reference(hidden[keep], weight, labels[keep], bias, lora, **_logit_options(transform))
    return {name: every[name].new_zeros(keep.shape).masked_scatter(keep, every[name]) for name in names}


def _logit_options(transform: LogitTransform) -> dict[str, Any]:
    return {"logit_scale": transform.scale, "softcap": transform.softcap, "temperature": transform.temperature}


def _transform(options: Options) -> LogitTransform:
    softcap = None if options.softcap is None else float(options.softcap)
    return LogitTransform(float(options.logit_scale), softcap, float(options.temperature))


def _operands(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
) -> Operands:
    """The rows flattened, and under autocast in the dtype that `torch.nn.functional.linear` would multiply there."""
    projected, lora_b = (None, None) if lora is None else lora
    ref_hidden = None if ref_hidden is None else ref_hidden.detach().flatten(0, -2)
    projected = None if projected is None else projected.flatten(0, -2)
    operands = Operands(hidden.flatten(0, -2), weight, bias, projected, lora_b, ref_hidden)
    device = operands.hidden.device.type
    if not torch.is_autocast_enabled(device) or operands.hidden.dtype == torch.float64:
        return operands
    dtype = torch.get_autocast_dtype(device)
    return Operands(*cast(Any, (None if x is None else x.to(dtype) for x in operands)))


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


def _choose_mode(
    options: Options, impl: Impl, *, rows: tuple[Tensor | None, ...], head: tuple[Tensor | None, ...]
) -> Mode:
    mode, skips = options.mode, options.skip_mass > 0
    wants_rows, wants_head = (any(x is not None and x.requires_grad for x in part) for part in (rows, head))
    if impl == "reference" and (mode not in ("auto", "no_grad") or skips):
        raise ValueError(f"impl='reference' knows no mode and no skip_mass, got mode={mode!r}, skip_mass={skips}")
    if mode == "auto":
        if not torch.is_grad_enabled() or not (wants_head or wants_rows):
            return "no_grad"
        if skips:
            return "lean"
        if not wants_head:
            return "frozen"
        return "lean" if options.memory_budget is None else "stash"
    if mode == "frozen" and wants_head and torch.is_grad_enabled():
        raise ValueError("mode='frozen' gives no gradient to weight, bias and lora_B, of which one requires it")
    return mode
