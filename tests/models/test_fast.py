from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastres import models
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.models import FastNet
from fastres.nn import PlainPooledBlock, PooledBlock
from tests.oracle import LAYOUTS, activation, assert_close, generator, output_length, weight_length
from tests.parity import close, learns_by_heart, same_training, scramble

WIDTH = 0.16  # 8, 40 and 40 channels


def network(*key, dropout=0.0, algorithm=None, classes=7):
    """A small network in which nothing is at its first value."""
    gen = generator(*key)
    model = FastNet(classes, width=WIDTH, dropout=dropout, conv_algorithm=algorithm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=gen) * (2 / fan) ** 0.5)
        model.whitening.bias.copy_(torch.randn(model.whitening.bias.shape, generator=gen))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Without it a channel that happens to vary little would magnify rounding without bound.
                module.eps = 0.05
    return scramble(model, seed=int(torch.randint(2**31, (1,), generator=gen)))


def oracle(state, x, training):
    """Logits from a state_dict in float64, written with torch.nn.functional; updates running statistics in training."""

    def norm(name, x):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training, 0.4, 0.05)

    x = F.gelu(F.conv2d(x, state["whitening.weight"], state["whitening.bias"]))
    for block in ("block1", "block2", "block3"):
        x = F.max_pool2d(F.conv2d(x, state[f"{block}.conv1.weight"], padding=1), 2)
        x = F.gelu(norm(f"{block}.bn1", x))
        x = F.gelu(norm(f"{block}.bn2", F.conv2d(x, state[f"{block}.conv2.weight"], padding=1)))
    return x.amax((2, 3)) @ state["fc.weight"].T / 9


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_is_what_it_says_in_float64(layout, training, fused):
    gen = generator("oracle", layout, training)
    model = network("oracle", layout, training).double().train(training)
    model = model if fused else unfuse(model)
    x = activation((4, 3, 22, 17), torch.float64, layout, gen).requires_grad_()
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in names:
        state[name].requires_grad_()
    exact = x.detach().clone().requires_grad_()
    y, expected = model(x), oracle(state, exact, training)
    close(y, expected, x.numel(), times=1e3)
    dy = torch.randn(y.shape, generator=gen, dtype=torch.float64)
    found = torch.autograd.grad(y, [x, *(dict(model.named_parameters())[name] for name in names)], dy)
    wanted = torch.autograd.grad(expected, [exact, *(state[name] for name in names)], dy)
    for name, a, b in zip(["x", *names], found, wanted, strict=True):
        close(a, b, x.numel(), f"gradient of {name}", times=1e3)
    for name, value in model.named_buffers():
        if value.is_floating_point():
            close(value, state[name], x.numel(), name, times=1e3)


def block_oracle(block, x):
    """PooledBlock in training, in float64: the block's own parameters, PyTorch's operators."""

    def norm(norm, x):
        return F.gelu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, 0.05))

    out = norm(block.bn1, F.max_pool2d(F.conv2d(x, block.conv1.weight, padding=1), 2))
    return norm(block.bn2, F.conv2d(out, block.conv2.weight, padding=1))


def separate(x, block):
    """Whether no two largest values of a window of the pool are so close that rounding may say which is larger."""
    y = F.conv2d(x.double(), block.conv1.weight.double(), padding=1)
    windows = F.unfold(y.flatten(0, 1)[:, None], 2, stride=2)
    largest = windows.topk(2, dim=1).values
    return bool((largest[:, 0] - largest[:, 1] > 1e-5 * y.abs().max()).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["auto", "winograd", "torch"])
def test_a_block_in_float32_has_the_gradients_of_float64(algorithm, layout):
    gen = generator("block", algorithm, layout)
    block = PooledBlock(32, 40, eps=0.05, conv_algorithm=algorithm)
    for conv in (block.conv1, block.conv2):
        nn.init.normal_(conv.weight, std=(2 / (9 * 32)) ** 0.5, generator=gen)
    scramble(block, seed=int(torch.randint(2**31, (1,), generator=gen)))
    x = activation((4, 32, 9, 8), torch.float32, layout, gen, mean=0.0)
    while not separate(x, block):
        x = activation((4, 32, 9, 8), torch.float32, layout, gen, mean=0.0)
    x.requires_grad_()
    exact, exact_x = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    y, expected = block(x), block_oracle(exact, exact_x)
    dy = torch.randn(y.shape, generator=gen)
    y.backward(dy)
    expected.backward(dy.double())
    length = output_length(40)
    assert_close(y, expected, "y", length=length)
    assert_close(x.grad, exact_x.grad, "gradient of x", length=length)
    wanted = dict(exact.named_parameters())
    for name, p in block.named_parameters():
        # The sums behind a gradient carry the errors of the products before, of their own length.
        if p.requires_grad:
            assert_close(p.grad, wanted[name].grad, f"gradient of {name}", length=length + weight_length(x))
    for name, value in block.named_buffers():
        if value.is_floating_point():
            assert_close(value, dict(exact.named_buffers())[name], name, length=length)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_network_is_as_near_to_float64_as_plain_pytorch_is(training, autocast, layout):
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        key = ("near", training, autocast, layout, seed)
        fused = network(*key).train(training)
        plain, exact = unfuse(copy.deepcopy(fused)), unfuse(copy.deepcopy(fused)).double()
        x = activation((8, 3, 32, 32), torch.float32, layout, generator(*key))
        results = []
        for model in (fused, plain, exact):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast and model is not exact):
                y = model(x if model is not exact else x.double())
            results.append([y, *(b for b in model.buffers() if b.dim())])
        ours, theirs, true = (
            torch.cat([v.double().flatten() / t.norm() for v, t in zip(r, results[2], strict=True)]) for r in results
        )
        errors += torch.stack(((ours - true).norm(), (theirs - true).norm()))
    # The rounding errors of Winograd's sums in float32 are about twice those of the direct ones.
    assert errors[0] <= 4 * errors[1]


def test_winograds_convolution_and_its_statistics_are_used_where_the_network_is_wide():
    model = FastNet().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).sum().backward()
    calls = {e.key: e.count for e in profile.key_averages()}
    assert calls["fastres::conv3x3_forward"] >= 4
    assert calls["fastres::batch_norm_act_training"] == 6
    assert "aten::native_batch_norm" not in calls
    model.eval()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    assert "aten::native_batch_norm" not in {e.key for e in profile.key_averages()}


def test_fused_and_plain_from_one_seed_train_alike():
    torch.manual_seed(3)
    fused = models.create("fast", num_classes=4)
    torch.manual_seed(3)
    plain = models.create("fast", num_classes=4, fused=False)
    assert [type(m) for m in plain.modules() if isinstance(m, PlainPooledBlock)] == [PlainPooledBlock] * 3
    for key, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value), key
    gen = generator("alike")

    def make():
        return torch.randn(6, 3, 18, 18, generator=gen, dtype=torch.float64)

    same_training(fused.double(), plain.double(), make, steps=2, lr=1e-3, times=1e4)


def test_unfusing_and_fusing_change_classes_only():
    model = network("classes", dropout=0.25)
    before = [(name, id(p)) for name, p in model.named_parameters()]
    plain = unfuse(model)
    assert {type(m) for m in plain.modules() if type(m).__module__.startswith("fastres.nn")} == {PlainPooledBlock}
    report = fuse_report(plain)
    assert not report.swapped
    assert sorted(report.left) == ["block1", "block2", "block3"]
    again = fuse(plain)
    assert sorted(fuse_report(again).swapped) == ["block1", "block2", "block3"]
    assert {type(m) for m in again.modules() if isinstance(m, PlainPooledBlock)} == {PooledBlock}
    assert [(name, id(p)) for name, p in again.named_parameters()] == before
    assert [m.dropout for m in again.modules() if isinstance(m, PooledBlock)] == [0.25] * 3
    assert repr(again) == repr(model)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_dropout_drops_its_share_of_a_blocks_output_in_training_only(fused):
    torch.manual_seed(0)
    block = PooledBlock(32, 32, dropout=0.25)
    block = block if fused else unfuse(block)
    x = torch.randn(16, 32, 16, 16)
    share = (block(x) == 0).double().mean().item()
    assert share == pytest.approx(0.25, abs=6 * (0.25 * 0.75 / (16 * 32 * 64)) ** 0.5)
    block.eval()
    assert torch.equal(block(x), block(x))
    assert (block(x) == 0).double().mean().item() < 0.01


@pytest.mark.parametrize("child", ["pool", "act", "bn2", "conv1"])
def test_a_block_with_another_child_computes_that_childs_meaning(child):
    gen = generator("child", child)
    block = PooledBlock(32, 32).double()
    torch.nn.init.normal_(block.conv1.weight, generator=gen)
    replacements = {
        "pool": nn.AvgPool2d(2), "act": nn.Tanh(), "bn2": nn.GroupNorm(4, 32).double(),
        "conv1": nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular").double(),
    }  # fmt: skip
    setattr(block, child, replacements[child])
    x = torch.randn(4, 32, 8, 8, generator=gen, dtype=torch.float64)
    out = block.act(block.bn1(block.pool(block.conv1(x))))
    close(block(x), block.act(block.bn2(block.conv2(out))), 9 * 32 * 36, times=16)


def test_the_convolutions_begin_as_the_identity_of_their_input():
    torch.manual_seed(0)
    model = FastNet(width=0.5)
    x = torch.randn(2, 32, 6, 6)
    assert torch.equal(model.block1.conv1(x[:, :24])[:, :24], x[:, :24])
    assert torch.equal(model.block1.conv2(x), x)
    assert torch.equal(model.block2.conv1(x)[:, :32], x)
    assert model.block2.conv1.weight[32:].abs().max() > 0
    narrow = FastNet(width=0.16)  # 24 channels to 8
    assert torch.equal(narrow.block1.conv1(x[:, :24]), x[:, :8])
    assert [m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)] == [24, 8, 8, 40, 40, 40, 40]
    assert [m.out_channels for m in FastNet().modules() if isinstance(m, nn.Conv2d)] == [24, 64, 64, *[256] * 4]
    assert all(
        m.weight.eq(1).all() and not m.weight.requires_grad and m.bias.eq(0).all()
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.whitening.bias.eq(0).all()
    assert "whitening.bias" in trained
    assert "whitening.weight" not in trained


def test_the_whitening_makes_the_patches_of_its_images_uncorrelated_with_variance_one():
    gen = generator("whitening")
    # Correlated between colours and neighbours, as images are; the means are not 0.
    x = F.avg_pool2d(torch.randn(64, 3, 21, 21, generator=gen, dtype=torch.float64), 2, 1)
    mixing = torch.randn(3, 3, generator=gen, dtype=torch.float64) + 2 * torch.eye(3, dtype=torch.float64)
    x = torch.einsum("oc,nchw->nohw", mixing, x) + 0.25
    model = FastNet(width=0.01).double()
    model.set_whitening(x, eps=1e-14)
    y = F.conv2d(x, model.whitening.weight).transpose(0, 1).flatten(1)
    second = y[:12] @ y[:12].T / y.shape[1]
    torch.testing.assert_close(second, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(y[12:], -y[:12])
    filters = model.whitening.weight[:12].flatten(1)
    norms = filters.norm(dim=1)
    assert bool((norms[:-1] >= norms[1:]).all())
    assert bool((filters.gather(1, filters.abs().argmax(1, keepdim=True)) > 0).all())
    eps = 0.01
    model.set_whitening(x, eps=eps)
    values = norms.square().reciprocal()
    torch.testing.assert_close(model.whitening.weight[:12].flatten(1).norm(dim=1), (values + eps).rsqrt())
    assert not model.whitening.weight.requires_grad


def test_the_filters_are_read_from_patches_as_the_convolution_reads_them():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 1, 0, 1] = 2.0  # a single patch with one element that is not 0
    model = FastNet(width=0.01)
    model.set_whitening(images, eps=0.0001)
    assert model.whitening.weight[11, 1, 0, 1].item() == pytest.approx(1 / (4 + 0.0001) ** 0.5)
    assert model.whitening.weight[11].count_nonzero() == 1


def test_it_learns_a_few_images_by_heart():
    torch.manual_seed(0)
    model = FastNet(4, width=WIDTH)
    x = torch.randn(16, 3, 18, 18)
    model.set_whitening(x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.85)
    assert learns_by_heart(model, x, optimizer, steps=30)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_it_exports_and_compiles_as_the_plain_network(fused):
    model = network("export").double().eval()
    x = torch.randn(2, 3, 18, 18, generator=generator("export"), dtype=torch.float64)
    with torch.no_grad():
        expected = unfuse(model)(x)
        model = model if fused else unfuse(model)
        close(torch.export.export(model, (x,)).module()(x), expected, x.numel(), times=1e3)
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected, x.numel(), times=1e3)


def test_checkpoints_and_copies_go_both_ways():
    model = network("copies").double().eval()
    other = unfuse(FastNet(7, width=WIDTH)).double().eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.05
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 18, 18, generator=generator("copies"), dtype=torch.float64)
    with torch.no_grad():
        close(copy.deepcopy(model)(x), other(x), x.numel(), times=1e3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FastNet(0), ValueError, "num_classes: expected at least 1, got 0"),
        (lambda: FastNet(stem="imagenet"), ValueError, "stem: expected 'cifar', the only one .* got 'imagenet'"),
        (lambda: FastNet(stem="mnist"), ValueError, "stem: expected one of"),
        (lambda: FastNet(dropout=1), ValueError, "dropout: expected 0 <= dropout < 1, got 1"),
        (lambda: FastNet(width=0), ValueError, "width: expected a positive number, got 0"),
        (lambda: FastNet(width="1"), TypeError, "width: expected a number, got str"),
        (lambda: FastNet(conv_algorithm="fft"), ValueError, "conv_algorithm: expected one of"),
        (lambda: FastNet()(torch.randn(2, 3, 8, 32)), ValueError, "x: expected at least 9 pixels a side, got 8 x 32"),
        (lambda: FastNet().set_whitening([1]), TypeError, "images: expected a tensor in floating point, got list"),
        (
            lambda: FastNet().set_whitening(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)),
            TypeError,
            "images: expected a tensor in floating point, got torch.uint8",
        ),
        (lambda: FastNet().set_whitening(torch.zeros(5, 1, 4, 4)), ValueError, r"images: .* got \(5, 1, 4, 4\)"),
        (lambda: FastNet().set_whitening(torch.zeros(0, 3, 4, 4)), ValueError, "images: expected"),
        (lambda: FastNet().set_whitening(torch.zeros(5, 3, 1, 4)), ValueError, "images: .* at least 2"),
        (lambda: FastNet().set_whitening(torch.zeros(5, 3, 4, 4), eps=0), ValueError, "eps: expected a positive"),
        (
            lambda: FastNet().set_whitening(torch.full((5, 3, 4, 4), float("nan"))),
            ValueError,
            "images: expected finite values",
        ),
    ],
)
def test_a_bad_argument_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
