"""Normalisation over one and three dimensions: views onto the two-dimensional kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from fastres import functional
from fastres import nn as fast
from fastres.fuse import fuse, fuse_report, unfuse
from tests.operators import Operators
from tests.parity import DTYPES, close

SHAPES = {
    "1d rows": ((7, 6), fast.FusedBatchNormAct1d, nn.BatchNorm1d, torch.contiguous_format),
    "1d": ((4, 6, 9), fast.FusedBatchNormAct1d, nn.BatchNorm1d, torch.contiguous_format),
    "2d": ((3, 6, 4, 5), fast.FusedBatchNormAct2d, nn.BatchNorm2d, torch.channels_last),
    "3d": ((2, 6, 3, 4, 5), fast.FusedBatchNormAct3d, nn.BatchNorm3d, torch.contiguous_format),
    "3d channels_last": ((2, 6, 3, 4, 5), fast.FusedBatchNormAct3d, nn.BatchNorm3d, torch.channels_last_3d),
}
MODES = [("add_act", "relu"), ("act_add", "relu"), ("add_act", "silu"), ("act_add", "leaky_relu")]


def data(shape, memory_format, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen, dtype=torch.float64) + 0.3
    return x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()


def oracle(norm, act, order, x, residual):
    z = norm(x)
    if residual is not None and order == "add_act":
        return act(z + residual)
    return act(z) if residual is None else act(z) + residual


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "kind"), MODES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_are_torchs(name, dtype, order, kind, with_residual, training):
    shape, cls, plain, memory_format = SHAPES[name]
    ours = cls(6, dtype=dtype, act=kind, order=order)
    with torch.no_grad():
        for value in (ours.weight, ours.bias, ours.running_mean, ours.running_var):
            value.copy_(torch.rand(6) + 0.4)
    theirs = plain(6, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    ours.train(training), theirs.train(training)
    x = data(shape, memory_format, dtype, 1)
    r = data(shape, memory_format, dtype, 2) if with_residual else None
    exact = [t.detach().double().requires_grad_() for t in (x, r) if t is not None]
    with Operators() as seen:
        y = ours(x, r)
    assert any(n.startswith("batch_norm_act") for n in seen.names)
    expected = oracle(theirs, ours.act, order, exact[0], exact[1] if with_residual else None)
    assert y.stride() == x.stride() and y.shape == x.shape
    gradient = torch.randn_like(expected)
    y.backward(gradient.to(dtype))
    expected.backward(gradient.to(dtype).double())
    length = x.numel()
    close(y.double().to(dtype), expected.to(dtype), length)
    for what, a, b in [("x", x, exact[0]), *([("residual", r, exact[1])] if with_residual else [])]:
        close(a.grad, b.grad.to(dtype), length, what, times=4)
        assert a.grad.stride() == x.stride()
    close(ours.weight.grad, theirs.weight.grad.to(dtype), length, "weight", times=4)
    close(ours.bias.grad, theirs.bias.grad.to(dtype), length, "bias", times=4)
    close(ours.running_mean, theirs.running_mean.to(dtype), length, "running_mean")
    close(ours.running_var, theirs.running_var.to(dtype), length, "running_var")


@pytest.mark.parametrize("name", SHAPES)
def test_dropout_is_that_of_the_contract_and_the_same_in_every_view(name):
    shape, _, _, memory_format = SHAPES[name]
    x, seed = data(shape, memory_format, torch.float32, 3).detach(), torch.tensor([11])
    y = functional.batch_norm_act(x, None, None, training=True, activation="identity", dropout_p=0.4, seed=seed)
    flat = functional.batch_norm_act(
        x.reshape(*shape[:2], -1, 1), None, None, training=True, activation="identity", dropout_p=0.4, seed=seed
    )
    assert torch.equal(y == 0, (flat == 0).reshape(shape))
    assert 0.2 < (y == 0).double().mean() < 0.6


@pytest.mark.parametrize("name", SHAPES)
def test_strides_of_no_format_are_copied_once(name):
    shape, cls, plain, _ = SHAPES[name]
    x = torch.randn((2 * shape[0], *shape[1:]))[::2]
    close(cls(6, relu=False)(x), plain(6)(x), x.numel())


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (fast.FusedBatchNormAct1d, (2, 6, 3, 3)),
        (fast.FusedBatchNormAct2d, (2, 6, 3)),
        (fast.FusedBatchNormAct3d, (2, 6, 3, 3)),
    ],
)
def test_another_number_of_dimensions_is_refused_as_torch_refuses_it(cls, shape):
    with pytest.raises(ValueError, match=r"expected .*D"):
        cls(6)(torch.randn(shape))


def test_they_are_fused_unfused_and_reported():
    model = nn.Sequential(fast.BatchNormAct1d(6), fast.BatchNormAct3d(6))
    fused = fuse(model)
    assert [type(m) for m in fused] == [fast.FusedBatchNormAct1d, fast.FusedBatchNormAct3d]
    assert set(fuse_report(fused).swapped) == {"0", "1"}
    assert [type(m) for m in unfuse(fused)] == [fast.BatchNormAct1d, fast.BatchNormAct3d]
