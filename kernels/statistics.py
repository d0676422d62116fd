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
def _moments_of_sums(count, total, squares):
    """(mean - origin, M2) of `count` values whose differences from an origin have this sum and sum of squares.

    M2 = squares - total^2 / count loses as many digits as squares / M2 has. The origin is the mean of a share of the
    values, a k-th of them, and those alone contribute M2 >= count / k * (mean - origin)^2: never more than log10(k).
    Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", section 4.
    """
    mean = total / count
    m2 = squares - total * mean
    return mean, tl.where(m2 < 0, 0.0, m2)  # where it is NaN it stays that


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

    Each position of the tile has sums of its own, which are added up once, at the end, so the loop has no exchange
    between threads. They are of differences from the mean of the program's first tile, small where the mean is far
    from 0.
    """
    row = tl.arange(0, tile.BLOCK_S)[:, None]
    within = element_offsets(extent, tile)
    first = locate(tl.program_id(0), block, extent, tile)
    exists = row < first.left
    x = load_tile(x_ptr, first.element + within, exists & block.real[None, :], tile)
    total = x - origin[None, :]
    if not tile.EVEN_S:
        total = tl.where(exists, total, 0.0)
    anchor = origin + tl.sum(total, axis=0) / first.left.to(tl.float32)
    # Of an infinite mean nothing can be subtracted.
    anchor = tl.where(tl.abs(anchor) < float("inf"), anchor, 0.0)
    total = x - anchor[None, :]
    if not tile.EVEN_S:
        total = tl.where(exists, total, 0.0)
    squares = total * total
    count = first.left.to(tl.int32)
    # Four loads under way before the first is needed.
    for index in tl.range(tl.program_id(0) + splits, tiles, splits, loop_unroll_factor=4):
        place = locate(index, block, extent, tile)
        exists = row < place.left
        x = load_tile(x_ptr, place.element + within, exists & block.real[None, :], tile) - anchor[None, :]
        if not tile.EVEN_S:
            x = tl.where(exists, x, 0.0)
            count += place.left.to(tl.int32)
        total += x
        squares += x * x
    if tile.EVEN_S:
        count = tl.cdiv(tiles - tl.program_id(0), splits) * tile.BLOCK_S
    count = tl.full((1,), count, tl.int32).to(tl.float32)
    mean, m2 = _moments_of_sums(count, tl.sum(total, axis=0), tl.sum(squares, axis=0))
    return count, (anchor - origin) + mean, m2


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
        # The union of the samples, by sums of differences from the first one's mean.
        anchor = tl.load(row_ptr + column, cache_modifier=".cg")
        anchor = tl.where(tl.abs(anchor) < float("inf"), anchor, 0.0)
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in tl.range(0, splits, BLOCK_P, loop_unroll_factor=2):
            p = start + tl.arange(0, BLOCK_P)
            exists = p < splits
            at = row_ptr + (p * (2 * BLOCK_C))[:, None] + column[None, :]
            n = tl.load(counts_ptr + p, mask=exists, other=0.0, cache_modifier=".cg")[:, None]
            delta = tl.load(at, mask=exists[:, None], other=0.0, cache_modifier=".cg") - anchor[None, :]
            # Rows that do not exist take no part.
            delta = tl.where(exists[:, None], delta, 0.0)
            total += n * delta
            squares += tl.load(at + BLOCK_C, mask=exists[:, None], other=0.0, cache_modifier=".cg") + n * delta * delta
        positions = extent.positions.to(tl.float32)
        mean, m2 = _moments_of_sums(positions, tl.sum(total, axis=0), tl.sum(squares, axis=0))
        _finalise(origin + (anchor + mean), m2, positions, kept, block)


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
