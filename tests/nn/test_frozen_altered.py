"""Frozen networks of altered ones, frozen networks that are altered, and inputs that they refuse."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fastres
from tests import oracle
from tests.test_freeze import randomise

IMAGES = (2, 3, 40, 40)


def network(block=BasicBlock, **options) -> ResNet:
    """A small ResNet in evaluation, whose normalisations do something."""
    torch.manual_seed(1)
    return randomise(ResNet(block, [1, 1, 1, 1], num_classes=10, **options), "altered", block.__name__)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or IMAGES), generator=oracle.generator("images", *shape))


def distance(y: torch.Tensor, plain: nn.Module, x: torch.Tensor) -> float:
    """Of a result to that of the plain network in float64, relative to its norm."""
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
    assert y.shape == exact.shape
    return float((y.double() - exact).norm() / exact.norm())


CLOSE = 2e-5

# ------------------------------------------------------------------------------------------- networks that are altered


def in_place_downsample(model):
    old = model.layer2[0].downsample
    model.layer2[0].downsample = nn.Sequential(nn.ReLU(inplace=True), *old)


def broadcast_downsample(model):
    outputs = model.layer2[0].downsample[0]
    model.layer2[0].downsample = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs.in_channels, outputs.out_channels, 1)
    ).eval()


def function_as_pool(model):
    del model.maxpool
    model.maxpool = lambda x: x[:, :, ::2, ::2]


def arithmetic_as_pool(model):
    del model.maxpool
    model.maxpool = lambda x: 2 * x - 1


def numbers(model):
    model.conv1.stride, model.conv1.padding = 1, [3, 3]
    model.layer1[0].conv2.padding = 1
    model.layer2[0].downsample[0].stride = 2


def larger_kernel(model):
    conv = model.layer1[0].conv2
    conv.weight, conv.padding = nn.Parameter(0.02 * torch.randn(*conv.weight.shape[:2], 5, 5)), (2, 2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(
    "alter",
    [in_place_downsample, broadcast_downsample, function_as_pool, arithmetic_as_pool, numbers, larger_kernel],
)
def test_an_altered_network_is_frozen_as_it_is(alter, block, packed):
    model, x = network(block), images()
    alter(model)
    frozen = fastres.freeze(model, packed=packed)
    with torch.no_grad():
        for _ in range(2):
            assert distance(frozen(x), model, x) < CLOSE


class Negative(torch.Tensor):
    """A weight with which a convolution or linear layer means something else, as quantised ones do."""

    def __deepcopy__(self, memo):
        return self.as_subclass(torch.Tensor).clone().as_subclass(Negative)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        negates = getattr(function, "__name__", "") in ("conv2d", "linear")
        return -result.as_subclass(torch.Tensor) if negates else result


@pytest.mark.parametrize("held", ["parameter", "buffer"])
@pytest.mark.parametrize("where", ["layer1.0.conv1", "layer2.0.downsample.0", "fc"])
def test_weights_of_a_class_of_their_own_keep_their_meaning(where, held):
    model, x = network(), images()
    layer = model.get_submodule(where)
    weight = layer.weight.detach().as_subclass(Negative)
    if held == "parameter":
        layer.weight = nn.Parameter(weight)
    else:
        del layer.weight
        layer.register_buffer("weight", weight)
    with torch.no_grad():
        expected, plain = model(x), network()(x)
        assert (expected - plain).norm() > 0.1 * plain.norm()
        for found in (fastres.fuse(model), fastres.freeze(model)):
            torch.testing.assert_close(found(x), expected, rtol=1e-3, atol=1e-3)


def test_a_scripted_child_stays_what_it_is():
    model, x = network(), images()
    plain = copy.deepcopy(model)
    model.fc = torch.jit.script(model.fc)
    with torch.no_grad():
        assert distance(fastres.freeze(model)(x), plain, x) < CLOSE


@pytest.mark.parametrize("name", ["_forward", "_run", "_infer"])
def test_a_subclass_may_have_helpers_of_any_name(name):
    helped = type("Helped", (ResNet,), {name: lambda self, x: x * 0})
    model, x = network(), images()
    plain = copy.deepcopy(model)
    model.__class__ = helped
    with torch.no_grad():
        for found in (fastres.fuse(model), fastres.freeze(model)):
            assert distance(found(x), plain, x) < CLOSE
            assert not getattr(found, name)(x).any()


def test_a_dtype_of_the_model_s_own_is_not_ours():
    class Named(ResNet):
        dtype = property(lambda self: self.fc.weight.dtype)

    class Wrapper(nn.Sequential):
        dtype = property(lambda self: self[0].fc.weight.dtype)

    model, x = network(), images()
    model.__class__ = Named
    assert fastres.freeze(model).dtype == torch.float32
    with torch.no_grad():
        assert fastres.freeze(Wrapper(model), dtype=torch.bfloat16)(x).dtype == torch.bfloat16
        again = fastres.freeze(fastres.freeze(nn.Sequential(model)), dtype=torch.bfloat16)
        assert again(x).dtype == torch.bfloat16


def test_a_dtype_is_refused_where_nothing_could_follow_it():
    model = network()
    model.forward = MethodType(ResNet.forward, model)
    with pytest.raises(ValueError, match="dtype: expected None where the model has a forward of its own"):
        fastres.freeze(model, dtype=torch.bfloat16)


def test_from_the_meta_device_by_a_state_dict():
    model, x = network(), images()
    with torch.device("meta"):
        empty = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    state = fastres.freeze(model, packed=False).state_dict()
    for assign in (False, True):
        frozen = fastres.freeze(empty, packed=False).to_empty(device="cpu")
        for buffer in frozen.buffers():
            buffer.fill_(float("nan"))
        frozen.load_state_dict(copy.deepcopy(state), assign=assign)
        with torch.no_grad():
            assert distance(frozen(x), model, x) < CLOSE


# ------------------------------------------------------------------------------ frozen networks that are altered later


def other_pool(model):
    model.maxpool.stride = 1


def padded_pool(model):
    model.maxpool.padding, model.maxpool.kernel_size = 0, 2


@pytest.mark.parametrize("alter", [other_pool, padded_pool])
def test_what_is_set_after_a_call_is_seen_by_the_next(alter):
    model, x = network(), images()
    frozen = fastres.freeze(model)
    with torch.no_grad():
        frozen(x)
        alter(model)
        alter(frozen)
        assert distance(frozen(x), model, x) < CLOSE


def test_another_activation_after_a_call_is_seen_by_the_next():
    model, x = network(), images()
    frozen = fastres.freeze(model)
    with torch.no_grad():
        frozen(x)
        model.layer1[0].relu = nn.SiLU()
        for name in ("conv1", "conv2"):
            frozen.layer1[0].get_submodule(name).activation = fastres.Activation("silu")
        assert distance(frozen(x), model, x) < CLOSE


def test_dropout_that_is_switched_on_after_a_call_drops():
    model, x = network(), images()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    frozen = fastres.freeze(model)
    with torch.no_grad():
        assert torch.equal(frozen(x), frozen(x))
        frozen.fc[0].train()
        assert not torch.equal(frozen(x), frozen(x))


def test_what_was_frozen_in_inference_mode_may_be_written_to():
    model, other, x = network(), network(), images()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    with torch.inference_mode():
        frozen = fastres.freeze(model)
        inside = fastres.freeze(copy.deepcopy(model))
        for found in (frozen, inside):
            assert distance(found(x), model, x) < CLOSE
            found.load_state_dict(fastres.freeze(other).state_dict())
            assert distance(found(x), other, x) < CLOSE


def test_a_default_device_of_the_first_call_leaves_nothing_behind():
    model, x = network(), images()
    frozen = fastres.freeze(model)
    with torch.no_grad():
        with torch.device("meta"):
            inside = frozen(x)
        for y in (inside, frozen(x)):
            assert distance(y, model, x) < CLOSE


# ---------------------------------------------------------------------------------------------- inputs that are refused


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("channels", [20, 30, 32])
def test_other_channels_are_refused_where_rows_are_padded(channels, packed):
    model = network()
    model.conv1 = nn.Conv2d(24, 64, 3, 1, 1, bias=False)
    frozen = fastres.freeze(model, packed=packed)
    with pytest.raises(ValueError, match=rf"x: expected shape \[N, 24, H, W\], got \[2, {channels}, 16, 16\]"):
        frozen(torch.randn(2, channels, 16, 16))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, 16, 16), ValueError, r"x: expected shape \[N, 3, H, W\], got \[3, 16, 16\]"),
        (torch.zeros(1, 2, 3, 16, 16), ValueError, r"x: expected shape \[N, 3, H, W\], got \[1, 2, 3, 16, 16\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "x: expected a tensor .*, got torch.uint8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), TypeError, "x: expected a tensor .*, got torch.int64"),
        (None, TypeError, "x: expected a tensor .*, got NoneType"),
    ],
    ids=["three", "five", "bytes", "integers", "none"],
)
def test_what_is_no_batch_of_images_is_refused(x, error, message, packed):
    backbone = IntermediateLayerGetter(network(), {"layer2": "0"})
    for model in (network(), backbone, fastres.nn.FusedBasicBlock(3, 3), fastres.nn.FusedPreactivationBlock(3, 3)):
        with pytest.raises(error, match=message):
            fastres.freeze(model.eval(), packed=packed)(x)


# -------------------------------------------------------------------------------------- classes that somebody patches


@pytest.fixture(params=["before", "after"])
def when(request):
    """Whether a class is patched before its objects are fused."""
    return request.param


@pytest.mark.parametrize("owner, name", [(BasicBlock, "forward"), (ResNet, "_forward_impl"), (ResNet, "forward")])
def test_a_method_that_was_replaced_in_torchvision_s_class_is_what_runs(owner, name, when, monkeypatch):
    model, x = network(), images()
    early = fastres.fuse(model)
    released = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, x: F.softplus(released(self, x)))
    with torch.no_grad():
        expected = model(x)
        found = early if when == "after" else fastres.fuse(model)
        for y in (found(x), fastres.freeze(model)(x), fastres.freeze(early)(x)):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    if name != "forward" or owner is not ResNet:
        assert any("has been replaced" in why for why in fastres.fuse_report(found).left.values())
    monkeypatch.undo()
    with torch.no_grad():
        assert distance(early(x), model, x) < CLOSE


def test_a_forward_that_was_replaced_in_the_layer_getter_s_class_is_what_runs(when, monkeypatch):
    trunk, x = IntermediateLayerGetter(network(), {"layer2": "0"}), images()
    early = fastres.fuse(trunk)
    released = IntermediateLayerGetter.forward
    monkeypatch.setattr(
        IntermediateLayerGetter, "forward", lambda self, x: {k: F.softplus(y) for k, y in released(self, x).items()}
    )
    with torch.no_grad():
        expected = trunk(x)["0"]
        found = early if when == "after" else fastres.fuse(trunk)
        for of in (found, fastres.freeze(trunk), fastres.freeze(early)):
            torch.testing.assert_close(of(x)["0"], expected, rtol=1e-4, atol=1e-4)


def test_a_bound_forward_is_bound_to_the_copy():
    model, x = network(), images()
    model.forward = MethodType(ResNet.forward, model)
    fused = fastres.fuse(model.train())
    fused.eval()
    with torch.no_grad():
        assert distance(fused(x), network(), x) < CLOSE
    assert int(model.bn1.num_batches_tracked) == 0
