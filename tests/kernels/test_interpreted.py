"""The Triton kernels in the interpreter: bytes moved, programs that cooperate, 64-bit offsets.

tests/test_backends.py runs this file in a process of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastres import contract
from fastres.contract import PLAIN, Act, Norm, NormParams, Residual
from fastres.ops import batch_norm_act as ops
from tests import backend
from tests.oracle import LAYOUTS, activation, generator, norm

pytestmark = pytest.mark.skipif(backend.NAME != "triton", reason="not the process of Triton's interpreter")


def detached(n: NormParams) -> NormParams:
    return NormParams(*(None if t is None else t.detach() for t in n[:4]), n.momentum, n.eps)


# ----------------------------------------------------------------------------------------------------------- traffic


@contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """Bytes that kernels load ("load") and store ("store") within it, masked lanes left out, atomics as both."""
    from triton.runtime.interpreter import InterpreterBuilder

    bytes_of: Counter[str] = Counter()
    own = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        bytes_of["load"] += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        return own["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        bytes_of["store"] += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        return own["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for kind in ("load", "store"):
            bytes_of[kind] += int(mask.data.sum()) * value.data.itemsize
        return own["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    # Loads and stores without a mask call the masked ones.
    replaced = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic}
    try:
        for name, f in replaced.items():
            setattr(InterpreterBuilder, name, f)
        yield bytes_of
    finally:
        for name, f in own.items():
            setattr(InterpreterBuilder, name, f)


@pytest.fixture(autouse=True)
def without_gradients():
    """The operators are called by themselves here, and refuse inputs that require a gradient."""
    with torch.no_grad():
        yield


SHAPE = (8, 64, 16, 16)
# dtype, format, dropout, residual, dy in two parts, activation, multiprocessors: every two of their values meet.
TRAFFIC = [
    (torch.float32, "nchw", 0.0, False, False, "relu", 2),
    (torch.float32, "channels_last", 0.1, True, False, "relu", 132),
    (torch.bfloat16, "nchw", 0.1, True, True, "relu", 132),
    (torch.bfloat16, "channels_last", 0.0, True, True, "silu", 132),
    (torch.bfloat16, "channels_last", 0.0, True, False, "silu", 2),
    (torch.float32, "nchw", 0.1, False, False, "silu", 132),
    (torch.bfloat16, "channels_last", 0.1, False, True, "relu", 2),
]


@pytest.mark.parametrize(
    ("dtype", "layout", "dropout_p", "residual", "two_gradients", "kind", "multiprocessors"), TRAFFIC, ids=str
)
def test_bytes_stay_within_three_percent_of_the_budget(
    dtype, layout, dropout_p, residual, two_gradients, kind, multiprocessors, monkeypatch
):
    from fastres.kernels import launch
    from fastres.kernels.plan import Device

    monkeypatch.setattr(launch, "INTERPRETED", Device(multiprocessors))
    gen = generator("traffic", dtype, layout, dropout_p, residual)
    x, r, dy, dy2 = (activation(SHAPE, dtype, layout, gen) for _ in range(4))
    own, act = detached(norm(64, dtype, gen)), Act(kind, 0.0, dropout_p, "add_act")
    one = x.numel() * x.element_size()
    bits = x.numel() // 8 if act.saves_bits(residual) else 0
    with counted_bytes() as forward:
        _, mean, rstd, _, _, mask = ops.training(
            x, own, None, r if residual else None, None, None, torch.tensor([3]), act
        )  # fmt: skip
    saved = (x, Norm(mean, rstd, *own[2:4]), Residual(r) if residual and act.reads_residual() else None, mask, act)
    with counted_bytes() as backward:
        ops.backward(dy, dy2 if two_gradients else None, *saved, True, [True, residual, True])
    with counted_bytes() as evaluation:
        ops.inference(x, own, r if residual else None, None, act, False)
    # Reads and writes of the design's table: x twice, r, y and bits; dy, x and bits twice, dx, dr; x, r, y. Into a
    # smooth activation's input goes the residual, which is read with x. Two gradients are read once and written once,
    # as dr, and what was written is read with x: 7 T with a residual.
    reads_r = residual and act.reads_residual()
    budgets = {
        "forward": (forward, (2 + residual) * one, one + bits),
        "backward": (backward, (4 + 2 * reads_r) * one + 2 * bits, (1 + residual) * one),
        "evaluation": (evaluation, (1 + residual) * one, one),
    }
    if two_gradients:
        budgets["backward"] = (backward, (5 + reads_r) * one + bits, 2 * one)
    for name, (counted, reads, writes) in budgets.items():
        assert counted["load"] >= reads and counted["store"] >= writes, f"{name}: a tensor was not passed over"
        total = counted["load"] + counted["store"]
        assert total <= 1.03 * (reads + writes), f"{name}: {total} bytes, budget {reads + writes}"


@pytest.mark.parametrize("dtype", backend.GPU_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_finalising_costs_at_most_three_percent_of_a_pass(dtype, layout):
    """The statistics' launch reads T; everything beside it is partial sums, counters and the vectors of the result."""
    x = activation(SHAPE, dtype, layout, generator("finalise", dtype, layout))
    with counted_bytes() as counted:
        ops.stats(x)
    beside = counted["load"] + counted["store"] - x.numel() * x.element_size()
    assert 0 < beside <= 0.03 * x.numel() * x.element_size()


# ------------------------------------------------------------------------------------------------ cooperating programs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counters_are_zero_again_after_every_launch(layout):
    from fastres.kernels.launch import _counters

    gen = generator("counters", layout)
    x, dy = (activation((4, 70, 9, 9), torch.float32, layout, gen) for _ in range(2))
    for _ in range(2):
        _, mean, m2 = ops.stats(x)
        ops.backward_reduce(dy, None, x, Norm(mean, m2, None, None), None, None, PLAIN)
        assert all(not c.any() for c in _counters[x.device].by_stream.values())


def test_counters_come_from_no_pool_that_the_calling_thread_has_opened(monkeypatch):
    """A CUDA graph's pool, which torch.compile opens for one thread while it warms the graph up."""
    from fastres.kernels import launch

    threads, zeros = [], torch.zeros

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        threads.append(threading.get_ident())
        return zeros(*arguments, **options)

    monkeypatch.setattr(launch, "_counters", {})
    monkeypatch.setattr(launch.torch, "zeros", noted)
    taken = launch.arrival_counters(torch.empty(0), 2000)
    assert taken.shape == (2000,) and taken.dtype == torch.int32 and not taken.any()
    assert len(threads) == 2 and threading.get_ident() not in threads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_channel_s_running_statistics_are_updated_once(layout):
    """Momentum 1 replaces, so an update made twice would not show; momentum 0.5 from a known start does."""
    x = activation((8, 70, 16, 16), torch.float32, layout, generator("once", layout))
    mean, var = torch.full((70,), 8.0), torch.full((70,), 4.0)
    ops.training(x, NormParams(mean, var, momentum=0.5), None, None, None, None, None, PLAIN)
    torch.testing.assert_close(mean, 4 + 0.5 * x.mean((0, 2, 3)))
    torch.testing.assert_close(var, 2 + 0.5 * x.var((0, 2, 3), correction=1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_does_not_depend_on_which_program_arrives_last(layout, monkeypatch):
    from triton.runtime import interpreter

    x = activation((8, 70, 16, 16), torch.float32, layout, generator("order", layout))
    results = [ops.stats(x)]
    own = interpreter.InterpreterBuilder.create_get_program_id

    def reversed_id(self: Any, axis: Any) -> Any:
        if axis != 0:
            return own(self, axis)
        index = interpreter.interpreter_builder.grid_idx
        self.grid_idx = (self.grid_dim[0] - 1 - index[0], *index[1:])
        try:
            return own(self, axis)
        finally:
            self.grid_idx = index

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", reversed_id)
    results.append(ops.stats(x))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- offsets


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [24, 21])
def test_64_bit_offsets_give_the_same_bits(layout, channels, monkeypatch):
    """What tensors beyond 2^31 elements take, at a size that runs."""
    from fastres.kernels import plan

    gen, shape = generator("64", layout, channels), (3, channels, 5, 4)
    x, r, dy = (activation(shape, torch.float32, layout, gen) for _ in range(3))
    own = detached(norm(channels, torch.float32, gen, running=False))
    act = Act("relu", 0.0, 0.3, "add_act")

    def run() -> list[torch.Tensor]:
        y, mean, rstd, _, _, bits = ops.training(x, own, None, r, None, None, torch.tensor([-5]), act)
        gradients = ops.backward(dy, None, x, Norm(mean, rstd, *own[2:4]), None, bits, act, True, [True, True, True])
        return [y, mean, rstd, bits, *gradients]

    narrow = run()
    monkeypatch.setattr(plan, "INDEX_32_LIMIT", 0)
    for f in (plan.reduce_plan, plan.apply_plan):
        f.cache_clear()
    try:
        wide = run()
    finally:
        for f in (plan.reduce_plan, plan.apply_plan):
            f.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


if backend.NAME == "triton":
    import triton
    import triton.language as tl

    from fastres.kernels.philox import _words

    @triton.jit
    def _store_words(seed_ptr, out_ptr, first):
        i = tl.arange(0, 4)
        a, b, c, d = _words(tl.load(seed_ptr), first.to(tl.int64), i, True)
        tl.store(out_ptr + 4 * i, a.to(tl.int64))
        tl.store(out_ptr + 4 * i + 1, b.to(tl.int64))
        tl.store(out_ptr + 4 * i + 2, c.to(tl.int64))
        tl.store(out_ptr + 4 * i + 3, d.to(tl.int64))


@pytest.mark.parametrize("first", [2**32 - 2, 2**32, 2**33 + 5])
def test_philox_counts_beyond_32_bits(first):
    """Counters of tensors beyond 2^34 elements have a high word."""
    seed, out = torch.tensor([-(2**62) + 9]), torch.zeros(4, 4, dtype=torch.int64)
    _store_words[1,](seed, out, first)
    assert torch.equal(out, contract.philox_4x32(seed, first + torch.arange(4)))
