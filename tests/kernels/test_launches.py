"""A whole training step under fake CUDA tensors: shapes, strides, dtypes, and the number of launches."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.compiled.launches import evaluation, run_backward, training_step
from fastres import contract
from fastres.contract import Act, Norm, NormParams, Statistics
from fastres.kernels import batch_norm_act
from fastres.kernels.compiled import ARCHITECTURES
from fastres.kernels.launch import recording
from fastres.kernels.plan import WAVES

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="traces need no interpreter")

# A ResNet-18 has 17 normalisations outside its shortcuts; the three in the shortcuts ride along.
NORMS = 17


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_is_two_launches_forward_and_two_backward_a_norm(memory_format, dtype, dropout):
    trace, network = training_step(batch=64, dtype=dtype, dropout=dropout, memory_format=memory_format)
    assert not trace.mismatches
    names = Counter(launch.name for launch in trace.launches)
    assert names == {
        "statistics_kernel": NORMS, "apply_kernel": NORMS, "backward_reduce_kernel": NORMS,
        "backward_apply_kernel": NORMS,
    }  # fmt: skip
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.dtype == p.dtype, name
        assert p.grad.device.type == "cuda"
    layouts = {launch.arguments["CHANNELS_LAST"] for launch in trace.launches}
    assert layouts == {memory_format == torch.channels_last}
    assert trace.operators["aten::native_dropout"] == trace.operators["aten::native_batch_norm"] == 0


def test_the_shortcut_s_norm_adds_only_its_share_of_the_tensors():
    trace, _ = training_step(batch=64)
    shared = [
        x for x in trace.launches if x.name == "backward_apply_kernel" and x.arguments["residual_mean_ptr"] is not None
    ]
    given = [
        x for x in trace.launches if x.name == "statistics_kernel" and x.arguments["other_given_mean_ptr"] is not None
    ]
    assert len(shared) == len(given) == trace.operators["fastres::projection_shortcut_forward"] == 3
    # The product's statistics come from the convolution: no program reads it to measure it.
    assert all(x.grid[2] == 1 for x in given)


def test_evaluation_is_one_launch_a_norm():
    trace = evaluation(batch=64)
    assert not trace.mismatches
    # The three blocks with a projection are one operator each, which is not among these kernels.
    assert Counter(launch.name for launch in trace.launches) == {"apply_kernel": NORMS - 3}


def test_grids_fill_the_gpu_without_a_wave_too_many():
    for architecture in ARCHITECTURES:
        device = architecture.device
        for launch in training_step(device=device)[0].launches:
            threads = launch.num_warps * device.warp
            programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
            waves = WAVES if launch.name == "apply_kernel" or launch.name == "backward_apply_kernel" else 1
            assert programs * threads <= device.multiprocessors * device.resident * waves
            assert programs >= device.multiprocessors // 2


@pytest.mark.parametrize("given", ["x", "both"])
def test_known_statistics_take_a_launch_that_touches_no_activation(given):
    with recording() as launches:
        x = torch.empty(4, 300, 5, 5, device="meta")
        v = torch.empty(300, device="meta")
        statistics = Statistics(v, v, torch.empty(1, dtype=torch.int64, device="meta"))
        residual = (x, NormParams(None, None), statistics) if given == "both" else (None, None, None)
        own = NormParams(v.clone(), v.clone(), v, v)
        batch_norm_act.training(x, own, statistics, *residual, None, Act("relu", 0.0, 0.0, "add_act"))
    assert [launch.name for launch in launches] == ["finalise_kernel", "apply_kernel"]
    assert launches[0].grid == (1, 3, 1)
    assert all(t.numel() in (1, 300) for t in launches[0].arguments.values() if isinstance(t, torch.Tensor))


def test_a_gradient_in_two_parts_takes_no_more_launches_than_one():
    with recording() as launches:
        x, dy, dy2 = (torch.empty(4, 300, 5, 5, device="meta") for _ in range(3))
        v = torch.empty(300, device="meta")
        bits = torch.empty(contract.bits_size(x), dtype=torch.uint8, device="meta")
        act = Act("relu", 0.0, 0.0, "add_act")
        _, dr, *_ = batch_norm_act.backward(
            dy, dy2, x, Norm(v, v, v, v), None, bits, act, True, [True, True, True]
        )  # fmt: skip
    first, second = launches
    assert (first.name, second.name) == ("backward_reduce_kernel", "backward_apply_kernel")
    # The gradient of a plain residual is what the first wrote, and all that the second knows of y's gradient.
    assert first.arguments["dz_ptr"] is second.arguments["dy_ptr"] is dr
    assert first.arguments["dy2_ptr"] is dy2
    assert second.arguments["dresidual_ptr"] is second.arguments["bits_ptr"] is second.arguments["PASSES"] is None


def test_the_engine_of_the_trace_computes_gradients():
    """The trace's own walk through autograd's graph against autograd, on real tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    x, labels = torch.randn(7, 3, 6, 6), torch.randint(5, (7,))

    def loss():
        hidden = model[:2](x)
        return F.cross_entropy(model[2:](hidden + 0.5 * hidden), labels)  # a fork, whose gradients add up

    expected = torch.autograd.grad(loss(), list(model.parameters()))
    run_backward(loss())
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
