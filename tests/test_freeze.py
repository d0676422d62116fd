"""freeze(model): outputs against float64, what the copy is and refuses, and what it leaves as it is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torchvision
from torch import Tensor
from torchvision.models._utils import IntermediateLayerGetter

from fastres import ArticleResNet18, FusedResNet18, freeze, freeze_report, fuse, unfuse
from fastres.nn import FusedBasicBlock, FusedBatchNormAct2d, FusedBottleneck, ResidualBlock, SkipConnection
from fastres.nn.frozen import Frozen
from fastres.ops.packed import pack, turn_back, unpack
from tests.oracle import LAYOUTS, activation, generator
from tests.parity import one_thread  # noqa: F401

LOW = torch.bfloat16


def randomise(model: nn.Module, *key: object) -> nn.Module:
    """Statistics and parameters of normalisations as after some training; evaluation mode."""
    gen = generator(*key)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                if t is not None:
                    t.data.copy_(torch.rand(t.shape, generator=gen, device="cpu") * (high - low) + low)
    return model.eval()


def images(*shape: int, layout: str = "nchw", dtype: torch.dtype = torch.float32) -> Tensor:
    return activation(shape, dtype, layout, generator(shape, "images"), mean=0.0, std=1.0)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def exact(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(unfuse(model)).double()(x.double())


def assert_same_function(frozen: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Within four times the error of the plain model in x's precision: Winograd's is about twice the direct sum's."""
    wanted = exact(model, x)
    with torch.no_grad():
        y, plain = frozen(x), unfuse(model)(x)
    assert y.dtype == plain.dtype and y.shape == plain.shape
    eps = torch.finfo(x.dtype).eps
    assert distance(y, wanted) <= 4 * distance(plain, wanted) + 4 * eps


# So many that the error of one image is no matter of luck: of seven, now and then PyTorch's was small by chance.
CLASSES = 256
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "FusedResNet18": lambda: FusedResNet18(CLASSES),
    "imagenet stem": lambda: FusedResNet18(CLASSES, stem="imagenet", dropout=0.3),
    "torchvision resnet50": lambda: torchvision.models.resnet50(num_classes=CLASSES),
    "torchvision resnext": lambda: torchvision.models.resnext50_32x4d(num_classes=CLASSES),
    "dilated": lambda: torchvision.models.resnet50(
        num_classes=CLASSES, replace_stride_with_dilation=[False, True, True]
    ),
    "article": lambda: ArticleResNet18(CLASSES),
    "winograd": lambda: FusedResNet18(CLASSES, conv_algorithm="winograd"),
    "torch": lambda: FusedResNet18(CLASSES, conv_algorithm="torch"),
}
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "FusedBasicBlock": lambda: FusedBasicBlock(32, 32),
    "FusedBasicBlock, projection": lambda: FusedBasicBlock(
        32, 48, 2, nn.Sequential(nn.Conv2d(32, 48, 1, 2, bias=False), nn.BatchNorm2d(48))
    ),
    "FusedBottleneck": lambda: FusedBottleneck(64, 16),
    "FusedBottleneck, dilated": lambda: FusedBottleneck(64, 16, dilation=2),
    "FusedBottleneck, groups": lambda: FusedBottleneck(64, 16, groups=4),
    "FusedBottleneck, groups of two": lambda: FusedBottleneck(64, 16, groups=8, base_width=8),
    "FusedBottleneck, groups by PyTorch": lambda: FusedBottleneck(64, 16, groups=4, conv_algorithm="torch"),
    "ResidualBlock": lambda: ResidualBlock(32, 32),
    "ResidualBlock, projection": lambda: ResidualBlock(32, 48, 2),
    "SkipConnection": lambda: SkipConnection(32, 48, 2),
}


def frozen_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__module__ == Frozen.__module__]


# -------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_sources(name):
    model = randomise(NETWORKS[name](), name)
    frozen = freeze(model)
    norms = [m for m in frozen.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not norms
    for batch, layout in ((1, "nchw"), (4, "channels_last")):
        assert_same_function(frozen, model, images(batch, 3, 32, 32, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_alone_is_the_same_function(name, layout):
    model = randomise(BLOCKS[name](), name)
    channels = next(p for p in model.parameters() if p.dim() == 4).shape[1]
    frozen = freeze(model)
    assert frozen_names(frozen)
    for batch, size in ((1, 4), (2, 9), (24, 16)):
        assert_same_function(frozen, model, images(batch, channels, size, size, layout=layout))


@pytest.mark.parametrize("size", [8, 32])
def test_bfloat16_by_autocast_and_by_the_model_itself(size):
    model = randomise(FusedResNet18(CLASSES), "low")
    x = images(2, 3, size, size)
    with torch.no_grad(), torch.autocast("cpu", LOW):
        y = freeze(model)(x)
    assert y.dtype == LOW and distance(y, exact(model, x)) < 0.05
    low = copy.deepcopy(model).to(LOW)
    for frozen in (freeze(low), freeze(model).to(LOW)):
        with torch.no_grad():
            y = frozen(x.to(LOW))
        assert y.dtype == LOW and distance(y, exact(low, x.to(LOW))) < 0.05


class Branches(nn.Module):
    """Two inputs, and a frozen block in the midst of other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 16, 3), FusedBasicBlock(16, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor, *, other: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)) + other)


def test_a_dtype_is_what_a_frozen_model_computes_in():
    x = images(2, 3, 16, 16)
    other = images(2, 16, 14, 14)
    cases = {"network": (FusedResNet18(CLASSES), {}), "block": (FusedBasicBlock(3, 3), {}),
             "model": (Branches(), {"other": other})}  # fmt: skip
    for name, (model, inputs) in cases.items():
        model = randomise(model, name)
        frozen = freeze(model, dtype=LOW)
        assert all(t.dtype in (torch.float32, torch.int64) for t in frozen.state_dict().values())
        for copied in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            with torch.no_grad():
                y = copied(x, **inputs)
                with torch.autocast("cpu", LOW):
                    same = freeze(model)(x, **inputs)
            assert y.dtype == LOW and torch.equal(y, same)
        assert not torch.is_autocast_enabled("cpu")
        with torch.no_grad():
            assert freeze(model)(x, **inputs).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        ("bf16", TypeError, r"dtype: expected a torch.dtype or None, got str"),
        (torch.float64, ValueError, r"dtype: expected torch.bfloat16, torch.float16 or None, got torch.float64"),
        (torch.float32, ValueError, r"dtype: expected .* got torch.float32"),
    ],
)
def test_another_dtype_is_refused(dtype, error, message):
    with pytest.raises(error, match=message):
        freeze(FusedBasicBlock(4, 4), dtype=dtype)


def test_a_model_in_float64_stays_exact():
    model = randomise(FusedResNet18(CLASSES).double(), "double")
    x = images(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert distance(freeze(model)(x), model(x)) < 1e-13


def test_a_layer_without_affine_parameters_is_folded():
    block = FusedBasicBlock(24, 24, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False))
    model = randomise(nn.Sequential(block), "affine")
    frozen = freeze(model)
    assert len(frozen_names(frozen)) == 3
    assert_same_function(frozen, model, images(2, 24, 9, 9))


# ----------------------------------------------------------------------------------------------------- what the copy is


def test_it_has_buffers_only_and_shares_no_memory():
    model = randomise(FusedResNet18(CLASSES), "alone")
    frozen = freeze(model)
    assert not list(frozen.parameters()) and not any(b.requires_grad for b in frozen.buffers())
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert pointers.isdisjoint(b.data_ptr() for b in frozen.buffers() if b.numel())
    assert isinstance(frozen, torchvision.models.ResNet) and not frozen.training
    assert not any(m.training for m in frozen.modules())
    assert len(list(model.parameters())) == 62 and type(model) is FusedResNet18  # the source is as it was


def test_later_writes_to_the_source_do_not_reach_it():
    model = randomise(FusedResNet18(CLASSES), "later")
    frozen, x = freeze(model), images(2, 3, 16, 16)
    with torch.no_grad():
        before = frozen(x)
        for t in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            t.data.mul_(1.5)
        assert torch.equal(frozen(x), before)
        assert not torch.allclose(model(x), before)


def test_training_is_refused_and_evaluation_changes_nothing():
    model = FusedResNet18(CLASSES)
    assert model.training
    frozen = freeze(model)
    assert model.training and frozen.eval() is frozen and frozen.train(False) is frozen
    for call in (frozen.train, lambda: frozen.train(True), frozen.layer1[0].train, nn.Sequential(frozen).train):
        with pytest.raises(RuntimeError, match=r"^train: the model was frozen .* expected mode=False"):
            call()
    assert not any(m.training for m in frozen.modules())


@pytest.mark.parametrize("name", ["FusedResNet18", "torchvision resnet50", "article"])
def test_backward_is_refused(name):
    frozen = freeze(NETWORKS[name]())
    x = images(1, 3, 32, 32)
    assert not frozen(x).requires_grad
    y = frozen(x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"^backward: the model was frozen .* differentiate its source"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(frozen(x), y)


def test_every_way_to_copy_and_to_save_gives_the_same_function():
    model = randomise(FusedResNet18(CLASSES), "copies")
    frozen, x = freeze(model), images(2, 3, 16, 16)
    whole, states = io.BytesIO(), io.BytesIO()
    torch.save(frozen, whole)
    torch.save(frozen.state_dict(), states)
    whole.seek(0)
    states.seek(0)
    other = freeze(FusedResNet18(CLASSES))
    with torch.no_grad():
        wanted = frozen(x)
        assert not torch.equal(other(x), wanted)
        other.load_state_dict(torch.load(states))
        for twin in (other, torch.load(whole, weights_only=False), copy.deepcopy(frozen), freeze(frozen)):
            assert torch.equal(twin(x), wanted)
            assert type(twin) is type(frozen)
            with pytest.raises(RuntimeError, match=r"^train: "):
                twin.train()


def test_states_from_before_every_convolution_was_packed_load():
    model = randomise(FusedResNet18(CLASSES), "before")
    frozen, x, state = freeze(model), images(2, 3, 16, 16), {}
    for key, value in frozen.state_dict().items():
        name, _, kind = key.rpartition(".")
        layer = frozen.get_submodule(name)
        if kind != "packed":
            state[key] = value
            continue
        weight = unpack(value, layer.outputs, layer.inputs, layer.shape.kernel)
        if layer.shape.kernel == 3:
            state[key] = pack(weight, padded=True)
        if layer.shape.kernel == 1 or layer.shape.stride == 2:
            state[f"{name}.weight"] = weight
    other = freeze(FusedResNet18(CLASSES))
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(x), frozen(x))


def test_a_state_from_before_convolutions_in_groups_were_packed_loads():
    model = randomise(FusedBottleneck(64, 16, groups=4), "groups before")
    frozen, x = freeze(model), images(2, 64, 8, 8)
    state = frozen.state_dict()
    state["conv2.weight"] = turn_back(state.pop("conv2.packed")).contiguous(memory_format=torch.channels_last)
    other = freeze(FusedBottleneck(64, 16, groups=4))
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(x), frozen(x))


def test_it_moves():
    model = freeze(FusedResNet18(CLASSES))
    x = torch.empty(2, 3, 16, 16, device="meta")
    assert model.to("meta")(x).shape == (2, CLASSES)


# ----------------------------------------------------------------------------------------- compiled and exported models


def test_it_compiles_to_one_graph():
    model = randomise(FusedResNet18(CLASSES), "compiled")
    frozen, x = freeze(model), images(2, 3, 16, 16)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), frozen(x))


@pytest.mark.parametrize("name", ["FusedResNet18", "torchvision resnet50", "torchvision resnext"])
def test_an_exported_program_is_pytorchs_own(name):
    model = randomise(NETWORKS[name](), "exported", name)
    frozen, x = freeze(model), images(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(frozen, (x,), dynamic_shapes=({0: batch},))
    assert "fastres" not in str(program.graph)
    for other in (x, images(5, 3, 32, 32)):
        assert_same_function(program.module(), model, other)


@pytest.mark.parametrize("tracer", [lambda f, x: torch.jit.trace(f, x), lambda f, x: torch.func.vmap(f)])
def test_traced_and_transformed_calls_are_pytorchs_own(tracer):
    model = randomise(FusedResNet18(CLASSES), "traced")
    frozen, x = freeze(model), images(2, 3, 16, 16)
    with torch.no_grad():
        function = tracer(frozen, x)
        y = function(x) if isinstance(function, torch.jit.ScriptModule) else function(x[None])[0]
    assert distance(y, exact(model, x)) < 1e-5


# ----------------------------------------------------------------------------------------------------- altered networks


def _double_output(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return 2 * output


def _hooked_relu(block: nn.Module) -> None:
    block.relu.register_forward_hook(_double_output)


def _hooked_norm(block: nn.Module) -> None:
    block.bn1.register_forward_hook(_double_output)


def _other_activation(block: nn.Module) -> None:
    block.relu = nn.Tanh()


def _other_norm(block: nn.Module) -> None:
    block.bn2 = nn.GroupNorm(4, block.bn2.num_features)


def _batch_statistics(block: nn.Module) -> None:
    block.bn1 = nn.BatchNorm2d(block.bn1.num_features, track_running_stats=False)


def _parametrised(block: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.conv1)


def _forward_of_its_own(block: nn.Module) -> None:
    block.conv1.forward = lambda x: torch.zeros_like(x)


ALTERATIONS = [
    _hooked_relu, _hooked_norm, _other_activation, _other_norm, _batch_statistics, _parametrised, _forward_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda f: f.__name__)
def test_an_altered_block_is_copied_as_it_is(alter):
    model = randomise(FusedResNet18(CLASSES), "altered")
    alter(model.layer1[0])
    frozen = freeze(model)
    names = frozen_names(frozen)
    assert "layer1.1" in names and not any(name.startswith("layer1.0") for name in names)
    assert not list(frozen.parameters()) and not frozen.layer1[0].training
    x = images(3, 3, 16, 16)
    wanted = exact(model, x)
    with torch.no_grad():
        assert distance(frozen(x), wanted) < 1e-5
        assert distance(model(x), wanted) < 1e-5


@pytest.mark.parametrize("child", ["conv1", "bn1", "relu"])
def test_a_hooked_stem_is_copied_as_it_is(child):
    model = randomise(FusedResNet18(CLASSES), "stem")
    getattr(model, child).register_forward_hook(_double_output)
    frozen = freeze(model)
    assert "conv1" not in frozen_names(frozen) and "layer1.0" in frozen_names(frozen)
    x = images(3, 3, 16, 16)
    with torch.no_grad():
        assert distance(frozen(x), exact(model, x)) < 1e-5


def test_a_replaced_or_hooked_projection_is_copied_as_it_is():
    model = randomise(FusedResNet18(CLASSES), "projection")
    model.layer2[0].downsample[1].register_forward_hook(_double_output)
    model.layer3[0].downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(128, 256, 1, bias=False))
    frozen = freeze(model)
    names = frozen_names(frozen)
    assert "layer2.0" in names and "layer2.0.downsample" not in names and "layer4.0.downsample" in names
    x = images(3, 3, 16, 16)
    with torch.no_grad():
        assert distance(frozen(x), exact(model, x)) < 1e-5


def test_hooks_on_blocks_see_what_they_saw():
    model = randomise(FusedResNet18(CLASSES), "hooks")
    seen: list[Tensor] = []
    model.layer2[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.layer3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frozen, x = freeze(model), images(2, 3, 16, 16)
    with torch.no_grad():
        frozen(x)
        model(x)
    assert len(seen) == 4
    for a, b in zip(seen[:2], seen[2:], strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("layers", [{"conv1": "a", "layer2": "b"}, {"bn1": "a", "layer1": "b"}, {"relu": "a"}], ids=str)
def test_features_of_a_trunk_are_the_sources(layers):
    trunk = randomise(IntermediateLayerGetter(torchvision.models.resnet18(), layers), "trunk")
    frozen, x = freeze(trunk), images(2, 3, 32, 32)
    with torch.no_grad():
        found, wanted = frozen(x), trunk(x)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert distance(found[key], wanted[key]) < 1e-5


def test_a_shared_block_stays_shared():
    block = FusedBasicBlock(24, 24)
    model = randomise(nn.Sequential(block, nn.Identity(), block), "shared")
    frozen = freeze(model)
    assert frozen[0] is frozen[2] and isinstance(frozen[0], Frozen)
    assert_same_function(frozen, model, images(2, 24, 9, 9))


def test_other_modules_are_copied_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), FusedBatchNormAct2d(8), nn.Dropout(0.5), nn.BatchNorm2d(8))
    randomise(model, "others").train()
    frozen, x = freeze(model), images(2, 3, 9, 9)
    with torch.no_grad():
        y = frozen(x)
        assert distance(y, model.eval()(x)) < 1e-6
    assert not list(frozen.parameters())


def test_a_fused_and_a_plain_network_freeze_alike():
    plain = randomise(torchvision.models.resnet18(num_classes=CLASSES), "alike")
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(freeze(plain)(x), freeze(fuse(plain))(x))
    assert type(plain) is torchvision.models.ResNet


def test_what_cannot_be_frozen_is_named():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int"):
        freeze(3)
    with pytest.raises(TypeError, match=r"^model: it is compiled already; call freeze before torch.compile"):
        freeze(torch.compile(FusedResNet18(CLASSES)))
    with pytest.raises(TypeError, match=r"^packed: expected a bool, got int"):
        freeze(FusedResNet18(CLASSES), packed=1)


# ----------------------------------------------------------------------------------------------------- unpacked, report


@pytest.mark.parametrize("name", ["FusedResNet18", "torchvision resnet50"])
def test_weights_stay_pytorchs_where_that_is_asked_for(name):
    model = randomise(NETWORKS[name](), name, "unpacked")
    frozen = freeze(model, packed=False)
    assert not any("packed" in key for key in frozen.state_dict())
    assert_same_function(frozen, model, images(2, 3, 32, 32))
    report = freeze_report(frozen)
    assert not report.packed and set(report.left.values()) == {"PyTorch's convolution: packed=False was asked for"}


def test_the_report_says_what_is_packed_and_why_the_rest_is_not():
    model = randomise(torchvision.models.resnext50_32x4d(num_classes=CLASSES), "report")
    _batch_statistics(model.layer1[1])
    frozen = freeze(model)
    with torch.no_grad():
        frozen(images(1, 3, 32, 32))
    report = freeze_report(frozen)
    assert report.packed["conv1"] == "3 to 64, 7x7, stride 2" and report.packed["layer2.0.conv3"] == "256 to 512, 1x1"
    assert report.packed["layer2.0.conv2"] == "256 to 256, 3x3, stride 2, 32 groups"
    assert "normalisations" in report.left["layer1.1"]
    assert report.apart == {"": "FusedBottleneck is no module of PyTorch's or ours"}
    assert str(report).startswith("packed: ") and "  layer1.1: left, one of its normalisations is frozen" in str(report)
    whole = freeze_report(freeze(FusedResNet18(CLASSES)))
    assert len(whole.packed) == 20 and not whole.left and not whole.apart


def test_the_report_names_dilations():
    frozen = freeze(FusedBottleneck(64, 16, dilation=2))
    frozen(images(1, 64, 8, 8))
    report = freeze_report(frozen)
    assert report.packed["conv2"] == "16 to 16, 3x3, dilation 2" and not report.left
    assert report.apart == {"": "a convolution is dilated"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"groups": 8, "base_width": 8}, "there is no kernel of our own for groups of 2 inputs and 2 outputs"),
        ({"groups": 4, "dilation": 2}, "its dilation is (2, 2)"),
        ({"groups": 4, "conv_algorithm": "torch"}, "PyTorch's algorithm was requested"),
    ],
)
def test_the_report_says_why_a_convolution_in_groups_is_left(change, why):
    frozen = freeze(FusedBottleneck(64, 16, **change))
    frozen(images(1, 64, 8, 8))
    report = freeze_report(frozen)
    assert report.left == {"conv2": f"PyTorch's convolution: {why}"}
    assert report.apart == {"": "there is no step for a FrozenConv2d"}


def test_the_report_is_of_frozen_models():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int"):
        freeze_report(3)
    with pytest.raises(ValueError, match=r"^model: expected one that fastres.freeze returned, got torch.nn.Linear"):
        freeze_report(nn.Linear(2, 2))
