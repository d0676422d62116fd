from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastres import models
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.models import ArticleResNet18
from fastres.models.article import PlainArticleResNet18
from fastres.nn import DropoutBasicBlock, PlainResidualBlock, PlainSkipConnection, ResidualBlock
from fastres.nn.blocks import FusedBlock
from tests.parity import close, learns_by_heart, same_training, scramble


@pytest.mark.parametrize("width", [1.0, 0.4])
@pytest.mark.parametrize("name", ["resnet18", "article", "resnet20", "wrn16-2"])
def test_fused_and_plain_from_one_seed_are_the_same_network(name, width):
    torch.manual_seed(0)
    fused = models.create(name, num_classes=4, dropout=0.0, width=width)
    torch.manual_seed(0)
    plain = models.create(name, num_classes=4, dropout=0.0, fused=False, width=width)
    for key, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value), key
    generator = torch.Generator().manual_seed(1)

    def make():
        return torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)

    same_training(fused.double(), plain.double(), make, steps=1, lr=1e-3, times=1e4)


def test_without_dropout_the_plain_network_is_made_of_torchvision_and_torch_only():
    model = models.create("resnet50", num_classes=4, fused=False)
    assert type(model) is ResNet
    assert {type(m) for m in model.modules() if isinstance(m, (BasicBlock, Bottleneck))} == {Bottleneck}
    assert not [type(m) for m in model.modules() if type(m).__module__.startswith("fastres")]


def test_with_dropout_the_plain_network_has_torchvisions_blocks_and_dropout():
    model = models.create("resnet18", num_classes=4, dropout=0.2, fused=False)
    assert {type(m) for m in model.modules() if type(m).__module__.startswith("fastres")} == {DropoutBasicBlock}
    assert {m.dropout for m in model.modules() if isinstance(m, BasicBlock)} == {0.2}


@pytest.mark.parametrize("name", models.NAMES)
def test_conv_algorithm_reaches_every_block(name):
    with torch.device("meta"):
        for algorithm in (None, "torch"):
            model = models.create(name, num_classes=2, conv_algorithm=algorithm)
            blocks = [m for m in model.modules() if isinstance(m, FusedBlock)]
            assert blocks
            assert {m.conv_algorithm for m in blocks} == {algorithm}
            assert str(fuse_report(model)) == str(fuse_report(models.create(name, num_classes=2)))


@pytest.mark.parametrize("name", models.NAMES)
def test_every_name_makes_a_network_with_its_own_default_dropout(name):
    with torch.device("meta"):
        model = models.create(name, num_classes=6, stem="cifar" if name == "fast" else "imagenet")
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 6)
    rates = {m.dropout for m in model.modules() if isinstance(m, FusedBlock)}
    assert rates == ({0.5} if name == "article" else {0.0})


def test_the_networks_of_the_article_have_a_long_skip_from_the_stem():
    torch.manual_seed(0)
    model = scramble(ArticleResNet18(7, stem="imagenet")).double().eval()
    assert [len(getattr(model, f"layer{i}")) for i in range(1, 5)] == [2, 2, 2, 2]
    assert {type(m) for i in range(1, 5) for m in getattr(model, f"layer{i}")} == {ResidualBlock}
    assert (model.skip.in_features, model.fc.in_features) == (64, 512)
    assert model.skip.weight.data_ptr() != model.fc.weight.data_ptr()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        norm = model.bn1
        stem = F.conv2d(x, model.conv1.weight, stride=2, padding=3)
        stem = F.batch_norm(stem, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        stem = F.max_pool2d(F.relu(stem), 3, 2, 1)
        assert stem.shape == (2, 64, 16, 16)
        features = model.layer4(model.layer3(model.layer2(model.layer1(stem))))
        assert features.shape == (2, 512, 2, 2)
        expected = features.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
        expected = expected + stem.mean((2, 3)) @ model.skip.weight.T + model.skip.bias
        close(model(x), expected, 4608, times=16)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_networks_of_the_article_learn_a_few_images_by_heart(stem):
    torch.manual_seed(0)
    model = ArticleResNet18(4, stem=stem, dropout=0.1)
    x = torch.randn(8, 3, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert learns_by_heart(model, x, optimizer, steps=8)


def test_the_plain_network_of_the_article_can_be_fused_again():
    model = models.create("article", num_classes=3)
    plain = unfuse(model)
    assert type(plain) is PlainArticleResNet18
    assert {type(m) for m in plain.modules() if type(m).__module__.startswith("fastres")} == {
        PlainArticleResNet18, PlainResidualBlock, PlainSkipConnection,
    }  # fmt: skip
    report = fuse_report(plain)
    assert not report.swapped
    assert set(report.left.values()) == {"not fused yet: fuse(model) does it"}
    assert repr(fuse(plain)) == repr(model)


def test_bfloat16_autocast_stays_near_torchvision():
    torch.manual_seed(0)
    fused = models.create("resnet18", num_classes=4)
    plain = unfuse(fused)
    exact = unfuse(fused).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = exact(x)
        fused.eval(), plain.eval()
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = fused(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm()
    fused.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(fused(x), torch.arange(4))
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fused.parameters())


@pytest.mark.parametrize("name", ["resnet18", "article"])
def test_a_model_in_bfloat16_trains(name):
    model = models.create(name, num_classes=4).bfloat16()
    y = model(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert all(isinstance(m, nn.Module) and m.running_mean.dtype == torch.bfloat16 for m in [model.bn1])
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
