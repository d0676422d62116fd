"""The forward pass by given statistics: normalisation, residual addition, activation and dropout at once.

xhat = (x - mean) * rstd        z = weight * xhat + bias
"add_act":  y = dropout(f(z + r))            "act_add":  y = dropout(f(z)) + r
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import dropout_keep
from .tile import (
    Extent,
    NormPointers,
    Tile,
    element_offsets,
    load_affine,
    load_tile,
    locate,
    program_channels,
    store_bits,
    store_tile,
)


@triton.jit(
    do_not_specialize=["positions", "eps", "residual_eps", "threshold", "keep_scale", "tiles", "splits", "alpha"]
)
def apply_kernel(
    x_ptr, residual_ptr, y_ptr,  # [M, C] or [N, C, HW]; residual_ptr may be None
    bits_ptr,  # uint8, the bit mask; or None where it is not kept
    seed_ptr,  # int64 [1]; or None without dropout
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # [C] float32; weight and bias may be None
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,  # [C]; None without their own norm
    positions, channels, image, eps, residual_eps, threshold, keep_scale, tiles, splits, alpha,
    FORWARD: tl.constexpr, PASSES: tl.constexpr,  # functions of activations.py; or None
    ACT_ADD: tl.constexpr, VARIANCE: tl.constexpr, FOURS: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = dropout(f(z + r)) or dropout(f(z)) + r, and the bit mask.

    Reads T for x and T for r, writes T for y and 1 bit an element. VARIANCE: rstd_ptr holds the variance, as evaluation
    has it. Grid: (splits, channel blocks).
    """
    tile: tl.constexpr = Tile(CHANNELS_LAST, INDEX_64, EVEN_S, EVEN_C, BLOCK_S, BLOCK_C)
    extent = Extent(positions, channels, image)
    block = program_channels(extent, tile)
    norm = NormPointers(mean_ptr, rstd_ptr, weight_ptr, bias_ptr)
    residual_norm = NormPointers(residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr)
    NORMED: tl.constexpr = residual_mean_ptr is not None
    # With a smooth activation a thread has half as many channels (`plan.CROWDED_BYTES_A_THREAD`).
    IN_LOOP: tl.constexpr = NORMED and FORWARD is None and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    # What is 0 where it does not pass needs no function, and shares dropout's selection.
    SELECTS: tl.constexpr = FORWARD is None and PASSES is not None
    if not IN_LOOP:
        mean, scale, bias = load_affine(norm, block, eps, VARIANCE)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row = tl.arange(0, BLOCK_S)[:, None]
    within = element_offsets(extent, tile)
    for step in range(tl.program_id(0), tiles, splits):
        place = locate(tiles - 1 - step, block, extent, tile)
        offset = place.element + within
        mask = (row < place.left) & block.real[None, :]
        x = load_tile(x_ptr, offset, mask, tile)
        if residual_ptr is not None:
            r = load_tile(residual_ptr, offset, mask, tile)
            if NORMED:
                r_mean, r_scale, r_bias = load_affine(residual_norm, block, residual_eps, VARIANCE)
                r = (r - r_mean) * r_scale + r_bias
        if IN_LOOP:
            # For every tile, out of the first-level cache: six vectors kept in registers, where a thread has eight
            # channels of each, would halve the number of resident threads.
            mean, scale, bias = load_affine(norm, block, eps, VARIANCE)
        z = (x - mean) * scale + bias
        if residual_ptr is not None and not ACT_ADD:
            z += r
        bit = mask
        if PASSES is not None:
            bit = bit & PASSES(z, alpha)
        kept = mask
        if SELECTS:
            kept = bit
        if FORWARD is not None:
            z = FORWARD(z, alpha)
        if seed_ptr is not None:
            keep = dropout_keep(seed, place.index, channels, threshold, FOURS, WIDE, tile)
            bit = bit & keep
            kept = kept & keep
            z *= keep_scale
        if SELECTS or seed_ptr is not None:
            z = tl.where(kept, z, 0.0)
        if residual_ptr is not None and ACT_ADD:
            z += r
        store_tile(y_ptr, offset, z, mask, tile)
        if bits_ptr is not None:
            store_bits(bits_ptr, place, bit, block, extent, tile)
