"""Every kernel of the CUDA shortcut and every instance of it, run thread by thread against float64."""

from __future__ import annotations

import pytest
import torch

from tests.emulator.cases import SHAPES, Case
from tests.emulator.machine import ARITHMETIC
from tests.oracle import LAYOUTS, SEED, assert_close

pytestmark = [
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("arithmetic", ARITHMETIC),
    pytest.mark.parametrize("shape", SHAPES),
]


def test_forward_gives_the_product_and_the_statistics_of_what_it_stored(machine, arithmetic, layout, shape):
    case = Case(arithmetic, layout, shape)
    results = machine.forward(arithmetic, case.s, case.weight, case.stride, seed=SEED)
    case.check_forward(results)
    again = machine.forward(arithmetic, case.s, case.weight, case.stride, seed=SEED + 1)
    for a, b in zip(results, again, strict=True):
        assert torch.equal(a, b)
    alone = machine.forward(arithmetic, case.s, case.weight, case.stride, statistics=False)[0]
    assert torch.equal(alone, results[0])


@pytest.mark.parametrize("branch", ["alone", "as it is", "normalised"])
def test_inference_is_everything_up_to_relu(machine, arithmetic, layout, shape, branch):
    case = Case(arithmetic, layout, shape, branch)
    x = None if branch == "alone" else case.x
    x_norm = case.x_norm if branch == "normalised" else None
    relu = branch != "as it is"
    y = machine.inference(arithmetic, case.s, case.weight, case.stride, case.norm, x, x_norm, relu=relu, seed=SEED)
    assert_close(y, case.y(x, x_norm, relu), "y", length=case.s.shape[1])


def test_the_gradient_of_the_input_is_written_once_zeros_included(machine, arithmetic, layout, shape):
    case = Case(arithmetic, layout, shape)
    ds = machine.input_gradient(arithmetic, case.dproduct, case.s, case.weight, case.stride, seed=SEED)
    case.check_ds(ds)


def test_the_gradient_of_the_weight_is_the_same_in_every_order(machine, arithmetic, layout, shape):
    case = Case(arithmetic, layout, shape)
    dweight = machine.weight_gradient(arithmetic, case.dproduct, case.s, case.weight, case.stride, seed=SEED)
    case.check_dweight(dweight)
    again = machine.weight_gradient(arithmetic, case.dproduct, case.s, case.weight, case.stride, seed=SEED + 1)
    assert torch.equal(dweight, again)
