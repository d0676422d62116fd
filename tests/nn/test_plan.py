"""Plans: a frozen network as one operator call, what leaves it to its layers, and how places in scratch are shared."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn as nn
import torchvision
from torch import Tensor

from fastres import FusedResNet18, freeze, models
from fastres.activations import Activation
from fastres.contract import ConvShape
from fastres.nn import FusedBasicBlock, FusedBottleneck, plan
from fastres.nn.frozen import FrozenNetwork
from fastres.nn.plan import Recorder, Value, _places
from fastres.ops import algorithms
from fastres.ops.frozen_network import INPUT, NONE, OUTPUT, Kind, Step, fallback, frozen_network
from fastres.ops.packed import pack, turn
from tests.operators import opcheck
from tests.ops.test_conv3x3 import needs_kernels
from tests.oracle import SEED, activation, assert_close, form_of, generator, output_length
from tests.test_freeze import CLASSES, assert_same_function, distance, images, randomise

pytestmark = needs_kernels


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """The tables of steps that the operator was called with."""
    seen: list[Tensor] = []

    def noted(x, tensors, steps, scratch, output):
        seen.append(steps)
        return frozen_network(x, tensors, steps, scratch, output)

    monkeypatch.setattr(plan, "frozen_network", noted)
    return seen


NETWORKS = {
    "cifar stem": (lambda: FusedResNet18(CLASSES), 20 + 2, 32),
    "imagenet stem": (lambda: torchvision.models.resnet18(num_classes=CLASSES), 21 + 2, 64),
    "bottlenecks": (lambda: torchvision.models.resnet50(num_classes=CLASSES), 54 + 2, 64),
    "groups": (lambda: torchvision.models.resnext50_32x4d(num_classes=CLASSES), 54 + 2, 64),
    "wide": (lambda: torchvision.models.wide_resnet50_2(num_classes=CLASSES), 54 + 2, 33),
    "preactivation": (lambda: models.create("wrn16-4", num_classes=CLASSES), None, 32),
    "article": (lambda: models.create("article", num_classes=CLASSES), None, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_operator_call(name, calls):
    make, steps, size = NETWORKS[name]
    model = randomise(make(), name)
    frozen = freeze(model)
    for batch, layout in ((1, "nchw"), (3, "channels_last")):
        calls.clear()
        x = images(batch, 3, size, size, layout=layout)
        assert_same_function(frozen, model, x)
        assert len(calls) == 1 and (steps is None or len(calls[0]) == steps)


def test_a_plan_and_the_layers_give_the_same(calls):
    model = randomise(torchvision.models.resnet50(num_classes=CLASSES), "same")
    frozen, x = freeze(model), images(2, 3, 64, 64)
    with torch.no_grad():
        planned = frozen(x)
        assert len(calls) == 1
        assert distance(planned, frozen._layer_by_layer(x)) < 4e-6
        assert len(calls) == 1 + 16  # a block each


@pytest.mark.parametrize("block", [lambda: FusedBasicBlock(32, 32), lambda: FusedBottleneck(64, 16)])
def test_a_block_alone_is_one_operator_call(block, calls):
    model = randomise(block(), "alone")
    frozen = freeze(model)
    channels = next(p for p in model.parameters() if p.dim() == 4).shape[1]
    assert_same_function(frozen, model, images(2, channels, 9, 7))
    assert len(calls) == 1


@pytest.mark.parametrize("matrix_units", [False, True])
def test_bfloat16_by_autocast(calls, matrix_units, monkeypatch):
    """A CPU that multiplies bfloat16 matrices does so by PyTorch's convolutions, layer by layer."""
    capability, _ = algorithms._processor()
    monkeypatch.setattr(algorithms, "_processor", lambda: (capability, matrix_units))
    model = randomise(FusedResNet18(CLASSES), "low")
    x = images(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = freeze(model)(x)
    with torch.no_grad():
        assert len(calls) == (not matrix_units) and y.dtype == torch.bfloat16 and distance(y, model(x)) < 0.05


def test_threads_and_repetition_change_no_bit():
    frozen, x = freeze(randomise(FusedResNet18(CLASSES), "threads")), images(3, 3, 32, 32)
    before, results = torch.get_num_threads(), []
    try:
        with torch.no_grad():
            for count in (1, 2, 2, 5):
                torch.set_num_threads(count)
                results.append(frozen(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


# ---------------------------------------------------------------------------------------- what changes after freezing


def _head(frozen: nn.Module) -> None:
    frozen.fc = nn.Linear(512, 5)


def _hook(frozen: nn.Module) -> None:
    frozen.layer3[1].register_forward_hook(lambda m, i, o: 2 * o)


def _inner_hook(frozen: nn.Module) -> None:
    frozen.layer1[0].conv1.register_forward_hook(lambda m, i, o: 2 * o)


def _state(frozen: nn.Module) -> None:
    frozen.load_state_dict(freeze(randomise(FusedResNet18(CLASSES), "another")).state_dict())


def _in_place(frozen: nn.Module) -> None:
    frozen.layer2[0].conv1.packed.mul_(2)


def _head_in_place(frozen: nn.Module) -> None:
    frozen.fc.weight.mul_(2)


def _forward(frozen: nn.Module) -> None:
    frozen.layer1[0].forward = lambda x: 3 * x


def _block(frozen: nn.Module) -> None:
    frozen.layer4[1] = nn.Identity()


def _inserted(frozen: nn.Module) -> None:
    frozen.layer1.append(nn.Tanh())


CHANGES = [_head, _hook, _inner_hook, _state, _in_place, _head_in_place, _forward, _block, _inserted]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_after_freezing_is_seen_in_the_next_call(change):
    frozen, x = freeze(randomise(FusedResNet18(CLASSES), "change")), images(2, 3, 16, 16)
    with torch.no_grad():
        before = frozen(x)
        change(frozen)
        y = frozen(x)
        assert y.shape != before.shape or not torch.allclose(y, before)
        # Compiled calls go through the layers themselves.
        layers = torch.compile(frozen, backend="eager")(x) if change is not _hook else None
        for module in (*frozen.modules(),):
            assert not isinstance(module, FrozenNetwork) or module is frozen
        wanted = frozen._layer_by_layer(x) if layers is None else layers
        assert distance(y, wanted) < 4e-6


def test_a_global_hook_sees_every_layer():
    frozen, x = freeze(FusedResNet18(CLASSES)), images(1, 3, 16, 16)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        with torch.no_grad():
            frozen(x)
    finally:
        handle.remove()
    assert seen.count("FrozenPackedConv2d") == 20


def test_plans_go_with_their_module_and_are_in_no_copy():
    frozen, x = freeze(FusedResNet18(CLASSES)), images(1, 3, 16, 16)
    with torch.no_grad():
        frozen(x)
        twin = copy.deepcopy(frozen)
        twin.fc.weight.zero_()
        assert not torch.equal(twin(x), frozen(x))
    gone = weakref.ref(frozen)
    del frozen
    gc.collect()
    assert gone() is None


def test_sizes_beyond_the_most_plans_are_served():
    frozen = freeze(randomise(nn.Sequential(FusedBasicBlock(16, 16)), "sizes"))
    with torch.no_grad():
        for size in range(1, plan._MOST_PLANS + 4):
            x = images(1, 16, size, 3)
            assert distance(frozen(x), frozen[0]._layer_by_layer(x)) < 4e-6


# ------------------------------------------------------------------------------------------------------ the operator


def recorded(batch: int = 2) -> tuple[Tensor, list[Tensor], Tensor, int, tuple[int, ...]]:
    frozen, x = freeze(randomise(FusedBottleneck(64, 16), "operator")), images(batch, 64, 5, 6)
    found = plan.plan_for(frozen, x, frozen._layer_by_layer)
    assert found is not None
    return x, found.tensors, found.steps, found.scratch, found.output


def test_opcheck_passes():
    opcheck(frozen_network, *recorded())


def test_the_fallback_means_the_same():
    arguments = recorded()
    assert distance(frozen_network(*arguments), fallback(*arguments)) < 4e-6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", 9, "steps: expected a kind of step"),
        ("input", 10**6, "steps: expected room for"),
        ("input", OUTPUT, "steps: expected room for"),
        ("output", INPUT, "steps: expected room for"),
        ("output", 10**9, "steps: expected room for"),
        ("residual", OUTPUT, "steps: expected room for"),
        ("weight", 99, "steps: expected one of the tensors"),
        ("bias", 0, "tensors: expected a contiguous tensor of"),
        ("channels", 0, "steps: expected sizes of at least 1"),
        ("out_height", 6, "steps: "),
        ("stride", 0, "steps: the sizes of the output are not those of the window"),
        ("depth", 7, "steps: unexpected depth"),
        ("activation", 99, "steps: expected an activation's number"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(field, value, message):
    x, tensors, steps, scratch, output = recorded()
    steps = steps.clone()
    steps[-1, Step._fields.index(field)] = value
    with pytest.raises(ValueError, match=message):
        frozen_network(x, tensors, steps, scratch, output)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"steps: expected a contiguous int64 tensor"),
        ({"scratch": -1}, ValueError, "scratch: expected at least 0, got -1"),
        ({"scratch": 0}, ValueError, "steps: expected room for"),
        ({"output": (3, 64, 5, 6)}, ValueError, "output: expected the sizes of 2 images"),
        ({"x": torch.zeros(2, 64, 5, 6, dtype=torch.float64)}, TypeError, "x: expected dtype float32 or bfloat16"),
        ({"tensors": []}, ValueError, "steps: expected one of the tensors"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = dict(zip(("x", "tensors", "steps", "scratch", "output"), recorded(), strict=True))
    with pytest.raises(error, match=message):
        frozen_network(*(arguments | change).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
def test_pools_are_pytorchs(kernel, stride, padding, dtype):
    gen = generator("pool", kernel, dtype)
    x = activation((2, 37, 11, 8), dtype, "channels_last", gen)
    x[0, 5, 3, 3] = float("nan")
    recorder = Recorder(x, dtype, {})
    found = recorder.finish(nn.functional.max_pool2d(recorder.input, kernel, stride, padding))
    wanted = nn.functional.max_pool2d(x, kernel, stride, padding)
    assert torch.equal(found.run(x).nan_to_num(99), wanted.nan_to_num(99))
    recorder = Recorder(x[1:], dtype, {})
    found = recorder.finish(nn.functional.adaptive_avg_pool2d(recorder.input, 1))
    exact = x[1:].double().mean((2, 3), keepdim=True)
    assert distance(found.run(x[1:]), exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("field", ["weight", "bias"])
def test_a_tensor_that_a_step_does_not_read_has_to_be_one_nevertheless(field):
    recorder, x = Recorder(torch.ones(1, 8, 4, 4), torch.float32, {}), torch.ones(1, 8, 4, 4)
    found = recorder.finish(nn.functional.max_pool2d(recorder.input, 2, 2, 0))
    found.steps[0, Step._fields.index(field)] = 10**6
    with pytest.raises(ValueError, match="steps: expected one of the tensors, got number 1000000"):
        found.run(x)


def test_a_kernel_that_is_larger_than_the_input_is_refused():
    # One row of outputs out of one of inputs, by a division that rounds towards zero.
    step = Step(Kind.CONVOLUTION, INPUT, NONE, OUTPUT, 0, 1, 64, 1, 2048, 64, 1, 1024, kernel=2, stride=2, depth=64)
    tensors = [torch.zeros(4, 4 * 64, 16), torch.zeros(64)]
    with pytest.raises(ValueError, match="steps: the sizes of the output are not those of the window"):
        frozen_network(torch.ones(1, 64, 1, 2048), tensors, torch.tensor([list(step)]), 0, (1, 64, 1, 1024))


def test_the_mean_of_many_pixels_has_few_rounding_errors():
    """Of equal values, whose roundings are all in one direction."""
    x = torch.full((1, 9, 112, 96), 0.1)
    recorder = Recorder(x, torch.float32, {})
    y = recorder.finish(nn.functional.adaptive_avg_pool2d(recorder.input, 1)).run(x)
    assert torch.all((y - 0.1).abs() <= 4 * 0.1 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "kernel", "stride"),
    [(5, 4, 4, 3, 1), (3, 8, 8, 3, 2), (2, 16, 24, 5, 1), (2, 24, 8, 7, 2), (37, 1, 1, 3, 1), (3, 32, 32, 3, 1)],
)
def test_convolutions_in_groups_are_exact(groups, inputs, outputs, kernel, stride, threads, dtype):
    gen = generator("groups", groups, inputs, kernel, dtype)
    x = activation((2, groups * inputs, 11, 9), dtype, "channels_last", gen)
    weight = torch.randn(groups * outputs, inputs, kernel, kernel, generator=gen)
    bias = torch.randn(len(weight), generator=gen)
    shape = ConvShape(len(weight), kernel, stride, kernel // 2)
    layer = SimpleNamespace(
        shape=shape, groups=groups, packed=turn(weight), bias=bias, activation=Activation("leaky_relu", 0.25)
    )
    recorder = Recorder(x, dtype, {})
    found = recorder.finish(recorder.grouped(recorder.input, layer, "grouped"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = found.run(x)
    finally:
        torch.set_num_threads(before)
    exact = nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2, 1, groups)
    eps = torch.finfo(dtype).eps
    # The sum's own roundings, and in a low dtype those of the sum and of what its bias makes of it.
    assert distance(y, nn.functional.leaky_relu(exact, 0.25)) < (8 if dtype == torch.float32 else 1.5) * eps
    assert distance(y, fallback(x, *found[1:])) < 8 * eps


def test_an_infinite_weight_in_groups_shows_only_where_it_is_read():
    frozen = freeze(randomise(FusedBottleneck(64, 16, groups=4), "infinite"))
    frozen.conv2.packed[0, 0, 0, 0] = float("inf")  # above and to the left of a pixel
    recorder, x = Recorder(torch.ones(1, 64, 4, 5), torch.float32, {}), torch.ones(1, 64, 4, 5)
    y = recorder.finish(recorder.grouped(recorder.input, frozen.conv2, None)).run(x)
    assert y[0, 0, 1:, 1:].isinf().all() and y[0, 0, 0].isfinite().all() and y[0, 0, :, 0].isfinite().all()
    assert y[0, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depth", 0, "steps: unexpected depth 0"),
        ("depth", 3, "steps: unexpected depth 3"),
        ("depth", 2, "steps: there is no kernel for these groups"),
        ("padding", 0, "steps: the sizes of the output are not those of the window"),
        ("residual", INPUT, "steps: expected no residual of a convolution in groups"),
        ("weight", 1, "tensors: expected a contiguous tensor of"),
    ],
)
def test_a_step_in_groups_that_does_not_fit_is_refused(field, value, message):
    frozen, x = freeze(FusedBottleneck(64, 16, groups=4)), torch.ones(1, 64, 4, 5)
    recorder = Recorder(x, torch.float32, {})
    found = recorder.finish(recorder.grouped(recorder.input, frozen.conv2, None))
    found.steps[0, Step._fields.index(field)] = value
    with pytest.raises(ValueError, match=message):
        found.run(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_winograds_algorithm_is_exact(stride, dtype):
    x = activation((2, 33, 11, 9), dtype, "channels_last", generator("winograd", stride, dtype))
    weight, bias = torch.randn(40, 33, 3, 3) / 17, torch.randn(40)
    layer = SimpleNamespace(
        shape=ConvShape(40, 3, stride, 1), packed=pack(weight, padded=True), bias=bias,
        activation=Activation("leaky_relu", 0.25),
    )  # fmt: skip
    recorder = Recorder(x, dtype, {})
    found = recorder.finish(recorder.convolution(recorder.input, layer, None, "winograd", True))
    assert Step(*found.steps[0].tolist()).winograd == 1
    exact = nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, 1)
    wanted, length = nn.functional.leaky_relu(exact, 0.25), output_length(33, form_of(x, stride))
    assert_close(found.run(x), wanted, "y", length=length)
    assert distance(fallback(x, *found[1:]), wanted) < 8 * torch.finfo(dtype).eps


# ------------------------------------------------------------------------------------------------------------- places


@hypothesis.settings(max_examples=200, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(st.data())
def test_no_value_is_written_over_while_it_has_readers(data):
    recorder = Recorder(torch.zeros(1, 8, 4, 4), torch.float32, {})
    values = [recorder.input]
    for _ in range(data.draw(st.integers(1, 12))):
        x = data.draw(st.sampled_from(values))
        same = [v for v in values if v.sizes == x.sizes and v is not x]
        residual = data.draw(st.sampled_from([None, *same]))
        values.append(recorder._step(Kind.NORM_ACT, x, x.sizes, residual=residual))
        channels = data.draw(st.integers(1, 300))
        values.append(recorder._step(Kind.CONVOLUTION, values[-1], (channels, 4, 4)))
    result = values[-1]
    places, scratch = _places(recorder.steps, recorder.input, result)
    assert places[recorder.input.number] == INPUT and places[result.number] == OUTPUT
    sizes = {v.number: v.channels * v.height * v.width for v in values}
    last: dict[int, int] = {}
    for i, step in enumerate(recorder.steps):
        for v in (step.input, step.residual):
            if v is not None:
                last[v.number] = i
    for i, step in enumerate(recorder.steps):
        written = places[step.output.number]
        if written < 0:
            continue
        end = written + sizes[step.output.number]
        assert end <= scratch
        for j, other in enumerate(recorder.steps[:i]):
            number = other.output.number
            begin = places[number]
            # The residual of a step is read where its output is written, element by element.
            own = step.residual is not None and step.residual.number == number and last[number] == i
            if begin >= 0 and last.get(number, j) >= i and not own:
                assert end <= begin or begin + sizes[number] <= written
        if step.input is not step.residual:
            begin = places[step.input.number]
            assert begin < 0 or begin + sizes[step.input.number] <= written or end <= begin


def test_a_resnet_takes_four_buffers_at_most():
    frozen, x = freeze(torchvision.models.resnet50()), images(1, 3, 64, 64)
    found = plan.plan_for(frozen, x, frozen._layer_by_layer)
    largest = max(Step(*row).outputs * Step(*row).out_height * Step(*row).out_width for row in found.steps.tolist())
    assert found.scratch <= 3 * largest


def test_a_value_says_what_it_cannot_do():
    recorder = Recorder(torch.zeros(1, 8, 4, 4), torch.float32, {})
    x = recorder.input
    assert isinstance(x, Value)
    for use in (
        lambda: torch.sigmoid(x),
        lambda: x.mean(),
        lambda: x + 1,
        lambda: torch.flatten(x, 1),
        lambda: nn.functional.max_pool2d(x, (2, 3)),
        lambda: nn.functional.max_pool2d(x, 2, ceil_mode=True),
        lambda: nn.functional.adaptive_avg_pool2d(x, 2),
        lambda: nn.functional.linear(x, torch.zeros(3, 8)),
        lambda: nn.functional.dropout(x, 0.5, True),
        lambda: recorder.finish(x),
    ):
        with pytest.raises(plan.NotPlannedError):
            use()
