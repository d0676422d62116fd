from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
import torchvision
from torch.optim.swa_utils import update_bn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from fastres.fuse import fuse, fuse_report, unfuse
from fastres.nn import (
    DropoutBasicBlock,
    FusedBasicBlock,
    FusedBatchNormAct2d,
    FusedBottleneck,
    FusedLayerGetter,
    FusedStemResNet,
    ResidualBlock,
)
from tests.operators import Operators
from tests.oracle import TILE4
from tests.parity import FORMATS, one_thread, same_training, scramble, twin  # noqa: F401

# Blocks in each, all of torchvision's ResNet constructors.
BLOCKS = {
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnet152": 50,
    "resnext50_32x4d": 16,
    "resnext101_32x8d": 33,
    "resnext101_64x4d": 33,
    "wide_resnet50_2": 16,
    "wide_resnet101_2": 33,
}
FUSED_CLASSES = (FusedBasicBlock, FusedBottleneck, FusedBatchNormAct2d, FusedStemResNet, FusedLayerGetter)


class Narrowed(ResNet):
    """torchvision's, but for the channels of the last two stages, which hold 94 % of the weights."""

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, {256: 32, 512: 48}.get(planes, planes), *args, **options)


def small(norm_layer=None, *, block=BasicBlock, layers=(1, 1, 1, 1), seed=0):
    """A ResNet of a block a stage, exactly of torchvision's class."""
    torch.manual_seed(seed)
    model = Narrowed(block, list(layers), num_classes=4, norm_layer=norm_layer)
    model.fc = nn.Linear(model.inplanes, 4)
    model.__class__ = ResNet
    return scramble(model)


def images(dtype=torch.float64, size=32, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def again(model, way):
    """The model itself, or what comes back when it is copied or saved whole."""
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    return model


def fused_modules(model):
    return [name for name, m in model.named_modules() if isinstance(m, FUSED_CLASSES)]


# ------------------------------------------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("name", BLOCKS)
def test_every_resnet_of_torchvision_is_fused_whole(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
        fused = fuse(model)
        assert fused(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    shortcuts = 3 if name in ("resnet18", "resnet34") else 4
    report = fuse_report(fused)
    assert not report.left
    assert len(report.swapped) == BLOCKS[name] + shortcuts + 1
    assert type(fused) is FusedStemResNet
    swapped = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck, ResNet: FusedStemResNet}
    for ours, theirs in zip(fused.modules(), model.modules(), strict=True):
        assert type(ours) is swapped.get(type(theirs), type(theirs))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_a_fused_resnet_evaluates_as_before(name):
    torch.manual_seed(0)
    model = scramble(getattr(torchvision.models, name)(weights=None, num_classes=10)).eval()
    x = images(torch.float32, 64)()[:2].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        actual = fuse(model)(x)
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_fused_resnet_trains_as_before(block, inplace):
    model = small(block=block).double()
    expected = twin(model)
    same_training(fuse(model, inplace=inplace), expected, images(), steps=2, lr=1e-3, times=1e4)


def test_a_resnet_inside_a_segmentation_model_is_fused_with_its_stem():
    torch.manual_seed(0)
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2).eval()
    fused = fuse(model)
    report = fuse_report(fused)
    assert not report.left
    assert len(report.swapped) == 16 + 4 + 1
    assert "backbone.bn1" in report.swapped
    x = images(torch.float32)()[:1]
    with torch.no_grad():
        torch.testing.assert_close(fused(x)["out"], model(x)["out"], rtol=1e-4, atol=1e-4)
    assert repr(unfuse(fused)) == repr(model)


def test_a_backbone_that_returns_the_stem_before_its_relu_keeps_it():
    for layers, fits in (({"bn1": "a", "layer1": "b"}, False), ({"relu": "a", "layer1": "b"}, True)):
        model = IntermediateLayerGetter(small(), layers).eval()
        fused = fuse(model)
        assert type(fused) is FusedLayerGetter
        assert type(unfuse(fused)) is IntermediateLayerGetter
        assert ("bn1" in fuse_report(fused).swapped) == fits
        x = images(torch.float32)()
        for key, value in model(x).items():
            torch.testing.assert_close(fused(x)[key], value, rtol=1e-4, atol=1e-4)


def test_the_backbone_of_a_detection_model_computes_as_before_with_its_frozen_normalisation():
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    fused = fuse(backbone)
    report = fuse_report(fused)
    assert not report.swapped
    assert len(report.left) == 8 + 1
    x = images(torch.float32, 64)()
    for key, value in backbone(x).items():
        assert torch.equal(fused(x)[key], value)
    for why in report.left.values():
        assert "is torchvision.ops.misc.FrozenBatchNorm2d, expected exactly torch.nn.BatchNorm2d" in why


def test_the_stem_of_an_unknown_model_is_left():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn1, self.relu = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()
            self.blocks = small().layer1

        def forward(self, x):
            return self.blocks(self.bn1(self.relu(self.conv(x))))

    model = Mine().eval()
    fused = fuse(model)
    report = fuse_report(fused)
    assert report.swapped == {"blocks.0": "FusedBasicBlock"}
    assert not report.left
    assert type(fused) is Mine
    x = images(torch.float32)()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


class Mine(ResNet):
    def __init__(self, extra=3):
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=4)
        self.extra = extra

    def twice(self, x):
        return 2 * self(x)


@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle", "torch.save"])
def test_a_subclass_of_resnet_that_only_adds_to_it_gets_a_class_of_its_own(way):
    torch.manual_seed(0)
    model = scramble(Mine(extra=5)).eval()
    fused = again(fuse(model), way)
    assert type(fused) is type(fuse(Mine()))
    assert isinstance(fused, (Mine, FusedStemResNet))
    assert (type(fused).__name__, fused.extra) == ("FusedMine", 5)
    assert not fuse_report(fused).left
    x = images(torch.float32)()
    torch.testing.assert_close(fused.twice(x), model.twice(x), rtol=1e-4, atol=1e-4)
    back = unfuse(fused)
    assert type(back) is Mine
    assert torch.equal(back(x), model(x))


class OtherStem(ResNet):
    def _forward_impl(self, x):
        return super()._forward_impl(x.flip(3))


def test_a_subclass_of_resnet_with_a_forward_of_its_own_keeps_it():
    model = scramble(OtherStem(BasicBlock, [1, 1, 1, 1])).eval()
    fused = fuse(model)
    assert type(fused) is OtherStem
    report = fuse_report(fused)
    assert list(report.left) == ["bn1"]
    assert "OtherStem, whose forward may differ" in report.left["bn1"]
    x = images(torch.float32)()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_lone_block_is_fused():
    assert type(fuse(BasicBlock(8, 8))) is FusedBasicBlock
    assert fuse_report(fuse(BasicBlock(8, 8))).swapped == {"": "FusedBasicBlock"}


# ------------------------------------------------------------------------------------------------ what a swap leaves be


def test_a_copy_shares_everything_and_leaves_the_original_alone():
    model = small()
    model.extra = {"kept": [1]}
    before = repr(model)
    fused = fuse(model)
    assert repr(model) == before
    assert not fused_modules(model)
    theirs = model.state_dict(keep_vars=True)
    for key, value in fused.state_dict(keep_vars=True).items():
        assert value is theirs[key], key
    assert fused.extra == model.extra
    fused.fc = nn.Identity()
    fused.layer1[0].register_forward_hook(lambda *_: None)
    assert isinstance(model.fc, nn.Linear)
    assert not model.layer1[0]._forward_hooks


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("inplace", [True, False])
def test_nothing_but_classes_is_changed(block, inplace):
    model = small(block=block)
    before = {name: (m, dict(m.__dict__)) for name, m in model.named_modules()}
    fused = fuse(model, inplace=inplace)
    assert [name for name, _ in fused.named_modules()] == list(before)
    for name, m in fused.named_modules():
        old, attributes = before[name]
        assert (m is old) == inplace
        assert list(m.__dict__) == list(attributes), name
        for key, value in attributes.items():
            mine = m.__dict__[key]
            if inplace or not isinstance(value, (dict, set)):
                assert mine is value, f"{name}.{key}"
            elif key != "_modules":
                assert mine == value, f"{name}.{key}"
        changes = isinstance(m, (FusedBasicBlock, FusedBottleneck, FusedStemResNet))
        assert changes == (name == "" or (name.count(".") == 1 and "layer" in name))
        assert changes or type(m) is type(old)


def test_a_training_step_on_the_copy_is_seen_by_the_original():
    model = small().double()
    fused = fuse(model)
    x = images()()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    fused(x).square().sum().backward()
    optimizer.step()
    assert model.bn1.num_batches_tracked == 1
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))


def test_in_place_every_module_stays_the_same_object():
    model = small()
    modules = dict(model.named_modules())
    parameters = [id(p) for p in model.parameters()]
    assert fuse(model, inplace=True) is model
    assert all(m is modules[name] for name, m in model.named_modules())
    assert [id(p) for p in model.parameters()] == parameters
    assert unfuse(model, inplace=True) is model
    assert all(m is modules[name] for name, m in model.named_modules())


@pytest.mark.parametrize("inplace", [True, False])
def test_hooks_keep_running_and_see_what_they_saw(inplace):
    model = small(layers=(1, 1, 1, 1)).eval()
    seen = {}

    def watch(target, name, key):
        module = target.get_submodule(name)
        module.register_forward_hook(lambda m, args, y: seen.__setitem__(key + name, y.detach().clone()))

    names = ["conv1", "maxpool", "layer1", "layer2.0", "layer2.0.conv1", "layer3.0.conv2", "fc", ""]
    for name in names:
        watch(model, name, "")
    x = images(torch.float32)()
    model(x)
    expected = dict(seen)
    seen.clear()
    fused = fuse(model, inplace=inplace)
    assert list(fuse_report(fused).left) == ["layer2.0", "layer3.0"]
    fused(x)
    assert seen.keys() == expected.keys() == set(names)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-4, atol=1e-4)


def test_backward_hooks_and_hooks_before_forward_keep_running():
    model = small()
    calls = []
    model.layer1[0].register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    model.layer2[0].register_forward_pre_hook(lambda m, args: calls.append("before"))
    fuse(model)(images(torch.float32)()).sum().backward()
    assert calls == ["before", "backward"]


def test_mode_and_requires_grad_of_every_module_are_kept():
    model = small()
    model.layer2[0].eval()
    model.layer3[0].downsample[1].eval()
    model.layer1[0].bn1.eval()
    for p in model.layer1.parameters():
        p.requires_grad_(False)
    modes = {name: m.training for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    for changed in (fuse(model), unfuse(fuse(model))):
        assert {name: m.training for name, m in changed.named_modules()} == modes
        assert {name: p.requires_grad for name, p in changed.named_parameters()} == grads
    same_training(fuse(twin(model).double()), twin(model).double(), images(), steps=2, lr=1e-3, times=1e4)


def test_with_every_normalisation_frozen_it_fine_tunes_as_before():
    model = small().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    expected = twin(model)
    fused = fuse(model)
    same_training(fused, expected, images(), steps=2, lr=1e-3, times=1e4)
    assert fused.bn1.num_batches_tracked == 0


def test_statistics_can_be_estimated_anew():
    model = small().double()
    expected = twin(model)
    fused = fuse(model)
    batches = [images(seed=s)() for s in range(3)]
    for m in (fused, expected):
        update_bn(batches, m)
    for (name, a), b in zip(fused.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert fused.layer2[0].downsample[1].num_batches_tracked == 3


def test_a_module_that_is_used_twice_stays_one():
    block = small().layer1[0]
    model = nn.Sequential(block, nn.Identity(), block)
    fused = fuse(model)
    assert fused[0] is fused[2]
    assert type(fused[0]) is FusedBasicBlock
    assert type(block) is BasicBlock


# ------------------------------------------------------------------------------------------------------- what is left


def hook(module):
    module.register_forward_hook(lambda *_: None)


def parametrize_weight(model):
    torch.nn.utils.parametrizations.weight_norm(model.layer2[0].downsample[0])


class OtherBlock(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def other_block(model):
    model.layer1[0].__class__ = OtherBlock


def shared_norm(model):
    model.layer1[0].bn2 = model.layer1[0].bn1


OBSTACLES = {
    "hook on bn1": (lambda m: hook(m.layer1[0].bn1), "layer1.0", "its bn1 has hooks"),
    "hook before bn2": (
        lambda m: m.layer1[0].bn2.register_forward_pre_hook(lambda *_: None), "layer1.0", "its bn2 has hooks",
    ),
    "backward hook on bn2": (
        lambda m: m.layer1[0].bn2.register_full_backward_hook(lambda *_: None), "layer1.0", "its bn2 has hooks",
    ),
    "hook on relu": (lambda m: hook(m.layer1[0].relu), "layer1.0", "its relu has hooks"),
    "hook on downsample": (lambda m: hook(m.layer2[0].downsample), "layer2.0.downsample", "has hooks"),
    "hook on its convolution": (
        lambda m: hook(m.layer2[0].downsample[0]), "layer2.0.downsample", "its 0 has hooks",
    ),
    "hook on its normalisation": (
        lambda m: hook(m.layer2[0].downsample[1]), "layer2.0.downsample", "its 1 has hooks",
    ),
    "pruned": (
        lambda m: torch.nn.utils.prune.l1_unstructured(m.layer2[0].downsample[0], "weight", 0.5),
        "layer2.0.downsample", "its 0 has hooks",
    ),
    "parametrised": (
        parametrize_weight, "layer2.0.downsample", "its 0 is torch.nn.utils.parametrize.ParametrizedConv2d",
    ),
    "bias": (
        lambda m: m.layer2[0].downsample.__setitem__(0, nn.Conv2d(64, 128, 1, 2)),
        "layer2.0.downsample", "its convolution has a bias",
    ),
    "other activation": (
        lambda m: setattr(m.layer1[0], "relu", nn.Tanh()), "layer1.0", "its relu is torch.nn.Tanh",
    ),
    "other normalisation": (
        lambda m: setattr(m.layer1[0], "bn2", nn.GroupNorm(1, 64)), "layer1.0", "its bn2 is torch.nn.GroupNorm",
    ),
    "one norm frozen": (
        lambda m: m.layer1[0].bn2.eval(), "layer1.0", "one of its normalisations is frozen, another is not",
    ),
    "folded": (lambda m: setattr(m.layer1[0], "bn1", nn.Identity()), "layer1.0", "its bn1 is torch.nn.Identity"),
    "other forward": (other_block, "layer1.0", "OtherBlock, whose forward may differ"),
    "forward set on the block": (
        lambda m: setattr(m.layer1[0], "forward", lambda x: x + 1), "layer1.0", "has a forward of its own",
    ),
    "forward set on bn2": (
        lambda m: setattr(m.layer1[0].bn2, "forward", lambda x: x), "layer1.0", "its bn2 has a forward of its own",
    ),
    "hook on the stem's bn1": (lambda m: hook(m.bn1), "bn1", "has hooks"),
    "the stem's relu replaced": (lambda m: setattr(m, "relu", nn.Tanh()), "bn1", "its relu is torch.nn.Tanh"),
    "hook on the stem's relu": (lambda m: hook(m.relu), "bn1", "its relu has hooks"),
    "forward set on the model": (
        lambda m: setattr(m, "forward", m.forward), "bn1", "a forward of its own, set on the instance",
    ),
}  # fmt: skip


OF_ANOTHER_CLASS = ("other forward", "forward set on the block", "forward set on the model")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", OBSTACLES)
def test_what_cannot_be_fused_exactly_is_left_with_the_reason(case, when):
    change, name, reason = OBSTACLES[case]
    if when == "after" and case in ("other forward", "forward set on the model"):
        return  # gives the block another class, or binds forward of the class that the model had
    model = small()
    if when == "before":
        change(model)
    fused = fuse(model, inplace=True)
    if when == "after":
        change(fused)
    blocks = {f"layer{i}.0": fused.get_submodule(f"layer{i}.0") for i in range(1, 5)}
    left = [key for key, block in blocks.items() if not isinstance(block, FusedBasicBlock)]
    assert left == ([name] if when == "before" and case in OF_ANOTHER_CLASS and name != "bn1" else [])
    report = fuse_report(fused)
    assert list(report.left) == [name]
    assert reason in report.left[name]
    total = 4 + 3 + 1
    assert len(report.swapped) == total - 1
    expected = small()
    change(expected)
    expected.load_state_dict(fused.state_dict())
    if case == "backward hook on bn2":
        for m in (fused, expected):  # torchvision's in-place addition refuses it
            with pytest.raises(RuntimeError, match="modified inplace"):
                m(images(torch.float32)())
    elif case == "synchronised":
        x = images(torch.float32)()  # which trains on a GPU only
        torch.testing.assert_close(fused.eval()(x), expected.eval()(x), rtol=1e-4, atol=1e-4)
    else:
        same_training(fused.double(), expected.double(), images(), steps=1, times=1e4)


def test_a_normalisation_that_a_block_shares_with_its_downsample_counts_in_torchvisions_order():
    model = small()
    model.layer2[0].downsample[1] = model.layer2[0].bn2
    expected = twin(model).double()
    fused = fuse(model)
    assert list(fuse_report(fused).left) == ["layer2.0"]
    assert "its downsample shares a normalisation with it" in fuse_report(fused).left["layer2.0"]
    same_training(fused.double(), expected, images(), steps=2, lr=1e-3, times=1e4)


SHARED = {
    "one normalisation for both convolutions": shared_norm,
    "the stem's relu in a block": lambda m: setattr(m.layer1[0], "relu", m.relu),
    "one convolution twice": lambda m: setattr(m.layer1[0], "conv2", m.layer1[0].conv1),
}


@pytest.mark.parametrize("case", SHARED)
def test_children_that_are_used_twice_are_no_obstacle(case):
    model = small()
    SHARED[case](model)
    expected = twin(model).double()
    fused = fuse(model)
    assert not fuse_report(fused).left
    same_training(fused.double(), expected, images(), steps=2, lr=1e-3, times=1e4)


def operators_of(model, name):
    """The fastres operators that the block, or the stem, of that name runs."""
    if name == "bn1":
        module, x = copy.copy(model), images(torch.float32)()
        module._modules = dict(model._modules)
        for layer in ("layer1", "layer2", "layer3", "layer4", "fc"):
            setattr(module, layer, nn.Identity())
    else:
        module = model.get_submodule(name)
        x = torch.randn(2, module.conv1.in_channels, 8, 8)
    with Operators() as seen:
        module(x)
    return seen.names


CASES_THAT_RUN = [case for case in OBSTACLES if case != "backward hook on bn2"]


@pytest.mark.parametrize("case", CASES_THAT_RUN)
def test_the_report_says_what_runs(case):
    model = fuse(small(), conv_algorithm="winograd")
    if case == "other forward":
        model.layer1[0].__class__ = OtherBlock
    for altered in (False, True):
        if altered and case not in ("other forward", "forward set on the model"):
            OBSTACLES[case][0](model)
        report = fuse_report(model)
        for name in ("bn1", *(f"layer{i}.0" for i in range(1, 5))):
            ran = operators_of(model, name)
            assert bool(ran) == (name in report.swapped) == (name not in report.left), (name, ran)
            projected = any("projection" in operator for operator in ran)
            assert projected == (f"{name}.downsample" in report.swapped), name


def test_the_standard_conversion_to_synchronised_normalisations_stays_fused():
    model = fuse(small())
    before = fuse_report(model)
    x = torch.randn(2, 3, 32, 32)
    expected = model.eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert fuse_report(converted) == before
    assert torch.equal(converted.eval()(x), expected)
    assert operators_of(converted.train(), "layer1.0")


def test_the_log_says_once_that_a_block_left_the_faster_way(caplog):
    model = fuse(small())
    x = images(torch.float32)()
    with caplog.at_level(logging.WARNING, logger="fastres.nn.trust"):
        model(x)
        assert not caplog.records
        model.layer2[0].relu = nn.Softplus()
        model.relu = nn.Tanh()
        for _ in range(3):
            model(x)
    assert [r.getMessage() for r in caplog.records] == [
        "a FusedStemResNet goes on child by child, as in plain PyTorch: "
        "its relu is torch.nn.Tanh, expected exactly torch.nn.ReLU",
        "a FusedBasicBlock goes on child by child, as in plain PyTorch: "
        "its relu is torch.nn.Softplus, expected exactly torch.nn.ReLU",
    ]
    plain = unfuse(model)
    assert all("_was_fused" not in m.__dict__ for m in plain.modules())


def test_a_quantisable_resnet_is_left():
    model = torchvision.models.quantization.resnet18(weights=None, quantize=False)
    report = fuse_report(fuse(model))
    assert not report.swapped
    assert len(report.left) == 8 + 1
    assert "QuantizableBasicBlock, whose forward may differ" in report.left["layer1.0"]
    assert "QuantizableResNet, whose forward may differ" in report.left["bn1"]


def test_another_downsample_is_called_as_it_is():
    model = small()
    conv, norm = model.layer2[0].downsample
    conv.stride = (1, 1)
    model.layer2[0].downsample = nn.Sequential(nn.AvgPool2d(2), conv, norm)
    expected = twin(model).double()
    fused = fuse(model).double()
    assert type(fused.layer2[0]) is FusedBasicBlock
    assert "has the children ['0', '1', '2']" in fuse_report(fused).left["layer2.0.downsample"]
    same_training(fused, expected, images(), steps=2, lr=1e-3, times=1e4)


def test_the_report_prints_a_line_a_module_and_goes_to_the_log(caplog):
    model = small(norm_layer=FrozenBatchNorm2d)
    model.layer1 = small().layer1
    with caplog.at_level(logging.INFO, logger="fastres.fuse"):
        fused = fuse(model)
    text = str(fuse_report(fused))
    assert text in caplog.text
    lines = text.splitlines()
    assert lines[0] == "fused: 1, left: 4"
    assert "  layer1.0: fused, FusedBasicBlock" in lines
    assert any(line.startswith("  layer2.0: left, its bn1 is torchvision.ops.misc.FrozenBatchNorm2d") for line in lines)


def test_the_report_of_an_unfused_model_says_what_fuse_would_do():
    report = fuse_report(small())
    assert not report.swapped
    assert set(report.left.values()) == {"not fused yet: fuse(model) does it"}
    assert len(report.left) == 4 + 1


# ------------------------------------------------------------------------------------------------------- and back again


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_unfuse_gives_torchvisions_own_classes_back(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    back = unfuse(fuse(model))
    assert repr(back) == repr(model)
    for (key, a), b in zip(model.named_modules(), back.modules(), strict=True):
        assert type(a) is type(b), key
        assert a.__dict__.keys() == b.__dict__.keys(), key


def test_unfuse_gives_the_same_results():
    model = small().double()
    same_training(unfuse(fuse(model)), twin(model), images(), steps=1, times=1e4)


def test_dropout_survives_the_way_there_and_back():
    model = small()
    for name in ("layer1", "layer2"):
        block = getattr(model, name)[0]
        block.__class__, block.dropout = DropoutBasicBlock, 0.3
    fused = fuse(model)
    assert type(fused.layer1[0]) is FusedBasicBlock
    assert fused.layer1[0].dropout == 0.3
    assert fused.layer3[0].dropout == 0.0
    back = unfuse(fused)
    assert repr(back) == repr(model)
    assert back.layer1[0].dropout == 0.3
    assert type(back.layer3[0]) is BasicBlock


def test_a_second_fuse_and_a_second_unfuse_change_nothing():
    model = small()
    fused = fuse(model)
    text = repr(fused)
    assert repr(fuse(fused)) == text
    assert fuse(fused, inplace=True) is fused
    assert repr(fused) == text
    assert repr(unfuse(unfuse(fused))) == repr(unfuse(model)) == repr(model)


def test_a_fused_block_that_was_changed_since_unfuses_to_the_same_results():
    model = fuse(small()).double()
    model.layer1[0].relu = nn.LeakyReLU(0.3)
    model.layer2[0].downsample = nn.Sequential(*model.layer2[0].downsample, nn.Softplus())
    model.relu = nn.SiLU()
    plain = unfuse(model)
    assert not fused_modules(plain)
    same_training(plain, twin(model), images(), steps=1, times=1e4)


# ------------------------------------------------------------------------------------------------------- conv_algorithm


def algorithms(model):
    return [m.conv_algorithm for m in model.modules() if hasattr(m, "conv_algorithm")]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_conv_algorithm_is_set_on_every_block_and_goes_with_unfuse(block):
    model = small(block=block)
    fused = fuse(model, conv_algorithm="winograd")
    assert algorithms(fused) == ["winograd"] * 4
    assert not algorithms(model)
    assert str(fuse_report(fused)) == str(fuse_report(fuse(model)))
    back = unfuse(fused)
    assert not algorithms(back)
    for (name, m), n in zip(back.named_modules(), model.modules(), strict=True):
        assert m.__dict__.keys() == n.__dict__.keys(), name
    assert algorithms(fused) == ["winograd"] * 4
    assert algorithms(fuse(back)) == [None] * 4


def test_conv_algorithm_reaches_blocks_that_are_fused_already_where_it_is_given():
    model = nn.Sequential(fuse(small().layer1, conv_algorithm="winograd"), small().layer2, ResidualBlock(128, 128))
    assert algorithms(fuse(model)) == ["winograd", None, None]
    again = fuse(model, conv_algorithm="torch")
    assert algorithms(again) == ["torch"] * 3
    assert algorithms(model) == ["winograd", None]
    fuse(model, inplace=True, conv_algorithm="auto")
    assert algorithms(model) == ["auto"] * 3


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("fft", ValueError, "conv_algorithm: expected one of .*'winograd'.*, got 'fft'"),
        (True, TypeError, "conv_algorithm: expected a string or None, got bool"),
    ],
)
def test_a_bad_conv_algorithm_is_refused_before_anything_changes(value, error, message):
    model = small()
    with pytest.raises(error, match=message):
        fuse(model, inplace=True, conv_algorithm=value)
    assert not fused_modules(model)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_by_winograds_convolution_a_resnet_stays_as_near_to_float64(memory_format):
    model = small().to(memory_format=memory_format)
    exact, fused = twin(model).double(), fuse(twin(model), conv_algorithm="winograd")
    x = images(torch.float32)().contiguous(memory_format=memory_format)
    dy, results = torch.randn(4, 4), []
    for m, dtype in ((fused, torch.float32), (model, torch.float32), (exact, torch.float64)):
        y = m(x.to(dtype))
        y.backward(dy.to(dtype))
        results.append([y.detach(), *(p.grad for p in m.parameters()), *(b for b in m.buffers() if b.dim())])
    ours, theirs, true = (
        torch.cat([v.double().flatten() / t.norm() for v, t in zip(r, results[2], strict=True)]) for r in results
    )
    # Winograd's transforms magnify rounding errors by so much.
    assert (ours - true).norm() <= 2 * TILE4.outputs * (theirs - true).norm()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_fused_model_can_be_copied_and_saved(way):
    model = fuse(small(), conv_algorithm="winograd").eval()
    copied = again(model, way)
    assert repr(copied) == repr(model)
    assert algorithms(copied) == ["winograd"] * 4
    assert copied.conv1.weight is not model.conv1.weight
    x = images(torch.float32)()
    assert torch.equal(copied(x), model(x))


def test_a_hook_on_a_downsample_after_fuse_sees_what_it_would_have_seen():
    model = small().double()
    expected = twin(model)
    fused = fuse(model)
    seen = []
    for m in (fused, expected):
        m.layer2[0].downsample.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
        m(images()())
    torch.testing.assert_close(*seen)


def test_features_are_extracted_from_inside_fused_blocks():
    model = small().eval()
    x = images(torch.float32)()
    wanted = {"relu": "stem", "layer1.0.bn1": "raw", "layer2.0.relu": "inside", "layer4": "out"}
    expected = create_feature_extractor(model, wanted)(x)
    with Operators() as seen:
        actual = create_feature_extractor(fuse(model), wanted)(x)
    assert not seen.names
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_features_are_extracted_from_fused_blocks_as_leaves():
    model = small().eval()
    x, wanted = images(torch.float32)(), {"layer1": "low", "layer4.0": "high"}
    expected = create_feature_extractor(model, wanted)(x)
    leaves = [FusedBasicBlock, FusedBottleneck]
    with Operators() as seen:
        actual = create_feature_extractor(fuse(model), wanted, tracer_kwargs={"leaf_modules": leaves})(x)
    assert seen.names
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- memory format


def lie_channels_last(seen):
    """Whether the activations that each fastres operator took lie in channels_last."""
    return [
        value.is_contiguous(memory_format=torch.channels_last)
        for arguments in seen.arguments
        for name, value in arguments.items()
        if name in ("x", "s", "input", "residual") and isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("training", [True, False])
def test_a_network_on_nchw_input_computes_in_channels_last(block, training):
    model = small(block=block).train(training)
    fused, exact, x = fuse(twin(model), conv_algorithm="winograd"), twin(model).double(), images(torch.float32)()
    assert x.is_contiguous()
    with torch.no_grad(), Operators() as seen:
        y = fused(x)
        theirs, true = model(x), exact(x.double())
    found = lie_channels_last(seen)
    assert len(found) > 8
    assert all(found)
    assert (y - true).norm() <= 2 * TILE4.outputs * (theirs - true).norm()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("where", ["layer1", "layer1.0", "layer2.0", "maxpool", "layer3.0.conv2", "layer4"])
def test_a_hook_inside_sees_a_value_that_lies_as_in_pytorch(where, weights, memory_format):
    model = small().to(memory_format=weights)
    fused = fuse(twin(model), conv_algorithm="winograd")
    x, seen = images(torch.float32, 64)().contiguous(memory_format=memory_format), []
    for m in (fused, model):
        m.get_submodule(where).register_forward_hook(lambda m, args, y: seen.append((args[0].detach(), y.detach())))
    for m in (fused, model):
        m(x)
    for ours, theirs in zip(*seen, strict=True):
        assert ours.stride() == theirs.stride()
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_features_of_a_layer_getter_lie_as_in_pytorch(block, weights, memory_format):
    layers = {"relu": "stem", "layer1": "a", "layer3": "b", "layer4": "c"}
    model = IntermediateLayerGetter(small(block=block), layers).eval().to(memory_format=weights)
    fused = fuse(model, conv_algorithm="winograd")
    x = images(torch.float32, 64)().contiguous(memory_format=memory_format)
    with Operators() as seen:
        actual = fused(x)
    assert all(lie_channels_last(seen))
    expected = model(x)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].stride() == value.stride(), key
        assert (actual[key] - value).norm() <= 1e-4 * value.norm(), key


# ----------------------------------------------------------------------------------------------------- later changes


def test_pruning_after_fuse_counts():
    model = small().double()
    expected = twin(model)
    fused = fuse(model)
    for m in (fused, expected):
        torch.nn.utils.prune.l1_unstructured(m.layer2[0].downsample[0], "weight", amount=0.5)
    same_training(fused, expected, images(), steps=1, times=1e4)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("function", [fuse, unfuse])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_not_a_plain_module_is_refused(function):
    name = function.__name__
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got OrderedDict"):
        function(small().state_dict())
    with pytest.raises(TypeError, match=rf"model: expected a Python module, got RecursiveScriptModule; {name} before"):
        function(torch.jit.script(nn.Sequential(nn.ReLU())))
    compiled = torch.compile(small())
    with pytest.raises(TypeError, match=rf"model: it is compiled already; call {name} before torch\.compile"):
        function(compiled)
    with pytest.raises(TypeError, match=rf"model: its module '0' is compiled already; call {name} before"):
        function(nn.Sequential(compiled))
    in_place = small()
    in_place.layer1.compile()
    with pytest.raises(TypeError, match=r"model: its module 'layer1' is compiled already"):
        function(in_place)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        fuse_report(None)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_of_a_model_is_shared_as_it_is():
    part = torch.jit.script(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(part, small().layer1)
    fused = fuse(model)
    assert fused[0] is part
    assert type(fused[1][0]) is FusedBasicBlock
    assert unfuse(fused)[0] is part


def test_a_model_with_nothing_to_fuse_is_told_of_the_backend():
    with pytest.warns(UserWarning, match='backend="fastres"'):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
