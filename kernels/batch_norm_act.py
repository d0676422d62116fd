"""batch_norm_act in Triton: batch normalisation, residual addition, ReLU and dropout in one pass over memory.

    xhat = (x - mean) * rstd        z = weight * xhat + bias
    "add_act":  y = dropout(relu(z + r))            "act_add":  y = dropout(relu(z)) + r
    g = dy * bit / (1 - p)          bit = kept and (relu input > 0)
    dbias = sum g                   dweight = sum g * xhat
    dx = weight * rstd * (g - dbias / M - xhat * dweight / M)

T is one pass over a tensor of x's size and dtype. In training the forward pass is two launches, `statistics_kernel` and
`apply_kernel`, the backward pass two, `backward_reduce_kernel` and `backward_apply_kernel`; evaluation is one each.

Every kernel runs over a grid of (splits, channel blocks): a program owns BLOCK_C channels and every splits-th tile of
positions (kernels/tile.py), so a vector of one value a channel is loaded once a program. The second pass of a pair
walks the tiles backwards, since what the first pass read last is what the second-level cache still holds.

Sums over positions are two-stage without floating-point atomics. Each program leaves its partial sums in a workspace;
the program that arrives last for its channels, as an integer counter tells it, adds all partials in the order of their
splits. So the result does not depend on which program that was, and finalising costs no launch and no second reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres import reference
from fastres.kernels.launch import arrival_counters, geometry, launch, launch_over_channels
from fastres.kernels.philox import dropout_keep
from fastres.kernels.plan import Geometry, Plan, apply_plan, reduce_plan
from fastres.kernels.tile import (
    element_offsets,
    load_bits,
    load_channels,
    load_tile,
    locate,
    store_bits,
    store_tile,
)

# ----------------------------------------------------------------------------------------------------------- statistics


@triton.jit
def _finalise(
    mean, m2, mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, mask, count, momentum, eps
):
    """Store what one batch normalisation keeps of its batch, [BLOCK_C] each, and update its running statistics.

    running = (1 - momentum) * running + momentum * batch, with the unbiased variance m2 / (count - 1).
    """
    tl.store(mean_ptr + channel, mean, mask=mask)
    if m2_ptr is not None:
        tl.store(m2_ptr + channel, m2, mask=mask)
    if rstd_ptr is not None:
        # Once a channel, so the correctly rounded operations cost nothing.
        tl.store(rstd_ptr + channel, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, count) + eps)), mask=mask)
    if running_mean_ptr is not None:
        old_mean = tl.load(running_mean_ptr + channel, mask=mask, other=0.0)
        old_var = tl.load(running_var_ptr + channel, mask=mask, other=0.0)
        tl.store(running_mean_ptr + channel, (1 - momentum) * old_mean + momentum * mean, mask=mask)
        tl.store(running_var_ptr + channel, (1 - momentum) * old_var + momentum * (m2 / (count - 1)), mask=mask)


@triton.jit
def _first_row(x, ROWS: tl.constexpr):
    """Row 0 of a tile, [columns]."""
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == 0, x, 0.0), axis=0)


@triton.jit
def _combine_moments(count, mean, m2, ROWS: tl.constexpr):
    """(count [1], mean, M2 [columns]) of the union of ROWS samples a column, whose counts are [ROWS, 1].

    The means are combined as differences from the first, so that a mean far from 0 costs no precision.
    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    anchor = _first_row(mean, ROWS)
    total = tl.sum(count, axis=0)
    # A sample of count 0 has no mean; another's infinity must not reach it as 0 * inf.
    difference = tl.where(count > 0, mean - anchor[None, :], 0.0)
    shift = tl.sum(count * difference, axis=0) / total
    spread = difference - shift[None, :]
    return total, anchor + shift, tl.sum(m2 + count * spread * spread, axis=0)


@triton.jit
def _origin(x_ptr, channel, mask, image, CHANNELS_LAST: tl.constexpr):
    """[BLOCK_C], the tensor's first element of each channel: means are kept as differences from it."""
    if CHANNELS_LAST:
        offset = channel
    else:
        offset = channel * image
    return tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _moments(
    x_ptr, origin, first_channel, positions, channels, image, tiles, splits,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(count [1], mean - origin, M2 [BLOCK_C]) of this program's tiles.

    Each position of the tile is a sample of its own, updated as in Welford 1962; the BLOCK_S samples of a channel are
    combined once, at the end, so the loop has no exchange between threads. Differences from the origin are taken first:
    where the mean is far from 0 they are small, and where the origin itself is far from the rest M2 is large.
    """
    MASKED: tl.constexpr = not (EVEN_S and EVEN_C)
    real = first_channel + tl.arange(0, BLOCK_C) < channels
    row = tl.arange(0, BLOCK_S)[:, None]
    within = element_offsets(channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    mean = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_S, 1), tl.float32)
    rounds = 0.0
    # Four loads under way before the first is needed.
    for tile in tl.range(tl.program_id(0), tiles, splits, loop_unroll_factor=4):
        at, _, _, left = locate(tile, first_channel, positions, channels, image, CHANNELS_LAST, INDEX_64, BLOCK_S)
        x = load_tile(x_ptr, at + within, (row < left) & real[None, :], MASKED) - origin[None, :]
        delta = x - mean
        if EVEN_S:
            rounds += 1.0
            mean += delta * (1.0 / rounds)
            m2 += delta * (x - mean)
        else:
            exists = row < left
            count += exists.to(tl.float32)
            mean += tl.where(exists, delta / tl.maximum(count, 1.0), 0.0)
            m2 += tl.where(exists, delta * (x - mean), 0.0)
    if EVEN_S:
        count += rounds
    return _combine_moments(count, mean, m2, BLOCK_S)


@triton.jit
def _statistics(
    x_ptr, partial_ptr, arrivals_ptr, mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps,
    positions, channels, image, tiles, splits,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Statistics of one tensor: this program's share, and all of them where it is the last of its channels."""
    split = tl.program_id(0)
    first_channel = tl.program_id(1) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    mask = channel < channels
    origin = _origin(x_ptr, channel, mask, image, CHANNELS_LAST)
    count, mean, m2 = _moments(
        x_ptr, origin, first_channel, positions, channels, image, tiles, splits, CHANNELS_LAST, INDEX_64, EVEN_S,
        EVEN_C, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    row_ptr = partial_ptr + tl.program_id(1) * splits * 2 * BLOCK_C
    counts_ptr = partial_ptr + (tl.num_programs(1) * 2 * BLOCK_C + tl.program_id(1)) * splits
    own = row_ptr + split * 2 * BLOCK_C + column
    tl.store(own, mean)
    tl.store(own + BLOCK_C, m2)
    tl.store(counts_ptr + split + tl.arange(0, 1), count)
    # The barrier makes all warps' stores happen before the one thread's release, and the acquire orders the loads.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + tl.program_id(1), 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        tl.store(arrivals_ptr + tl.program_id(1), 0)
        counts = tl.zeros((BLOCK_P, 1), tl.float32)
        means = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        m2s = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        # Row by row in the loop, across rows once after it: nothing here waits but for memory.
        for start in tl.range(0, splits, BLOCK_P, loop_unroll_factor=2):
            p = start + tl.arange(0, BLOCK_P)
            exists = p < splits
            at = row_ptr + (p * (2 * BLOCK_C))[:, None] + column[None, :]
            n = tl.load(counts_ptr + p, mask=exists, other=0.0, cache_modifier=".cg")[:, None]
            delta = tl.load(at, mask=exists[:, None], other=0.0, cache_modifier=".cg") - means
            m2s += tl.load(at + BLOCK_C, mask=exists[:, None], other=0.0, cache_modifier=".cg")
            share = n / tl.maximum(counts + n, 1.0)
            # Rows that do not exist take no part, not even where the mean is infinite.
            means += tl.where(n > 0, delta * share, 0.0)
            m2s += tl.where(n > 0, delta * delta * (counts * share), 0.0)
            counts += n
        _, whole_mean, whole_m2 = _combine_moments(counts, means, m2s, BLOCK_P)
        _finalise(
            origin + whole_mean, whole_m2, mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, mask,
            positions.to(tl.float32), momentum, eps,
        )  # fmt: skip


@triton.jit(do_not_specialize=["positions", "momentum", "eps", "other_momentum", "other_eps", "tiles", "splits"])
def statistics_kernel(
    x_ptr,  # [M, C] or [N, C, HW]
    other_ptr,  # the same shape: a second tensor whose statistics are taken in the same launch; or None
    partial_ptr,  # float32, a tensor after the other: [channel blocks, splits, 2, BLOCK_C] mean - origin and M2, then
    # [channel blocks, splits] counts
    arrivals_ptr,  # [tensors, channel blocks] int32, 0 before and after
    mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,  # [C] float32
    other_given_mean_ptr, other_given_m2_ptr,  # [C]: statistics of the second tensor where they are known; or None
    other_mean_ptr, other_rstd_ptr, other_running_mean_ptr, other_running_var_ptr,  # [C]
    positions, channels, image,  # M, C, H * W
    momentum, eps, other_momentum, other_eps,
    tiles, splits,  # tiles of BLOCK_S positions, programs that share them
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """mean, M2 and rstd of x a channel, and of a second tensor; updates the running statistics.

    Reads T (2 T with a second tensor), writes partial sums of 8 bytes a channel and program.
    Grid: (splits, channel blocks, tensors).
    """
    if other_ptr is not None:
        if tl.program_id(2) == 0:
            _statistics(
                x_ptr, partial_ptr, arrivals_ptr, mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
                momentum, eps, positions, channels, image, tiles, splits, CHANNELS_LAST, INDEX_64, EVEN_S, EVEN_C,
                BLOCK_S, BLOCK_C, BLOCK_P,
            )  # fmt: skip
        else:
            blocks = tl.num_programs(1)
            _statistics(
                other_ptr, partial_ptr + blocks * splits * (2 * BLOCK_C + 1), arrivals_ptr + blocks,
                other_mean_ptr, None, other_rstd_ptr, other_running_mean_ptr, other_running_var_ptr, other_momentum,
                other_eps, positions, channels, image, tiles, splits, CHANNELS_LAST, INDEX_64, EVEN_S, EVEN_C, BLOCK_S,
                BLOCK_C, BLOCK_P,
            )  # fmt: skip
    else:
        if other_given_mean_ptr is not None:
            if tl.program_id(0) == 0:
                _finalise_given(
                    other_given_mean_ptr, other_given_m2_ptr, other_mean_ptr, other_rstd_ptr, other_running_mean_ptr,
                    other_running_var_ptr, positions, channels, other_momentum, other_eps, BLOCK_C,
                )  # fmt: skip
        _statistics(
            x_ptr, partial_ptr, arrivals_ptr, mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum,
            eps, positions, channels, image, tiles, splits, CHANNELS_LAST, INDEX_64, EVEN_S, EVEN_C, BLOCK_S, BLOCK_C,
            BLOCK_P,
        )  # fmt: skip


@triton.jit
def _finalise_given(
    given_mean_ptr, given_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, positions, channels, momentum,
    eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    mean = tl.load(given_mean_ptr + channel, mask=mask, other=0.0)
    m2 = tl.load(given_m2_ptr + channel, mask=mask, other=0.0)
    _finalise(
        mean, m2, mean_ptr, None, rstd_ptr, running_mean_ptr, running_var_ptr, channel, mask,
        positions.to(tl.float32), momentum, eps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["positions", "momentum", "eps", "other_momentum", "other_eps"])
def finalise_kernel(
    given_mean_ptr, given_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,  # [C] float32
    other_given_mean_ptr, other_given_m2_ptr, other_mean_ptr, other_rstd_ptr, other_running_mean_ptr,
    other_running_var_ptr,  # [C] float32; or None
    positions, channels, momentum, eps, other_momentum, other_eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rstd and running statistics where every mean and M2 is known: nothing of size T is touched.

    Grid: (1, channel blocks).
    """
    _finalise_given(
        given_mean_ptr, given_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, positions, channels,
        momentum, eps, BLOCK_C,
    )  # fmt: skip
    if other_given_mean_ptr is not None:
        _finalise_given(
            other_given_mean_ptr, other_given_m2_ptr, other_mean_ptr, other_rstd_ptr, other_running_mean_ptr,
            other_running_var_ptr, positions, channels, other_momentum, other_eps, BLOCK_C,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, mask, eps, VARIANCE: tl.constexpr):
    """(mean, weight * rstd, bias), [1, BLOCK_C] each; rstd from the variance where that is what is stored."""
    rstd = load_channels(rstd_ptr, channel, mask, 1.0)
    if VARIANCE:
        rstd = tl.rsqrt(rstd + eps)
    mean = load_channels(mean_ptr, channel, mask, 0.0)
    return mean, rstd * load_channels(weight_ptr, channel, mask, 1.0), load_channels(bias_ptr, channel, mask, 0.0)


@triton.jit(do_not_specialize=["positions", "eps", "residual_eps", "threshold", "keep_scale", "tiles", "splits"])
def apply_kernel(
    x_ptr, residual_ptr, y_ptr,  # [M, C] or [N, C, HW]; residual_ptr may be None
    bits_ptr,  # uint8, the bit mask; or None where it is not kept
    seed_ptr,  # int64 [1]; or None without dropout
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # [C] float32; weight and bias may be None
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,  # [C]; None without their own norm
    positions, channels, image, eps, residual_eps, threshold, keep_scale, tiles, splits,
    RELU: tl.constexpr, ACT_ADD: tl.constexpr, VARIANCE: tl.constexpr, FOURS: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = dropout(relu(z + r)) or dropout(relu(z)) + r, and the bit mask.

    Reads T for x and T for r, writes T for y and 1 bit an element. VARIANCE: rstd_ptr holds the variance, as evaluation
    has it. Grid: (splits, channel blocks).
    """
    MASKED: tl.constexpr = not (EVEN_S and EVEN_C)
    first_channel = tl.program_id(1) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    real = channel < channels
    NORMED: tl.constexpr = residual_mean_ptr is not None
    IN_LOOP: tl.constexpr = NORMED and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    if not IN_LOOP:
        mean, scale, bias = _load_affine(
            mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, real, eps, VARIANCE
        )  # fmt: skip
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row = tl.arange(0, BLOCK_S)[:, None]
    within = element_offsets(channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    for step in range(tl.program_id(0), tiles, splits):
        at, byte_at, index, left = locate(
            tiles - 1 - step, first_channel, positions, channels, image, CHANNELS_LAST, INDEX_64, BLOCK_S
        )
        offset = at + within
        mask = (row < left) & real[None, :]
        x = load_tile(x_ptr, offset, mask, MASKED)
        if residual_ptr is not None:
            r = load_tile(residual_ptr, offset, mask, MASKED)
            if NORMED:
                r_mean, r_scale, r_bias = _load_affine(
                    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr, channel, real,
                    residual_eps, VARIANCE,
                )  # fmt: skip
                r = (r - r_mean) * r_scale + r_bias
        if IN_LOOP:
            # For every tile, out of the first-level cache: six vectors kept in registers, where a thread has eight
            # channels of each, would halve the number of resident threads.
            mean, scale, bias = _load_affine(
                mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, real, eps, VARIANCE
            )  # fmt: skip
        z = (x - mean) * scale + bias
        if residual_ptr is not None and not ACT_ADD:
            z += r
        passed = mask
        if RELU:
            # As in torch's ReLU, NaN passes.
            passed = passed & ~(z <= 0)
        if seed_ptr is not None:
            passed = passed & dropout_keep(seed, index, channels, threshold, FOURS, WIDE, BLOCK_S, BLOCK_C)
            z *= keep_scale
        if RELU or seed_ptr is not None:
            z = tl.where(passed, z, 0.0)
        if residual_ptr is not None and ACT_ADD:
            z += r
        store_tile(y_ptr, offset, z, mask, MASKED)
        if bits_ptr is not None:
            store_bits(
                bits_ptr, byte_at, passed, left, first_channel, channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _masked_gradient(
    dy, centred, scale, bias, bits_ptr, byte_at, keep_scale, left, first_channel, channels, image,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = dy * bit / (1 - p): the gradient that reaches z. Without a bit mask the ReLU's bit comes from z itself."""
    if bits_ptr is not None:
        passed = load_bits(bits_ptr, byte_at, left, first_channel, channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        g = tl.where(passed, dy * keep_scale, 0.0)
    elif RELU:
        g = tl.where(centred * scale + bias <= 0, 0.0, dy)
    else:
        g = dy
    return g


@triton.jit(do_not_specialize=["positions", "keep_scale", "tiles", "splits"])
def backward_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr,  # [M, C] or [N, C, HW]; the residual only where it has a normalisation of its own
    bits_ptr,  # uint8, the bit mask; or None
    partial_ptr,  # [channel blocks, splits, SUMS, BLOCK_C] float32
    arrivals_ptr,  # [channel blocks] int32, 0 before and after
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, residual_mean_ptr, residual_rstd_ptr,  # [C] float32
    dweight_ptr, dbias_ptr, residual_dweight_ptr, residual_dbias_ptr,  # [C] float32, results
    positions, channels, image, keep_scale, tiles, splits,
    RELU: tl.constexpr, ACT_ADD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dbias = sum g, dweight = sum g * xhat, and the same for the residual's own normalisation.

    Reads T for dy, T for x, 1 bit an element (T more for a normalised residual); writes 8 bytes a channel and program
    (12, or with order "act_add" 16, with a normalised residual). Grid: (splits, channel blocks).
    """
    split = tl.program_id(0)
    MASKED: tl.constexpr = not (EVEN_S and EVEN_C)
    first_channel = tl.program_id(1) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    real = channel < channels
    mean = load_channels(mean_ptr, channel, real, 0.0)
    rstd = load_channels(rstd_ptr, channel, real, 1.0)
    if RELU and bits_ptr is None:
        scale = rstd * load_channels(weight_ptr, channel, real, 1.0)
        bias = load_channels(bias_ptr, channel, real, 0.0)
    else:
        scale = rstd
        bias = mean
    row = tl.arange(0, BLOCK_S)[:, None]
    within = element_offsets(channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    sum_g = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_d = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_dr = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    # Four loads under way before the first is needed; with more vectors than two they do not fit in the registers.
    UNROLL: tl.constexpr = 2 if residual_ptr is None and (bits_ptr is not None or not RELU) else 1
    for tile in tl.range(split, tiles, splits, loop_unroll_factor=UNROLL):
        at, byte_at, _, left = locate(tile, first_channel, positions, channels, image, CHANNELS_LAST, INDEX_64, BLOCK_S)
        offset = at + within
        mask = (row < left) & real[None, :]
        dy = load_tile(dy_ptr, offset, mask, MASKED)
        centred = load_tile(x_ptr, offset, mask, MASKED) - mean
        g = _masked_gradient(
            dy, centred, scale, bias, bits_ptr, byte_at, keep_scale, left, first_channel, channels, image, RELU,
            CHANNELS_LAST, BLOCK_S, BLOCK_C,
        )  # fmt: skip
        sum_g += g
        sum_gx += g * centred
        if residual_ptr is not None:
            r = load_tile(residual_ptr, offset, mask, MASKED)
            r -= load_channels(residual_mean_ptr, channel, real, 0.0)
            if ACT_ADD:
                sum_d += dy
                sum_dr += dy * r
            else:
                sum_dr += g * r
    SUMS: tl.constexpr = 2 if residual_ptr is None else (4 if ACT_ADD else 3)
    partials_ptr = partial_ptr + tl.program_id(1) * splits * SUMS * BLOCK_C + tl.arange(0, BLOCK_C)
    own = partials_ptr + split * SUMS * BLOCK_C
    tl.store(own, tl.sum(sum_gx, axis=0))
    tl.store(own + BLOCK_C, tl.sum(sum_g, axis=0))
    if SUMS == 4:
        tl.store(own + 2 * BLOCK_C, tl.sum(sum_d, axis=0))
    if SUMS >= 3:
        tl.store(own + (SUMS - 1) * BLOCK_C, tl.sum(sum_dr, axis=0))
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + tl.program_id(1), 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        tl.store(arrivals_ptr + tl.program_id(1), 0)
        dweight, dbias = _sum_partials(partials_ptr, splits, SUMS, BLOCK_C, BLOCK_P)
        tl.store(dbias_ptr + channel, dbias, mask=real)
        tl.store(dweight_ptr + channel, dweight * tl.load(rstd_ptr + channel, mask=real, other=0.0), mask=real)
        if residual_ptr is not None:
            # The last two; of three partials the middle one serves twice, since dr is g then.
            dbias, r_dweight = _sum_partials(partials_ptr + (SUMS - 2) * BLOCK_C, splits, SUMS, BLOCK_C, BLOCK_P)
            r_dweight *= tl.load(residual_rstd_ptr + channel, mask=real, other=0.0)
            tl.store(residual_dweight_ptr + channel, r_dweight, mask=real)
            tl.store(residual_dbias_ptr + channel, dbias, mask=real)


@triton.jit
def _sum_partials(first_ptr, splits, SUMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Two neighbouring partials summed over all splits, [BLOCK_C] each, in the same order whichever program asks.

    first_ptr: [BLOCK_C], the first of the two in split 0.
    """
    a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    b = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, splits, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        exists = (p < splits)[:, None]
        at = first_ptr[None, :] + (p * (SUMS * BLOCK_C))[:, None]
        a += tl.load(at, mask=exists, other=0.0, cache_modifier=".cg")
        b += tl.load(at + BLOCK_C, mask=exists, other=0.0, cache_modifier=".cg")
    return tl.sum(a, axis=0), tl.sum(b, axis=0)


@triton.jit
def _load_gradient_vectors(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dbias_ptr, dweight_ptr, channel, mask, share, BIAS: tl.constexpr
):
    """(mean, weight * rstd, bias, dbias / M, dweight / M * rstd), [1, BLOCK_C] each; the last two are 0 in evaluation.

    With them dx = scale * (g - mean_g - (x - mean) * mean_gx).
    """
    mean = load_channels(mean_ptr, channel, mask, 0.0)
    rstd = load_channels(rstd_ptr, channel, mask, 1.0)
    scale = rstd * load_channels(weight_ptr, channel, mask, 1.0)
    bias = mean
    if BIAS:
        bias = load_channels(bias_ptr, channel, mask, 0.0)
    mean_g = load_channels(dbias_ptr, channel, mask, 0.0) * share
    mean_gx = load_channels(dweight_ptr, channel, mask, 0.0) * (share * rstd)
    return mean, scale, bias, mean_g, mean_gx


@triton.jit(do_not_specialize=["positions", "keep_scale", "tiles", "splits"])
def backward_apply_kernel(
    dy_ptr, x_ptr, residual_ptr,  # [M, C] or [N, C, HW]; the residual only where it has a normalisation of its own
    bits_ptr,  # uint8, the bit mask; or None
    dx_ptr, dresidual_ptr,  # [M, C] or [N, C, HW], results; None where not needed
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # [C] float32
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr,  # [C] float32; None without their own norm
    dweight_ptr, dbias_ptr, residual_dweight_ptr, residual_dbias_ptr,  # [C] float32; None in evaluation
    count_ptr,  # int64 [1], elements a channel behind the sums; None: those of x
    positions, channels, image, keep_scale, tiles, splits,
    RELU: tl.constexpr, ACT_ADD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = weight * rstd * (g - dbias / M - xhat * dweight / M), and the residual's gradient.

    Reads T for dy, T for x, 1 bit an element (T more for a normalised residual), writes T for dx and T for dresidual.
    Grid: (splits, channel blocks).
    """
    TRAINING: tl.constexpr = dbias_ptr is not None
    NORMED: tl.constexpr = residual_mean_ptr is not None
    IN_LOOP: tl.constexpr = NORMED and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    READS_X: tl.constexpr = (TRAINING and dx_ptr is not None) or (RELU and bits_ptr is None)
    MASKED: tl.constexpr = not (EVEN_S and EVEN_C)
    first_channel = tl.program_id(1) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    real = channel < channels
    if count_ptr is not None:
        share = 1.0 / tl.load(count_ptr).to(tl.float32)
    else:
        share = 1.0 / positions.to(tl.float32)
    if not IN_LOOP:
        mean, scale, bias, mean_g, mean_gx = _load_gradient_vectors(
            mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dbias_ptr, dweight_ptr, channel, real, share,
            RELU and bits_ptr is None,
        )  # fmt: skip
    row = tl.arange(0, BLOCK_S)[:, None]
    within = element_offsets(channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    for step in range(tl.program_id(0), tiles, splits):
        at, byte_at, _, left = locate(
            tiles - 1 - step, first_channel, positions, channels, image, CHANNELS_LAST, INDEX_64, BLOCK_S
        )
        offset = at + within
        mask = (row < left) & real[None, :]
        if IN_LOOP:
            # For every tile, as in the forward pass.
            mean, scale, bias, mean_g, mean_gx = _load_gradient_vectors(
                mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dbias_ptr, dweight_ptr, channel, real, share,
                RELU and bits_ptr is None,
            )  # fmt: skip
        dy = load_tile(dy_ptr, offset, mask, MASKED)
        centred = dy
        if READS_X:
            centred = load_tile(x_ptr, offset, mask, MASKED) - mean
        g = _masked_gradient(
            dy, centred, scale, bias, bits_ptr, byte_at, keep_scale, left, first_channel, channels, image, RELU,
            CHANNELS_LAST, BLOCK_S, BLOCK_C,
        )  # fmt: skip
        centred_g = g
        if TRAINING:
            centred_g = g - mean_g
        if dx_ptr is not None:
            dx = centred_g
            if TRAINING:
                dx -= centred * mean_gx
            store_tile(dx_ptr, offset, dx * scale, mask, MASKED)
        if dresidual_ptr is not None:
            dr = g
            if ACT_ADD:
                dr = dy
            if NORMED:
                r_mean, r_scale, _, r_mean_g, r_mean_gx = _load_gradient_vectors(
                    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, None, residual_dbias_ptr,
                    residual_dweight_ptr, channel, real, share, False,
                )  # fmt: skip
                if TRAINING:
                    if ACT_ADD:
                        dr -= r_mean_g
                    else:
                        # The mean of the same gradient.
                        dr = centred_g
                    r = load_tile(residual_ptr, offset, mask, MASKED) - r_mean
                    dr -= r * r_mean_gx
                dr *= r_scale
            store_tile(dresidual_ptr, offset, dr, mask, MASKED)


# ------------------------------------------------------------------------------------------------------------ launchers


def _image(shape: Geometry) -> int:
    # Of no use in channels_last, and a constant there is one specialisation less.
    return 1 if shape.channels_last else shape.image


def _vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def _nothing(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype, device=x.device)


def _check(
    x: Tensor,
    activations: Iterable[tuple[str, Tensor | None]],
    vectors: Iterable[Tensor | None],
    bits: Tensor | None = None,
) -> None:
    """Refuse what would make a kernel leave its tensors. `fastres.functional` has checked all of it with better words.

    Raises:
        ValueError: another shape or memory format than x's, or a vector that is not [C]. TypeError: another dtype.
    """
    for name, t in activations:
        if t is not None:
            if t.shape != x.shape or t.stride() != x.stride():
                raise ValueError(
                    f"{name}: expected shape {tuple(x.shape)} and strides {x.stride()}, got {tuple(t.shape)} and"
                    f" {t.stride()}"
                )
            if t.dtype != x.dtype:
                raise TypeError(f"{name}: expected dtype {x.dtype}, got {t.dtype}")
    for v in vectors:
        if v is not None:
            if v.dim() != 1 or v.shape[0] != x.shape[1]:
                raise ValueError(f"vector: expected size ({x.shape[1]},), one value a channel, got {tuple(v.shape)}")
            if v.dtype != torch.float32:
                raise TypeError(f"vector: expected dtype torch.float32, got {v.dtype}")
    if bits is not None and bits.numel() not in (0, reference.bits_size(x)):
        raise ValueError(f"bits: expected {reference.bits_size(x)} bytes, got {bits.numel()}")


class _Norm(NamedTuple):
    """What one batch normalisation brings to the statistics: known mean and M2, and what it updates."""

    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float
    given_mean: Tensor | None
    given_m2: Tensor | None


def _batch_statistics(values: list[tuple[Tensor, _Norm]]) -> list[tuple[Tensor, Tensor]]:
    """(mean, rstd) of x, and of a normalised residual, in one launch; the running statistics are updated."""
    results = [(_vector(x), _vector(x)) for x, _ in values]
    # The kernels take first what they have to compute.
    order = sorted(range(len(values)), key=lambda i: values[i][1].given_mean is not None)
    x, norm = values[order[0]]
    mean, rstd = results[order[0]]
    other, other_norm, other_mean, other_rstd = None, _Norm(None, None, 0.0, 0.0, None, None), None, None
    if len(values) == 2:
        (other, other_norm), (other_mean, other_rstd) = values[order[1]], results[order[1]]
    shape = geometry(x)
    own_running = (norm.running_mean, norm.running_var)
    other_running = (other_norm.running_mean, other_norm.running_var)
    floats = (norm.momentum, norm.eps, other_norm.momentum, other_norm.eps)
    if norm.given_mean is not None:
        launch_over_channels(
            finalise_kernel, shape, x,
            (norm.given_mean, norm.given_m2, mean, rstd, *own_running, other_norm.given_mean, other_norm.given_m2,
             other_mean, other_rstd, *other_running, shape.positions, shape.channels, *floats),
        )  # fmt: skip
        return results
    if other_norm.given_mean is not None:
        other = None
    _launch_statistics(
        x, other, shape, (mean, None, rstd, *own_running, other_norm.given_mean, other_norm.given_m2, other_mean,
                          other_rstd, *other_running), floats,
    )  # fmt: skip
    return results


_RUNNING = ("running_mean_ptr", "running_var_ptr", "other_running_mean_ptr", "other_running_var_ptr")


def _launch_statistics(
    x: Tensor, other: Tensor | None, shape: Geometry, vectors: tuple[Tensor | None, ...], floats: tuple[float, ...]
) -> None:
    tensors = 1 if other is None else 2

    def arguments(plan: Plan) -> tuple[Any, ...]:
        partial = torch.empty(
            tensors * plan.channel_blocks * plan.splits * (2 * plan.block_c + 1), dtype=torch.float32, device=x.device
        )
        arrivals = arrival_counters(x, tensors * plan.channel_blocks)
        return (x, other, partial, arrivals, *vectors, shape.positions, shape.channels, _image(shape), *floats)

    names = dict(zip(statistics_kernel.arg_names[4:], vectors, strict=False))
    launch(
        statistics_kernel, reduce_plan, shape, x, arguments, depth=tensors, partials=True,
        restore=[name for name in _RUNNING if names[name] is not None],
    )  # fmt: skip


def stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count int64 [1], mean [C], M2 [C]) of x [N, C, H, W]."""
    shape, mean, m2 = geometry(x), _vector(x), _vector(x)
    _launch_statistics(x, None, shape, (mean, m2, *[None] * 9), (0.0, 0.0, 0.0, 0.0))
    return torch.full((1,), shape.positions, dtype=torch.int64, device=x.device), mean, m2


def _bits(x: Tensor, act: reference.Activation, has_residual: bool, save: bool) -> Tensor:
    size = reference.bits_size(x) if save and reference.needs_bits(act, has_residual) else 0
    return _nothing(x, torch.uint8) if size == 0 else torch.empty(size, dtype=torch.uint8, device=x.device)


def _keep_scale(dropout_p: float) -> float:
    return 1.0 / (1.0 - dropout_p)


def _forward(
    x: Tensor, vectors: tuple[Tensor | None, ...], residual: Tensor | None, residual_vectors: tuple[Tensor | None, ...],
    seed: Tensor | None, eps: float, residual_eps: float, act: reference.Activation, save_bits: bool, variance: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, bits) by one launch. `vectors`: mean, rstd (the variance where `variance` says so), weight, bias."""
    shape = geometry(x)
    y = torch.empty_like(x)
    bits = _bits(x, act, residual is not None, save_bits)
    threshold = reference.dropout_threshold(act.dropout_p)
    arguments = (
        x, residual, y, bits if bits.numel() > 0 else None, seed if act.dropout_p > 0 else None, *vectors,
        *residual_vectors, shape.positions, shape.channels, _image(shape), eps, residual_eps,
        # As a signed number, so that the argument has one type whatever its value.
        threshold - 2**32 if threshold >= 2**31 else threshold, _keep_scale(act.dropout_p),
    )  # fmt: skip
    launch(
        apply_kernel, apply_plan, shape, x, lambda _: arguments, RELU=act.relu,
        ACT_ADD=residual is not None and act.order == "act_add",
        VARIANCE=variance, FOURS=shape.channels % 4 == 0, WIDE=shape.positions * shape.channels >= 2**34,
    )  # fmt: skip
    return y, bits


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    residual_mean: Tensor | None, residual_rstd: Tensor | None, residual_weight: Tensor | None,
    residual_bias: Tensor | None, seed: Tensor | None, relu: bool, dropout_p: float, order: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_apply."""
    vectors = (mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias)
    _check(x, [("residual", residual)], vectors)
    residual_vectors = (residual_mean, residual_rstd, residual_weight, residual_bias)
    return _forward(
        x, (mean, rstd, weight, bias), residual, residual_vectors if residual_mean is not None else (None,) * 4, seed,
        0.0, 0.0, reference.Activation(relu, dropout_p, order), True, False,
    )  # fmt: skip


def training(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None, residual_weight: Tensor | None, residual_bias: Tensor | None,
    residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
    x_mean: Tensor | None, x_m2: Tensor | None, residual_mean: Tensor | None, residual_m2: Tensor | None,
    seed: Tensor | None, residual_norm: bool, momentum: float, eps: float, residual_momentum: float,
    residual_eps: float, relu: bool, dropout_p: float, order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_training: two launches."""
    vectors = (weight, bias, running_mean, running_var, x_mean, x_m2, residual_weight, residual_bias,
               residual_running_mean, residual_running_var, residual_mean, residual_m2)  # fmt: skip
    _check(x, [("residual", residual)], vectors)
    values = [(x, _Norm(running_mean, running_var, momentum, eps, x_mean, x_m2))]
    normed = residual is not None and residual_norm
    if residual is not None and residual_norm:
        own = _Norm(
            residual_running_mean, residual_running_var, residual_momentum, residual_eps, residual_mean, residual_m2
        )
        values.append((residual, own))
    statistics = _batch_statistics(values)
    for updated in (running_mean, running_var, residual_running_mean, residual_running_var):
        if updated is not None:
            # A kernel writes past autograd, which has to know that the tensor is no longer what it was.
            torch.autograd.graph.increment_version(updated)
    mean, rstd = statistics[0]
    r_mean, r_rstd = statistics[1] if normed else (_nothing(x), _nothing(x))
    residual_vectors = (r_mean, r_rstd, residual_weight, residual_bias) if normed else (None,) * 4
    y, bits = _forward(
        x, (mean, rstd, weight, bias), residual, residual_vectors, seed, 0.0, 0.0,
        reference.Activation(relu, dropout_p, order), True, False,
    )  # fmt: skip
    return y, mean, rstd, r_mean, r_rstd, bits


def inference(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, eps: float, residual_eps: float, relu: bool,
    order: str, save_bits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_inference: one launch."""
    vectors = (running_mean, running_var, weight, bias, residual_running_mean, residual_running_var, residual_weight,
               residual_bias)  # fmt: skip
    _check(x, [("residual", residual)], vectors)
    residual_vectors = (residual_running_mean, residual_running_var, residual_weight, residual_bias)
    return _forward(
        x, (running_mean, running_var, weight, bias), residual,
        residual_vectors if residual_running_mean is not None else (None,) * 4, None, eps, residual_eps,
        reference.Activation(relu, 0.0, order), save_bits, True,
    )  # fmt: skip


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, relu: bool, dropout_p: float,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_backward_reduce: one launch."""
    _check(
        x, [("dy", dy), ("residual", residual)], (mean, rstd, weight, bias, residual_mean, residual_rstd), bits
    )  # fmt: skip
    shape = geometry(x)
    bits = None if bits is None or bits.numel() == 0 else bits
    normed = residual_mean is not None
    dweight, dbias = _vector(x), _vector(x)
    r_dweight, r_dbias = (_vector(x), _vector(x)) if normed else (_nothing(x), _nothing(x))
    sums = (4 if order == "act_add" else 3) if normed else 2

    def arguments(plan: Plan) -> tuple[Any, ...]:
        partial = torch.empty(
            plan.channel_blocks * plan.splits * sums * plan.block_c, dtype=torch.float32, device=x.device
        )
        return (
            dy, x, residual if normed else None, bits, partial, arrival_counters(x, plan.channel_blocks), mean, rstd,
            weight, bias, residual_mean, residual_rstd, dweight, dbias, r_dweight if normed else None,
            r_dbias if normed else None, shape.positions, shape.channels, _image(shape), _keep_scale(dropout_p),
        )  # fmt: skip

    launch(
        backward_reduce_kernel, reduce_plan, shape, x, arguments, partials=True, RELU=relu,
        ACT_ADD=normed and order == "act_add",
    )  # fmt: skip
    return dweight, dbias, r_dweight, r_dbias


def backward_apply(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, dweight: Tensor | None,
    dbias: Tensor | None, residual_dweight: Tensor | None, residual_dbias: Tensor | None, count: Tensor | None,
    relu: bool, dropout_p: float, order: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_backward_apply: one launch, or none where no gradient is needed."""
    vectors = (mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, dweight, dbias,
               residual_dweight, residual_dbias)  # fmt: skip
    _check(x, [("dy", dy), ("residual", residual)], vectors, bits)
    shape = geometry(x)
    dx, dr = (torch.empty_like(x) if need else _nothing(x, x.dtype) for need in needs)
    if not any(needs):
        return dx, dr
    normed = residual_mean is not None
    arguments = (
        dy, x, residual if normed else None, None if bits is None or bits.numel() == 0 else bits,
        dx if needs[0] else None, dr if needs[1] else None, mean, rstd, weight, bias, residual_mean, residual_rstd,
        residual_weight if normed else None, dweight, dbias, residual_dweight, residual_dbias, count, shape.positions,
        shape.channels, _image(shape), _keep_scale(dropout_p),
    )  # fmt: skip
    launch(
        backward_apply_kernel, apply_plan, shape, x, lambda _: arguments, RELU=relu,
        ACT_ADD=needs[1] and order == "act_add",
    )  # fmt: skip
    return dx, dr


def _call(function: Callable[..., Any], *groups: Iterable[Any]) -> Any:
    return function(*chain.from_iterable(groups))


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, training: bool, relu: bool,
    dropout_p: float, order: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_backward: two launches, or one: sums alone, or input gradients in evaluation."""
    saved = [
        dy, x, mean, rstd, weight, bias, residual, residual_mean, residual_rstd, residual_weight, residual_bias, bits
    ]  # fmt: skip
    act = (relu, dropout_p, order)
    sums = none = [_nothing(x) for _ in range(4)]
    depend = training and (needs[0] or needs[1])  # on the sums
    if needs[2] or depend:
        sums = list(_call(backward_reduce, saved, act))
    through: list[Tensor | None] = [None] * 4
    if depend:
        through = [*sums] if residual_mean is not None else [*sums[:2], None, None]
    dx, dr = _call(backward_apply, saved, through, (None,), act, (needs[:2],))
    return dx, dr, *(sums if needs[2] else none)
