"""The operators of projection_shortcut one by one."""

from __future__ import annotations

import pytest
import torch

from fastres import _extension, functional
from fastres.activations import Activation
from fastres.contract import NormParams
from fastres.ops import projection_shortcut as ops
from tests.emulator.cases import Case
from tests.operators import opcheck
from tests.ops.test_projection_shortcut_gpu import check_all, run_all
from tests.oracle import LAYOUTS, activation, generator, norm

OPS = torch.ops.fastres


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [[1, 1], [2, 2], [2, 3]])
def test_opcheck_passes_on_every_operator(layout, stride):
    gen = generator(layout, stride)
    s = activation((2, 5, 6, 7), torch.float32, layout, gen)
    weight = activation((9, 5, 1, 1), torch.float32, "nchw", gen)
    for statistics in (True, False):
        opcheck(ops.forward, s, weight, stride, statistics)
    product = OPS.projection_shortcut_forward(s, weight, stride, False)[0]
    dproduct = torch.randn_like(product)
    for needs in ([True, True], [True, False], [False, True]):
        opcheck(ops.backward, dproduct, s, weight, stride, needs)
    norms = [norm(9, torch.float32, gen) for _ in range(2)]
    own, other = (n._replace(weight=n.weight.detach(), bias=n.bias.detach()) for n in norms)
    x = torch.randn_like(product)
    opcheck(ops.inference, s, weight, own, x, other, stride, Activation("relu"))
    opcheck(ops.inference, s, weight, own, None, None, stride, Activation("silu"))


def test_statistics_are_those_of_the_product_as_it_is_stored():
    gen = generator("stored")
    s = activation((2, 8, 6, 6), torch.bfloat16, "channels_last", gen)
    weight = activation((16, 8, 1, 1), torch.bfloat16, "nchw", gen)
    product, mean, m2 = OPS.projection_shortcut_forward(s, weight, [2, 2], True)
    _, wanted_mean, wanted_m2 = OPS.batch_norm_act_stats(product)
    torch.testing.assert_close(mean, wanted_mean)
    torch.testing.assert_close(m2, wanted_m2)


@pytest.mark.parametrize("training", [True, False])
def test_the_function_compiles_to_one_graph_with_the_same_results(training):
    gen = generator("compile", training)
    s = activation((2, 5, 6, 7), torch.float32, "channels_last", gen).requires_grad_()
    x = activation((2, 9, 3, 4), torch.float32, "channels_last", gen).requires_grad_()
    weight = activation((9, 5, 1, 1), torch.float32, "nchw", gen).requires_grad_()
    own, other = norm(9, torch.float32, gen), norm(9, torch.float32, gen)

    def f(s, weight, x):
        return functional.projection_shortcut(s, weight, own, x, other, stride=2, training=training)

    inputs = [s, weight, x, own.weight, other.bias]
    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        y = run(s, weight, x)
        results.append([y, *torch.autograd.grad((y * y).sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gpus_tests_pass_here_too(layout):
    """So that they fit the operators also where no GPU runs them."""
    case = Case("float32", layout, "gradients in several parts")
    check_all(case, run_all(case, "cpu"))


@pytest.mark.skipif(_extension.load_cpu() is None, reason="PyTorch's convolution refuses these")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "outputs"), [((0, 3, 5, 4), 2), ((2, 3, 0, 4), 2), ((2, 0, 5, 4), 2), ((2, 3, 5, 4), 0)], ids=str
)
def test_the_operators_serve_tensors_without_elements(shape, outputs, layout):
    s = torch.ones(shape).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.ones(outputs, shape[1], 1, 1)
    product, mean, m2 = OPS.projection_shortcut_forward(s, weight, [2, 2], True)
    assert product.shape == (shape[0], outputs, (shape[2] + 1) // 2, 2) and not product.any()
    assert torch.equal(mean, torch.zeros(outputs)) and torch.equal(m2, torch.zeros(outputs))
    ds, dweight = OPS.projection_shortcut_backward(product, s, weight, [2, 2], [True, True])
    assert torch.equal(ds, torch.zeros(shape)) and torch.equal(dweight, torch.zeros_like(weight))
    y = ops.inference(s, weight, NormParams(mean, m2 + 1), None, None, [2, 2], Activation("relu"))
    assert y.shape == product.shape and not y.any()
