"""Triton kernels of the forward: partial statistics of each tile, and their reduction.

One tile of the (N, V) plane is a BLOCK_N x BLOCK_V product accumulated in fp32 and never stored. The forward keeps
three numbers a row and tile: the maximum m, sum e^(z-m) and sum e^(z-m) (z-m). They are written once and reduced by a
second kernel in a fixed order, and a third one sums over sequences: no atomics, bit-identical from run to run.
"""

import triton
import triton.language as tl

from fastpo.kernels.device import LOG2E, LOWEST, project, tile_index, to_logits


@triton.jit
def _write_partials(
    z, rows, cols, col_tile, N, labels, part_max, part_sum, part_moment, label_logit,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store a tile's maximum, mass, moment (T, N) and label logits (N,); returns e^(z - m)."""
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
    return p


@triton.jit
def _write_stash(p, z, rows, cols, V, stash, stride_sn, stash_rows, softcap, inv_temperature, SLOPE: tl.constexpr):
    """Store p of the first stash_rows rows in stash (stash_rows, V); with SLOPE, times 1 - tanh^2."""
    if SLOPE:
        t = tl.maximum(z * (1.0 / (softcap * inv_temperature)), -1.0)  # past V, z is LOWEST
        p *= 1.0 - t * t
    at = stash + rows.to(tl.int64)[:, None] * stride_sn + cols[None, :]
    tl.store(at, p.to(stash.dtype.element_ty), mask=(rows < stash_rows)[:, None] & (cols[None, :] < V))


@triton.jit
def _forward_tile(
    pid, num_rows, num_cols, hidden, weight, bias, labels, part_max, part_sum, part_moment, label_logit, stash,
    N, V, D, stride_hn, stride_wv, stride_sn, stash_rows,
    scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, STASH: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_index(pid, num_rows, num_cols, GROUP)
    x = project(
        hidden, weight, row_tile * BLOCK_N, col_tile * BLOCK_V, N, V, D,
        stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION, TMA,
    )  # fmt: skip
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = to_logits(x, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where(cols[None, :] < V, z, LOWEST)
    p = _write_partials(z, rows, cols, col_tile, N, labels, part_max, part_sum, part_moment, label_logit, BLOCK_V)
    if STASH:
        _write_stash(p, z, rows, cols, V, stash, stride_sn, stash_rows, softcap, inv_temperature, SLOPE)


@triton.jit
def forward_kernel(
    hidden, weight, bias, labels, part_max, part_sum, part_moment, label_logit, stash,
    N, V, D, stride_hn, stride_wv, stride_sn, stash_rows,
    scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, STASH: tl.constexpr, SLOPE: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Partials of a (N, V) plane, each (V / BLOCK_V, N) fp32: the tile's max, mass and moment; label_logit (N,) fp32.

    labels (N,) int32. With STASH, e^(z - m) of the first stash_rows rows goes to stash (stash_rows, V); with SLOPE,
    times 1 - tanh^2. PERSISTENT: a program takes every num_programs-th tile; else one.
    """
    num_rows, num_cols = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), num_rows * num_cols, tl.num_programs(0)):
            _forward_tile(
                pid, num_rows, num_cols,
                hidden, weight, bias, labels, part_max, part_sum, part_moment, label_logit, stash,
                N, V, D, stride_hn, stride_wv, stride_sn, stash_rows,
                scale, softcap, inv_temperature,
                BLOCK_N, BLOCK_V, BLOCK_D, GROUP, EVEN_D, HAS_BIAS, HAS_SOFTCAP, PRECISION, TMA, STASH, SLOPE,
            )  # fmt: skip
    else:
        _forward_tile(
            tl.program_id(0), num_rows, num_cols,
            hidden, weight, bias, labels, part_max, part_sum, part_moment, label_logit, stash,
            N, V, D, stride_hn, stride_wv, stride_sn, stash_rows,
            scale, softcap, inv_temperature,
            BLOCK_N, BLOCK_V, BLOCK_D, GROUP, EVEN_D, HAS_BIAS, HAS_SOFTCAP, PRECISION, TMA, STASH, SLOPE,
        )  # fmt: skip


@triton.jit
def _joint_forward_tile(
    pid, num_rows, num_cols, hidden, ref_hidden, weight, bias, labels,
    part_max, part_sum, part_moment, part_gap, label_logit,
    ref_part_max, ref_part_sum, ref_part_moment, ref_label_logit, stash,
    N, V, D, stride_hn, stride_rn, stride_wv, stride_sn, stash_rows,
    scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, STASH: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_index(pid, num_rows, num_cols, GROUP)
    row0, col0 = row_tile * BLOCK_N, col_tile * BLOCK_V
    rows, cols = row0 + tl.arange(0, BLOCK_N), col0 + tl.arange(0, BLOCK_V)
    y = project(
        ref_hidden, weight, row0, col0, N, V, D,
        stride_rn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION, TMA,
    )  # fmt: skip
    y = to_logits(y, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
    y = tl.where(cols[None, :] < V, y, LOWEST)
    _write_partials(
        y, rows, cols, col_tile, N, labels, ref_part_max, ref_part_sum, ref_part_moment, ref_label_logit, BLOCK_V
    )
    x = project(
        hidden, weight, row0, col0, N, V, D,
        stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION, TMA,
    )  # fmt: skip
    z = to_logits(x, bias, cols, V, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where(cols[None, :] < V, z, LOWEST)
    p = _write_partials(z, rows, cols, col_tile, N, labels, part_max, part_sum, part_moment, label_logit, BLOCK_V)
    tl.store(part_gap + col_tile.to(tl.int64) * N + rows, tl.sum(p * (z - y), axis=1), mask=rows < N)
    if STASH:
        _write_stash(p, z, rows, cols, V, stash, stride_sn, stash_rows, softcap, inv_temperature, SLOPE)


@triton.jit
def joint_forward_kernel(
    hidden, ref_hidden, weight, bias, labels,
    part_max, part_sum, part_moment, part_gap, label_logit,
    ref_part_max, ref_part_sum, ref_part_moment, ref_label_logit, stash,
    N, V, D, stride_hn, stride_rn, stride_wv, stride_sn, stash_rows,
    scale, softcap, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, STASH: tl.constexpr, SLOPE: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` for the policy's and the reference's rows at once.

    part_gap (V / BLOCK_V, N) = sum e^(z - m) (z - z_ref) is what KL(policy || reference) needs besides.
    """
    num_rows, num_cols = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), num_rows * num_cols, tl.num_programs(0)):
            _joint_forward_tile(
                pid, num_rows, num_cols, hidden, ref_hidden, weight, bias, labels,
                part_max, part_sum, part_moment, part_gap, label_logit,
                ref_part_max, ref_part_sum, ref_part_moment, ref_label_logit, stash,
                N, V, D, stride_hn, stride_rn, stride_wv, stride_sn, stash_rows,
                scale, softcap, inv_temperature,
                BLOCK_N, BLOCK_V, BLOCK_D, GROUP, EVEN_D, HAS_BIAS, HAS_SOFTCAP, PRECISION, TMA, STASH, SLOPE,
            )  # fmt: skip
    else:
        _joint_forward_tile(
            tl.program_id(0), num_rows, num_cols, hidden, ref_hidden, weight, bias, labels,
            part_max, part_sum, part_moment, part_gap, label_logit,
            ref_part_max, ref_part_sum, ref_part_moment, ref_label_logit, stash,
            N, V, D, stride_hn, stride_rn, stride_wv, stride_sn, stash_rows,
            scale, softcap, inv_temperature,
            BLOCK_N, BLOCK_V, BLOCK_D, GROUP, EVEN_D, HAS_BIAS, HAS_SOFTCAP, PRECISION, TMA, STASH, SLOPE,
        )  # fmt: skip


@triton.jit
def reduce_kernel(
    part_max, part_sum, part_moment, part_gap, label_logit, logps, entropy, lse, max_logit, gap, N, num_tiles,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, HAS_GAP: tl.constexpr,
):  # fmt: skip
    """logps, entropy, lse, max_logit (N,) of BLOCK_R rows a program, and gap (N,) = sum_v p_v (z_v - z_ref_v)."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = rows < N
    m = tl.full((BLOCK_R,), LOWEST, dtype=tl.float32)
    mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_R,), dtype=tl.float32)
    total_gap = tl.zeros((BLOCK_R,), dtype=tl.float32)
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
        if HAS_GAP:
            tile_gap = tl.load(part_gap + at, mask=mask, other=0.0)
            total_gap = total_gap * old_decay + tl.sum(tile_gap * decay, axis=0)
        m = new_m
    mass = tl.where(in_range, mass, 1.0)
    log_mass = tl.log(mass)
    label = tl.load(label_logit + rows, mask=in_range, other=0.0)
    tl.store(logps + rows, tl.where(label <= LOWEST, float("-inf"), label - m - log_mass), mask=in_range)
    tl.store(entropy + rows, log_mass - moment / mass, mask=in_range)
    tl.store(lse + rows, m + log_mass, mask=in_range)
    tl.store(max_logit + rows, m, mask=in_range)
    if HAS_GAP:
        tl.store(gap + rows, total_gap / mass, mask=in_range)


@triton.jit
def sequence_sum_kernel(values, labels, offsets, sums, BLOCK_R: tl.constexpr):
    """sums (S,) of values (N,) over rows offsets[i] to offsets[i+1]; rows with label -1 do not count."""
    seq = tl.program_id(0)
    end = tl.load(offsets + seq + 1)
    # Thousands of nats: fp32 partial sums would round away what the tokens are exact to.
    total = tl.zeros((BLOCK_R,), dtype=tl.float64)
    for first in range(tl.load(offsets + seq), end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        in_range = rows < end
        counts = in_range & (tl.load(labels + rows, mask=in_range, other=-1) != -1)
        total += tl.load(values + rows, mask=counts, other=0.0).to(tl.float64)
    tl.store(sums + seq, tl.sum(total).to(tl.float32))
