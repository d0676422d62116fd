"""The dropout contract in Triton: which elements are kept, a pure function of the seed and the element's index.

Element i (linear index in N, H, W, C order, whatever the memory format) takes word i % 4 of Philox-4x32-10 with the
seed as key and the counter (i // 4, 0, 0, 0), and is kept where that word, as an unsigned number, is at least the
threshold.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(seed, first, offset, WIDE: tl.constexpr):
    """The four words of each counter first + offset, uint32 in the offset's shape.

    WIDE: whether counters reach 2^32; otherwise their high word is 0.
    """
    if WIDE:
        counter = first + offset
        low = (counter & 0xFFFFFFFF).to(tl.uint32)
        high = (counter >> 32).to(tl.uint32)
    else:
        low = first.to(tl.uint32) + offset.to(tl.uint32)
        high = low * 0
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def dropout_keep(seed, index, channels, threshold, FOURS: tl.constexpr, WIDE: tl.constexpr, tile: tl.constexpr):
    """Whether each element of a tile is kept, bool [BLOCK_S, BLOCK_C].

    Args:
        index: of the tile's first element in N, H, W, C order; its rows follow each other in that order.
        threshold: int32 with the bits of the unsigned threshold.
        FOURS: channels % 4 == 0. Then four neighbouring channels share a call and use its four words. Otherwise a call
            serves one element, since groups of four run across the ends of rows.
        WIDE: whether the tensor has 2^34 elements or more.
    """
    least = threshold.to(tl.uint32, bitcast=True)
    s = tl.arange(0, tile.BLOCK_S)[:, None]
    if FOURS:
        a, b, c, d = _words(seed, index // 4, s * (channels // 4) + tl.arange(0, tile.BLOCK_C // 4)[None, :], WIDE)
        even = tl.join(a >= least, c >= least)
        odd = tl.join(b >= least, d >= least)
        return tl.reshape(tl.join(even, odd), (tile.BLOCK_S, tile.BLOCK_C))
    else:
        element = (index % 4).to(tl.int32) + s * channels + tl.arange(0, tile.BLOCK_C)[None, :]
        a, b, c, d = _words(seed, index // 4, element >> 2, WIDE)
        word = element & 3
        return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)) >= least
