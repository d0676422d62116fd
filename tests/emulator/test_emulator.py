"""The emulator itself: fragments as the PTX ISA has them, conversions as torch makes them, faults that it names."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.emulator.machine import EmulatorError, tf32
from tests.oracle import SEED, generator


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def pack(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., 2] 16-bit values, or [..., 1] tf32 values, as registers."""
    if dtype == torch.float32:
        return tf32(values)[..., 0].contiguous().view(torch.int32)
    return values.to(dtype).contiguous().view(torch.int32)[..., 0]


# How a fragment is made: the format, and mma or the version by shuffles.
MMA = {
    "bf16": (torch.bfloat16, 0),
    "f16": (torch.float16, 1),
    "tf32": (torch.float32, 2),
    "bf16 by shuffles": (torch.bfloat16, 4),
    "f16 by shuffles": (torch.float16, 5),
}


@pytest.mark.parametrize("how", MMA)
def test_mma_multiplies_fragments_as_documented(machine, how):
    """The tables of PTX ISA 9.7.14.5: mma.m16n8k16 for 16 bits, mma.m16n8k8 for tf32, in their own words."""
    dtype, code = MMA[how]
    gen = generator("mma", how)
    depth = 8 if dtype == torch.float32 else 16
    exact = tf32 if dtype == torch.float32 else lambda t: t.to(dtype).float()
    a, b = exact(torch.randn(16, depth, generator=gen)), exact(torch.randn(depth, 8, generator=gen))
    c = torch.randn(16, 8, generator=gen)
    left, right, sums = [], [], []
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        if dtype == torch.float32:
            # a_i: row groupID (i = 0, 2) or groupID + 8 (i = 1, 3), column member (i = 0, 1) or member + 4.
            left.append([[a[group + (8 if i % 2 else 0), member + (4 if i >= 2 else 0)]] for i in range(4)])
            right.append([[b[member + 4 * i, group]] for i in range(2)])
        else:
            # a_i, i = 0 ... 7: row groupID where i is 0, 1, 4, 5; column member * 2 + (i & 1), + 8 from i = 4 on.
            rows = [group if i in (0, 1, 4, 5) else group + 8 for i in range(8)]
            columns = [member * 2 + (i & 1) + (8 if i >= 4 else 0) for i in range(8)]
            values = [a[r, k] for r, k in zip(rows, columns, strict=True)]
            left.append([values[i : i + 2] for i in range(0, 8, 2)])
            # b_i, i = 0 ... 3: row member * 2 + (i & 1), + 8 from i = 2 on; column groupID.
            values = [b[member * 2 + (i & 1) + (8 if i >= 2 else 0), group] for i in range(4)]
            right.append([values[0:2], values[2:4]])
        # c_i: row groupID, + 8 from i = 2 on; column member * 2 + (i & 1).
        sums.append([c[group + (8 if i >= 2 else 0), member * 2 + (i & 1)] for i in range(4)])
    registers = pack(torch.tensor(left), dtype), pack(torch.tensor(right), dtype)
    d = torch.tensor(sums)
    machine.start([], [], seed=SEED)
    machine.check(machine.c.test_mma(pointer(registers[0]), pointer(registers[1]), pointer(d), code))
    expected = c.double() + a.double() @ b.double()
    for lane in range(32):
        for i in range(4):
            wanted = expected[(lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)]
            assert abs(d[lane, i].double() - wanted) < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_two_elements_of_a_row_of_each_matrix(machine, transposed):
    words = torch.arange(4 * 8 * 8, dtype=torch.int16).reshape(4, 8, 8)
    registers = torch.empty(32, 4, 2, dtype=torch.int16)
    machine.start([], [], seed=SEED)
    machine.check(machine.c.test_load_matrices(pointer(words), pointer(registers), int(transposed)))
    matrices = words.transpose(1, 2) if transposed else words
    # Lane l of matrix m: row l / 4, elements 2 * (l % 4) and the next.
    expected = matrices.reshape(4, 32, 2).transpose(0, 1)
    assert torch.equal(registers, expected)


def test_conversions_round_as_torch_does(machine):
    gen = generator("conversions")
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=gen, dtype=torch.int64).to(torch.int32)
    half = torch.randn(50_000, generator=gen) * torch.logspace(-9, 5, 50_000)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = halves[:-1] + (halves[1:] - halves[:-1]) / 2
    values = torch.cat([bits.view(torch.float32), half, ties[ties.isfinite()]])
    values = torch.where(values.isnan(), torch.tensor(float("nan")), values).contiguous()
    bf16, f16 = torch.empty(len(values), dtype=torch.bfloat16), torch.empty(len(values), dtype=torch.float16)
    rounded = torch.empty_like(values)
    count = ctypes.c_int64(len(values))
    machine.c.test_convert(pointer(values), pointer(bf16), pointer(f16), pointer(rounded), count)
    torch.testing.assert_close(bf16, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(f16, values.half(), rtol=0, atol=0, equal_nan=True)
    finite = values.isfinite() & (values.abs() < 3e38)
    torch.testing.assert_close(rounded[finite], tf32(values[finite]), rtol=0, atol=0)

    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wide = [torch.empty(65536) for _ in range(2)]
    machine.c.test_widen(pointer(every), pointer(wide[0]), pointer(wide[1]), ctypes.c_int64(65536))
    torch.testing.assert_close(wide[0], every.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide[1], every.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)


def test_division_by_a_known_number_is_exact_below_two_to_the_31(machine):
    gen = generator("division")
    random = torch.randint(1, 2**31, (200,), generator=gen).tolist()
    for divisor in [*range(1, 70), 2**16, 2**16 + 1, 2**30, 2**30 + 1, 2**31 - 1, *random]:
        numbers = torch.randint(0, 2**31, (200,), generator=gen)
        multiples = torch.arange(1, 200) * divisor
        edges = torch.cat([multiples, multiples - 1, torch.tensor([0, 2**31 - 1])])
        n = torch.cat([numbers, edges[edges < 2**31]]).to(torch.int32)
        quotient = torch.empty_like(n)
        machine.c.test_divide(divisor, pointer(n), pointer(quotient), ctypes.c_int64(len(n)))
        assert torch.equal(quotient, n // divisor)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_of_every_size_fill_with_zeros_what_is_not_there(machine, size):
    x, y = torch.randn(32, size // 4), torch.empty(32, size // 4)
    x[20:] = float("nan")
    machine.start([x[:20]], [y], seed=SEED)
    machine.check(machine.c.test_copy(pointer(x), pointer(y), size, 20))
    assert torch.equal(y, torch.where(torch.arange(32)[:, None] < 20, x, 0.0))
    machine.start([x[:19]], [y], seed=SEED)
    with pytest.raises(EmulatorError, match="outside of every global buffer"):
        machine.check(machine.c.test_copy(pointer(x), pointer(y), size, 20))


FAULTS = {
    "race": "^race: shared memory is .* without a barrier",
    "deadlock": "deadlock",
    "divergent barrier": "different barriers|deadlock",
    "beyond shared memory": "outside of shared memory",
    "beyond global memory": "outside of every global buffer",
    "misaligned": "misaligned in global memory",
    "written twice": "an output is written twice",
    "input written": "an input is written",
    "unrounded tf32": "not rounded to tf32",
    "left with copies": "left with copies under way",
}


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_fault_is_named_with_its_place_and_seed(machine, fault):
    x, y = torch.randn(64), torch.empty(64)
    code = ["none", *FAULTS].index(fault)
    machine.start([x], [y], seed=SEED)
    if fault == "none":
        machine.check(machine.c.test_exchange(pointer(x), pointer(y), code))
        assert torch.equal(y, torch.cat([x[32:], x[:32]]))
        return
    with pytest.raises(EmulatorError, match=FAULTS[fault]) as raised:
        machine.check(machine.c.test_exchange(pointer(x), pointer(y), code))
    assert f"seed {SEED}" in str(raised.value)


def test_without_the_detector_a_race_shows_in_some_orders(machine):
    x, y = torch.randn(64), torch.empty(64)
    wrong = 0
    for i in range(20):
        machine.start([x], [y], seed=SEED + i, detect_races=False)
        machine.check(machine.c.test_exchange(pointer(x), pointer(y), 1))
        wrong += not torch.equal(y, torch.cat([x[32:], x[:32]]))
    # A warp that reads first finds NaN; one of the two always does.
    assert wrong == 20
