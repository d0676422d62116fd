"""Plans: every position once, no more programs than fit, and vectors that cost little beside the tensors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastres.kernels.launch import candidates
from fastres.kernels.plan import WAVES, Device, Geometry, apply_plan, reduce_plan, register_limit

DEVICES = [Device(132), Device(128, 1536, 32, 72), Device(304, 2048, 64), Device(2)]


@settings(max_examples=300, deadline=None)
@given(
    channels_last=st.booleans(),
    images=st.integers(1, 700),
    channels=st.integers(1, 4096),
    image=st.integers(1, 3000),
    itemsize=st.sampled_from([2, 4]),
    device=st.sampled_from(DEVICES),
    plan=st.sampled_from([reduce_plan, apply_plan]),
    crowded=st.booleans(),
)
def test_a_plan_covers_everything_once_and_fits(
    channels_last, images, channels, image, itemsize, device, plan, crowded
):
    shape = Geometry(channels_last, images * image, channels, image, itemsize)
    p = plan(shape, device, crowded=crowded)
    for block in (p.block_s, p.block_c, p.block_p):
        assert block & (block - 1) == 0
    # A byte of the bit mask belongs to one program, philox's groups of four to one tile.
    assert p.block_s % 8 == 0 and p.block_c % 8 == 0
    tiles = -(-shape.positions // p.block_s) if channels_last else images * -(-image // p.block_s)
    assert p.tiles == tiles and 1 <= p.splits <= tiles
    assert (p.channel_blocks - 1) * p.block_c < channels <= p.channel_blocks * p.block_c
    threads = p.num_warps * device.warp
    waves = WAVES if plan is apply_plan else 1
    most = device.multiprocessors * device.resident // threads * waves
    assert p.splits * p.channel_blocks <= max(p.channel_blocks, most)
    assert p.channel_blocks <= 65535
    # No program is left without a tile, nor with two more than another.
    assert -(-tiles // p.splits) * (p.splits - 1) < tiles
    assert p.even_c == (channels % p.block_c == 0)
    assert p.even_s == ((shape.positions if channels_last else image) % p.block_s == 0)
    last = (shape.positions + p.block_s) * channels + p.block_c * image
    assert p.index_64 == (last >= 2**31)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("crowded", [False, True])
def test_partial_sums_cost_at_most_three_percent_of_a_pass(itemsize, channels_last, crowded):
    for stage in range(4):
        for batch in (8, 128, 512):
            image = (32 >> stage) ** 2
            shape = Geometry(channels_last, batch * image, 64 << stage, image, itemsize)
            for device in DEVICES:
                p = reduce_plan(shape, device, crowded=crowded)
                partials = 2 * p.splits * p.channel_blocks * p.block_c * 8
                # One program is the least there can be, however small the tensor.
                assert p.splits == 1 or partials <= 0.03 * shape.positions * shape.channels * itemsize


def test_64_bit_offsets_begin_where_32_bits_end():
    below = Geometry(True, 2**31 // 64 - 4096, 64, 1024, 2)
    beyond = Geometry(True, 2**31 // 64, 64, 1024, 2)
    assert not apply_plan(below, DEVICES[0]).index_64 and apply_plan(beyond, DEVICES[0]).index_64


def test_candidates_for_tuning_have_the_grid_that_is_looked_up_for_them():
    for shape in (Geometry(True, 512 * 1024, 64, 1024, 2), Geometry(False, 8 * 49, 21, 49, 4)):
        for make in (reduce_plan, apply_plan):
            plans = candidates(make, shape, DEVICES[0])
            assert plans[0] == make(shape, DEVICES[0])
            grids = {(p.block_s, p.block_c, p.splits): (p.splits, p.channel_blocks) for p in plans}
            assert all(grids[p.block_s, p.block_c, p.splits] == (p.splits, p.channel_blocks) for p in plans)
            assert len(plans) >= 2


def test_registers_leave_half_of_the_threads_resident():
    for threads, capability in ((2048, (8, 0)), (2048, (9, 0)), (2048, (10, 0)), (1536, (8, 9)), (1536, (12, 0))):
        assert register_limit(threads, capability) * threads // 2 <= 65536
