from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn as nn
import torchvision
from torchvision.ops import FrozenBatchNorm2d

from fastres import models
from fastres.fuse import fuse_report
from fastres.models import FusedResNet18, FusedResNet34, FusedResNet50, FusedResNet101, FusedResNet152
from tests.parity import FORMATS, same_training, scramble

CLASSES = {
    "resnet18": FusedResNet18,
    "resnet34": FusedResNet34,
    "resnet50": FusedResNet50,
    "resnet101": FusedResNet101,
    "resnet152": FusedResNet152,
}


def torchvision_model(name, **options):
    return getattr(torchvision.models, name)(weights=None, **options)


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_shapes_of_the_state_are_those_of_torchvision(name):
    with torch.device("meta"):
        actual, expected = CLASSES[name](1000, stem="imagenet"), torchvision_model(name)
    assert [(k, v.shape, v.dtype) for k, v in actual.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in expected.state_dict().items()
    ]
    report = fuse_report(actual)
    assert not report.left
    assert len(report.swapped) == 1 + sum(m.expansion > 0 for m in actual.modules() if hasattr(m, "expansion")) + (
        3 if name in ("resnet18", "resnet34") else 4
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_initial_state_is_that_of_torchvision_bit_for_bit(name):
    torch.manual_seed(7)
    actual = CLASSES[name](1000, stem="imagenet")
    torch.manual_seed(7)
    expected = torchvision_model(name)
    for key, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], value), key


def inputs(dtype, memory_format=torch.channels_last, size=32):
    generator = torch.Generator().manual_seed(3)

    def make():
        x = torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64)
        return x.to(dtype).contiguous(memory_format=memory_format)

    return make


@pytest.mark.parametrize(
    ("name", "memory_format", "steps"),
    [("resnet18", FORMATS[0], 2), ("resnet18", FORMATS[1], 2), ("resnet50", FORMATS[1], 1)],
)
def test_training_follows_torchvision_in_float64(name, memory_format, steps):
    actual = scramble(CLASSES[name](10, stem="imagenet")).double().to(memory_format=memory_format)
    expected = torchvision_model(name, num_classes=10).double().to(memory_format=memory_format)
    expected.load_state_dict(actual.state_dict())
    same_training(actual, expected, inputs(torch.float64, memory_format), steps=steps, lr=1e-3, times=1e4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_in_float32_it_is_as_near_to_float64_as_torchvision_is(name):
    # A ReLU that rounding flips moves one network's gradients and not the other's, so several are taken together.
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        actual = scramble(CLASSES[name](10, stem="imagenet"), seed)
        expected = torchvision_model(name, num_classes=10)
        exact = torchvision_model(name, num_classes=10).double()
        for module in (expected, exact):
            module.load_state_dict(actual.state_dict())
        x, gradient = inputs(torch.float32)(), torch.randn(4, 10)
        results = []
        for module, dtype in ((actual, torch.float32), (expected, torch.float32), (exact, torch.float64)):
            y = module(x.to(dtype))
            y.backward(gradient.to(dtype))
            gradients = [p.grad for p in module.parameters()]
            results.append([y.detach(), *gradients, *(b for b in module.buffers() if b.dim())])
        ours, theirs, true = (
            torch.cat([v.double().flatten() / t.norm() for v, t in zip(r, results[2], strict=True)]) for r in results
        )
        errors += torch.stack(((ours - true).norm(), (theirs - true).norm()))
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_checkpoints_load_both_ways(name):
    ours = CLASSES[name](5, stem="imagenet").double().eval()
    theirs = torchvision_model(name, num_classes=5).double().eval()
    x = inputs(torch.float64)()
    scramble(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    scramble(ours, seed=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "options",
    [
        {"zero_init_residual": True},
        {"groups": 4, "width_per_group": 8},
        {"width_per_group": 16},
        {"replace_stride_with_dilation": [False, True, True]},
        {"norm_layer": partial(nn.BatchNorm2d, eps=0.01, momentum=0.3)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_other_arguments_of_torchvision_are_passed_on(options):
    torch.manual_seed(0)
    actual = FusedResNet50(5, stem="imagenet", **options)
    torch.manual_seed(0)
    expected = torchvision_model("resnet50", num_classes=5, **options)
    for key, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], value), key
    assert actual.bn1.eps == expected.bn1.eps
    x = inputs(torch.float64)()
    with torch.no_grad():
        torch.testing.assert_close(actual.double().eval()(x), expected.double().eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_layer", [partial(nn.GroupNorm, 4), nn.InstanceNorm2d, FrozenBatchNorm2d])
def test_with_a_norm_layer_of_another_kind_it_computes_as_torchvisions_network(norm_layer):
    torch.manual_seed(0)
    actual = FusedResNet18(5, stem="imagenet", norm_layer=norm_layer)
    expected = torchvision_model("resnet18", num_classes=5, norm_layer=norm_layer)
    expected.load_state_dict(actual.state_dict())
    report = fuse_report(actual)
    assert not report.swapped
    assert len(report.left) == 8 + 1
    x, results = inputs(torch.float32, size=64)(), []
    for model in (actual, expected):
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_stem_for_small_images_keeps_their_resolution():
    model = FusedResNet18()
    seen = {}
    model.layer1.register_forward_hook(lambda module, args, y: seen.update(shape=y.shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen["shape"] == (2, 64, 32, 32)
    assert list(model.state_dict()) == list(torchvision_model("resnet18").state_dict())
    # He initialisation by fan out, as torchvision's convolutions: 64 channels of 3x3.
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_dropout_is_in_every_block_once_and_off_in_evaluation():
    model = FusedResNet50(dropout=0.3)
    rates = {name: m.dropout for name, m in model.named_modules() if getattr(m, "dropout", 0.0)}
    assert rates == {f"layer{i + 1}.{j}": 0.3 for i, n in enumerate((3, 4, 6, 3)) for j in range(n)}
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FusedResNet18(stem="mnist"), ValueError, "stem: expected one of .*'cifar', 'imagenet'.* got 'mnist'"),
        (lambda: FusedResNet18(0), ValueError, "num_classes: expected at least 1, got 0"),
        (lambda: FusedResNet18(2.5), TypeError, "num_classes: expected an int, got float"),
        (lambda: FusedResNet18(dropout=1), ValueError, "dropout: expected 0 <= dropout < 1, got 1"),
        (lambda: models.ArticleResNet18(stem=""), ValueError, "stem: expected one of"),
        (lambda: models.ArticleResNet18(dropout=-1), ValueError, "dropout: expected 0 <= dropout < 1"),
        (
            lambda: FusedResNet18(conv_algorithm="fft"),
            ValueError,
            "conv_algorithm: expected one of .*'auto', 'torch', 'winograd'.*, got 'fft'",
        ),
        (lambda: FusedResNet50(conv_algorithm=1), TypeError, "conv_algorithm: expected a string or None, got int"),
        (lambda: models.ArticleResNet18(conv_algorithm="Auto"), ValueError, "conv_algorithm: expected one of"),
        (
            lambda: models.create("article", num_classes=2, conv_algorithm=""),
            ValueError,
            "conv_algorithm: expected one",
        ),
        (
            lambda: models.create("resnet18", num_classes=2, fused=False, conv_algorithm="auto"),
            ValueError,
            "conv_algorithm: expected None with fused=False, got 'auto'",
        ),
        (lambda: models.create("resnet19", num_classes=10), ValueError, "name: expected one of .* got 'resnet19'"),
        (lambda: models.create("resnet18", num_classes=-1), ValueError, "num_classes: expected at least 1"),
    ],
)
def test_a_bad_argument_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
