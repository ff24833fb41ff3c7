"""Device functions that the Triton kernels share: which tile is mine, its projection, its logits."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Stands for -inf: finite, so that a fully masked tile gives 0 and not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def tanh(x):
    """tanh without libdevice (the interpreter has none): a series near 0, where the quotient would cancel."""
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    quotient = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.0625, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def tile_index(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """Row tile and column tile of a program: GROUP row tiles share a column of the head while it is in the cache."""
    per_group = GROUP * num_cols
    first = (pid // per_group) * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def project(
    hidden, weight, row0, col0, N, V, D, stride_hn, stride_wv,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Raw projections x (BLOCK_N, BLOCK_V), fp32; rows and columns past the end hold anything finite.

    With TMA hidden and weight are tensor descriptors of (BLOCK_N, BLOCK_D) and (BLOCK_V, BLOCK_D) blocks, which read 0
    past the end; else pointers, and the last row or column is repeated. Both have an inner stride of 1.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if TMA:
        for k0 in range(0, D, BLOCK_D):
            acc = tl.dot(hidden.load([row0, k0]), weight.load([col0, k0]).T, acc, input_precision=PRECISION)
    else:
        ks = tl.arange(0, BLOCK_D)
        rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), N - 1)
        cols = tl.minimum(col0 + tl.arange(0, BLOCK_V), V - 1)
        h_rows = hidden + rows.to(tl.int64)[:, None] * stride_hn
        w_rows = weight + cols.to(tl.int64)[None, :] * stride_wv
        for k0 in range(0, D, BLOCK_D):
            k = k0 + ks
            if EVEN_D:
                h = tl.load(h_rows + k[None, :])
                w = tl.load(w_rows + k[:, None])
            else:
                h = tl.load(h_rows + k[None, :], mask=k[None, :] < D, other=0.0)
                w = tl.load(w_rows + k[:, None], mask=k[:, None] < D, other=0.0)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def to_logits(x, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    if HAS_BIAS:
        x += tl.load(bias + tl.minimum(cols, V - 1)).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = tanh(x * (scale / softcap)) * (softcap * inv_temperature)
    else:
        z = x * (scale * inv_temperature)
    if HAS_BIAS:
        # Not -inf, but still NaN: a NaN that became a number would cost nothing and go unseen.
        z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return z
