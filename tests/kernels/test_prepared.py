"""How a launch is repeated: Triton's own way once, then what it compiled, with addresses and the same constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastres.kernels.launch import _Prepared

GRID = (2, 1, 1)


class Compiled:
    """What Triton gives back: takes every parameter of the kernel, in the signature's order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert grid == GRID
        return lambda *arguments: self.calls.append(arguments)


class Kernel:
    """A kernel with two pointers, a number and two constants, as triton.jit makes one."""

    arg_names = ("x_ptr", "bits_ptr", "scale", "BLOCK", "EVEN")

    def __init__(self) -> None:
        self.compiled = Compiled()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        assert grid == GRID

        def run(*values: Any, **options: Any) -> Compiled:
            self.calls.append((values, options))
            return self.compiled

        return run


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def prepared(kernel: Kernel) -> _Prepared:
    return _Prepared(kernel, GRID, {"EVEN": True, "BLOCK": 64, "num_warps": 8})


def test_a_second_launch_hands_addresses_and_constants_to_what_was_compiled(prepared, kernel):
    x, bits, other = torch.zeros(8), torch.zeros(16, dtype=torch.uint8), torch.ones(8)
    prepared.run((x, bits, 0.5))
    assert len(kernel.calls) == 1 and kernel.calls[0][0] == (x, bits, 0.5) and not kernel.compiled.calls
    prepared.run((other, bits, 0.25))
    assert len(kernel.calls) == 1
    assert kernel.compiled.calls == [(other.data_ptr(), bits.data_ptr(), 0.25, 64, True)]


def test_what_is_none_is_compiled_for_apart(prepared, kernel):
    x, bits = torch.zeros(8), torch.zeros(16, dtype=torch.uint8)
    for _ in range(2):
        prepared.run((x, None, 0.5))
        prepared.run((x, bits, 0.5))
    assert len(kernel.calls) == 2
    assert kernel.compiled.calls == [
        (x.data_ptr(), None, 0.5, 64, True),
        (x.data_ptr(), bits.data_ptr(), 0.5, 64, True),
    ]


def test_an_address_that_is_no_multiple_of_16_goes_triton_s_own_way(prepared, kernel):
    x, bits = torch.zeros(9), torch.zeros(16, dtype=torch.uint8)
    for value in (x, x[1:], x[1:], x):
        prepared.run((value, bits, 0.5))
    assert len(kernel.calls) == 3 and len(kernel.compiled.calls) == 1


def test_tensors_of_two_devices_are_refused(prepared, kernel):
    x, elsewhere = torch.zeros(8), torch.zeros(16, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="expected all tensors on one device, got them on cpu, meta"):
        prepared.run((x, elsewhere, 0.5))
    assert not kernel.calls
