"""Every kernel of the CUDA shortcut and every instance of it, run thread by thread against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.emulator.cases import SHAPES, Case
from tests.emulator.machine import ARITHMETIC, STEPS, problem_of
from tests.oracle import LAYOUTS, SEED, assert_close, generator


def every_case(test):
    for name, values in (("shape", SHAPES), ("arithmetic", ARITHMETIC), ("layout", LAYOUTS)):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@every_case
def test_forward_gives_the_product_and_the_statistics_of_what_it_stored(machine, arithmetic, layout, shape):
    case = Case(arithmetic, layout, shape)
    results = machine.forward(arithmetic, case.s, case.weight, case.stride, seed=SEED)
    case.check_forward(results)
    again = machine.forward(arithmetic, case.s, case.weight, case.stride, seed=SEED + 1)
    for a, b in zip(results, again, strict=True):
        assert torch.equal(a, b)
    alone = machine.forward(arithmetic, case.s, case.weight, case.stride, statistics=False)[0]
    assert torch.equal(alone, results[0])


@every_case
@pytest.mark.parametrize("branch", ["alone", "as it is", "normalised"])
def test_inference_is_everything_up_to_relu(machine, arithmetic, layout, shape, branch):
    case = Case(arithmetic, layout, shape, branch)
    x = None if branch == "alone" else case.x
    x_norm = case.x_norm if branch == "normalised" else None
    relu = branch != "as it is"
    y = machine.inference(arithmetic, case.s, case.weight, case.stride, case.norm, x, x_norm, relu=relu, seed=SEED)
    assert_close(y, case.y(x, x_norm, relu), "y", length=case.s.shape[1])


@every_case
def test_the_gradient_of_the_input_is_written_once_zeros_included(machine, arithmetic, layout, shape):
    case = Case(arithmetic, layout, shape)
    ds = machine.input_gradient(arithmetic, case.dproduct, case.s, case.weight, case.stride, seed=SEED)
    case.check_ds(ds)


@every_case
def test_the_gradient_of_the_weight_is_the_same_in_every_order(machine, arithmetic, layout, shape):
    case = Case(arithmetic, layout, shape)
    dweight = machine.weight_gradient(arithmetic, case.dproduct, case.s, case.weight, case.stride, seed=SEED)
    case.check_dweight(dweight)
    again = machine.weight_gradient(arithmetic, case.dproduct, case.s, case.weight, case.stride, seed=SEED + 1)
    assert torch.equal(dweight, again)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_these_shapes_take_every_instance_of_every_kernel(machine, arithmetic, step):
    seen = set()
    for shape in SHAPES:
        case = Case(arithmetic, "channels_last", shape)
        plan = machine.plan_of(step, arithmetic, problem_of(case.s, case.weight, case.stride))
        seen.add((plan.vector_loads, plan.vector_stores))
    assert {(True, True), (False, False)} <= seen
    if step in ("forward", "inference"):
        assert (True, False) in seen


@pytest.mark.parametrize("case", range(24))
def test_random_shapes_give_the_same_as_float64(machine, case):
    gen = generator("random shapes", case)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=gen))

    arithmetic = list(ARITHMETIC)[draw(0, 3)]
    whole = 8 if draw(0, 1) else 1
    sizes = (draw(1, 3), whole * draw(1, 96 // whole), draw(1, 16), draw(1, 16))
    SHAPES["random"] = (sizes, whole * draw(1, 160 // whole), (draw(1, 3), draw(1, 3)))
    try:
        random = Case(arithmetic, list(LAYOUTS)[draw(0, 1)], "random", case)
    finally:
        shape = SHAPES.pop("random")
    for step in STEPS:
        try:
            random.check(machine, step, seed=SEED)
        except AssertionError as e:
            raise AssertionError(f"{step}, {arithmetic}, {shape}: {e}") from e


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_pointers_that_are_not_aligned_take_element_loads(machine, arithmetic, step):
    case = Case(arithmetic, "channels_last", "whole 16-byte rows", "unaligned")
    for name in ("s", "x", "dproduct"):
        t = getattr(case, name)
        moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride(), 1)
        setattr(case, name, moved.copy_(t))
    case.check(machine, step, seed=SEED)
    assert machine.plan is not None
    assert not machine.plan.vector_loads or step == "weight_gradient"


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_statistics_are_right_where_the_mean_is_large(machine, arithmetic):
    """Mean 1e4, std 1: what E[x^2] - E[x]^2 in float32 would lose."""
    gen = generator("large mean", arithmetic)
    dtype = ARITHMETIC[arithmetic]
    s = torch.randn(4, 16, 32, 33, generator=gen)
    s[:, 0] = 1e4
    weight = torch.randn(24, 16, 1, 1, generator=gen) / 4
    weight[:, 0] = 1
    s, weight = s.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype)
    product, mean, m2 = machine.forward(arithmetic, s, weight, (1, 1))
    stored = product.double()
    assert ((mean - stored.mean((0, 2, 3))).abs() < 2e-3).all()
    variance = stored.var((0, 2, 3), correction=0)
    assert ((m2.double() / (4 * 32 * 33) - variance).abs() <= 1e-3 * variance.clamp(min=1e-3)).all()


def test_inference_keeps_nan_and_infinities(machine):
    case = Case("float32", "channels_last", "whole 16-byte rows", "not finite")
    case.x[0, 0, 0, 0], case.x[0, 1, 0, 0], case.x[0, 2, 0, 0] = float("nan"), float("inf"), float("-inf")
    y = machine.inference("float32", case.s, case.weight, case.stride, case.norm, case.x, case.x_norm)
    assert y[0, 0, 0, 0].isnan() and y[0, 1, 0, 0] == float("inf") and y[0, 2, 0, 0] == 0


def test_the_statistics_normalise_the_product_as_it_is_stored(machine):
    """In bfloat16 the accumulators' own statistics would leave a mean behind."""
    case = Case("bfloat16", "channels_last", "gradients in several parts", "normalised")
    product, mean, m2 = machine.forward("bfloat16", case.s, case.weight, case.stride)
    count = product.numel() // product.shape[1]
    z = (product.float() - mean.view(1, -1, 1, 1)) / (m2 / count).sqrt().view(1, -1, 1, 1)
    expected = F.batch_norm(product.double(), None, None, training=True, eps=1e-12)
    assert_close(z, expected, "z", length=count)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
@pytest.mark.parametrize("shape", ["whole 16-byte rows", "odd channels"])
def test_the_rows_of_a_fragment_lie_in_different_banks(machine, arithmetic, step, shape):
    Case(arithmetic, "channels_last", shape, "banks").check(machine, step)
    assert machine.c.emulator_conflicts() == 0
