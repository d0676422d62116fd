"""Batch statistics: mean, sum of squared deviations (M2) and rstd a channel, and the update of running statistics.

Sums over positions are two-stage without floating-point atomics. Each program leaves its partial sums in a workspace;
the program that arrives last for its channels, as an integer counter tells it, adds all partials in the order of their
splits. So the result does not depend on which program that was, and finalising costs no launch and no second reader.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import Extent, Tile, element_offsets, load_tile, locate, program_channels


class Kept(NamedTuple):
    """What one batch normalisation keeps of its batch: pointers to [C] of float32, each but the mean may be None."""

    mean: Any
    m2: Any
    rstd: Any
    running_mean: Any
    running_var: Any
    momentum: Any
    eps: Any


class Given(NamedTuple):
    """Statistics that are known: pointers to [C] of float32, and to the int64 count, which may be None."""

    mean: Any
    m2: Any
    count: Any


@triton.jit
def _finalise(mean, m2, count, kept, block):
    """Store what is kept, and update the running statistics; mean and M2 are [BLOCK_C].

    running = (1 - momentum) * running + momentum * batch, with the unbiased variance m2 / (count - 1).
    """
    channel, mask = block.channel, block.real
    tl.store(kept.mean + channel, mean, mask=mask)
    if kept.m2 is not None:
        tl.store(kept.m2 + channel, m2, mask=mask)
    if kept.rstd is not None:
        # Once a channel, so the correctly rounded operations cost nothing.
        tl.store(kept.rstd + channel, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, count) + kept.eps)), mask=mask)
    if kept.running_mean is not None:
        share = kept.momentum
        old_mean = tl.load(kept.running_mean + channel, mask=mask, other=0.0)
        old_var = tl.load(kept.running_var + channel, mask=mask, other=0.0)
        tl.store(kept.running_mean + channel, (1 - share) * old_mean + share * mean, mask=mask)
        tl.store(kept.running_var + channel, (1 - share) * old_var + share * (m2 / (count - 1)), mask=mask)


@triton.jit
def _finalise_given(given, kept, block, positions):
    mean = tl.load(given.mean + block.channel, mask=block.real, other=0.0)
    m2 = tl.load(given.m2 + block.channel, mask=block.real, other=0.0)
    count = positions.to(tl.float32)
    if given.count is not None:
        count = tl.load(given.count).to(tl.float32)
    _finalise(mean, m2, count, kept, block)


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
def _origin(x_ptr, block, extent, tile: tl.constexpr):
    """[BLOCK_C], the tensor's first element of each channel: means are kept as differences from it."""
    if tile.CHANNELS_LAST:
        offset = block.channel
    else:
        offset = block.channel * extent.image
    return tl.load(x_ptr + offset, mask=block.real, other=0.0).to(tl.float32)


@triton.jit
def _moments(x_ptr, origin, block, extent, tiles, splits, tile: tl.constexpr):
    """(count [1], mean - origin, M2 [BLOCK_C]) of this program's tiles.

    Each position of the tile is a sample of its own, updated as in Welford 1962; the BLOCK_S samples of a channel are
    combined once, at the end, so the loop has no exchange between threads. Differences from the origin are taken first:
    where the mean is far from 0 they are small, and where the origin itself is far from the rest M2 is large.
    """
    row = tl.arange(0, tile.BLOCK_S)[:, None]
    within = element_offsets(extent, tile)
    mean = tl.zeros((tile.BLOCK_S, tile.BLOCK_C), tl.float32)
    m2 = tl.zeros((tile.BLOCK_S, tile.BLOCK_C), tl.float32)
    count = tl.zeros((tile.BLOCK_S, 1), tl.float32)
    rounds = 0.0
    # Four loads under way before the first is needed.
    for index in tl.range(tl.program_id(0), tiles, splits, loop_unroll_factor=4):
        place = locate(index, block, extent, tile)
        exists = row < place.left
        x = load_tile(x_ptr, place.element + within, exists & block.real[None, :], tile) - origin[None, :]
        delta = x - mean
        if tile.EVEN_S:
            rounds += 1.0
            mean += delta * (1.0 / rounds)
            m2 += delta * (x - mean)
        else:
            count += exists.to(tl.float32)
            mean += tl.where(exists, delta / tl.maximum(count, 1.0), 0.0)
            m2 += tl.where(exists, delta * (x - mean), 0.0)
    if tile.EVEN_S:
        count += rounds
    return _combine_moments(count, mean, m2, tile.BLOCK_S)


@triton.jit
def _statistics(
    x_ptr, partial_ptr, arrivals_ptr, kept, extent, tiles, splits, tile: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Statistics of one tensor: this program's share, and all of them where it is the last of its channels."""
    BLOCK_C: tl.constexpr = tile.BLOCK_C
    split = tl.program_id(0)
    block = program_channels(extent, tile)
    origin = _origin(x_ptr, block, extent, tile)
    count, mean, m2 = _moments(x_ptr, origin, block, extent, tiles, splits, tile)
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
        _finalise(origin + whole_mean, whole_m2, extent.positions.to(tl.float32), kept, block)


@triton.jit(do_not_specialize=["positions", "momentum", "eps", "other_momentum", "other_eps", "tiles", "splits"])
def statistics_kernel(
    x_ptr,  # [M, C] or [N, C, HW]
    other_ptr,  # the same shape: a second tensor whose statistics are taken in the same launch; or None
    partial_ptr,  # float32, a tensor after the other: [channel blocks, splits, 2, BLOCK_C] mean - origin and M2, then
    # [channel blocks, splits] counts
    arrivals_ptr,  # [tensors, channel blocks] int32, 0 before and after
    mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,  # [C] float32
    other_given_mean_ptr, other_given_m2_ptr,  # [C]: statistics of the second tensor where they are known; or None
    other_given_count_ptr,  # int64 [1], of them; None: M
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
    tile: tl.constexpr = Tile(CHANNELS_LAST, INDEX_64, EVEN_S, EVEN_C, BLOCK_S, BLOCK_C)
    extent = Extent(positions, channels, image)
    kept = Kept(mean_ptr, m2_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps)
    other = Kept(
        other_mean_ptr, None, other_rstd_ptr, other_running_mean_ptr, other_running_var_ptr, other_momentum, other_eps
    )
    if other_ptr is not None:
        if tl.program_id(2) == 0:
            _statistics(x_ptr, partial_ptr, arrivals_ptr, kept, extent, tiles, splits, tile, BLOCK_P)
        else:
            blocks = tl.num_programs(1)
            other_partial_ptr = partial_ptr + blocks * splits * (2 * BLOCK_C + 1)
            _statistics(
                other_ptr, other_partial_ptr, arrivals_ptr + blocks, other, extent, tiles, splits, tile, BLOCK_P
            )
    else:
        if other_given_mean_ptr is not None:
            if tl.program_id(0) == 0:
                given = Given(other_given_mean_ptr, other_given_m2_ptr, other_given_count_ptr)
                _finalise_given(given, other, program_channels(extent, tile), positions)
        _statistics(x_ptr, partial_ptr, arrivals_ptr, kept, extent, tiles, splits, tile, BLOCK_P)


@triton.jit(do_not_specialize=["positions", "momentum", "eps", "other_momentum", "other_eps"])
def finalise_kernel(
    given_mean_ptr, given_m2_ptr,  # [C] float32
    given_count_ptr,  # int64 [1], elements a channel behind them; None: M
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,  # [C] float32
    other_given_mean_ptr, other_given_m2_ptr, other_given_count_ptr,  # of a second tensor; or None
    other_mean_ptr, other_rstd_ptr, other_running_mean_ptr, other_running_var_ptr,
    positions, channels, momentum, eps, other_momentum, other_eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rstd and running statistics where every mean and M2 is known: nothing of size T is touched.

    Grid: (1, channel blocks).
    """
    tile: tl.constexpr = Tile(True, False, False, False, 1, BLOCK_C)
    block = program_channels(Extent(positions, channels, 1), tile)
    given = Given(given_mean_ptr, given_m2_ptr, given_count_ptr)
    kept = Kept(mean_ptr, None, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps)
    _finalise_given(given, kept, block, positions)
    if other_given_mean_ptr is not None:
        given = Given(other_given_mean_ptr, other_given_m2_ptr, other_given_count_ptr)
        kept = Kept(
            other_mean_ptr, None, other_rstd_ptr, other_running_mean_ptr, other_running_var_ptr, other_momentum,
            other_eps,
        )  # fmt: skip
        _finalise_given(given, kept, block, positions)
