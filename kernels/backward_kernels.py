"""Triton kernels of the backward: the gradient of the logits, from a recomputed tile or from a stashed one.

With p the softmax, H the entropy, K = KL(p || q) and upstream gradients g, g_H, g_K of a row:

    d loss / d x = (g (1[v = y] - p) - g_H p (log p + H) + g_K p (log p - log q - K)) d z / d x

The products with the head and with the hidden states are the vendor's GEMMs, but for a backward that skips tiles.
"""

import triton
import triton.language as tl

from fastpo.kernels.device import LOG2E, project, tile_index, to_logits


@triton.jit
def _logits_grad(
    z, z_ref, rows, cols, N, labels, lse, entropy, ref_lse, kl, grad_logps, grad_entropy, grad_kl,
    first_col, scale, softcap, inv_temperature,
    HAS_SOFTCAP: tl.constexpr, HAS_LOGPS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KL: tl.constexpr,
):  # fmt: skip
    in_range = rows < N
    row_lse = tl.load(lse + rows, mask=in_range, other=0.0)
    logp = z - row_lse[:, None]
    p = tl.exp2(logp * LOG2E)
    if HAS_LOGPS:
        g = tl.load(grad_logps + rows, mask=in_range, other=0.0)
        if HAS_ENTROPY:
            g_h = tl.load(grad_entropy + rows, mask=in_range, other=0.0)
            h = tl.load(entropy + rows, mask=in_range, other=0.0)
            factor = -g[:, None] - g_h[:, None] * (logp + h[:, None])
        else:
            factor = -g[:, None]
    else:
        if HAS_ENTROPY:
            g_h = tl.load(grad_entropy + rows, mask=in_range, other=0.0)
            h = tl.load(entropy + rows, mask=in_range, other=0.0)
            factor = -g_h[:, None] * (logp + h[:, None])
        else:
            factor = tl.zeros_like(logp)
    if HAS_KL:
        g_k = tl.load(grad_kl + rows, mask=in_range, other=0.0)
        offset = tl.load(ref_lse + rows, mask=in_range, other=0.0) - row_lse
        offset -= tl.load(kl + rows, mask=in_range, other=0.0)
        factor += g_k[:, None] * (z - z_ref + offset[:, None])
    grad = p * factor
    if HAS_LOGPS:
        label = tl.load(labels + rows, mask=in_range, other=-1) - first_col
        grad = tl.where(label[:, None] == cols[None, :], grad + g[:, None], grad)
    if HAS_SOFTCAP:
        t = z * (1.0 / (softcap * inv_temperature))
        grad *= 1.0 - t * t
    return grad * (scale * inv_temperature)


@triton.jit
def backward_kernel(
    hidden, ref_hidden, weight, bias, labels, lse, entropy, ref_lse, kl, grad_logps, grad_entropy, grad_kl,
    keep, grad_x,
    first_col, N, V, D, stride_hn, stride_rn, stride_wv, stride_gn, stride_keep,
    scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, HAS_LOGPS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KL: tl.constexpr,
    SKIPS: tl.constexpr,
):  # fmt: skip
    """grad_x (N, V) = d loss / d x of the vocabulary slice that starts at first_col; weight and bias are that slice's.

    One program a tile. With SKIPS, tiles whose keep (V / BLOCK_V, N / BLOCK_N) int8 is 0 are neither computed nor
    written.
    """
    row_tile, col_tile = tile_index(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    if SKIPS:
        if tl.load(keep + col_tile * stride_keep + row_tile) == 0:
            return
    row0, col0 = row_tile * BLOCK_N, col_tile * BLOCK_V
    rows, cols = row0 + tl.arange(0, BLOCK_N), col0 + tl.arange(0, BLOCK_V)
    x = project(
        hidden, weight, row0, col0, N, V, D,
        stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION, TMA,
    )  # fmt: skip
    z = to_logits(x, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
    z_ref = z
    if HAS_KL:
        y = project(
            ref_hidden, weight, row0, col0, N, V, D,
            stride_rn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION, TMA,
        )  # fmt: skip
        z_ref = to_logits(y, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
    grad = _logits_grad(
        z, z_ref, rows, cols, N, labels, lse, entropy, ref_lse, kl, grad_logps, grad_entropy, grad_kl,
        first_col, scale, softcap, inv_temperature, HAS_SOFTCAP, HAS_LOGPS, HAS_ENTROPY, HAS_KL,
    )  # fmt: skip
    at = grad_x + rows.to(tl.int64)[:, None] * stride_gn + cols[None, :]
    tl.store(at, grad.to(grad_x.dtype.element_ty), mask=(rows < N)[:, None] & (cols[None, :] < V))


@triton.jit
def stash_backward_kernel(
    stash, peak, labels, lse, entropy, grad_logps, grad_entropy, grad_x,
    first_col, N, V, stride_sn, stride_pt, stride_gn, scale, softcap, inv_temperature,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILE_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LOGPS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """`backward_kernel` from stash (N, V) = e^(z - peak): a pass over memory, no product.

    peak (V / TILE_V, N) fp32 belongs to the forward's tiles. log p is off by the stash's rounding (2^-9 in bf16),
    which only the entropy's gradient and a softcap's slope see.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (cols < V)[None, :]
    at = rows.to(tl.int64)[:, None]
    scaled = tl.load(stash + at * stride_sn + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tile = (cols // TILE_V).to(tl.int64)[None, :]
    shift = tl.load(peak + tile * stride_pt + at, mask=inside, other=0.0)
    z = tl.log(tl.maximum(scaled, 1.1754943508222875e-38)) + shift
    grad = _logits_grad(
        z, z, rows, cols, N, labels, lse, entropy, lse, lse, grad_logps, grad_entropy, grad_logps,
        first_col, scale, softcap, inv_temperature, HAS_SOFTCAP, HAS_LOGPS, HAS_ENTROPY, False,
    )  # fmt: skip
    tl.store(grad_x + at * stride_gn + cols[None, :], grad.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def settle_kernel(
    scaled, peak, running, N, V, stride_sn, stride_pt,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """scaled (N, V) = e^(z - peak) becomes e^(z - running) in place: one scale a row, as a product needs it."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = tl.program_id(1) // (TILE_V // BLOCK_C)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = rows < N
    shift = tl.load(peak + tile.to(tl.int64) * stride_pt + rows, mask=in_range, other=0.0)
    shift -= tl.load(running + rows, mask=in_range, other=0.0)
    # Rows whose largest logit so far lies in this very tile are as they should be.
    inside = (in_range & (shift != 0))[:, None] & (cols < V)[None, :]
    at = scaled + rows.to(tl.int64)[:, None] * stride_sn + cols[None, :]
    p = tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.exp2(shift * LOG2E)[:, None]
    tl.store(at, p.to(scaled.dtype.element_ty), mask=inside)


@triton.jit
def decay_rows_kernel(x, decay, D, stride_xn, BLOCK_D: tl.constexpr):
    """x (N, D) *= decay (N,), without touching rows whose decay is 1: after a few slices, nearly all of them."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(decay + row)
    if factor != 1.0:
        for first in range(0, D, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            at = x + row * stride_xn + cols
            tl.store(at, tl.load(at, mask=cols < D, other=0.0) * factor, mask=cols < D)


@triton.jit
def kept_hidden_kernel(
    grad_x, weight, counts, tiles, out, N, V, D, stride_gn, stride_wv, stride_t, stride_on,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (N, D) fp32 += grad_x (N, V) @ weight (V, D) over the kept tiles.

    Row tile i has counts[i] of them: columns tiles[i, :] int64 of width BLOCK_V.
    """
    row_tile = tl.program_id(0)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ks = tl.arange(0, BLOCK_K)
    PARTS: tl.constexpr = BLOCK_V // BLOCK_K
    at_out = out + rows.to(tl.int64)[:, None] * stride_on + ds[None, :]
    inside = (rows < N)[:, None] & (ds < D)[None, :]
    acc = tl.load(at_out, mask=inside, other=0.0)
    at_g = grad_x + rows.to(tl.int64)[:, None] * stride_gn
    at_w = weight + ds[None, :]
    for step in range(0, tl.load(counts + row_tile) * PARTS):
        cols = tl.load(tiles + row_tile * stride_t + step // PARTS) * BLOCK_V + (step % PARTS) * BLOCK_K + ks
        g = tl.load(at_g + cols[None, :], mask=(rows < N)[:, None] & (cols < V)[None, :], other=0.0)
        w = tl.load(at_w + cols[:, None] * stride_wv, mask=(cols < V)[:, None] & (ds < D)[None, :], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
    tl.store(at_out, acc, mask=inside)


@triton.jit
def kept_weight_kernel(
    grad_x, hidden, counts, tiles, out, N, V, D, stride_gn, stride_hn, stride_t, stride_ov,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (V, D) = grad_x (N, V).T @ hidden (N, D) over the kept tiles, rounded once.

    Column tile j has counts[j] of them: rows tiles[j, :] int64 of height BLOCK_N.
    """
    col_tile = tl.program_id(0)
    cols = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ks = tl.arange(0, BLOCK_K)
    PARTS: tl.constexpr = BLOCK_N // BLOCK_K
    acc = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    for step in range(0, tl.load(counts + col_tile) * PARTS):
        rows = tl.load(tiles + col_tile * stride_t + step // PARTS) * BLOCK_N + (step % PARTS) * BLOCK_K + ks
        g = tl.load(
            grad_x + rows[None, :] * stride_gn + cols[:, None],
            mask=(rows < N)[None, :] & (cols < V)[:, None], other=0.0,
        )  # fmt: skip
        h = tl.load(
            hidden + rows[:, None] * stride_hn + ds[None, :],
            mask=(rows < N)[:, None] & (ds < D)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(g, h, acc, input_precision=PRECISION)
    inside = (cols < V)[:, None] & (ds < D)[None, :]
    tl.store(out + cols.to(tl.int64)[:, None] * stride_ov + ds[None, :], acc.to(out.dtype.element_ty), mask=inside)
