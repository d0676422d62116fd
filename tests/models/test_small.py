"""The networks for small images, against what the papers say, written here in torch's functions and float64."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock

from fastres import contract, freeze, models
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.models.cifar import PlainCifarResNet
from fastres.models.wide import PlainWideResNet
from fastres.nn import FusedBasicBlock, FusedPreactivationBlock, PadShortcut, PreactivationBlock
from fastres.nn.blocks import FusedBlock
from tests.operators import Operators
from tests.oracle import generator, near_zero
from tests.parity import FORMATS, close, scramble, twin

SMALL = ["resnet20", "wrn10-2", "wrn16-1"]


class Formula:
    """A network as the papers have it, over tensors by name; it updates running statistics as torch does."""

    def __init__(self, name, tensors, training, drop=lambda z: z):
        self.tensors, self.training, self.drop = tensors, training, drop
        self.wide = name.startswith("wrn")
        depth = int(name.removeprefix("wrn").removeprefix("resnet").partition("-")[0])
        self.blocks = (depth - (4 if self.wide else 2)) // 6

    def norm(self, name, x):
        t = self.tensors
        mean, var = t[f"{name}.running_mean"], t[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, t[f"{name}.weight"], t[f"{name}.bias"], self.training)

    def conv(self, name, x, stride=1):
        return F.conv2d(x, self.tensors[f"{name}.weight"], stride=stride, padding=1)

    def basic(self, name, x, stride):
        """He et al. 2015, figure 2, with the shortcut of option A."""
        z = self.drop(F.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride))))
        z = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", z))
        if stride == 2:
            x = x[:, :, ::2, ::2]
            x = torch.cat([x, torch.zeros_like(x)], 1)
        return F.relu(z + x)

    def preactivation(self, name, x, stride):
        """Zagoruyko and Komodakis 2016, figure 1 (d)."""
        a = F.relu(self.norm(f"{name}.bn1", x))
        z = self.drop(F.relu(self.norm(f"{name}.bn2", self.conv(f"{name}.conv1", a, stride))))
        weight = self.tensors.get(f"{name}.shortcut.weight")
        return self.conv(f"{name}.conv2", z) + (x if weight is None else F.conv2d(a, weight, stride=stride))

    def __call__(self, x):
        x = self.conv("conv1", x)
        x = x if self.wide else F.relu(self.norm("bn1", x))
        for stage in (1, 2, 3):
            for i in range(self.blocks):
                block = self.preactivation if self.wide else self.basic
                x = block(f"layer{stage}.{i}", x, 2 if stage > 1 and i == 0 else 1)
        x = F.relu(self.norm("bn1", x)) if self.wide else x
        return F.linear(x.mean((2, 3)), self.tensors["fc.weight"], self.tensors["fc.bias"])


def tensors_of(model):
    """Copies of all parameters, which ask for gradients, and buffers, in float64."""
    found = {name: b.detach().double().clone() for name, b in model.named_buffers()}
    return found | {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def make(name, **options):
    torch.manual_seed(0)
    return scramble(models.create(name, num_classes=4, **options))


def images(*key, dtype=torch.float64, memory_format=torch.channels_last, size=16):
    x = torch.randn((4, 3, size, size), generator=generator(*key), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=memory_format)


# ------------------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # He et al. 2015, table 6
        ("resnet20", "0.27"),
        ("resnet32", "0.46"),
        ("resnet44", "0.66"),
        ("resnet56", "0.85"),
        ("resnet110", "1.7"),
        # Zagoruyko and Komodakis 2016, table 4
        ("wrn40-1", "0.6"),
        ("wrn40-2", "2.2"),
        ("wrn40-4", "8.9"),
        ("wrn28-10", "36.5"),
        ("wrn28-12", "52.5"),
        ("wrn22-8", "17.2"),
        ("wrn16-8", "11.0"),
        ("wrn16-10", "17.1"),
    ],
)
def test_the_number_of_parameters_is_the_papers(name, millions):
    with torch.device("meta"):
        model = models.create(name, num_classes=10)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    digits = len(millions.partition(".")[2])
    # The papers round, or cut off: 8.949 is "8.9", 0.464 is "0.46".
    assert abs(count - float(millions)) < 10**-digits
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    projections = 3 if name.startswith("wrn") and not name.endswith("-1") else 2 if name.startswith("wrn") else 0
    depth = int(name.removeprefix("wrn").removeprefix("resnet").partition("-")[0])
    assert len(convolutions) == depth - (4 if name.startswith("wrn") else 2) + 1
    assert sum(m.kernel_size == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d)) == projections
    assert not fuse_report(model).left


def test_resnet20_and_wrn28_10_have_exactly_their_parameters():
    def resnet(n):
        stages = 2 * n * 9 * 16 * 16 + (9 * 16 * 32 + (2 * n - 1) * 9 * 32 * 32)
        stages += 9 * 32 * 64 + (2 * n - 1) * 9 * 64 * 64
        return 9 * 3 * 16 + stages + 2 * (16 + 2 * n * (16 + 32 + 64)) + 64 * 10 + 10

    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in models.CifarResNet(6 * n + 2).parameters()) for n in (1, 3, 18)}
        wide = sum(p.numel() for p in models.WideResNet(28, 10).parameters())
    assert counts == {n: resnet(n) for n in (1, 3, 18)}
    assert counts[3] == 269_722
    assert wide == 36_479_194


def test_weights_begin_as_in_he_2015b():
    model = models.create("wrn16-4", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (model.fc.bias == 0).all() and model.fc.weight.abs().max() <= 1 / 16


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_padded_shortcut_takes_every_second_pixel_and_keeps_the_format_of_an_even_image(memory_format, size):
    s = torch.randn(2, 3, size, size + 1).contiguous(memory_format=memory_format)
    y = PadShortcut(5, 2)(s)
    assert y.shape == (2, 8, (size + 1) // 2, (size + 2) // 2)
    if size == 4:  # F.pad takes every second pixel of an odd image for no memory format at all
        assert y.is_contiguous(memory_format=memory_format)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            assert torch.equal(y[:, :3, i, j], s[:, :, 2 * i, 2 * j])
    assert not y[:, 3:].any()


# ------------------------------------------------------------------------------------------------- against the formula


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", SMALL)
def test_outputs_gradients_and_statistics_are_the_formulas(name, memory_format, training, fused):
    model = make(name, fused=fused).double().to(memory_format=memory_format).train(training)
    tensors = tensors_of(model)
    formula = Formula(name, tensors, training)
    x = images(name, memory_format, memory_format=memory_format)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    y, expected = model(inputs[0]), formula(inputs[1])
    close(y, expected, x.numel(), times=1e3)
    dy = torch.randn(y.shape, generator=generator(name), dtype=torch.float64)
    y.backward(dy), expected.backward(dy)
    close(inputs[0].grad, inputs[1].grad, x.numel(), "input gradient", times=1e4)
    for key, p in model.named_parameters():
        close(p.grad, tensors[key].grad, x.numel(), f"gradient of {key}", times=1e4)
    for key, b in model.named_buffers():
        if b.is_floating_point():
            close(b, tensors[key], x.numel(), key, times=1e3)
        else:
            assert b == training


@pytest.mark.parametrize("algorithm", ["winograd", "torch", None])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", SMALL)
def test_in_float32_it_is_as_near_to_float64_as_plain_pytorch(name, memory_format, algorithm):
    fused = make(name, conv_algorithm=algorithm).to(memory_format=memory_format)
    gen = generator(name, memory_format, algorithm)
    # One draw may have a gradient that is nearly 0, whose relative error is a matter of luck on either side.
    errors = sum(errors_of(name, [twin(fused), unfuse(twin(fused))], memory_format, gen) for _ in range(3))
    # Winograd's rounding errors are about twice those of the direct sum.
    assert errors[0] <= 4 * errors[1]


def errors_of(name, models, memory_format, gen):
    """Of each model in float32, all relative errors together: outputs, gradients and statistics."""
    while True:
        # No ReLU in doubt: behind a flipped one stand whole layers.
        x = torch.randn((3, 3, 8, 8), generator=gen).contiguous(memory_format=memory_format)
        tensors = tensors_of(models[0])
        with Operators() as seen:
            expected = Formula(name, tensors, True)(x.double())
        if not any(near_zero(z, x.dtype).any() for z in seen.relu_inputs):
            break
    dy = torch.randn(expected.shape, generator=gen)
    expected.backward(dy.double())
    errors = []
    for model in models:
        y = model(x)
        y.backward(dy)
        found = {"y": (y, expected)}
        found |= {key: (p.grad, tensors[key].grad) for key, p in model.named_parameters()}
        found |= {key: (b, tensors[key]) for key, b in model.named_buffers() if b.is_floating_point()}
        with torch.no_grad():
            found["evaluation"] = (model.eval()(x), Formula(name, tensors_of(model), False)(x.double()))
        errors.append(torch.stack([(ours - true).norm() / true.norm() for ours, true in found.values()]).norm())
    return torch.stack(errors)


@pytest.mark.parametrize("name", SMALL)
def test_dropout_stands_between_the_convolutions_of_every_block(name):
    model = make(name, dropout=0.3).double()
    assert {m.dropout for m in model.modules() if isinstance(m, FusedBlock)} == {0.3}

    def drop(z):
        return torch.where(contract.dropout_keep(z.shape, contract.draw_seed(z.device), 0.3), z / 0.7, 0)

    x, plain = images(name, "dropout"), unfuse(twin(model))
    for network, rule in ((model, drop), (plain, lambda z: F.dropout(z, 0.3))):
        torch.manual_seed(3)
        expected = Formula(name, tensors_of(network), True, rule)(x)
        torch.manual_seed(3)
        close(network(x), expected, x.numel(), times=1e3)
        network.eval()
        assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_stays_as_near_as_plain_pytorch(name):
    fused = make(name)
    plain, x = unfuse(twin(fused)), images(name, "bfloat16", dtype=torch.float32)
    expected = Formula(name, tensors_of(fused), False)(x.double()).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused.eval()(x), plain.eval()(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(fused.train()(x), torch.arange(4))
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fused.parameters())


# ------------------------------------------------------------------------------------------------ fused, plain, frozen


KINDS = {
    "resnet20": (models.CifarResNet, PlainCifarResNet, FusedBasicBlock, BasicBlock),
    "wrn16-1": (models.WideResNet, PlainWideResNet, FusedPreactivationBlock, PreactivationBlock),
}


@pytest.mark.parametrize("name", KINDS)
def test_fuse_and_unfuse_change_classes_and_nothing_else(name):
    network, plain_network, block, plain_block = KINDS[name]
    model = models.create(name, num_classes=3)
    plain = unfuse(model)
    assert (type(model), type(plain)) == (network, plain_network)
    assert {type(b) for b in (*model.layer1, *model.layer2)} == {block}
    assert {type(b) for b in (*plain.layer1, *plain.layer2)} == {plain_block}
    report = fuse_report(plain)
    assert not report.swapped and set(report.left.values()) == {"not fused yet: fuse(model) does it"}
    assert len(report.left) == 1 + (9 if name == "resnet20" else 6)
    assert repr(fuse(plain)) == repr(model)
    assert list(fuse_report(fuse(plain)).swapped) == list(report.left)
    direct = plain_network(20 if name == "resnet20" else 16, *([1] if name == "wrn16-1" else []), num_classes=3)
    assert repr(direct) == repr(plain)


@pytest.mark.parametrize("name", KINDS)
def test_a_network_is_copied_pickled_and_scripted(name):
    model, x = make(name).eval(), images(name, "copies", dtype=torch.float32)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        wanted = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert type(other) is type(model)
            assert torch.equal(other(x), wanted)
        scripted = torch.jit.script(model)
        assert torch.equal(scripted(x), unfuse(model)(x))
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert "fastres" not in str(program.graph)


@pytest.mark.parametrize("algorithm", ["winograd", "torch"])
@pytest.mark.parametrize("name", KINDS)
def test_frozen_it_is_the_same_function_without_normalisations(name, algorithm):
    model = make(name, conv_algorithm=algorithm, dropout=0.3)
    frozen = freeze(model)
    assert not [m for m in frozen.modules() if isinstance(m, (nn.BatchNorm2d, FusedBlock))]
    assert not list(frozen.parameters())
    expected = Formula(name, tensors_of(model), False)
    for size, memory_format in ((16, FORMATS[0]), (32, FORMATS[1])):
        x = images(name, size, dtype=torch.float32, size=size, memory_format=memory_format)
        with torch.no_grad():
            wanted = expected(x.double())
            assert (frozen(x) - wanted).norm() <= 1e-5 * wanted.norm()
            with torch.autocast("cpu", torch.bfloat16):
                assert (frozen(x) - wanted).norm() <= 0.05 * wanted.norm()
    program = torch.export.export(frozen, (x,))
    assert "fastres" not in str(program.graph)
    with torch.no_grad():
        assert (program.module()(x) - wanted).norm() <= 1e-5 * wanted.norm()
    with pytest.raises(RuntimeError, match=r"^backward: the model was frozen"):
        frozen(x.requires_grad_()).sum().backward()


def test_a_wide_network_with_a_hooked_last_normalisation_is_frozen_but_for_that():
    model = make("wrn16-1").eval()
    model.bn1.register_forward_hook(lambda module, args, y: 2 * y)
    model.layer2[0].bn1.register_forward_hook(lambda module, args, y: 2 * y)
    frozen, x = freeze(model), images("hooked", dtype=torch.float32)
    assert type(frozen.layer2[0]) is FusedPreactivationBlock and type(frozen.layer2[1]) is not FusedPreactivationBlock
    assert isinstance(frozen.bn1, nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- names and widths


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "article", "wrn16-4"])
@pytest.mark.parametrize("width", [0.25, 0.3, 2])
def test_width_multiplies_all_channels_and_rounds_to_multiples_of_eight(name, width):
    def channels(model):
        return [t for m in model.modules() if isinstance(m, nn.Conv2d) for t in (m.in_channels, m.out_channels)][1:]

    with torch.device("meta"):
        model, whole = (models.create(name, num_classes=5, width=w) for w in (width, 1.0))
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 5)
    expansion = 4 if name == "resnet50" else 1
    for ours, theirs in zip(channels(model), channels(whole), strict=True):
        allowed = {scale * max(8, round(theirs / scale * width / 8) * 8) for scale in (1, expansion)}
        assert ours in allowed
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]


def test_half_a_channel_group_is_rounded_up():
    with torch.device("meta"):
        model = models.create("resnet20", num_classes=5, width=0.75)
    assert [m.out_channels for m in (model.conv1, model.layer2[0].conv1, model.layer3[0].conv1)] == [16, 24, 48]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_narrow_resnet_trains(stem):
    model = models.create("resnet18", num_classes=4, stem=stem, width=0.125)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert model.conv1.out_channels == model.bn1.num_features == 8
    assert model.fc.in_features == 64
    assert all(p.grad is not None for p in model.parameters())


def test_width_one_is_the_network_without_a_width():
    for name in ("resnet18", "article", "resnet20"):
        states = []
        for options in ({}, {"width": 1}, {"width": 1.0}):
            torch.manual_seed(0)
            states.append(models.create(name, num_classes=4, stem="imagenet", **options).state_dict())
        for state in states[1:]:
            assert all(torch.equal(a, b) for a, b in zip(states[0].values(), state.values(), strict=True))


@pytest.mark.parametrize("name", [*models.NAMES, "wrn10-1", "wrn52-1", "wrn100-3"])
def test_names_are_known(name):
    assert models.why_unknown(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn25-4", r"expected 6n \+ 4 \(10, 16, 22, 28, 34, ...\) as the depth, got 'wrn25-4'"),
        ("wrn4-4", r"expected 6n \+ 4 .* got 'wrn4-4'"),
        ("wrn28-0", r"expected one of resnet18, .*wrn<depth>-<k>, got 'wrn28-0'"),
        ("wrn28", r"expected one of .*, got 'wrn28'"),
        ("wrn028-10", r"expected one of .*, got 'wrn028-10'"),
        ("WRN28-10", r"expected one of .*, got 'WRN28-10'"),
        ("resnet21", r"expected one of .*, got 'resnet21'"),
        (None, r"expected one of .*, got None"),
    ],
)
def test_an_unknown_name_is_refused_with_its_reason(name, message):
    with pytest.raises(ValueError, match=f"^name: {message}$"):
        models.create(name, num_classes=10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: models.CifarResNet(21), ValueError, r"depth: expected 6n \+ 2 \(8, 14, 20, 26, 32, ...\), got 21"),
        (lambda: models.CifarResNet(2), ValueError, r"depth: expected 6n \+ 2"),
        (lambda: models.CifarResNet(20.0), TypeError, "depth: expected an int, got float"),
        (lambda: models.CifarResNet(20, 0), ValueError, "num_classes: expected at least 1, got 0"),
        (lambda: models.CifarResNet(20, stem=""), ValueError, "stem: expected one of"),
        (lambda: models.CifarResNet(20, dropout=1.0), ValueError, "dropout: expected 0 <= dropout < 1"),
        (lambda: models.CifarResNet(20, conv_algorithm="fft"), ValueError, "conv_algorithm: expected one of"),
        (lambda: models.WideResNet(28, 0), ValueError, "k: expected at least 1, got 0"),
        (lambda: models.WideResNet(28, 2.5), TypeError, "k: expected an int, got float"),
        (lambda: models.WideResNet(27, 2), ValueError, r"depth: expected 6n \+ 4"),
        (lambda: models.WideResNet(10, 1, conv_algorithm=3), TypeError, "conv_algorithm: expected a string or None"),
        *[
            (lambda name=name, width=width: models.create(name, num_classes=2, width=width), error, message)
            for name in ("resnet18", "article", "resnet20", "wrn10-1")
            for width, error, message in (
                (0, ValueError, "width: expected a positive number, got 0"),
                (float("inf"), ValueError, "width: expected a positive number, got inf"),
                (float("nan"), ValueError, "width: expected a positive number, got nan"),
                ("1", TypeError, "width: expected a number, got str"),
                (True, TypeError, "width: expected a number, got bool"),
            )
        ],
    ],
)
def test_a_bad_argument_is_named(make, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        make()
