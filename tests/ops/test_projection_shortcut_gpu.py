"""The CUDA kernels of the projection shortcut on a GPU: the cases that the emulator runs, and larger ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastres import _extension, functional
from fastres.activations import RELU
from tests.emulator.cases import SHAPES, Case
from tests.emulator.machine import ARITHMETIC
from tests.oracle import LAYOUTS, assert_close, generator, norm

pytestmark = pytest.mark.gpu

OPS = torch.ops.fastres


@pytest.fixture(autouse=True)
def compiled_kernels():
    if _extension.load_cuda() is None:
        pytest.skip(f"no CUDA module: {_extension.status().cuda.reason}")


@pytest.fixture
def allow_tf32(request):
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda yes: setattr(torch.backends.cuda.matmul, "allow_tf32", yes)
    torch.backends.cuda.matmul.allow_tf32 = before


def moved(*values: Any, device: str = "cuda") -> list[Any]:
    """Tensors, detached, on the device; all else as it is."""
    return [v.detach().to(device) if isinstance(v, Tensor) else v for v in values]


def run_all(case: Case, device: str = "cuda") -> list[Tensor]:
    """Every step of a case: product, mean, M2, ds, dweight, y."""
    s, weight, dproduct, x = moved(case.s, case.weight, case.dproduct, case.x, device=device)
    own, other = moved(*case.norm, device=device), moved(*case.x_norm, device=device)
    stride = list(case.stride)
    product, mean, m2 = OPS.projection_shortcut_forward(s, weight, stride, True)
    ds, dweight = OPS.projection_shortcut_backward(dproduct, s, weight, stride, [True, True])
    y = OPS.projection_shortcut_inference(s, weight, *own, x, *other, stride, *RELU)
    return [product, mean, m2, ds, dweight, y]


def check_all(case: Case, found: list[Tensor]) -> None:
    product, mean, m2, ds, dweight, y = (t.cpu() for t in found)
    case.check_forward((product, mean, m2))
    case.check_ds(ds)
    case.check_dweight(dweight)
    assert_close(y, case.y(case.x, case.x_norm, True), "y", length=case.s.shape[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_gives_what_float64_gives(arithmetic, layout, shape, allow_tf32):
    if arithmetic == "tf32" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no tf32")
    allow_tf32(arithmetic == "tf32")
    case = Case(arithmetic, layout, shape)
    check_all(case, run_all(case))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_results_are_the_same_bit_for_bit_from_run_to_run(arithmetic, allow_tf32):
    allow_tf32(arithmetic == "tf32")
    case = Case(arithmetic, "channels_last", "gradients in several parts", "twice")
    first = run_all(case)
    for _ in range(5):
        for a, b in zip(first, run_all(case), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("cin", [64, 128, 256])
def test_the_shortcuts_of_a_resnet_at_batch_512_give_what_cudnn_gives(cin):
    gen = torch.Generator(device="cuda").manual_seed(generator(cin).initial_seed() % 2**31)
    size = 2048 // cin
    s = torch.randn(512, cin, size, size, generator=gen, device="cuda", dtype=torch.bfloat16)
    s = s.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2 * cin, cin, 1, 1, generator=gen, device="cuda").div(cin**0.5).bfloat16()
    product, mean, m2 = OPS.projection_shortcut_forward(s, weight, [2, 2], True)
    rows = s[:, :, ::2, ::2].permute(0, 2, 3, 1).reshape(-1, cin).double()
    expected = (rows @ weight.flatten(1).double().t()).reshape(512, size // 2, size // 2, -1).permute(0, 3, 1, 2)
    assert_close(product.cpu(), expected.cpu(), "product", length=cin)
    count = product.numel() // (2 * cin)
    stored = product.double()
    assert_close(mean.cpu(), stored.mean((0, 2, 3)).cpu(), "mean", length=count)
    assert_close(m2.cpu(), (stored.var((0, 2, 3), correction=0) * count).cpu(), "M2", length=count)
    dproduct = torch.randn(product.shape, generator=gen, device="cuda").to(product)
    dproduct = dproduct.contiguous(memory_format=torch.channels_last)
    ds, dweight = OPS.projection_shortcut_backward(dproduct, s, weight, [2, 2], [True, True])
    drows = dproduct.permute(0, 2, 3, 1).reshape(-1, 2 * cin).double()
    assert_close(dweight.flatten(1).cpu(), (drows.t() @ rows).cpu(), "dweight", length=count)
    wanted = torch.zeros_like(s, dtype=torch.float64)
    gradient = (drows @ weight.flatten(1).double()).reshape(512, size // 2, size // 2, cin).permute(0, 3, 1, 2)
    wanted[:, :, ::2, ::2] = gradient
    assert_close(ds.cpu(), wanted.cpu(), "ds", length=2 * cin)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [[1, 1], [2, 3]])
def test_opcheck_passes_on_cuda(layout, stride):
    check = torch.library.opcheck
    gen = generator("cuda", layout, stride)
    s = torch.randn(2, 8, 6, 7, generator=gen).cuda().contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(16, 8, 1, 1, generator=gen).cuda()
    for statistics in (True, False):
        check(OPS.projection_shortcut_forward.default, (s, weight, stride, statistics))
    dproduct = torch.randn_like(OPS.projection_shortcut_forward(s, weight, stride, False)[0])
    for needs in ([True, True], [True, False], [False, True]):
        check(OPS.projection_shortcut_backward.default, (dproduct, s, weight, stride, needs))
    own, other = (moved(*norm(16, torch.float32, gen)) for _ in range(2))
    check(OPS.projection_shortcut_inference.default, (s, weight, *own, dproduct, *other, stride, *RELU))


def test_a_step_can_be_captured_in_a_cuda_graph():
    case = Case("bfloat16", "channels_last", "gradients in several parts", "graph")
    expected = run_all(case)
    s, weight, dproduct = moved(case.s, case.weight, case.dproduct)
    stride = list(case.stride)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward = OPS.projection_shortcut_forward(s, weight, stride, True)
        backward = OPS.projection_shortcut_backward(dproduct, s, weight, stride, [True, True])
    graph.replay()
    for a, b in zip([*forward, *backward], expected[:5], strict=True):
        assert torch.equal(a, b)


def test_the_function_compiles_to_one_graph_with_the_same_results():
    gen = generator("compile")
    s = torch.randn(4, 16, 8, 8, generator=gen).cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
    x = torch.randn(4, 32, 4, 4, generator=gen).cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 16, 1, 1, generator=gen).cuda().requires_grad_()
    own, other = (
        n._replace(**{k: getattr(n, k).detach().cuda() for k in ("running_mean", "running_var", "weight", "bias")})
        for n in (norm(32, torch.float32, gen) for _ in range(2))
    )

    def f(s, weight, x):
        return functional.projection_shortcut(s, weight, own, x, other, stride=2, training=True)

    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        y = run(s, weight, x)
        results.append([y, *torch.autograd.grad((y * y).sum(), [s, weight, x])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_float64_and_other_devices_are_refused_in_words():
    s, weight = torch.randn(2, 8, 4, 4, device="cuda"), torch.randn(4, 8, 1, 1, device="cuda")
    with pytest.raises(TypeError, match="s: expected float32, bfloat16 or float16 on CUDA"):
        OPS.projection_shortcut_forward(s.double(), weight.double(), [1, 1], True)
    with pytest.raises(ValueError, match="weight: expected shape"):
        OPS.projection_shortcut_forward(s, weight[:, :3], [1, 1], True)
