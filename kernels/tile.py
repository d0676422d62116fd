"""How a program walks over an activation: tiles of [BLOCK_S positions, BLOCK_C channels], in either memory format.

channels_last memory is [M, C], M = N * H * W: a tile is BLOCK_S rows of it. NCHW memory is [N, C, HW]: a tile is
BLOCK_S positions of one image. In both the tile's axis 0 is the position and axis 1 the channel, so that all arithmetic
and all sums over positions are written once; the compiler sees along which axis the memory runs and orders its threads
by it.

An offset is a scalar, where the tile begins, and an offset within the tile that is the same for every tile. Their sum
serves all tensors of a pass. It has 32 bits where the tensor allows it: 64 would cost every thread registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Extent(NamedTuple):
    """The size of an activation, three scalars: M = N * H * W, C and H * W."""

    positions: Any
    channels: Any
    image: Any


class Tile(NamedTuple):
    """What a kernel knows of its tiles when it is compiled; `plan.Plan` explains the choice."""

    CHANNELS_LAST: Any
    INDEX_64: Any
    EVEN_S: Any
    EVEN_C: Any
    BLOCK_S: Any
    BLOCK_C: Any


class Block(NamedTuple):
    """The channels of a program: its first, all of them, [BLOCK_C], and which of these there are."""

    first: Any
    channel: Any
    real: Any


class Place(NamedTuple):
    """Where a tile begins: four scalars, the first three of 64 bits where INDEX_64 says that they need them.

    Attributes:
        element: offset of its first element in memory.
        byte: offset of its first byte in the bit mask.
        index: index of its first element in N, H, W, C order.
        left: how many positions there are from its first on, in channels_last to the end of the batch and in NCHW to
            the end of the image, BLOCK_S at most.
    """

    element: Any
    byte: Any
    index: Any
    left: Any


class NormPointers(NamedTuple):
    """A normalisation by given statistics, pointers to [C] of float32; weight and bias may be None."""

    mean: Any
    rstd: Any
    weight: Any
    bias: Any


@triton.jit
def program_channels(extent, tile: tl.constexpr):
    """The channels of this program, the grid's second axis."""
    first = tl.program_id(1) * tile.BLOCK_C
    channel = first + tl.arange(0, tile.BLOCK_C)
    return Block(first, channel, channel < extent.channels)


@triton.jit
def locate(index, block, extent, tile: tl.constexpr):
    """The `Place` of a tile, counted along the positions."""
    if tile.INDEX_64:
        index = tl.cast(index, tl.int64)
    if tile.CHANNELS_LAST:
        first = index * tile.BLOCK_S
        element = first * extent.channels + block.first
        byte = first * tl.cdiv(extent.channels, 8) + block.first // 8
        of_element = element
        left = extent.positions - first
    else:
        tiles_per_image = tl.cdiv(extent.image, tile.BLOCK_S)
        n = index // tiles_per_image
        first = (index % tiles_per_image) * tile.BLOCK_S
        row = n * extent.channels + block.first
        element = row * extent.image + first
        byte = row * tl.cdiv(extent.image, 8) + first // 8
        of_element = (n * extent.image + first) * extent.channels + block.first
        left = extent.image - first
    return Place(element, byte, of_element, tl.minimum(left, tile.BLOCK_S))


@triton.jit
def element_offsets(extent, tile: tl.constexpr):
    """Offsets of a tile's elements from its first, [BLOCK_S, BLOCK_C] of 32 bits, the same for every tile."""
    s, c = tl.arange(0, tile.BLOCK_S)[:, None], tl.arange(0, tile.BLOCK_C)[None, :]
    if tile.CHANNELS_LAST:
        offset = s * extent.channels + c
    else:
        offset = c * extent.image + s
    return offset


@triton.jit
def load_tile(x_ptr, offset, mask, tile: tl.constexpr):
    """A tile in float32; 0 where it does not exist."""
    if tile.EVEN_S and tile.EVEN_C:
        x = tl.load(x_ptr + offset)
    else:
        x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_tile(x_ptr, offset, x, mask, tile: tl.constexpr):
    """Round a float32 tile to the tensor's dtype and store it."""
    x = x.to(x_ptr.dtype.element_ty)
    if tile.EVEN_S and tile.EVEN_C:
        tl.store(x_ptr + offset, x)
    else:
        tl.store(x_ptr + offset, x, mask=mask)


@triton.jit
def load_channels(v_ptr, block, OTHER: tl.constexpr):
    """[1, BLOCK_C] of a vector with one float32 value a channel; OTHER where there is no vector or no channel."""
    if v_ptr is not None:
        v = tl.load(v_ptr + block.channel, mask=block.real, other=OTHER)
    else:
        v = tl.full(block.channel.shape, OTHER, tl.float32)
    return v[None, :]


@triton.jit
def load_affine(norm, block, eps, VARIANCE: tl.constexpr):
    """(mean, weight * rstd, bias), [1, BLOCK_C] each; rstd from the variance where that is what is stored."""
    rstd = load_channels(norm.rstd, block, 1.0)
    if VARIANCE:
        rstd = tl.rsqrt(rstd + eps)
    mean = load_channels(norm.mean, block, 0.0)
    return mean, rstd * load_channels(norm.weight, block, 1.0), load_channels(norm.bias, block, 0.0)


@triton.jit
def _byte_offsets(place, block, extent, tile: tl.constexpr):
    """Offsets of a tile's bytes in the bit mask from its first, and which exist.

    [BLOCK_S, BLOCK_C / 8] in channels_last, [BLOCK_S / 8, BLOCK_C] in NCHW.
    """
    if tile.CHANNELS_LAST:
        s, byte = tl.arange(0, tile.BLOCK_S)[:, None], tl.arange(0, tile.BLOCK_C // 8)[None, :]
        offset = s * tl.cdiv(extent.channels, 8) + byte
        mask = (s < place.left) & (byte * 8 < extent.channels - block.first)
    else:
        byte, c = tl.arange(0, tile.BLOCK_S // 8)[:, None], tl.arange(0, tile.BLOCK_C)[None, :]
        offset = c * tl.cdiv(extent.image, 8) + byte
        mask = (byte * 8 < place.left) & (c < extent.channels - block.first)
    return offset, mask


@triton.jit
def store_bits(bits_ptr, place, passed, block, extent, tile: tl.constexpr):
    """Pack the tile's booleans, false outside the tensor, and store them: csrc/common/bitmask.h."""
    weight = 1 << tl.arange(0, 8)
    if tile.CHANNELS_LAST:
        eights = tl.reshape(passed.to(tl.int32), (tile.BLOCK_S, tile.BLOCK_C // 8, 8))
        byte = tl.sum(eights * weight[None, None, :], axis=2)
    else:
        eights = tl.reshape(passed.to(tl.int32), (tile.BLOCK_S // 8, 8, tile.BLOCK_C))
        byte = tl.sum(eights * weight[None, :, None], axis=1)
    offset, mask = _byte_offsets(place, block, extent, tile)
    tl.store(bits_ptr + (place.byte + offset), byte.to(tl.uint8), mask=mask)


@triton.jit
def load_bits(bits_ptr, place, block, extent, tile: tl.constexpr):
    """The tile's booleans from the bit mask, one byte loaded for eight of them."""
    offset, mask = _byte_offsets(place, block, extent, tile)
    byte = tl.load(bits_ptr + (place.byte + offset), mask=mask, other=0).to(tl.int32)
    shift = tl.arange(0, 8)
    if tile.CHANNELS_LAST:
        bits = (byte[:, :, None] >> shift[None, None, :]) & 1
    else:
        bits = (byte[:, None, :] >> shift[None, :, None]) & 1
    return tl.reshape(bits, (tile.BLOCK_S, tile.BLOCK_C)) != 0
