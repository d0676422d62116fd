"""Convolutions whose kernel covers the image, which become matrix products."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn as nn

import fastres
from tests.compiled import compare

SHAPE = (3, 6, 7, 5)


class Head(nn.Module):
    """A convolution of whole images between two others, written to in place, and a gate from images of one pixel.

    Nothing has a kink, of which bfloat16 may take either side.
    """

    def __init__(self, bias: bool, **options) -> None:
        super().__init__()
        self.before = nn.Conv2d(6, 10, 3, padding=1)
        self.whole = nn.Conv2d(10, 8, (7, 5), bias=bias, **options)
        self.last = nn.Conv2d(8, 4, 1)
        self.gate = nn.Conv2d(10, 10, 1)

    def forward(self, x):
        x = self.before(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.last(self.whole(x).tanh_())


def linears(reports):
    return [report.operators["linear_of_image"] for report in reports]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": "valid"}, {"padding": (0, 0), "stride": (3, 1)}])
def test_values_are_those_of_the_convolution(layout, bias, options):
    reports = compare.check(functools.partial(Head, bias, **options), [SHAPE], layout=layout)
    assert linears(reports) == [3] * len(reports)
    assert [report.fused_convolutions for report in reports] == [3] * len(reports)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    how = {"dtype": torch.float32} if dtype == torch.float32 else {"dtype": torch.float32, "autocast": dtype}
    assert linears(compare.check(functools.partial(Head, True), [SHAPE], layout="channels_last", **how)) == [3, 3]


class Spread(Head):
    """What is interpolated or padded lies in its input's format, and one pixel has one."""

    def forward(self, x):
        x = self.whole(self.before(x))
        return nn.functional.interpolate(x, (4, 4)), nn.functional.pad(x, (1, 1, 1, 1)), self.last(x)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bias", [True, False])
def test_strides_are_those_of_the_convolution(layout, bias):
    reports = compare.check(functools.partial(Spread, bias), [SHAPE], layout=layout)
    assert linears(reports) == [2] * len(reports)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        with torch.no_grad():
            return self.conv(x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_result_is_no_view(layout):
    """A view that was made without gradients may not be written to with them, and no view be detached in place."""
    model = Mean().to(memory_format=layout)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=layout)
    with compare.fresh():
        y = torch.compile(model, backend="fastres")(x)
        assert linears(fastres.compile_report()) == [1]
    assert y.stride() == model(x).stride()
    y += nn.Parameter(torch.ones(4, 1, 1))
    y.detach_()


class One(nn.Module):
    def __init__(self, *args, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **options)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: One(4, 6, 3, padding=1), (2, 4, 3, 3)),
        (lambda: One(4, 6, 3, groups=2), (2, 4, 3, 3)),
        (lambda: One(4, 6, 2, dilation=2), (2, 4, 3, 3)),
        (lambda: One(4, 6, 3), (2, 4, 3, 4)),
        (lambda: One(4, 6, (1, 3)), (2, 4, 3, 3)),
    ],
    ids=["padding", "groups", "dilation", "wider", "one row"],
)
def test_others_stay_convolutions(make, shape):
    assert linears(compare.check(make, [shape])) == [0, 0]


def test_one_pixel_may_be_dilated():
    assert linears(compare.check(lambda: One(4, 6, 1, dilation=2), [(2, 4, 1, 1)])) == [1, 1]


def test_batches_of_any_size():
    model = One(4, 6, 3)
    with compare.fresh():
        compiled = torch.compile(model, backend="fastres")
        for n in (2, 5, 3, 0):
            x = torch.randn(n, 4, 3, 3)
            torch.testing.assert_close(compiled(x), model(x))
        found = linears(fastres.compile_report())
    # The second graph serves every size but 0 and 1.
    assert found == [1] * len(found)
    assert len(found) <= 3
