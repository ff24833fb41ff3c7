"""Launchers and autograd function of the Triton kernels: statistics in one pass, gradients by vocabulary slices."""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from fastpo.kernels.configs import REDUCE_CONSTEXPRS, REDUCE_WARPS, tile_config
from fastpo.kernels.linear_logps import (
    linear_logps_bwd_kernel,
    linear_logps_fwd_kernel,
    linear_logps_reduce_kernel,
)
from fastpo.kernels.tiles import LogitTransform, mm_into, refuse_double_backward

# Rows that one program of the reduction handles when no sequences are given.
TOKENS_PER_SEGMENT = 32
# Elements of one slice of logits gradients: 64 MB in 16-bit, and still a large GEMM.
SLICE_ELEMENTS = 1 << 25
MAX_COLS = 8192


def interpreting() -> bool:
    """Whether Triton runs in its interpreter (TRITON_INTERPRET=1 when it was imported), which takes CPU tensors."""
    return not isinstance(linear_logps_fwd_kernel, triton.JITFunction)


def linear_logps_fused(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of N rows and, from the same pass, their sums over S sequences.

    Args:
        hidden: (N, D) fp32, fp16 or bf16, any strides.
        weight: (V, D), the same dtype, any strides.
        labels: (N,) int64, all in [0, V).
        bias: (V,) or None.
        transform: from raw projections to logits.
        offsets: (S+1,) int64: sequence i is rows offsets[i] to offsets[i+1]. None: blocks of rows.

    Returns:
        logps (N,), entropy (N,), sequence sums of each (S,): all fp32; differentiable once.
    """
    if offsets is None:
        n = hidden.shape[0]
        offsets = torch.arange(0, n + TOKENS_PER_SEGMENT, TOKENS_PER_SEGMENT, device=hidden.device).clamp_(max=n)
    with _device_of(hidden):
        return _LinearLogps.apply(hidden, weight, labels, bias, transform, offsets)


def _gemm_arguments(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> dict[str, Any]:
    """Arguments that both GEMM kernels take."""
    config = tile_config(hidden.device, hidden.dtype)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": hidden if bias is None else bias,
        "N": hidden.shape[0],
        "V": weight.shape[0],
        "D": hidden.shape[1],
        "stride_hn": hidden.stride(0),
        "stride_hd": hidden.stride(1),
        "stride_wv": weight.stride(0),
        "stride_wd": weight.stride(1),
        "scale": float(transform.scale),
        "softcap": 1.0 if transform.softcap is None else float(transform.softcap),
        "inv_temperature": 1.0 / transform.temperature,
        "EVEN_D": hidden.shape[1] % config.BLOCK_D == 0,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
        **config.constexprs(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _grid(arguments: dict[str, Any]) -> tuple[int]:
    tiles_n = triton.cdiv(arguments["N"], arguments["BLOCK_N"])
    return (tiles_n * triton.cdiv(arguments["V"], arguments["BLOCK_V"]),)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'; in a backward, autograd sees to it."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _operand(x: Tensor) -> Tensor:
    """The interpreter multiplies bf16 wrongly, so it gets fp32; a GPU gets the tensor as it is."""
    return x.float() if interpreting() else x


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        offsets: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.transform = transform
        n, sequences = hidden.shape[0], offsets.shape[0] - 1
        labels = labels.to(torch.int32)
        # Apart, not slices of one tensor: autograd refuses in-place changes of such views.
        logps, entropy, lse = (hidden.new_empty(n, dtype=torch.float32) for _ in range(3))
        seq_logps, seq_entropy = (hidden.new_empty(sequences, dtype=torch.float32) for _ in range(2))
        label_logit = hidden.new_full((n,), torch.nan, dtype=torch.float32)
        arguments = _gemm_arguments(_operand(hidden), _operand(weight), bias, transform)
        tiles = triton.cdiv(weight.shape[0], arguments["BLOCK_V"])
        partials = hidden.new_empty((3, tiles, n), dtype=torch.float32)
        linear_logps_fwd_kernel[_grid(arguments)](
            labels=labels, part_max=partials[0], part_sum=partials[1], part_moment=partials[2],
            label_logit=label_logit, **arguments,
        )  # fmt: skip
        linear_logps_reduce_kernel[(sequences,)](
            *partials, label_logit, offsets, logps, entropy, lse, seq_logps, seq_entropy, n, tiles,
            **REDUCE_CONSTEXPRS, num_warps=REDUCE_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, labels, bias, offsets, lse, entropy)
        return logps, entropy, seq_logps, seq_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, labels, bias, offsets, lse, entropy = ctx.saved_tensors
        grad_logps = _token_gradient(grads[0], grads[2], offsets, lse)
        grad_entropy = _token_gradient(grads[1], grads[3], offsets, lse)
        needs_hidden, needs_weight, _, needs_bias, _, _ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        d_bias = torch.empty_like(bias) if needs_bias else None
        n, v = hidden.shape[0], weight.shape[0]
        operand = _operand(hidden)
        width = min(v, MAX_COLS, max(256, SLICE_ELEMENTS // n // 256 * 256))
        buffer = operand.new_empty(n * width)
        for first in range(0, v, width):
            cols = slice(first, min(first + width, v))
            w = _operand(weight[cols])
            grad = buffer[: n * w.shape[0]].view(n, w.shape[0])
            arguments = _gemm_arguments(operand, w, None if bias is None else bias[cols], ctx.transform)
            linear_logps_bwd_kernel[_grid(arguments)](
                labels=labels, lse=lse, entropy=entropy, grad_logps=lse if grad_logps is None else grad_logps,
                grad_entropy=lse if grad_entropy is None else grad_entropy, grad_x=grad, first_col=first,
                stride_gn=grad.stride(0), HAS_LOGPS=grad_logps is not None,
                HAS_ENTROPY=grad_entropy is not None, **arguments,
            )  # fmt: skip
            if d_hidden is not None:
                mm_into(d_hidden, grad, w, accumulate=True)
            if d_weight is not None:
                slice_grad = torch.empty_like(w, dtype=torch.float32)
                mm_into(slice_grad, grad.t(), operand)
                d_weight[cols] = slice_grad
            if d_bias is not None:
                d_bias[cols] = grad.sum(0, dtype=torch.float32)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, d_bias, None, None


def _token_gradient(tokens: Tensor | None, sequences: Tensor | None, offsets: Tensor, like: Tensor) -> Tensor | None:
    """Gradient of each row's statistic: its own plus its sequence's."""
    if sequences is not None:
        spread = sequences.repeat_interleave(offsets.diff(), output_size=like.shape[0])
        tokens = spread if tokens is None else tokens + spread
    return None if tokens is None else tokens.contiguous()
