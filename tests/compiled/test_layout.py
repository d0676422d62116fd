"""Networks in NCHW: what of them is computed in channels_last, between which copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

import fastres
from fastres.backend.compiler import rewrite
from tests import oracle
from tests.compiled import compare

SHAPE = (2, 16, 12, 12)


class Squeeze(nn.Module):
    """A block of Hu et al. 2018, "Squeeze-and-excitation networks": gates from the mean of each image's channel."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool, self.conv, self.norm = pool, nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.gate, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 3, padding=1)

    def mean(self, x: Tensor) -> Tensor:
        if self.pool == "adaptive":
            return nn.functional.adaptive_avg_pool2d(x, 1)
        return x.mean((2, -1), keepdim=True) if self.pool == "method" else torch.mean(x, [2, 3], True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.last(x * self.gate(self.mean(x)).sigmoid())


class FewInputs(nn.Module):
    """A strided 1x1 convolution beside others that gain from channels_last."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(inputs, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.strided = nn.Conv2d(inputs, 32, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.strided(x)


def rewritten(model: nn.Module, x: Tensor) -> Graph:
    """The changed graph."""
    graphs = []

    def backend(graph, _):
        rewrite(graph, "torch")
        graphs.append(graph.graph)
        return graph.forward

    with compare.fresh():
        torch.compile(model, backend=backend)(x)
    return graphs[0]


def formats(model: nn.Module, x: Tensor) -> dict[tuple[int, int], bool]:
    """(kernel, inputs) of each convolution in the changed graph -> whether it reads channels_last."""
    found = {}
    for node in rewritten(model, x).find_nodes(op="call_function", target=torch.conv2d):
        image, weight = (n.meta["example_value"] for n in node.args[:2])
        found[weight.shape[2], weight.shape[1]] = image.is_contiguous(memory_format=torch.channels_last)
    return found


@pytest.fixture(autouse=True)
def copies_cost_nothing(monkeypatch):
    """These networks are too small for copies to pay."""
    compare.make_copies_free(monkeypatch)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=oracle.generator("layout", shape))


@pytest.mark.parametrize("pool", ["adaptive", "method", "function"])
def test_means_of_images_are_taken_in_channels_last_as_they_lie(pool):
    training, evaluation = compare.check(lambda: Squeeze(pool), [SHAPE], dtype=torch.float32)
    # Convolution, normalisation and ReLU, the product and the last convolution; gates have one pixel.
    assert training.channels_last == evaluation.channels_last == 5
    copies = rewritten(Squeeze(pool), images(*SHAPE)).find_nodes(op="call_method", target="contiguous")
    assert [n.kwargs["memory_format"] for n in copies] == [torch.channels_last, torch.contiguous_format]


class PooledOutput(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(torch.relu(self.norm(self.conv(x))), 1)
        return nn.functional.pad(pooled, (1, 1, 1, 1))  # of the pooled one's format


def test_a_pooled_image_has_the_strides_of_nchw():
    training, evaluation = compare.check(lambda: PooledOutput("adaptive"), [SHAPE], dtype=torch.float32)
    assert training.channels_last == evaluation.channels_last == 3


class Features(Squeeze):
    """Gives what it reads itself, as a network does whose activations are to be explained."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = torch.relu(self.norm(self.conv(x)))
        with torch.no_grad():
            views = features.flatten(1)
        return features, views, self.last(features).mean() + self.mean(features).square().mean()


@pytest.mark.parametrize("pool", ["adaptive", "method"])
def test_an_output_s_gradient_is_that_of_all_that_reads_it(pool):
    model, x = Features(pool), images(*SHAPE)
    plain = copy.deepcopy(model)
    with compare.fresh():
        compiled = torch.compile(model, backend="fastres", options={"smallest": 0, "conv_algorithm": "winograd"})
        features, views, loss = compiled(x)
        (report,) = fastres.compile_report()
    expected, _, expected_loss = plain(x)
    assert report.channels_last > 0 and features.stride() == expected.stride()
    assert features.data_ptr() == views.data_ptr()
    gradients = [torch.autograd.grad(*of)[0] for of in ((loss, features), (expected_loss, expected))]
    torch.testing.assert_close(*gradients)


class WrittenWithoutGradients(Squeeze):
    """The tensor keeps its gradient, and nothing that is computed there has one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(self.conv(x))
        with torch.no_grad():
            nn.functional.leaky_relu_(features, 0.1)
        return features, self.last(features)


def test_an_output_has_its_gradient_where_it_was_written_without():
    training, _ = compare.check(lambda: WrittenWithoutGradients("method"), [SHAPE], dtype=torch.float32)
    assert training.channels_last > 0


class OneChannel(Squeeze):
    def __init__(self, pool: str) -> None:
        super().__init__(pool)
        self.out = nn.Conv2d(self.conv.out_channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.conv(x))))


@pytest.mark.parametrize("gradients", [True, False])
def test_one_channel_has_all_strides_of_nchw(gradients):
    """What is joined to it outside goes by the strides of an axis of size 1 as well."""
    model, x = OneChannel("method"), images(*SHAPE)
    with compare.fresh(), torch.set_grad_enabled(gradients):
        compiled = torch.compile(model, backend="fastres", options={"smallest": 0, "conv_algorithm": "winograd"})
        y, expected = compiled(x), model(x)
        (report,) = fastres.compile_report()
    assert report.channels_last > 0
    assert y.stride() == expected.stride()
    assert torch.cat([y, y], 1).stride() == torch.cat([expected, expected], 1).stride()


class ViewedWithoutGradients(Squeeze):
    """Without gradients a view of a tensor with one asks for one as well, a copy does not."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(self.conv(x))
        with torch.no_grad():
            turned = features.transpose(2, 3)
        return torch.sigmoid(turned), self.last(features)


def test_a_view_that_was_made_without_gradients_asks_for_one():
    model, x = ViewedWithoutGradients("method"), images(*SHAPE)
    with compare.fresh():
        compiled = torch.compile(model, backend="fastres", options={"smallest": 0, "conv_algorithm": "winograd"})
        turned, _ = compiled(x)
    assert turned.requires_grad and model(x)[0].requires_grad


class WrittenInAPart(Squeeze):
    """The part writes to a view of what is read again after it."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        part = checkpoint(lambda t: t.relu_() * 2, features[:, :4], use_reentrant=False)
        return self.last(torch.relu(self.norm(features))) + part


class ReadInAPart(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        part = checkpoint(lambda t: self.last(self.norm(t)), features, use_reentrant=False)
        return self.last(torch.relu(features)) + part


@pytest.mark.parametrize(("network", "expected"), [(WrittenInAPart, (4, 1)), (ReadInAPart, (6, 3))])
def test_what_a_checkpointed_part_writes_to_stays_in_nchw(network, expected):
    model, x = network("method").eval(), images(*SHAPE)
    nn.init.normal_(model.norm.bias)
    with compare.fresh(), torch.no_grad():
        compiled = torch.compile(model, backend="fastres", options={"smallest": 0, "conv_algorithm": "winograd"})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
        (report,) = fastres.compile_report()
    assert (report.channels_last, report.fused_convolutions) == expected


class OtherMean(Squeeze):
    def mean(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True).mean((2, 3), keepdim=True)  # [1, C, H, W] between


def test_a_mean_over_images_keeps_its_strides():
    training, _ = compare.check(lambda: OtherMean("adaptive"), [SHAPE], dtype=torch.float32)
    assert training.channels_last > 0


@pytest.mark.parametrize("inputs", [8, 16])
def test_a_strided_1x1_convolution_of_few_inputs_stays_in_nchw(inputs):
    """There oneDNN's kernel for channels_last writes past its memory."""
    found = formats(FewInputs(inputs), images(2, inputs, 32, 32))
    assert found == {(3, inputs): True, (3, 32): True, (1, inputs): inputs >= 16}


class Overwrites(nn.Module):
    """What a network reads stays what it was, whatever copies there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu_() + x.sum(1, keepdim=True)


def test_strides_that_change_from_call_to_call_are_right_and_gain():
    """With the second layout Dynamo takes strides for numbers that it does not know."""
    model = Overwrites()
    plain = copy.deepcopy(model)
    x = images(*SHAPE)
    with compare.fresh():
        compiled = torch.compile(model, backend="fastres", options={"smallest": 0, "conv_algorithm": "winograd"})
        for given in (x.contiguous(memory_format=torch.channels_last), x, x[:, :, :7], x.mT.contiguous().mT):
            before = given.clone()
            torch.testing.assert_close(compiled(given), plain(given), rtol=1e-4, atol=1e-5)
            assert torch.equal(given, before)
        reports = fastres.compile_report()
    torch.testing.assert_close(model.norm.running_var, plain.norm.running_var)
    assert [r.fused_convolutions for r in reports] == [1] * len(reports) and len(reports) > 1
    assert reports[1].channels_last > 0
