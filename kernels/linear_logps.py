"""The Triton kernels of `fused`: forward partials, their reduction, and the gradient of the logits.

One tile of the (N, V) plane is a BLOCK_N x BLOCK_V product accumulated in fp32 and never stored. The forward keeps
three numbers a row and tile: the maximum m, sum e^(z-m) and sum e^(z-m) (z-m). They are written once and reduced by a
second kernel in a fixed order, so results are bit-identical from run to run.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Stands for -inf: finite, so that a fully masked tile gives 0 and not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _tanh(x):
    """tanh without libdevice (the interpreter has none): a series near 0, where the quotient would cancel."""
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    quotient = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.0625, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _tile_index(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """Row tile and column tile of a program: GROUP row tiles share a column of the head while it is in the cache."""
    per_group = GROUP * num_cols
    first = (pid // per_group) * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def _project(
    hidden, weight, rows, cols, N, V, D,
    stride_hn, stride_hd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw projections x (BLOCK_N, BLOCK_V), fp32. Rows and columns past the end repeat the last one."""
    ks = tl.arange(0, BLOCK_D)
    h_rows = hidden + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * stride_hn
    w_rows = weight + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * stride_wv
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for k0 in range(0, D, BLOCK_D):
        k = k0 + ks
        if EVEN_D:
            h = tl.load(h_rows + k[None, :] * stride_hd)
            w = tl.load(w_rows + k[:, None] * stride_wd)
        else:
            h = tl.load(h_rows + k[None, :] * stride_hd, mask=k[None, :] < D, other=0.0)
            w = tl.load(w_rows + k[:, None] * stride_wd, mask=k[:, None] < D, other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _to_logits(x, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    if HAS_BIAS:
        x += tl.load(bias + tl.minimum(cols, V - 1)).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = _tanh(x * (scale / softcap)) * (softcap * inv_temperature)
    else:
        z = x * (scale * inv_temperature)
    if HAS_BIAS:
        # Not -inf, but still NaN: a NaN that became a number would cost nothing and go unseen.
        z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def _logits_tile(
    hidden, weight, bias, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program's rows (BLOCK_N,), columns (BLOCK_V,), column tile, and logits (BLOCK_N, BLOCK_V) fp32."""
    row_tile, col_tile = _tile_index(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _project(
        hidden, weight, rows, cols, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
        BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION,
    )  # fmt: skip
    z = _to_logits(x, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
    return rows, cols, col_tile, z


@triton.jit
def linear_logps_fwd_kernel(
    hidden, weight, bias, labels, part_max, part_sum, part_moment, label_logit,
    N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part_* (V/BLOCK_V, N) fp32: each tile's max, mass and moment; label_logit (N,) fp32. labels: int32."""
    rows, cols, col_tile, z = _logits_tile(
        hidden, weight, bias, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap, inv_temperature,
        BLOCK_N, BLOCK_V, BLOCK_D, GROUP, EVEN_D, HAS_BIAS, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    z = tl.where(cols[None, :] < V, z, LOWEST)

    in_range = rows < N
    label = tl.load(labels + rows, mask=in_range, other=-1)
    here = label[:, None] == cols[None, :]
    owns_label = (label >= col_tile * BLOCK_V) & (label < (col_tile + 1) * BLOCK_V)
    tl.store(label_logit + rows, tl.sum(tl.where(here, z, 0.0), axis=1), mask=owns_label)

    m = tl.max(z, axis=1)
    d = z - m[:, None]
    p = tl.exp2(d * LOG2E)
    at = col_tile.to(tl.int64) * N + rows
    tl.store(part_max + at, m, mask=in_range)
    tl.store(part_sum + at, tl.sum(p, axis=1), mask=in_range)
    tl.store(part_moment + at, tl.sum(p * d, axis=1), mask=in_range)


@triton.jit
def linear_logps_reduce_kernel(
    part_max, part_sum, part_moment, label_logit, offsets,
    logps, entropy, lse, seq_logps, seq_entropy, N, num_tiles,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program a sequence: rows offsets[i] .. offsets[i+1] get logps, entropy, lse (N,), their sums seq_* (S,)."""
    seq = tl.program_id(0)
    begin = tl.load(offsets + seq)
    end = tl.load(offsets + seq + 1)
    # Thousands of nats: fp32 partial sums would round away what the tokens are exact to.
    sum_logps = tl.zeros((BLOCK_R,), dtype=tl.float64)
    sum_entropy = tl.zeros((BLOCK_R,), dtype=tl.float64)
    for first in range(begin, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        in_range = rows < end
        m = tl.full((BLOCK_R,), LOWEST, dtype=tl.float32)
        mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
        moment = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for t0 in range(0, num_tiles, BLOCK_T):
            tiles = t0 + tl.arange(0, BLOCK_T)
            at = tiles.to(tl.int64)[:, None] * N + rows[None, :]
            mask = (tiles < num_tiles)[:, None] & in_range[None, :]
            tile_m = tl.load(part_max + at, mask=mask, other=LOWEST)
            new_m = tl.maximum(m, tl.max(tile_m, axis=0))
            shift = tile_m - new_m[None, :]
            decay = tl.exp2(shift * LOG2E)
            tile_mass = tl.load(part_sum + at, mask=mask, other=0.0)
            tile_moment = tl.load(part_moment + at, mask=mask, other=0.0)
            old_shift = m - new_m
            old_decay = tl.exp2(old_shift * LOG2E)
            # 0 * (LOWEST - m) is 0, so tiles without mass drop out.
            moment = (moment + mass * old_shift) * old_decay + tl.sum((tile_moment + tile_mass * shift) * decay, axis=0)
            mass = mass * old_decay + tl.sum(tile_mass * decay, axis=0)
            m = new_m
        mass = tl.where(in_range, mass, 1.0)
        log_mass = tl.log(mass)
        label = tl.load(label_logit + rows, mask=in_range, other=0.0)
        row_logps = tl.where(label <= LOWEST, float("-inf"), label - m - log_mass)
        row_entropy = log_mass - moment / mass
        tl.store(logps + rows, row_logps, mask=in_range)
        tl.store(entropy + rows, row_entropy, mask=in_range)
        tl.store(lse + rows, m + log_mass, mask=in_range)
        sum_logps += tl.where(in_range, row_logps, 0.0).to(tl.float64)
        sum_entropy += tl.where(in_range, row_entropy, 0.0).to(tl.float64)
    tl.store(seq_logps + seq, tl.sum(sum_logps).to(tl.float32))
    tl.store(seq_entropy + seq, tl.sum(sum_entropy).to(tl.float32))


@triton.jit
def linear_logps_bwd_kernel(
    hidden, weight, bias, labels, lse, entropy, grad_logps, grad_entropy, grad_x,
    first_col, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, stride_gn, scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HAS_LOGPS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """grad_x (N, V) = d loss / d x of the vocabulary slice that starts at first_col; weight and bias are that slice's.

    g (1[v = y] - p) - g_H p (log p + H), times d z / d x.
    """
    rows, cols, _, z = _logits_tile(
        hidden, weight, bias, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap, inv_temperature,
        BLOCK_N, BLOCK_V, BLOCK_D, GROUP, EVEN_D, HAS_BIAS, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    in_range = rows < N
    logp = z - tl.load(lse + rows, mask=in_range, other=0.0)[:, None]
    grad = -tl.exp2(logp * LOG2E)
    g = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_LOGPS:
        g = tl.load(grad_logps + rows, mask=in_range, other=0.0)
    if HAS_ENTROPY:
        g_h = tl.load(grad_entropy + rows, mask=in_range, other=0.0)
        h = tl.load(entropy + rows, mask=in_range, other=0.0)
        grad *= g[:, None] + g_h[:, None] * (logp + h[:, None])
    else:
        grad *= g[:, None]
    if HAS_LOGPS:
        label = tl.load(labels + rows, mask=in_range, other=-1) - first_col
        grad = tl.where(label[:, None] == cols[None, :], grad + g[:, None], grad)
    if HAS_SOFTCAP:
        t = z * (1.0 / (softcap * inv_temperature))
        grad *= 1.0 - t * t
    grad *= scale * inv_temperature
    at = grad_x + rows.to(tl.int64)[:, None] * stride_gn + cols[None, :]
    tl.store(at, grad.to(grad_x.dtype.element_ty), mask=in_range[:, None] & (cols[None, :] < V))
