"""The functions as citizens of PyTorch: saved tensors, torch.func, tracers, autograd, flops, strides and autocast.

Every function stands in one table; what is expected of it is PyTorch's own operators on the same tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastres import functional, reference
from fastres.functional import NormParams
from fastres.ordinary import why_not_ordinary
from tests import backend
from tests.oracle import LAYOUTS, activation, generator, near_zero
from tests.parity import one_thread  # noqa: F401

pytestmark = pytest.mark.skipif(backend.NAME in ("triton", "cuda"), reason="the functions' own logic, on the CPU")

SHAPE = (3, 12, 6, 5)
# oneDNN's gradients of a strided 1x1 convolution overrun memory below 16 channels in float32 (torch 2.14.1).
PROJECTED = 16


class Function(NamedTuple):
    """`ours` and `plain` of (tensors, buffers): the names of the tensors that they take and differentiate."""

    names: tuple[str, ...]
    ours: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
    plain: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


def own(t: dict[str, Tensor], b: dict[str, Tensor], prefix: str = "") -> NormParams:
    names = ("mean", "var")
    return NormParams(*(b[prefix + n] for n in names), t[prefix + "weight"], t[prefix + "bias"], 0.2, 0.03)


def batch_norm_act(module, training: bool, **options):
    def run(t, b):
        n = own(t, b)
        normed = {"residual_norm": own(t, b, "r_")} if "r_weight" in t else {}
        return module.batch_norm_act(
            t["x"], *n[:4], momentum=n.momentum, eps=n.eps, residual=t.get("r"), training=training, **normed, **options
        )

    return run


def projection(module, training: bool):
    return lambda t, b: module.projection_shortcut(
        t["s"], t["k1"], own(t, b), t["x"], own(t, b, "r_"), stride=2, training=training
    )


def norm_pool(module):
    return lambda t, b: module.batch_norm_act_max_pool2d(t["x"], own(t, b), 3, 2, 1, training=True)


def first(y):
    return y if isinstance(y, Tensor) else y[0]


NORM, R_NORM = ("weight", "bias"), ("r_weight", "r_bias")
WINOGRAD, PRODUCT = {"algorithm": "winograd"}, {"algorithm": "gemm"}
SEED = {"seed": torch.tensor([7]), "dropout_p": 0.3}
FUNCTIONS: dict[str, Function] = {
    **{
        f"batch_norm_act-{mode}-{name}": Function(
            names, batch_norm_act(functional, training, **options), batch_norm_act(reference, training, **options)
        )
        for mode, training in (("training", True), ("evaluation", False))
        for name, names, options in (
            ("alone", ("x", *NORM), {}),
            ("residual", ("x", "r", *NORM), {}),
            ("act_add", ("x", "r", *NORM), {"order": "act_add", **SEED}),
            ("normalised", ("x", "r", *NORM, *R_NORM), SEED),
        )
    },
    "conv3x3": Function(
        ("x", "k3"),
        lambda t, b: functional.conv3x3(t["x"], t["k3"], **WINOGRAD),
        lambda t, b: reference.conv3x3(t["x"], t["k3"]),
    ),
    "conv3x3_with_statistics": Function(
        ("x", "k3"),
        lambda t, b: functional.conv3x3_with_statistics(t["x"], t["k3"], **WINOGRAD).y,
        lambda t, b: reference.conv3x3(t["x"], t["k3"]),
    ),
    "grouped_conv2d": Function(
        ("x", "k3"),
        lambda t, b: functional.grouped_conv2d(t["x"], t["k3"][:, :1], algorithm="grouped"),
        lambda t, b: reference.grouped_conv2d(t["x"], t["k3"][:, :1]),
    ),
    "grouped_conv2d_with_statistics": Function(
        ("x", "k3"),
        lambda t, b: functional.grouped_conv2d_with_statistics(t["x"], t["k3"][:, :1], algorithm="grouped").y,
        lambda t, b: reference.grouped_conv2d(t["x"], t["k3"][:, :1]),
    ),
    "max_pool2d": Function(
        ("x", "weight"),
        lambda t, b: functional.max_pool2d(t["x"] * t["weight"][:, None, None], 3, 2, 1),
        lambda t, b: F.max_pool2d(t["x"] * t["weight"][:, None, None], 3, 2, 1),
    ),
    "batch_norm_act_max_pool2d-training": Function(("x", *NORM), norm_pool(functional), norm_pool(reference)),
    "norm_act_conv3x3": Function(
        ("x", "r", "k3", *NORM),
        lambda t, b: functional.norm_act_conv3x3(t["x"], own(t, b), t["k3"], residual=t["r"], **SEED, **WINOGRAD)[0],
        lambda t, b: reference.norm_act_conv3x3(t["x"], own(t, b), t["k3"], residual=t["r"], **SEED),
    ),
    "conv1x1_with_statistics": Function(
        ("x", "k3"),
        lambda t, b: functional.conv1x1_with_statistics(t["x"], t["k3"][..., :1, :1], **PRODUCT).y,
        lambda t, b: reference.conv1x1(t["x"], t["k3"][..., :1, :1]),
    ),
    "norm_act_conv1x1": Function(
        ("x", "r", "k3", *NORM),
        lambda t, b: functional.norm_act_conv1x1(
            t["x"], own(t, b), t["k3"][..., :1, :1], residual=t["r"], **SEED, **PRODUCT
        )[0],
        lambda t, b: reference.norm_act_conv1x1(t["x"], own(t, b), t["k3"][..., :1, :1], residual=t["r"], **SEED),
    ),
    "conv3x3_norm_act": Function(
        ("x", "r", "k3", *NORM),
        lambda t, b: functional.conv3x3_norm_act(t["x"], t["k3"], own(t, b), residual=t["r"], **WINOGRAD),
        lambda t, b: reference.conv3x3_norm_act(t["x"], t["k3"], own(t, b), residual=t["r"]),
    ),
    "projection_shortcut-training": Function(
        ("s", "k1", "x", *NORM, *R_NORM), projection(functional, True), projection(reference, True)
    ),
    "projection_shortcut-evaluation": Function(
        ("s", "k1", "x", *NORM, *R_NORM), projection(functional, False), projection(reference, False)
    ),
}


@pytest.fixture(params=FUNCTIONS)
def function(request) -> Function:
    return FUNCTIONS[request.param]


def draw(names: tuple[str, ...], layout: str, dtype=torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random tensors and buffers, for which no ReLU of a function that takes them is too near zero to tell its sign."""
    gen = generator(names, layout)
    while True:
        tensors, buffers = draw_any(names, layout, dtype, gen)
        taken = [f for f in FUNCTIONS.values() if set(f.names) <= set(names)]
        if not any(near_zero(z, dtype).any() for f in taken for z in relu_inputs(f, tensors, buffers)):
            return tensors, buffers


def relu_inputs(function: Function, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> list[Tensor]:
    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        relu = F.relu
        patch.setattr(F, "relu", lambda z: seen.append(z) or relu(z))
        function.plain(*({k: v.double() for k, v in values.items()} for values in (tensors, buffers)))
    return seen


def draw_any(names: tuple[str, ...], layout: str, dtype, gen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    n, c, h, w = SHAPE
    tensors = {}
    for name in names:
        if name in ("x", "r"):
            tensors[name] = activation(SHAPE, dtype, layout, gen)
        elif name == "s":
            tensors[name] = activation((n, PROJECTED, 2 * h, 2 * w), dtype, layout, gen)
        elif name in ("k1", "k3"):
            shape = (c, PROJECTED, 1, 1) if name == "k1" else (c, c, 3, 3)
            tensors[name] = (0.3 * torch.randn(shape, generator=gen)).to(dtype).to(memory_format=LAYOUTS[layout])
        else:
            tensors[name] = (torch.randn(c, generator=gen) + 1).to(dtype)
    buffers = {
        prefix + name: (torch.rand(c, generator=gen) + 0.5).to(dtype)
        for prefix in ("", "r_")
        for name in ("mean", "var")
    }
    return tensors, buffers


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in tensors.items()}


def gradients(f, tensors, buffers) -> dict[str, Tensor]:
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    y = f(leaves, copies(buffers))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def assert_near(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """As near as two ways of computing the same in float32 are, Winograd's among them."""
    scale = float(expected.abs().max().clamp(min=1))
    assert actual.shape == expected.shape, name
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=1e-4 * scale, msg=lambda m: f"{name}: {m}"
    )


# -------------------------------------------------------------------------------------------------------- saved tensors

HOOKS: dict[str, Callable[[], torch.autograd.graph.saved_tensors_hooks]] = {
    "contiguous": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t),
    "numpy": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().numpy().copy(), lambda a: torch.from_numpy(a)
    ),
    "channels_last": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_may_come_back_in_other_strides(function, layout, hooks):
    if function is FUNCTIONS["max_pool2d"] and layout == "nchw":
        pytest.skip("PyTorch's own, whose gradient lies as what it saved")
    tensors, buffers = draw(function.names, layout)
    expected = gradients(function.ours, tensors, buffers)
    with HOOKS[hooks]():
        actual = gradients(function.ours, tensors, buffers)
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name
        assert actual[name].stride() == gradient.stride(), name


# ----------------------------------------------------------------------------------------------------------- torch.func


def func_gradient(f, tensors, buffers):
    return torch.func.grad(lambda t: f(t, buffers).square().mean())(tensors)


def func_vjp(f, tensors, buffers):
    y, vjp = torch.func.vjp(lambda t: f(t, buffers), tensors)
    return {"y": y, **vjp(torch.ones_like(y))[0]}


def func_jvp(f, tensors, buffers):
    y, tangent = torch.func.jvp(lambda t: f(t, buffers), (tensors,), (copies(tensors),))
    return {"y": y, "tangent": tangent}


def func_jacobian(jacobian):
    def run(f, tensors, buffers):
        name = "weight" if "weight" in tensors else "x"
        return {"jacobian": jacobian(lambda v: f({**tensors, name: v}, copies(buffers))[0, :2, 0, 0])(tensors[name])}

    return run


def dual(f, tensors, buffers):
    with forward_ad.dual_level():
        y = f({k: forward_ad.make_dual(v, v.clone()) for k, v in tensors.items()}, buffers)
        return {"tangent": forward_ad.unpack_dual(y).tangent}


TRANSFORMS = {
    "grad": func_gradient,
    "vjp": func_vjp,
    "jvp": func_jvp,
    "jacrev": func_jacobian(torch.func.jacrev),
    "jacfwd": func_jacobian(torch.func.jacfwd),
    "dual": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transforms_give_what_they_give_of_pytorchs_operators(function, layout, transform):
    tensors, buffers = draw(function.names, layout)
    exact = {k: v.double() for k, v in tensors.items()}, {k: v.double() for k, v in buffers.items()}
    actual = TRANSFORMS[transform](function.ours, tensors, buffers)
    expected = TRANSFORMS[transform](function.plain, *exact)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(actual[name], value, name)
    for name, value in exact[1].items():
        assert_near(buffers[name], value, name)  # running statistics move as those of F.batch_norm do


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_each_sample_are_those_of_the_samples_one_by_one(function, layout):
    tensors, buffers = draw(function.names, layout)
    batched = [name for name in ("x", "r", "s") if name in tensors]
    parameters = {k: v for k, v in tensors.items() if k not in batched}

    def loss(parameters, *samples):
        t = {**parameters, **dict(zip(batched, (s[None] for s in samples), strict=True))}
        return function.ours(t, {k: v.clone() for k, v in buffers.items()}).square().mean()

    samples = [tensors[name] for name in batched]
    dims = (None, *[0] * len(batched))
    if _updates(function):
        with pytest.raises((RuntimeError, ValueError), match="running_mean"):
            torch.func.vmap(torch.func.grad(loss), dims)(parameters, *samples)
        return
    actual = torch.func.vmap(torch.func.grad(loss), dims)(parameters, *samples)
    for i in range(SHAPE[0]):
        alone = {**parameters, **{name: tensors[name][i : i + 1] for name in batched}}
        leaves = {k: alone[k].double().requires_grad_() for k in parameters}
        exact = {k: v.double() for k, v in alone.items()} | leaves
        y = function.plain(exact, {k: v.double() for k, v in buffers.items()}).square().mean()
        for name, gradient in zip(leaves, torch.autograd.grad(y, list(leaves.values())), strict=True):
            assert_near(actual[name][i], gradient, name)


def _updates(function: Function) -> bool:
    """Whether it moves the running statistics."""
    tensors, buffers = draw(function.names, "nchw")
    before = copies(buffers)
    with torch.no_grad():
        function.plain(tensors, buffers)
    return any(not torch.equal(before[k], v) for k, v in buffers.items())


def test_an_ensemble_under_vmap_has_running_statistics_of_its_own(function):
    members = [draw((*function.names, str(i)), "channels_last") for i in range(2)]
    members = [({k: v for k, v in t.items() if k in function.names}, b) for t, b in members]
    stacked = [{k: torch.stack([m[j][k] for m in members]) for k in members[0][j]} for j in (0, 1)]
    y = torch.func.vmap(function.ours)(*stacked)
    for i, (t, b) in enumerate(members):
        assert_near(y[i], function.plain(t, b))
        for name, value in b.items():
            assert_near(stacked[1][name][i], value, name)


def test_second_derivatives_under_torch_func(function):
    tensors, buffers = draw(function.names, "channels_last")

    def penalty(f, buffers):
        def inner(t):
            return f(t, copies(buffers)).square().mean()

        return lambda t: sum(g.square().sum() for g in torch.func.grad(inner)(t).values())

    actual = torch.func.grad(penalty(function.ours, buffers))(tensors)
    exact = {k: v.double() for k, v in tensors.items()}
    expected = torch.func.grad(penalty(function.plain, {k: v.double() for k, v in buffers.items()}))(exact)
    for name, value in expected.items():
        assert_near(actual[name], value, name)


# -------------------------------------------------------------------------------------------------------------- tracers


def test_a_made_graph_holds_pytorchs_operators_and_differentiates(function):
    tensors, buffers = draw(function.names, "channels_last")
    graph = make_fx(function.ours)(tensors, copies(buffers))
    assert not [n for n in graph.graph.nodes if "fastres" in str(n.target)]
    actual, expected = (gradients(f, tensors, buffers) for f in (graph, function.plain))
    for name, gradient in expected.items():
        assert_near(actual[name], gradient, name)


def test_gradients_may_be_enabled_within_inference_mode(function):
    """Weights that ask for gradients meet inputs that nothing may save for backward."""
    tensors, buffers = draw(function.names, "channels_last")
    for t in tensors.values():
        t.requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        inputs = {name: t if name in ("k1", "k3", *NORM, *R_NORM) else t.clone() for name, t in tensors.items()}
        actual, expected = (first(f(inputs, copies(buffers))) for f in (function.ours, function.plain))
        assert_near(actual, expected, "y")


def test_what_is_not_ordinary_is_named():
    seen = []

    def note(x):
        seen.append(why_not_ordinary())
        return x.sin()

    x = torch.ones(2)
    note(x)
    torch.func.vmap(note)(x)
    torch.func.jvp(note, (x,), (x,))
    with forward_ad.dual_level():
        note(x)
    make_fx(note)(x)
    make_fx(note, pre_dispatch=True)(x)
    torch.jit.trace(note, x, check_trace=False)
    with torch.inference_mode():
        note(x)
        with torch.enable_grad():
            note(x)
    note(x)
    transformed, traced = "torch.func transforms it", "make_fx traces it"
    forward = "it is differentiated in forward mode"
    inference = "gradients are enabled within inference mode, where nothing can be saved for backward"
    made = [traced, traced, "torch.jit traces it"]
    assert seen == [None, transformed, transformed, forward, *made, None, inference, None]


@pytest.mark.parametrize("transformed", [False, True])
def test_the_compiler_sees_through_the_question(transformed):
    def f(x):
        return x.sin() if why_not_ordinary() is None else x.cos()

    g = torch.func.vmap(f) if transformed else f
    x = torch.randn(3, generator=generator("compiled"))
    torch._dynamo.reset()
    y = torch.compile(g, fullgraph=True, backend="eager")(x)
    assert torch.equal(y, x.cos() if transformed else x.sin())


# ------------------------------------------------------------------------------------------------ autograd at operators

OPS = torch.ops.fastres


def test_an_operator_refuses_inputs_that_require_a_gradient():
    x, k = torch.randn(1, 4, 4, 4).to(memory_format=torch.channels_last), torch.randn(4, 4, 3, 3)
    expected = OPS.conv3x3_forward(x, k, False)[0]
    k.requires_grad_()
    with pytest.raises(RuntimeError, match=r"fastres::conv3x3_forward: .*fastres\.functional\.conv3x3"):
        OPS.conv3x3_forward(x, k, False)
    with torch.no_grad():
        assert torch.equal(OPS.conv3x3_forward(x, k, False)[0], expected)
    with torch.inference_mode():
        assert torch.equal(OPS.conv3x3_forward(x, k, False)[0], expected)


def test_every_operator_has_the_refusal():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastres::")]
    assert names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"), name


def test_an_operator_that_is_called_still_moves_the_version_of_what_it_writes():
    tensors, buffers = draw(("x", *NORM), "channels_last")
    before = buffers["mean"]._version
    FUNCTIONS["batch_norm_act-training-alone"].ours(tensors, buffers)
    assert buffers["mean"]._version > before


# ---------------------------------------------------------------------------------------------------------------- flops


def count(f, tensors, buffers) -> tuple[int, int]:
    """(forward, backward) as FlopCounterMode has it."""
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    with FlopCounterMode(display=False) as forward:
        y = f(leaves, copies(buffers))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_are_those_of_pytorchs_operators(function, layout):
    tensors, buffers = draw(function.names, layout)
    assert count(function.ours, tensors, buffers) == count(function.plain, tensors, buffers)
    with torch.no_grad():
        totals = []
        for f in (function.ours, function.plain):
            with FlopCounterMode(display=False) as inference:
                f(tensors, copies(buffers))
            totals.append(inference.get_total_flops())
    assert totals[0] == totals[1]


@pytest.mark.parametrize("frozen", ["x", "s", "k3", "k1"])
def test_flops_of_a_gradient_that_is_not_needed_are_not_counted(function, frozen):
    if frozen not in function.names:
        pytest.skip("takes no such tensor")
    tensors, buffers = draw(function.names, "channels_last")
    totals = []
    for f in (function.ours, function.plain):
        leaves = {k: v.clone().requires_grad_(k in ("x", "s", "k3", "k1") and k != frozen) for k, v in tensors.items()}
        y = f(leaves, copies(buffers))
        if not y.requires_grad:
            pytest.skip("nothing is left to differentiate")
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        totals.append(backward.get_total_flops())
    assert totals[0] == totals[1]


# -------------------------------------------------------------------------------------------------------------- strides


def layouts_of(weight: Tensor) -> Iterator[Tensor]:
    """The weight in every dense layout."""
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)):
        stored = weight.permute(order).contiguous()
        yield stored.permute([order.index(d) for d in range(4)])
    yield weight.contiguous(memory_format=torch.channels_last)
    # Axes of size 1 may have any stride.
    strides = [v + 3 if n == 1 else v for n, v in zip(weight.shape, weight.stride(), strict=True)]
    yield weight.as_strided(weight.shape, strides)


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 5), (8, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("which", ["conv3x3", "norm_act_conv3x3", "projection_shortcut"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weights_gradient_has_the_weights_strides(which, outputs, inputs, layout):
    gen = generator(which, outputs, inputs)
    x = activation((2, inputs, 6, 6), torch.float32, layout, gen)
    size = 1 if which == "projection_shortcut" else 3
    for stored in layouts_of(torch.randn(outputs, inputs, size, size, generator=gen)):
        weight = stored.detach().requires_grad_()
        exact = stored.detach().double().requires_grad_()
        results = []
        for module, w, v, options in ((functional, weight, x, WINOGRAD), (reference, exact, x.double(), {})):
            n = NormParams(None, None)
            if which == "conv3x3":
                y = module.conv3x3(v, w, **options)
            elif which == "norm_act_conv3x3":
                y = first(module.norm_act_conv3x3(v, n, w, **options))
            else:
                y = module.projection_shortcut(v, w, n, training=True)
            (dy,) = (torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y),)
            results.append(torch.autograd.grad(y, w, dy)[0])
        assert results[0].stride() == weight.stride()
        assert_near(*results, which)


class Both(torch.nn.Module):
    """A convolution and a projection, whose weights are in the layout that is asked for."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        form = LAYOUTS[layout]
        self.k3 = torch.nn.Parameter(torch.randn(6, 6, 3, 3).to(memory_format=form))
        self.narrow = torch.nn.Parameter(torch.randn(6, 1, 3, 3).to(memory_format=form))
        self.k1 = torch.nn.Parameter(torch.randn(8, 6, 1, 1).to(memory_format=form))

    def forward(self, x: Tensor) -> Tensor:
        n = NormParams(None, None)
        y = functional.conv3x3(x[:, :1], self.narrow, **WINOGRAD)
        y, _ = functional.norm_act_conv3x3(y, n, self.k3, **WINOGRAD)
        return functional.projection_shortcut(y, self.k1, n, stride=2, training=True)


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ddp_warns_of_no_strides(layout, process_group, capfd):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Both(layout), gradient_as_bucket_view=True)
    x = torch.randn(2, 6, 6, 6).to(memory_format=torch.channels_last)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(x).sum().backward()
    assert not [w for w in caught if "stride" in str(w.message)]
    assert "stride" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_stays_float64_under_autocast(function, dtype):
    tensors, buffers = draw(function.names, "channels_last", torch.float64)
    results = []
    for f in (function.ours, function.plain):
        b = copies(buffers)
        with torch.autocast("cpu", dtype):
            y = f(tensors, b)
        assert y.dtype == torch.float64
        results.append((y, *b.values()))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_convolutions_take_the_dtype_of_autocast(dtype):
    tensors, _ = draw(("x", "k3"), "channels_last")
    with torch.autocast("cpu", dtype):
        assert functional.conv3x3(tensors["x"], tensors["k3"]).dtype == F.conv2d(tensors["x"], tensors["k3"]).dtype


# ----------------------------------------------------------------------------------------------------- better than both


@pytest.mark.parametrize("training", [True, False], ids=["trained-between", "moved-between"])
def test_an_evaluation_differentiates_with_the_statistics_of_its_forward(training):
    """PyTorch's own backward reads the running statistics anew, and after a training forward they are others."""
    tensors, buffers = draw(("x", "r", *NORM), "channels_last")
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    exact = {k: v.double().requires_grad_() for k, v in tensors.items()}
    then = {k: v.double() for k, v in buffers.items()}
    evaluate = FUNCTIONS["batch_norm_act-evaluation-residual"]
    y = evaluate.ours(leaves, buffers)
    if training:
        FUNCTIONS["batch_norm_act-training-residual"].ours(tensors, buffers)
    else:
        buffers["mean"].add_(1)
        buffers["var"].mul_(3)
    z = (
        exact["weight"][:, None, None]
        * (exact["x"] - then["mean"][:, None, None])
        * torch.rsqrt(then["var"][:, None, None] + 0.03)
        + exact["bias"][:, None, None]
    )
    expected = torch.relu(z + exact["r"])
    dy = torch.randn(y.shape, generator=generator("dy"))
    actual = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, a, e in zip(
        leaves, actual, torch.autograd.grad(expected, list(exact.values()), dy.double()), strict=True
    ):
        assert_near(a, e, name)
