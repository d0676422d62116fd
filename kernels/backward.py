"""The backward pass: sums over the batch, then the gradients of x and of the residual.

    g = dy * keep / (1 - p) * f'(z)      the gradient of z; in the order "add_act" of z + r, which is f's input
    dbias = sum g                        dweight = sum g * xhat
    dx = weight * rstd * (g - dbias / M - xhat * dweight / M)

Of a gated activation one bit says all, kept and passed: g = bit ? dy / (1 - p) : leak * dy. Other activations have
their input computed anew, from x, its statistics and, in the order "add_act", the residual.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import (
    Extent,
    NormPointers,
    Tile,
    element_offsets,
    load_affine,
    load_bits,
    load_channels,
    load_tile,
    locate,
    program_channels,
    store_tile,
)


@triton.jit
def _masked_gradient(dy, z, kept, keep_scale, alpha, PASSES: tl.constexpr, GRADIENT: tl.constexpr, LEAKS: tl.constexpr):
    """g. kept: the tile's bits, or None; z: f's input where PASSES or GRADIENT is given."""
    g = dy
    if GRADIENT is not None:
        g = dy * GRADIENT(z, alpha)
    dropped = 0.0
    if LEAKS:
        dropped = dy * alpha
    if kept is not None:
        g = tl.where(kept, g * keep_scale, dropped)
    elif PASSES is not None:
        g = tl.where(PASSES(z, alpha), dy, dropped)
    return g


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


@triton.jit(do_not_specialize=["positions", "keep_scale", "tiles", "splits", "alpha"])
def backward_reduce_kernel(
    dy_ptr, dy2_ptr, x_ptr,  # [M, C] or [N, C, HW]; dy2: the second part of y's gradient, or None
    residual_ptr,  # likewise; only where it has a normalisation of its own, or is part of f's input
    bits_ptr,  # uint8, the bit mask; or None
    dz_ptr,  # [M, C] or [N, C, HW]: g ("add_act") or dy + dy2 ("act_add"), a result; None without dy2
    partial_ptr,  # [channel blocks, splits, SUMS, BLOCK_C] float32
    arrivals_ptr,  # [channel blocks] int32, 0 before and after
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # [C] float32
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,  # [C] float32; None without own norm
    dweight_ptr, dbias_ptr, residual_dweight_ptr, residual_dbias_ptr,  # [C] float32, results
    positions, channels, image, keep_scale, tiles, splits, alpha,
    PASSES: tl.constexpr, GRADIENT: tl.constexpr, LEAKS: tl.constexpr, ACT_ADD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dbias = sum g, dweight = sum g * xhat, and the same for the residual's own normalisation.

    Reads T for dy, T for x, 1 bit an element (T more for dy2, and for a residual that is read); writes T for dz, and
    8 bytes a channel and program (12, or with order "act_add" 16, with a normalised residual).
    Grid: (splits, channel blocks).
    """
    tile: tl.constexpr = Tile(CHANNELS_LAST, INDEX_64, EVEN_S, EVEN_C, BLOCK_S, BLOCK_C)
    RECOMPUTES: tl.constexpr = PASSES is not None or GRADIENT is not None
    NORMED: tl.constexpr = residual_mean_ptr is not None
    ADDED: tl.constexpr = residual_ptr is not None and RECOMPUTES and not ACT_ADD  # to f's input
    extent = Extent(positions, channels, image)
    block = program_channels(extent, tile)
    residual_norm = NormPointers(residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr)
    split = tl.program_id(0)
    mean = load_channels(mean_ptr, block, 0.0)
    if RECOMPUTES:
        _, scale, bias = load_affine(NormPointers(mean_ptr, rstd_ptr, weight_ptr, bias_ptr), block, 0.0, False)
    if ADDED and NORMED:
        r_mean, r_scale, r_bias = load_affine(residual_norm, block, 0.0, False)
        bias += r_bias
    row = tl.arange(0, BLOCK_S)[:, None]
    within = element_offsets(extent, tile)
    sum_g = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_d = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_dr = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    # Four loads under way before the first is needed; with more vectors than two they do not fit in the registers.
    UNROLL: tl.constexpr = 1 if residual_ptr is not None or dy2_ptr is not None or RECOMPUTES else 2
    for index in tl.range(split, tiles, splits, loop_unroll_factor=UNROLL):
        place = locate(index, block, extent, tile)
        offset = place.element + within
        mask = (row < place.left) & block.real[None, :]
        dy = load_tile(dy_ptr, offset, mask, tile)
        if dy2_ptr is not None:
            dy += load_tile(dy2_ptr, offset, mask, tile)
        centred = load_tile(x_ptr, offset, mask, tile) - mean
        z = centred
        if RECOMPUTES:
            z = centred * scale + bias
        if ADDED:
            r = load_tile(residual_ptr, offset, mask, tile)
            if NORMED:
                r -= r_mean
                z += r * r_scale
            else:
                z += r
        kept = None
        if bits_ptr is not None:
            kept = load_bits(bits_ptr, place, block, extent, tile)
        g = _masked_gradient(dy, z, kept, keep_scale, alpha, PASSES, GRADIENT, LEAKS)
        if dz_ptr is not None:
            if ACT_ADD:
                store_tile(dz_ptr, offset, dy, mask, tile)
            else:
                store_tile(dz_ptr, offset, g, mask, tile)
        sum_g += g
        sum_gx += g * centred
        if NORMED:
            if not ADDED:
                r = load_tile(residual_ptr, offset, mask, tile)
                r -= load_channels(residual_mean_ptr, block, 0.0)
            if ACT_ADD:
                sum_d += dy
                sum_dr += dy * r
            else:
                sum_dr += g * r
    SUMS: tl.constexpr = 2 if not NORMED else (4 if ACT_ADD else 3)
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
        channel, real = block.channel, block.real
        dweight, dbias = _sum_partials(partials_ptr, splits, SUMS, BLOCK_C, BLOCK_P)
        tl.store(dbias_ptr + channel, dbias, mask=real)
        tl.store(dweight_ptr + channel, dweight * tl.load(rstd_ptr + channel, mask=real, other=0.0), mask=real)
        if NORMED:
            # The last two; of three partials the middle one serves twice, since dr is g then.
            dbias, r_dweight = _sum_partials(partials_ptr + (SUMS - 2) * BLOCK_C, splits, SUMS, BLOCK_C, BLOCK_P)
            r_dweight *= tl.load(residual_rstd_ptr + channel, mask=real, other=0.0)
            tl.store(residual_dweight_ptr + channel, r_dweight, mask=real)
            tl.store(residual_dbias_ptr + channel, dbias, mask=real)


@triton.jit
def _load_gradient_vectors(norm, dweight_ptr, dbias_ptr, block, share, BIAS: tl.constexpr):
    """(mean, weight * rstd, bias, dbias / M, dweight / M * rstd), [1, BLOCK_C] each; the last two are 0 in evaluation.

    With them dx = scale * (g - mean_g - (x - mean) * mean_gx).
    """
    mean = load_channels(norm.mean, block, 0.0)
    rstd = load_channels(norm.rstd, block, 1.0)
    scale = rstd * load_channels(norm.weight, block, 1.0)
    bias = mean
    if BIAS:
        bias = load_channels(norm.bias, block, 0.0)
    mean_g = load_channels(dbias_ptr, block, 0.0) * share
    mean_gx = load_channels(dweight_ptr, block, 0.0) * (share * rstd)
    return mean, scale, bias, mean_g, mean_gx


@triton.jit(do_not_specialize=["positions", "keep_scale", "tiles", "splits", "alpha"])
def backward_apply_kernel(
    dy_ptr, x_ptr,  # [M, C] or [N, C, HW]
    residual_ptr,  # likewise; only where it has a normalisation of its own, or is part of f's input
    bits_ptr,  # uint8, the bit mask; or None
    dx_ptr, dresidual_ptr,  # [M, C] or [N, C, HW], results; None where not needed
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # [C] float32
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,  # [C] float32; None without own norm
    dweight_ptr, dbias_ptr, residual_dweight_ptr, residual_dbias_ptr,  # [C] float32; None in evaluation
    count_ptr,  # int64 [1], elements a channel behind the sums; None: those of x
    positions, channels, image, keep_scale, tiles, splits, alpha,
    PASSES: tl.constexpr, GRADIENT: tl.constexpr, LEAKS: tl.constexpr, ACT_ADD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = weight * rstd * (g - dbias / M - xhat * dweight / M), and the residual's gradient.

    Reads T for dy, T for x, 1 bit an element (T more for a residual that is read), writes T for dx and T for dresidual.
    Grid: (splits, channel blocks).
    """
    tile: tl.constexpr = Tile(CHANNELS_LAST, INDEX_64, EVEN_S, EVEN_C, BLOCK_S, BLOCK_C)
    RECOMPUTES: tl.constexpr = PASSES is not None or GRADIENT is not None
    TRAINING: tl.constexpr = dbias_ptr is not None
    NORMED: tl.constexpr = residual_mean_ptr is not None
    # With a smooth activation a thread has half as many channels (`plan.CROWDED_BYTES_A_THREAD`).
    IN_LOOP: tl.constexpr = NORMED and GRADIENT is None and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    READS_X: tl.constexpr = (TRAINING and dx_ptr is not None) or RECOMPUTES
    ADDED: tl.constexpr = residual_ptr is not None and RECOMPUTES and not ACT_ADD  # to f's input
    extent = Extent(positions, channels, image)
    block = program_channels(extent, tile)
    norm = NormPointers(mean_ptr, rstd_ptr, weight_ptr, bias_ptr)
    residual_norm = NormPointers(residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr)
    if count_ptr is not None:
        share = 1.0 / tl.load(count_ptr).to(tl.float32)
    else:
        share = 1.0 / positions.to(tl.float32)
    if not IN_LOOP:
        mean, scale, bias, mean_g, mean_gx = _load_gradient_vectors(
            norm, dweight_ptr, dbias_ptr, block, share, RECOMPUTES
        )
    row = tl.arange(0, BLOCK_S)[:, None]
    within = element_offsets(extent, tile)
    for step in range(tl.program_id(0), tiles, splits):
        place = locate(tiles - 1 - step, block, extent, tile)
        offset = place.element + within
        mask = (row < place.left) & block.real[None, :]
        if IN_LOOP:
            # For every tile, as in the forward pass.
            mean, scale, bias, mean_g, mean_gx = _load_gradient_vectors(
                norm, dweight_ptr, dbias_ptr, block, share, RECOMPUTES
            )
        dy = load_tile(dy_ptr, offset, mask, tile)
        centred = dy
        if READS_X:
            centred = load_tile(x_ptr, offset, mask, tile) - mean
        z = centred
        if RECOMPUTES:
            z = centred * scale + bias
        if ADDED:
            r = load_tile(residual_ptr, offset, mask, tile)
            if NORMED:
                r_mean, r_scale, r_bias = load_affine(residual_norm, block, 0.0, False)
                z += (r - r_mean) * r_scale + r_bias
            else:
                z += r
        kept = None
        if bits_ptr is not None:
            kept = load_bits(bits_ptr, place, block, extent, tile)
        g = _masked_gradient(dy, z, kept, keep_scale, alpha, PASSES, GRADIENT, LEAKS)
        centred_g = g
        if TRAINING:
            centred_g = g - mean_g
        if dx_ptr is not None:
            dx = centred_g
            if TRAINING:
                dx -= centred * mean_gx
            store_tile(dx_ptr, offset, dx * scale, mask, tile)
        if dresidual_ptr is not None:
            dr = g
            if ACT_ADD:
                dr = dy
            if NORMED:
                r_mean, r_scale, _, r_mean_g, r_mean_gx = _load_gradient_vectors(
                    residual_norm, residual_dweight_ptr, residual_dbias_ptr, block, share, False
                )
                if TRAINING:
                    if ACT_ADD:
                        dr -= r_mean_g
                    else:
                        # The mean of the same gradient.
                        dr = centred_g
                    if not ADDED:
                        r = load_tile(residual_ptr, offset, mask, tile)
                    dr -= (r - r_mean) * r_mean_gx
                dr *= r_scale
            store_tile(dresidual_ptr, offset, dr, mask, tile)
