"""The launch plan: plain C++ that the CUDA launcher and the emulator both call."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fastres.contract import output_size
from tests.emulator.machine import ARITHMETIC, STEPS, Problem
from tests.oracle import generator

ROWS, COLUMNS, STEP_BYTES = 128, 64, 64


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_a_plan_covers_every_result_and_all_of_k(machine, arithmetic, step):
    gen = generator("plan", arithmetic, step)
    item = torch.empty((), dtype=ARITHMETIC[arithmetic]).element_size()
    for _ in range(200):
        limits = (600, 700, 70, 70, 700, 3, 3, 2, 2)
        n, cin, h, w, cout, sh, sw, *bits = (int(torch.randint(0, most, (), generator=gen)) + 1 for most in limits)
        last, aligned = (bit == 2 for bit in bits)
        plan = machine.plan_of(step, arithmetic, Problem(n, cin, h, w, cout, sh, sw, last), aligned=aligned)
        positions = n * output_size(h, sh) * output_size(w, sw)
        rows, columns, depth = {
            "forward": (positions, cout, cin),
            "inference": (positions, cout, cin),
            "input_gradient": (positions, cin, cout),
            "weight_gradient": (cout, cin, positions),
        }[step]
        assert (plan.row_tiles, plan.column_tiles) == (ceil_div(rows, ROWS), ceil_div(columns, COLUMNS))
        # The last split is not empty, and together they reach the end.
        steps = ceil_div(depth, STEP_BYTES // item)
        assert (plan.splits - 1) * plan.steps_a_split < steps <= plan.splits * plan.steps_a_split
        assert plan.splits == 1 or step == "weight_gradient"
        if step == "weight_gradient":
            assert plan.workspace == plan.splits * cin * cout
            assert plan.splits == 1 or plan.splits <= positions // 512
            assert plan.splits == 1 or 2 * plan.workspace * 4 <= positions * (cin + cout) * item
            assert plan.splits * plan.row_tiles * plan.column_tiles <= max(264, plan.row_tiles * plan.column_tiles)
        elif step == "forward":
            assert plan.workspace == plan.row_tiles * 2 * cout
        else:
            assert plan.workspace == plan.second_blocks == 0
        assert not (plan.vector_loads and not (last and aligned))
        if plan.vector_loads:
            assert cin * item % 16 == 0 and (step in ("forward", "inference") or cout * item % 16 == 0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cin", [64, 128, 256])
def test_the_shortcuts_of_a_resnet_at_batch_512_fill_a_gpu_by_16_byte_copies(machine, cin, step):
    problem = Problem(512, cin, 2048 // cin, 2048 // cin, 2 * cin, 2, 2, True)
    plan = machine.plan_of(step, "bfloat16", problem)
    assert plan.vector_loads and plan.vector_stores
    assert plan.row_tiles * plan.column_tiles * plan.splits >= 132


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_positions_are_found_in_tensors_beyond_two_to_the_31_elements(machine, layout):
    gen = generator("offsets", layout)
    for _ in range(100):
        limits = (3000, 500, 400, 400, 500, 4, 4)
        n, cin, h, w, cout, sh, sw = (int(torch.randint(0, most, (), generator=gen)) + 1 for most in limits)
        oh, ow = output_size(h, sh), output_size(w, sw)
        p = torch.randint(0, n * oh * ow, (100,), generator=gen)
        p[0] = n * oh * ow - 1
        image, i, j = p // (oh * ow), p // ow % oh, p % ow
        for strided, channels, (rows, columns), (row, column) in (
            (1, cin, (h, w), (i * sh, j * sw)),
            (0, cout, (oh, ow), (i, j)),
        ):
            pixel = row * columns + column
            expected = image * rows * columns * channels + (pixel if layout == "nchw" else pixel * channels)
            positions, offsets = p.to(torch.int32), torch.empty(len(p), dtype=torch.int64)
            problem = Problem(n, cin, h, w, cout, sh, sw, layout == "channels_last")
            machine.c.test_offsets(
                ctypes.byref(problem),
                strided,
                ctypes.c_void_p(positions.data_ptr()),
                ctypes.c_void_p(offsets.data_ptr()),
                ctypes.c_int64(len(p)),
            )
            assert torch.equal(offsets, expected)
