"""How a program walks over an activation: tiles of [BLOCK_S positions, BLOCK_C channels], in either memory format.

channels_last memory is [M, C], M = N * H * W: a tile is BLOCK_S rows of it. NCHW memory is [N, C, HW]: a tile is BLOCK_S
positions of one image. In both the tile's axis 0 is the position and axis 1 the channel, so that all arithmetic and all
sums over positions are written once; the compiler sees along which axis the memory runs and orders its threads by it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def positions_of(tile, positions, image, CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, BLOCK_S: tl.constexpr):
    """(image index, first position inside the image, index in N, H, W order [BLOCK_S], whether it exists [BLOCK_S]).

    In channels_last all images are one: image index 0, and the position counts through the batch.
    """
    if INDEX_64:
        tile = tile.to(tl.int64)
    if CHANNELS_LAST:
        n = tile * 0
        first = tile * BLOCK_S
        position = first + tl.arange(0, BLOCK_S)
        inside = position < positions
    else:
        tiles_per_image = tl.cdiv(image, BLOCK_S)
        n = tile // tiles_per_image
        first = (tile % tiles_per_image) * BLOCK_S
        s = first + tl.arange(0, BLOCK_S)
        position = n * image + s
        inside = s < image
    return n, first, position, inside


@triton.jit
def element_offsets(n, first, position, channel, channels, image, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offsets of the tile's elements in memory, [BLOCK_S, BLOCK_C]."""
    if CHANNELS_LAST:
        offset = position[:, None] * channels + channel[None, :]
    else:
        s = first + tl.arange(0, BLOCK_S)
        offset = (n * channels + channel)[None, :] * image + s[:, None]
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
    n, first, position, inside, first_channel, channels, image,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of the tile's bytes in the bit mask: [BLOCK_S, BLOCK_C / 8] or [BLOCK_S / 8, BLOCK_C]."""
    if CHANNELS_LAST:
        byte = first_channel // 8 + tl.arange(0, BLOCK_C // 8)
        row_bytes = tl.cdiv(channels, 8)
        offset = position[:, None] * row_bytes + byte[None, :]
        mask = inside[:, None] & (byte < row_bytes)[None, :]
    else:
        channel = first_channel + tl.arange(0, BLOCK_C)
        byte = first // 8 + tl.arange(0, BLOCK_S // 8)
        row_bytes = tl.cdiv(image, 8)
        offset = (n * channels + channel)[None, :] * row_bytes + byte[:, None]
        mask = (byte < row_bytes)[:, None] & (channel < channels)[None, :]
    return offset, mask


@triton.jit
def store_bits(
    bits_ptr, passed, n, first, position, inside, first_channel, channels, image,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pack the tile's booleans, false outside the tensor, into bytes and store them: csrc/common/bitmask.h."""
    weight = 1 << tl.arange(0, 8)
    if CHANNELS_LAST:
        eights = tl.reshape(passed.to(tl.int32), (BLOCK_S, BLOCK_C // 8, 8))
        byte = tl.sum(eights * weight[None, None, :], axis=2)
    else:
        eights = tl.reshape(passed.to(tl.int32), (BLOCK_S // 8, 8, BLOCK_C))
        byte = tl.sum(eights * weight[None, :, None], axis=1)
    offset, mask = _byte_offsets(
        n, first, position, inside, first_channel, channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C
    )
    tl.store(bits_ptr + offset, byte.to(tl.uint8), mask=mask)


@triton.jit
def load_bits(
    bits_ptr, n, first, position, inside, first_channel, channels, image,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tile's booleans from the bit mask, one byte loaded for eight of them."""
    offset, mask = _byte_offsets(
        n, first, position, inside, first_channel, channels, image, CHANNELS_LAST, BLOCK_S, BLOCK_C
    )
    byte = tl.load(bits_ptr + offset, mask=mask, other=0).to(tl.int32)
    shift = tl.arange(0, 8)
    if CHANNELS_LAST:
        bits = (byte[:, :, None] >> shift[None, None, :]) & 1
    else:
        bits = (byte[:, None, :] >> shift[None, :, None]) & 1
    return tl.reshape(bits, (BLOCK_S, BLOCK_C)) != 0
