"""Modules that were pickled whole when fused blocks still changed what their children meant.

pickled_whole.xz holds one of each as that version wrote them with torch.save: a BatchNorm2d that had swallowed its ReLU
(FusedBatchNormAct2d), a ReLU that did nothing (AbsorbedReLU), a dropout rate kept by the normalisation.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from fastres import fuse_report, unfuse
from fastres.nn import DropoutBasicBlock
from tests.altered import subjects
from tests.altered.compare import Draw, in_doubt, observe, problems
from tests.altered.subjects import BOTTLENECK, NETWORK, Subject
from tests.operators import Operators

# They have 8 channels where today's subjects have 16.
BASIC, PROJECTED, NORM_ACT, SKIP, RESIDUAL, SHORTCUT = (
    dataclasses.replace(subject, channels=8)
    for subject in (
        subjects.BASIC,
        subjects.PROJECTED,
        subjects.NORM_ACT,
        subjects.SKIP,
        subjects.RESIDUAL,
        subjects.SHORTCUT,
    )
)
PICKLED = [PROJECTED, BOTTLENECK, NORM_ACT, SKIP, RESIDUAL, SHORTCUT, NETWORK]


@pytest.fixture(autouse=True)
def made_with_8_channels(monkeypatch):
    monkeypatch.setattr(subjects, "CHANNELS", 8)


class InNCHW(Draw):
    """With 8 inputs of a strided 1x1 convolution plain PyTorch cannot be trusted in channels_last."""

    def x(self, index: int = 0, *, layout: str = "nchw", **options: Any) -> Tensor:
        return super().x(index, layout=layout, **options)


def load() -> dict[str, nn.Module]:
    file = io.BytesIO(lzma.decompress((Path(__file__).parent / "pickled_whole.xz").read_bytes()))
    return torch.load(file, weights_only=False)


def plain_twin(subject: Subject, module: nn.Module) -> nn.Module:
    plain = subject.plain()
    plain.load_state_dict({f"norm.{k}" if subject.name == "norm-act" else k: v for k, v in module.state_dict().items()})
    return plain


@pytest.mark.parametrize("subject", PICKLED, ids=str)
def test_a_module_pickled_whole_before_computes_as_it_did(subject):
    for attempt in itertools.count():
        module = load()[subject.name]
        models = [plain_twin(subject, module).double(), plain_twin(subject, module), module]
        key = ("pickled", attempt)
        with Operators() as seen:
            exact = observe(models[0], InNCHW(subject, key, torch.float64))
        if not in_doubt(seen.relu_inputs):
            break
    plain, ours = (observe(m, InNCHW(subject, key)) for m in models[1:])
    assert not problems(subject, ours, plain, exact)


@pytest.mark.parametrize("subject", [PROJECTED, BOTTLENECK, NETWORK], ids=str)
def test_a_network_pickled_whole_before_unfuses_to_plain_pytorch(subject):
    module = load()[subject.name]
    plain = plain_twin(subject, module)
    x = torch.randn(subject.shape())
    unfused = unfuse(module)
    with torch.no_grad(), Operators() as seen:
        torch.testing.assert_close(unfused.eval()(x), plain.eval()(x))
    assert not seen.names


@pytest.mark.parametrize("subject", [PROJECTED, BOTTLENECK], ids=str)
def test_a_block_pickled_whole_before_takes_its_faster_way(subject):
    module = load()[subject.name]
    with Operators() as seen:
        module(torch.randn(subject.shape()))
    assert seen.names
    assert "" in fuse_report(module).swapped


def test_a_dropout_rate_that_the_norm_kept_is_the_blocks():
    module = load()["dropout"]
    plain = DropoutBasicBlock(8, 8, dropout=0.3)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(BASIC.shape())
    # A hook keeps the block off its faster way: the same seed then gives the same mask.
    module.conv1.register_forward_hook(lambda m, args, y: None)
    outputs = []
    for m in (module, plain):
        torch.manual_seed(0)
        outputs.append(m(x))
    torch.testing.assert_close(*outputs)
