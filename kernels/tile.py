"""How a program walks over an activation: tiles of [BLOCK_S positions, BLOCK_C channels], in either memory format.

channels_last memory is [M, C], M = N * H * W: a tile is BLOCK_S rows of it. NCHW memory is [N, C, HW]: a tile is
BLOCK_S positions of one image. In both the tile's axis 0 is the position and axis 1 the channel, so that all arithmetic
and all sums over positions are written once; the compiler sees along which axis the memory runs and orders its threads
by it.

An offset is a scalar, where the tile begins, and an offset within the tile that is the same for every tile. Their sum
serves all tensors of a pass. It has 32 bits where the tensor allows it: 64 would cost every thread registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(
    tile, first_channel, positions, channels, image, CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Where a tile begins: four scalars, the first three of 64 bits where INDEX_64 says that they need them.

    Returns:
        offset of its first element in memory; offset of its first byte in the bit mask; index of its first element in
        N, H, W, C order; how many positions there are from its first on, in channels_last to the end of the batch and
        in NCHW to the end of the image, BLOCK_S at most.
    """
    if INDEX_64:
        tile = tl.cast(tile, tl.int64)
    if CHANNELS_LAST:
        first = tile * BLOCK_S
        element = first * channels + first_channel
        byte = first * tl.cdiv(channels, 8) + first_channel // 8
        index = element
        left = positions - first
    else:
        tiles_per_image = tl.cdiv(image, BLOCK_S)
        n = tile // tiles_per_image
        first = (tile % tiles_per_image) * BLOCK_S
        row = n * channels + first_channel
        element = row * image + first
        byte = row * tl.cdiv(image, 8) + first // 8
        index = (n * image + first) * channels + first_channel
        left = image - first
    return element, byte, index, tl.minimum(left, BLOCK_S)


@triton.jit
def element_offsets(channels, image, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile's elements from its first, [BLOCK_S, BLOCK_C] of 32 bits, the same for every tile."""
    s, c = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_C)[None, :]
    if CHANNELS_LAST:
        offset = s * channels + c
    else:
        offset = c * image + s
    return offset


@triton.jit
def load_tile(x_ptr, offset, mask, MASKED: tl.constexpr):
    """A tile in float32; 0 where it does not exist."""
    if MASKED:
        x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    else:
        x = tl.load(x_ptr + offset)
    return x.to(tl.float32)


@triton.jit
def store_tile(x_ptr, offset, x, mask, MASKED: tl.constexpr):
    """Round a float32 tile to the tensor's dtype and store it."""
    x = x.to(x_ptr.dtype.element_ty)
    if MASKED:
        tl.store(x_ptr + offset, x, mask=mask)
    else:
        tl.store(x_ptr + offset, x)


@triton.jit
def load_channels(v_ptr, channel, mask, OTHER: tl.constexpr):
    """[1, BLOCK_C] of a vector with one float32 value a channel; OTHER where there is no vector or no channel."""
    if v_ptr is not None:
        v = tl.load(v_ptr + channel, mask=mask, other=OTHER)
    else:
        v = tl.full(channel.shape, OTHER, tl.float32)
    return v[None, :]


@triton.jit
def _byte_offsets(
    left, first_channel, channels, image, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Offsets of a tile's bytes in the bit mask from its first, and which exist.

    [BLOCK_S, BLOCK_C / 8] in channels_last, [BLOCK_S / 8, BLOCK_C] in NCHW.
    """
    if CHANNELS_LAST:
        s, byte = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_C // 8)[None, :]
        offset = s * tl.cdiv(channels, 8) + byte
        mask = (s < left) & (byte * 8 < channels - first_channel)
    else:
        byte, c = tl.arange(0, BLOCK_S // 8)[:, None], tl.arange(0, BLOCK_C)[None, :]
        offset = c * tl.cdiv(image, 8) + byte
        mask = (byte * 8 < left) & (c < channels - first_channel)
    return offset, mask


@triton.jit
def store_bits(
    bits_ptr, at, passed, left, first_channel, channels, image,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pack the tile's booleans, false outside the tensor, and store them from byte `at` on: csrc/common/bitmask.h."""
    weight = 1 << tl.arange(0, 8)
    if CHANNELS_LAST:
        eights = tl.reshape(passed.to(tl.int32), (BLOCK_S, BLOCK_C // 8, 8))
        byte = tl.sum(eights * weight[None, None, :], axis=2)
    else:
        eights = tl.reshape(passed.to(tl.int32), (BLOCK_S // 8, 8, BLOCK_C))
        byte = tl.sum(eights * weight[None, :, None], axis=1)
    offset, mask = _byte_offsets(left, first_channel, channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    tl.store(bits_ptr + (at + offset), byte.to(tl.uint8), mask=mask)


@triton.jit
def load_bits(
    bits_ptr, at, left, first_channel, channels, image,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tile's booleans from the bit mask, one byte loaded for eight of them; they begin at byte `at`."""
    offset, mask = _byte_offsets(left, first_channel, channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    byte = tl.load(bits_ptr + (at + offset), mask=mask, other=0).to(tl.int32)
    shift = tl.arange(0, 8)
    if CHANNELS_LAST:
        bits = (byte[:, :, None] >> shift[None, None, :]) & 1
    else:
        bits = (byte[:, None, :] >> shift[None, :, None]) & 1
    return tl.reshape(bits, (BLOCK_S, BLOCK_C)) != 0
