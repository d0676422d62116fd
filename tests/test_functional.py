"""functional.batch_norm_act and projection_shortcut against float64 PyTorch, on whatever backend this process has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastres import _extension, contract, functional, reference
from fastres.functional import NormParams, Statistics
from tests import backend
from tests.oracle import (
    DTYPES,
    LAYOUTS,
    Case,
    activation,
    assert_close,
    check_case,
    generator,
    norm,
    saved_bytes,
    threads,
)


def call(f, case: Case, **options) -> Tensor:
    """batch_norm_act of `f` on the case's x, residual and norms."""
    n = case.norms["norm"]
    return f(
        case.tensors["x"], *n[:4], momentum=n.momentum, eps=n.eps, residual=case.tensors.get("residual"),
        residual_norm=case.norms.get("residual_norm"), **options,
    )  # fmt: skip


def make_case(shape, dtype, layout, gen, *, residual="plain", affine=True, running=True, **distribution) -> Case:
    tensors = {"x": activation(shape, dtype, layout, gen, **distribution).requires_grad_()}
    norms = {"norm": norm(shape[1], dtype, gen, affine=affine, running=running)}
    if residual != "none":
        tensors["residual"] = activation(shape, dtype, layout, gen).requires_grad_()
    if residual == "normalised":
        norms["residual_norm"] = norm(shape[1], dtype, gen, affine=affine, running=running)
    return Case(tensors, norms)


def check(case: Case, dtype, gen, *, statistics: Statistics | None = None, **options) -> Tensor:
    seed = torch.randint(2**62, (1,), generator=gen, device="cpu").to(backend.DEVICE)
    training, order = options.get("training", False), options.get("order", "add_act")
    x = case.tensors["x"]

    def relu_input(c: Case) -> Tensor:
        if order == "act_add":
            c = Case({"x": c.tensors["x"]}, {"norm": c.norms["norm"]})
        return call(reference.batch_norm_act, c, training=training, relu=False, order="add_act")

    return check_case(
        case,
        lambda c: call(functional.batch_norm_act, c, seed=seed, statistics=statistics, **options),
        lambda c: call(reference.batch_norm_act, c, seed=seed, **options),
        relu_input if options.get("relu", True) else None,
        dtype,
        gen,
        length=x.numel() // x.shape[1],
    )


def test_the_backend_under_test_is_the_one_asked_for():
    wanted = backend.NAME
    call(functional.batch_norm_act, make_case((2, 3, 2, 2), torch.float32, "nchw", generator()), training=True)
    status = _extension.status().cpu
    if wanted in ("reference", "triton", "cuda"):
        assert not status.live
    elif wanted is not None:
        assert status.live and status.capability == wanted
    if wanted == "triton":
        from fastres.kernels import batch_norm_act

        assert type(batch_norm_act.training.__globals__["apply_kernel"]).__name__ == "InterpretedFunction"


# ------------------------------------------------------------------------------------------------------- batch_norm_act


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
@pytest.mark.parametrize("order", functional.ORDERS)
def test_batch_norm_act_agrees_with_float64(dtype, layout, training, residual, order):
    for relu in (True, False):
        for dropout_p in (0.0, 0.3):
            for affine in (True, False):
                gen = generator(dtype, layout, training, residual, order, relu, dropout_p, affine)
                case = make_case((3, 37, 5, 7), dtype, layout, gen, residual=residual, affine=affine)
                y = check(case, dtype, gen, training=training, relu=relu, dropout_p=dropout_p, order=order)
                assert y.dtype == dtype and y.stride() == case.tensors["x"].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(4, 64, 8, 8), (9, 3, 1, 1), (1, 1, 5, 3), (5, 512, 2, 2), (2, 130, 7, 7), (300, 8, 1, 1), (3, 24, 6, 2)]
)
def test_shapes_that_fit_vectors_and_shapes_that_do_not(shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        gen = generator(shape, layout, dtype)
        for dropout_p in (0.0, 0.5):
            case = make_case(shape, dtype, layout, gen, residual="normalised")
            check(case, dtype, gen, training=True, dropout_p=dropout_p)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)).filter(
        lambda s: s[0] * s[2] * s[3] > 1
    ),
    permutation=st.permutations(range(4)),
    step=st.integers(1, 2),
    residual=st.sampled_from(["none", "plain", "normalised"]),
    order=st.sampled_from(functional.ORDERS),
    dropout_p=st.sampled_from([0.0, 0.25]),
    data_seed=st.integers(0, 2**31),
)
def test_any_shape_and_any_strides(shape, permutation, step, residual, order, dropout_p, data_seed):
    gen = torch.Generator().manual_seed(data_seed)
    case = make_case(shape, torch.float32, "nchw", gen, residual=residual)
    for name, t in case.tensors.items():
        stored = torch.zeros([shape[p] for p in permutation])
        stored = torch.cat([stored, torch.zeros_like(stored)], -1)[..., ::step][..., : stored.shape[-1]]
        view = stored.permute([permutation.index(d) for d in range(4)])
        case.tensors[name] = view.copy_(t.detach()).requires_grad_()
    check(case, torch.float32, gen, training=True, order=order, dropout_p=dropout_p)


def test_other_strides_are_copied_to_the_nearer_format():
    x = torch.randn(2, 6, 4, 8)[:, :, :, ::2]
    n = norm(6, torch.float32, generator())
    assert functional.batch_norm_act(x, *n[:4]).is_contiguous()
    y = functional.batch_norm_act(x.contiguous(memory_format=torch.channels_last)[:, :, ::2], *n[:4])
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_residual_in_the_other_memory_format_is_taken():
    gen = generator("formats")
    case = make_case((2, 16, 4, 5), torch.float32, "channels_last", gen)
    case.tensors["residual"] = case.tensors["residual"].detach().contiguous().requires_grad_()
    y = check(case, torch.float32, gen, training=True)
    assert contract.memory_format(y) == torch.channels_last


@pytest.mark.skipif(torch.float64 not in DTYPES, reason="GPU kernels have no float64")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
@pytest.mark.parametrize("order", functional.ORDERS)
def test_gradcheck_in_float64(training, residual, order):
    gen = generator("gradcheck", training, residual, order)
    case = make_case((2, 5, 2, 3), torch.float64, "channels_last", gen, residual=residual, running=not training)
    seed = torch.tensor([7])
    names = list(case.inputs())

    def f(*values: Tensor) -> Tensor:
        v = dict(zip(names, values, strict=True))
        norms = {
            k: NormParams(n.running_mean, n.running_var, v[f"{k}.weight"], v[f"{k}.bias"], eps=n.eps)
            for k, n in case.norms.items()
        }
        tensors = {k: v[k] for k in case.tensors}
        options = {"training": training, "order": order, "dropout_p": 0.3, "seed": seed}
        return call(functional.batch_norm_act, Case(tensors, norms), **options)

    assert torch.autograd.gradcheck(f, tuple(case.inputs().values()), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_of_10000_with_a_standard_deviation_of_1(layout):
    gen = generator("mean", layout)
    shape = (8, 20, 16, 16)
    x = activation(shape, torch.float32, layout, gen, mean=1e4, std=1.0)
    n = norm(shape[1], torch.float32, gen, affine=False)
    x[0, :, 0, 0] = 0  # what a shift by the first element would stumble over
    y = functional.batch_norm_act(x, *n[:4], training=True, relu=False, eps=0.0)
    # The mean is stored in float32: half a spacing of 1e4 over the smallest standard deviation.
    exact = reference.batch_norm_act(x.double(), None, None, training=True, relu=False, eps=0.0)
    rstd = 1 / x.double().std((0, 2, 3), correction=0)
    allowed = (2**-11 + 1e-3 * 2**-11) * rstd.max() + 1e-6 * exact.abs().max()
    assert (y.double() - exact).abs().max() <= allowed
    _, _, m2 = torch.ops.fastres.batch_norm_act_stats(x)
    exact_m2 = ((x.double() - x.double().mean((0, 2, 3), keepdim=True)) ** 2).sum((0, 2, 3))
    assert ((m2.double() - exact_m2).abs() / exact_m2).max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_far_from_zero_lose_no_precision(layout, dtype):
    gen = generator("far", layout, dtype)
    x = activation((8, 20, 16, 16), dtype, layout, gen, mean=1e4 if dtype == torch.float32 else 100.0, std=1.0)
    _, mean, m2 = torch.ops.fastres.batch_norm_act_stats(x)
    exact = x.double()
    exact_mean = exact.mean((0, 2, 3), keepdim=True)
    exact_m2 = ((exact - exact_mean) ** 2).sum((0, 2, 3))
    # The mean is stored in float32, half a spacing of 1e4 away at best; its own error takes as much again.
    assert (mean.double() - exact_mean.flatten()).abs().max() <= 2 * 2**-11
    assert ((m2.double() - exact_m2).abs() / exact_m2).max() < 1e-5


def test_a_million_elements_a_channel_in_bfloat16():
    gen = generator("million")
    x = activation((16, 2, 256, 256), torch.bfloat16, "channels_last", gen, mean=3.0)
    count, mean, m2 = torch.ops.fastres.batch_norm_act_stats(x)
    assert count.item() == 2**20
    assert_close(mean, x.double().mean((0, 2, 3)), "mean")
    assert_close(m2 / 2**20, x.double().var((0, 2, 3), correction=0), "variance")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_inf_and_nan_propagate_as_in_pytorch(value, layout):
    x = activation((2, 5, 3, 3), torch.float32, layout, generator("nan"))
    x[1, 2, 1, 1] = value
    for training in (True, False):
        n = norm(5, torch.float32, generator("n"), affine=False)
        expected = F.relu(F.batch_norm(x, n.running_mean.clone(), n.running_var.clone(), training=training, eps=1e-3))
        y = functional.batch_norm_act(x, *n[:4], training=training, eps=1e-3)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
        finite = expected.isfinite()
        assert_close(y[finite], expected[finite].double(), "finite part")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_channel_gives_the_bias(layout):
    x = torch.full((4, 3, 5, 5), 0.1).contiguous(memory_format=LAYOUTS[layout])
    y = functional.batch_norm_act(x, None, None, torch.ones(3), torch.tensor([1.0, 2.0, 3.0]), training=True)
    assert_close(y, torch.tensor([1.0, 2.0, 3.0]).double()[:, None, None].expand(4, 3, 5, 5), "y")


def test_running_statistics_follow_torch_over_several_batches():
    bn = torch.nn.BatchNorm2d(7, momentum=0.3).double()
    mean, var = torch.zeros(7), torch.ones(7)
    for step in range(4):
        x = activation((3, 7, 4, 4), torch.float32, "channels_last", generator("running", step))
        functional.batch_norm_act(x, mean, var, training=True, momentum=0.3)
        bn(x.double())
        version = mean._version
    assert version > 0, "autograd must see that the running statistics were changed in place"
    assert_close(mean, bn.running_mean, "running_mean")
    assert_close(var, bn.running_var, "running_var")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
def test_known_statistics_are_taken_instead_of_measured_ones(layout, dtype, residual):
    gen = generator("known", layout, dtype, residual)
    case = make_case((3, 18, 4, 5), dtype, layout, gen, residual=residual)
    x = case.tensors["x"].detach()
    measured = Statistics(*torch.ops.fastres.batch_norm_act_stats(x)[1:])
    check(case, dtype, gen, statistics=measured, training=True)

    n = case.norms["norm"]
    before = [t.double().clone() for t in n[:2]]
    wide = Statistics(measured.mean, measured.m2 * 4)
    y = functional.batch_norm_act(x, *n[:3], training=True, momentum=0.5, eps=0.0, relu=False, statistics=wide)
    mean, var = measured.mean.double(), measured.m2.double() / 60
    z = (x.double() - mean[:, None, None]) * (n.weight.detach().double() * torch.rsqrt(4 * var))[:, None, None]
    assert_close(y.detach(), z, "y")
    assert_close(n.running_mean, (before[0] + mean) / 2, "running_mean")
    assert_close(n.running_var, (before[1] + 4 * var * 60 / 59) / 2, "running_var")


def test_bfloat16_parameters_and_running_statistics_are_computed_in_float32():
    gen = generator("half model")
    case = make_case((3, 9, 4, 4), torch.bfloat16, "nchw", gen, residual="none")
    n = case.norms["norm"]
    low = [t.detach().bfloat16() for t in n[:4]]
    low[2].requires_grad_()
    wide = [t.detach().double() for t in low]
    y = functional.batch_norm_act(case.tensors["x"], *low, training=True, momentum=0.2, eps=1e-3)
    expected = reference.batch_norm_act(case.tensors["x"].double(), *wide, training=True, momentum=0.2, eps=1e-3)
    assert_close(y, expected.detach(), "y")
    assert_close(low[0], wide[0], "running_mean")
    assert_close(low[1], wide[1], "running_var")
    assert torch.autograd.grad(y.sum(), low[2])[0].dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("call", ["pointwise", "projection", "pool", "convolution"])
def test_parts_of_other_tensors_are_as_good_as_copies_of_them(call, training):
    gen = generator("parts", call, training)
    x, s = (activation((3, 9, 6, 6), torch.float32, "channels_last", gen) for _ in range(2))
    w3, w1 = (torch.randn(9, 9, k, k, generator=gen, device=gen.device) for k in (3, 1))
    whole = torch.rand(4, 18, generator=gen, device=gen.device) + 0.5
    found = []
    for step in (2, 1):
        rows = [row[::2].clone() if step == 1 else row.clone()[::2] for row in whole]
        assert {row.stride() for row in rows} == {(step,)}
        n = NormParams(rows[0], rows[1], rows[2].requires_grad_(), rows[3].requires_grad_())
        if call == "pointwise":
            y = functional.batch_norm_act(x, *n[:4], training=training, residual=s)
        elif call == "projection":
            y = functional.projection_shortcut(s, w1, n, x, training=training)
        elif call == "pool":
            y = functional.batch_norm_act_max_pool2d(x, n, 2, training=training)
        elif training:
            y, _ = functional.norm_act_conv3x3(x, n, w3)
        else:
            y = functional.conv3x3_norm_act(x, w3, n)
        found.append([y, n.running_mean, n.running_var, *torch.autograd.grad(y.square().sum(), n[2:4])])
    for ours, copies in zip(*found, strict=True):
        assert torch.equal(ours, copies)
    assert torch.equal(found[0][1], whole[0, ::2]) is not training


@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_passes_through_and_leaves_the_running_statistics(residual, training):
    case = make_case((0, 4, 3, 3), torch.float32, "nchw", generator(), residual=residual)
    before = [t.clone() for t in case.running().values()]
    y = call(functional.batch_norm_act, case, training=training)
    assert y.shape == (0, 4, 3, 3)
    gradients = torch.autograd.grad(y.sum(), list(case.inputs().values()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    assert all(torch.equal(a, b) for a, b in zip(before, case.running().values(), strict=True))


# ---------------------------------------------------------------------------------------------- memory, determinism,
# rng


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", functional.ORDERS)
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_only_x_and_a_bit_an_element_are_saved(layout, order, residual, dropout_p):
    case = make_case((2, 16, 8, 8), torch.float32, layout, generator(), residual=residual)
    one = case.tensors["x"].numel() * 4
    bits = case.tensors["x"].numel() // 8
    recomputable = dropout_p == 0 and (residual == "none" or order == "act_add")
    expected = one + (0 if recomputable else bits) + (one if residual == "normalised" else 0)
    options = {"training": True, "order": order, "dropout_p": dropout_p}
    assert saved_bytes(lambda: call(functional.batch_norm_act, case, **options)) == expected


def test_the_projection_saves_its_input_its_product_the_main_branch_and_bits():
    s = torch.randn(2, 8, 8, 8, requires_grad=True)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    weight = torch.randn(16, 8, 1, 1, requires_grad=True)
    norms = [norm(16, torch.float32, generator(k)) for k in range(2)]
    saved = saved_bytes(
        lambda: functional.projection_shortcut(s, weight, norms[0], x, norms[1], stride=2, training=True)
    )
    assert saved == 4 * (s.numel() + 2 * x.numel() + weight.numel()) + x.numel() // 8


def test_nothing_is_saved_without_gradients():
    case = make_case((2, 8, 4, 4), torch.float32, "nchw", generator())
    with torch.no_grad():
        assert call(functional.batch_norm_act, case, training=True).grad_fn is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_the_same_bits_for_any_number_of_threads(layout):
    gen = generator("threads", layout)
    case = make_case((16, 64, 16, 16), torch.float32, layout, gen, residual="normalised")
    dy = activation((16, 64, 16, 16), torch.float32, layout, gen)
    seed = torch.tensor([3])
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            y = call(functional.batch_norm_act, case, training=True, dropout_p=0.1, seed=seed)
            results.append([y, *torch.autograd.grad(y, list(case.inputs().values()), dy)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_manual_seed_decides_the_mask():
    x, n = torch.randn(2, 8, 4, 4), norm(8, torch.float32, generator())

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return functional.batch_norm_act(x, *n[:4], training=True, dropout_p=0.5)

    assert torch.equal(run(1) == 0, run(1) == 0)
    assert not torch.equal(run(1) == 0, run(2) == 0)


def test_dropout_is_the_identity_in_evaluation():
    x, n = torch.randn(2, 8, 4, 4), norm(8, torch.float32, generator())
    assert torch.equal(functional.batch_norm_act(x, *n[:4], dropout_p=0.9), functional.batch_norm_act(x, *n[:4]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    case = make_case((2, 8, 4, 4), torch.float32, "nchw", generator("checkpoint"), residual="normalised")
    inputs = list(case.inputs().values())

    def f(x: Tensor, r: Tensor, *_: Tensor) -> Tensor:
        c = Case({"x": x, "residual": r}, case.norms)
        return call(functional.batch_norm_act, c, training=True, dropout_p=0.4)

    gradients = []
    for run in (f, lambda *a: checkpoint(f, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        for t in inputs:
            t.grad = None
        (run(*inputs) ** 2).sum().backward()
        gradients.append([t.grad.clone() for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast_brings_the_residual_to_the_dtype_of_x():
    n = norm(6, torch.float32, generator())
    x, r = torch.randn(2, 6, 4, 4).bfloat16(), torch.randn(2, 6, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.batch_norm_act(x, *n[:4], residual=r).dtype == torch.bfloat16
        s, w = torch.randn(2, 3, 4, 4), torch.randn(6, 3, 1, 1)
        assert functional.projection_shortcut(s, w, n, r, n).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"residual: expected dtype torch.bfloat16, got torch.float32"):
        functional.batch_norm_act(x, *n[:4], residual=r)


# ---------------------------------------------------------------------------------------------------
# projection_shortcut


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("main", ["none", "plain", "normalised"])
def test_projection_shortcut_agrees_with_float64(dtype, layout, training, main):
    for stride, size in ((1, (4, 6)), (2, (7, 5)), (2, (8, 8)), ((2, 3), (5, 7))):
        gen = generator(dtype, layout, training, main, stride, size)
        case = projection_case(dtype, layout, gen, main, stride, size)
        seed = torch.tensor([5])
        options = {"stride": stride, "training": training, "dropout_p": 0.2, "seed": seed}
        # The product is stored in the input's dtype, and so are the sums of Cin products that make it.
        product_eps = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
        y = check_case(
            case,
            lambda c, o=options: project(functional.projection_shortcut, c, **o),
            lambda c, o=options: project(reference.projection_shortcut, c, **o),
            lambda c, o=options: project(reference.projection_shortcut, c, relu=False, **(o | {"dropout_p": 0.0})),
            dtype,
            gen,
            length=case_length(case, stride),
            product_eps=product_eps,
        )
        assert contract.memory_format(y) == LAYOUTS[layout]
        with torch.no_grad():
            fresh = project(functional.projection_shortcut, case, **(options | {"training": False}))
            exact = project(reference.projection_shortcut, case.double(), **(options | {"training": False}))
            assert_close(fresh, exact, "y without gradients", length=int(1 + (product_eps / 2**-23) ** 2) * 13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_projection_takes_known_statistics_of_the_main_branch(layout):
    gen = generator("known", layout)
    case = projection_case(torch.float32, layout, gen, "normalised", 2, (7, 5))
    x = case.tensors["x"]
    measured = Statistics(*torch.ops.fastres.batch_norm_act_stats(x.detach())[1:])
    start = [t.clone() for t in case.running().values()]
    results = []
    for statistics in (None, measured, Statistics(measured.mean, measured.m2 * 4)):
        for kept, value in zip(case.running().values(), start, strict=True):
            kept.copy_(value)
        options = {"stride": 2, "training": True, "relu": False, "x_statistics": statistics}
        y = project(functional.projection_shortcut, case, **options)
        gradients = torch.autograd.grad(y.sum(), list(case.inputs().values()))
        results.append([y, *gradients, *(t.clone() for t in case.running().values())])
    for a, b in zip(*results[:2], strict=True):
        assert_close(a, b.double(), "with known statistics", length=case_length(case, 2))
    assert not torch.allclose(results[2][0], results[0][0], rtol=0.1)


def case_length(case: Case, stride) -> int:
    s = case.tensors["s"]
    return s.shape[0] * s.shape[2] * s.shape[3] + s.shape[1]


def projection_case(dtype, layout, gen, main, stride, size) -> Case:
    channels, sh, sw = 22, *(stride if isinstance(stride, tuple) else (stride, stride))
    out = ((size[0] - 1) // sh + 1, (size[1] - 1) // sw + 1)
    weight = activation((channels, 13, 1, 1), dtype, "nchw", gen, mean=0, std=0.25)
    tensors = {"s": activation((3, 13, *size), dtype, layout, gen).requires_grad_(), "weight": weight.requires_grad_()}
    norms = {"norm": norm(channels, dtype, gen)}
    if main != "none":
        tensors["x"] = activation((3, channels, *out), dtype, layout, gen).requires_grad_()
    if main == "normalised":
        norms["x_norm"] = norm(channels, dtype, gen)
    return Case(tensors, norms)


def project(f, case: Case, **options) -> Tensor:
    t = case.tensors
    return f(t["s"], t["weight"], case.norms["norm"], t.get("x"), case.norms.get("x_norm"), **options)


def test_a_large_projection_spans_many_blocks_and_segments():
    for layout in LAYOUTS:
        gen = generator("large", layout)
        s = activation((8, 64, 32, 32), torch.float32, layout, gen)
        w = activation((96, 64, 1, 1), torch.float32, "nchw", gen, mean=0, std=0.125)
        product, mean, m2 = torch.ops.fastres.projection_shortcut_forward(s, w, [2, 2], True)
        exact = F.conv2d(s.double(), w.double(), stride=2)
        assert_close(product, exact, "product", length=64)
        assert_close(mean, product.double().mean((0, 2, 3)), "mean")
        assert_close(m2 / (8 * 256), product.double().var((0, 2, 3), correction=0), "variance")
        dproduct = activation(tuple(product.shape), torch.float32, layout, gen)
        ds, dw = torch.ops.fastres.projection_shortcut_backward(dproduct, s, w, [2, 2], [True, True])
        assert_close(ds, torch.nn.grad.conv2d_input(s.shape, w.double(), dproduct.double(), stride=2), "ds", length=96)
        exact_dw = torch.nn.grad.conv2d_weight(s.double(), w.shape, dproduct.double(), stride=2)
        assert_close(dw, exact_dw, "dweight", length=8 * 256)


# ------------------------------------------------------------------------------------------------------------- bad
# input

X = torch.zeros(2, 4, 3, 3)
V = torch.ones(4)
N = NormParams(V, V)
W = torch.zeros(4, 4, 1, 1)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"x: expected a Tensor, got list", {"x": [1.0]}),
        (ValueError, r"x: expected 2 to 5 dimensions .* got shape \(2,\)", {"x": X[:, 0, 0, 0]}),
        (TypeError, r"x: expected float32.* got torch.int64", {"x": X.long()}),
        (ValueError, r"running_mean: expected shape \(4,\).* got \(3,\)", {"running_mean": V[:3]}),
        (ValueError, r"weight: expected shape \(4,\).* got \(5,\)", {"weight": torch.ones(5)}),
        (TypeError, r"bias: expected a floating-point dtype, got torch.int64", {"bias": V.long()}),
        (ValueError, r"running_mean and running_var: expected both or neither", {"running_var": None}),
        (ValueError, r"running_mean: expected running statistics", {"running_mean": None, "running_var": None}),
        (ValueError, r"residual: expected shape \(2, 4, 3, 3\), got \(2, 4, 3, 2\)", {"residual": X[..., :2]}),
        (TypeError, r"residual: expected dtype torch.float32, got torch.float64", {"residual": X.double()}),
        (ValueError, r"residual: expected a tensor on cpu, got one on meta", {"residual": X.to("meta")}),
        (ValueError, r"residual_norm: expected None without a residual", {"residual_norm": N}),
        (TypeError, r"residual_norm: expected NormParams", {"residual": X, "residual_norm": (V, V)}),
        (
            ValueError,
            r"residual_norm.running_var: .* got \(2,\)",
            {"residual": X, "residual_norm": NormParams(V, V[:2])},
        ),
        (ValueError, r"dropout_p: expected 0 <= dropout_p < 1, got 1.0", {"dropout_p": 1.0}),
        (ValueError, r"dropout_p: .* got -0.1", {"dropout_p": -0.1}),
        (ValueError, r"dropout_p: .* got nan", {"dropout_p": float("nan")}),
        (TypeError, r"dropout_p: expected a number, got str", {"dropout_p": "0.1"}),
        (ValueError, r"order: expected one of .* got 'add'", {"order": "add"}),
        (TypeError, r"seed: expected an int64 Tensor", {"seed": 3}),
        (TypeError, r"seed: expected dtype torch.int64, got torch.int32", {"seed": torch.zeros(1, dtype=torch.int32)}),
        (ValueError, r"seed: expected one element", {"seed": torch.zeros(2, dtype=torch.int64)}),
        (TypeError, r"training: expected a bool", {"training": 1}),
        (TypeError, r"momentum: expected a number, got NoneType", {"momentum": None}),
        (ValueError, r"eps: expected at least 0, got -1", {"eps": -1}),
        (ValueError, r"more than 1 value a channel", {"x": torch.zeros(1, 4, 1, 1), "training": True}),
        (
            ValueError,
            r"statistics: expected None with training=False.* got Statistics",
            {"statistics": Statistics(V, V)},
        ),
        (TypeError, r"statistics: expected Statistics or None, got tuple", {"statistics": (V, V), "training": True}),
        (
            ValueError,
            r"statistics.mean: expected shape \(4,\).* got \(3,\)",
            {"statistics": Statistics(V[:3], V), "training": True},
        ),
        (
            TypeError,
            r"statistics.m2: expected dtype torch.float32, got torch.float64",
            {"statistics": Statistics(V, V.double()), "training": True},
        ),
        (
            TypeError,
            r"statistics.mean: expected a Tensor.* got NoneType",
            {"statistics": Statistics(None, V), "training": True},
        ),
    ],
)
def test_bad_input_to_batch_norm_act_is_named_before_anything_is_written(error, message, arguments):
    running_mean, running_var = torch.zeros(4), torch.ones(4)
    given = {"x": X, "running_mean": running_mean, "running_var": running_var} | arguments
    with pytest.raises(error, match=message):
        functional.batch_norm_act(given.pop("x"), given.pop("running_mean"), given.pop("running_var"), **given)
    assert torch.equal(running_mean, torch.zeros(4)) and torch.equal(running_var, torch.ones(4))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"s: expected a Tensor", {"s": None}),
        (ValueError, r"conv_weight: expected shape \(Cout, 4, 1, 1\)", {"conv_weight": torch.zeros(4, 3, 1, 1)}),
        (ValueError, r"conv_weight: expected shape", {"conv_weight": torch.zeros(4, 4, 3, 3)}),
        (TypeError, r"conv_weight: expected dtype", {"conv_weight": W.double()}),
        (ValueError, r"stride: expected at least 1, got 0", {"stride": 0}),
        (TypeError, r"stride: expected an int or two", {"stride": (1, 1, 1)}),
        (TypeError, r"stride: expected an int or two", {"stride": "2"}),
        (TypeError, r"norm: expected NormParams, got tuple", {"norm": (V, V)}),
        (ValueError, r"norm.running_mean: expected shape", {"norm": NormParams(V[:2], V[:2])}),
        (ValueError, r"x: expected shape \(2, 4, 2, 2\), got \(2, 4, 3, 3\)", {"x": X, "stride": 2}),
        (ValueError, r"x_norm: expected None without x", {"x_norm": N}),
        (ValueError, r"more than 1 value a channel", {"s": X[:1], "stride": 3, "training": True}),
        (ValueError, r"x_statistics: expected None without x and x_norm", {"x_statistics": Statistics(V, V)}),
        (ValueError, r"x_statistics: expected None without x and x_norm", {"x": X, "x_statistics": Statistics(V, V)}),
        (
            ValueError,
            r"x_statistics: expected None with training=False.* got Statistics",
            {"x": X, "x_norm": N, "x_statistics": Statistics(V, V)},
        ),
        (
            TypeError,
            r"x_statistics: expected Statistics or None, got Tensor",
            {"x": X, "x_norm": N, "x_statistics": V, "training": True},
        ),
        (
            ValueError,
            r"x_statistics.m2: expected shape \(4,\).* got \(2,\)",
            {"x": X, "x_norm": N, "x_statistics": Statistics(V, V[:2]), "training": True},
        ),
    ],
)
def test_bad_input_to_projection_shortcut_is_named(error, message, arguments):
    given = {"s": X, "conv_weight": W, "norm": N} | arguments
    with pytest.raises(error, match=message):
        functional.projection_shortcut(given.pop("s"), given.pop("conv_weight"), given.pop("norm"), **given)


def test_an_empty_batch_passes_through_the_projection():
    s = torch.zeros(0, 4, 3, 3, requires_grad=True)
    y = functional.projection_shortcut(s, W, N, stride=2, training=True)
    assert y.shape == (0, 4, 2, 2)
    y.sum().backward()
    assert s.grad is not None
