"""Max pooling in compiled networks: at the end of a chain, by itself, and where neither is ours to take."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fastres
from fastres import _extension
from tests.compiled import compare

SHAPE = (3, 4, 9, 11)
COMPILED = _extension.cpu_capability() in ("avx2", "avx512") and _extension.load_cpu() is not None
FUSED, ALONE = "batch_norm_act_max_pool2d", "max_pool2d"


POOLS = {
    "module": nn.MaxPool2d(3, 2, 1),
    "function": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "torch's": lambda x: torch.max_pool2d(x, (3, 3), (2, 2), (1, 1)),
    "no stride": lambda x: F.max_pool2d(x, 2),
}
NAMED = {"named": lambda x: F.max_pool2d(input=x, kernel_size=2)}
OTHERS = {
    "ceiling": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "dilation": lambda x: F.max_pool2d(x, 2, 2, 0, 2),
    "not square": lambda x: F.max_pool2d(x, (2, 3)),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 4),
}
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "in place": torch.relu_, "none": lambda x: x}


class Stem(nn.Module):
    """A convolution, its normalisation, and what a pool makes of that."""

    def __init__(self, pool: str, act: str = "relu") -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 8, 1)
        self.pool, self.act = (POOLS | NAMED | OTHERS)[pool], ACTIVATIONS[act]

    def forward(self, x):
        return self.last(self.pool(self.act(self.norm(self.conv(x)))))


def counts(make, layout="channels_last", **options):
    reports = compare.check(make, [SHAPE], layout=layout, **options)
    return [(report.operators[FUSED], report.operators[ALONE]) for report in reports]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_pool_ends_the_chain(pool, act):
    assert counts(functools.partial(Stem, pool, act)) == [(1, 0), (1, 0)]


def test_an_input_given_by_name_is_read_by_a_pool_alone():
    assert counts(functools.partial(Stem, "named")) == [(0, 1), (0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(monkeypatch, dtype):
    monkeypatch.setenv("FASTRES_CONV", "torch")  # in evaluation the convolution before would come first
    how = {"dtype": torch.float32} if dtype == torch.float32 else {"dtype": torch.float32, "autocast": dtype}
    assert counts(functools.partial(Stem, "module"), **how) == [(1, 0), (1, 0)]


def test_in_evaluation_a_convolution_before_comes_first(monkeypatch):
    monkeypatch.setenv("FASTRES_CONV", "winograd")
    found = compare.check(functools.partial(Stem, "module"), [SHAPE], dtype=torch.float32, layout="channels_last")
    assert [report.operators[FUSED] for report in found] == [1, 0 if COMPILED else 1]
    assert found[1].operators["conv3x3_norm_act"] == (1 if COMPILED else 0)


def test_evaluation_with_gradients_is_a_chain_and_a_pool():
    found = counts(functools.partial(Stem, "module"), differentiable=True)
    assert found == [(1, 0), (1, 0), (0, 1)]


@pytest.mark.parametrize("pool", OTHERS)
def test_others_stay_pytorchs(pool):
    assert counts(functools.partial(Stem, pool)) == [(0, 0), (0, 0)]


def test_nchw_stays_pytorchs():
    assert counts(functools.partial(Stem, "no stride"), layout="nchw") == [(0, 0), (0, 0)]


class Several(nn.Module):
    """Pools of what others read as well, before and after, and of an input."""

    def __init__(self, dropped: bool) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.dropped = dropped

    def forward(self, x):
        a = F.relu(self.norm(x * 2))
        pooled = F.max_pool2d(a, 2)
        b = self.other(x) + a
        b = F.max_pool2d(F.dropout(b, 0.0, self.dropped), 2)
        return pooled + F.max_pool2d(x * 3, 2).mul_(2) + b.mean(), a.mean()


def test_readers_beside_the_pool_keep_the_activation():
    found = counts(functools.partial(Several, True))
    assert found[0] == (0, 2)  # x itself asks for no gradient


class Written(nn.Module):
    """The pool's result, and what it read, are written to afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.second(x)
        y = F.max_pool2d(F.relu(self.norm(x)), 2)
        x.mul_(2)
        y += 1
        return y, x


def test_an_input_that_is_written_to_later():
    # Autograd refuses what PyTorch's normalisation has saved as well, so without gradients.
    model = Written().to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    with compare.fresh():
        wanted = model(x.clone())
        model.norm.reset_running_stats()
        got = torch.compile(model, backend="fastres", options={"smallest": 0})(x.clone())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_images_of_any_size():
    model = Stem("module").to(memory_format=torch.channels_last)
    with compare.fresh():
        compiled = torch.compile(model, backend="fastres", dynamic=True, options={"smallest": 0, "inner": "aot_eager"})
        for size in (8, 11, 14):
            x = torch.randn(3, 4, size, size + 1).contiguous(memory_format=torch.channels_last)
            results = []
            for f in (model, compiled):
                y = f(x)
                results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert len(fastres.compile_report()) <= 2


def test_batches_of_any_size():
    model = Stem("module").to(memory_format=torch.channels_last)
    with compare.fresh():
        compiled = torch.compile(model, backend="fastres", options={"smallest": 0})
        for n in (2, 5, 3):
            x = torch.randn(n, 4, 8, 8).contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        found = [report.operators[FUSED] for report in fastres.compile_report()]
    assert found == [1] * len(found) and len(found) <= 2
