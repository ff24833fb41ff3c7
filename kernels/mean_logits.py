"""The mean over the vocabulary of each row's logits: a constant, made without the logits in memory."""

import torch
from torch import Tensor

from fastpo.kernels.chunked import logit_sums
from fastpo.kernels.tiles import LogitTransform, Problem, accumulator_dtype, capturing, join


@torch.library.custom_op("fastpo::mean_logits", mutates_args=())
def mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projected: Tensor | None,
    lora_b: Tensor | None,
    keep: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """(M,) fp32 (float64 for float64), 0 outside of keep (M,) bool; the operands as in `fastpo.kernels.autograd`.

    Without a softcap it is each row times the sum of the head's rows; with one, a GEMM unit.
    """
    means = hidden.new_zeros(keep.shape, dtype=accumulator_dtype(hidden.dtype))
    where = slice(None) if capturing() else keep.nonzero()[:, 0]
    rows = hidden[where]
    if rows.shape[0] == 0:
        return means
    if projected is not None:
        rows = join(rows, projected[where], hidden.shape[1] + projected.shape[1])
    transform = LogitTransform(scale, softcap, temperature)
    means[where] = logit_sums(Problem(rows, weight, bias, keep, transform, lora_b=lora_b)) / weight.shape[0]
    return means.masked_fill_(~keep, 0)


@mean_logits.register_fake
def _(hidden, weight, bias, projected, lora_b, keep, *transform):  # type: ignore[no-untyped-def]
    return hidden.new_empty(keep.shape, dtype=accumulator_dtype(hidden.dtype))
