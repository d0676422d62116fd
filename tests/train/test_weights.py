import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from fastres import models
from fastres.train import InputError, Summary, TrainConfig, load_model
from fastres.train.weights import load_pretrained, start_weights
from tests.train.conftest import make_data


def save(tmp_path: Path, state: Any) -> Path:
    torch.save(state, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")},
    ],
    ids=["bare", "wrapped", "of several processes", "of an old torch"],
)
def test_network_of_torchvision_gives_the_same_logits(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    with torch.no_grad():
        for buffer in theirs.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    ours = models.create("resnet18", num_classes=10, stem="imagenet", fused=False)
    assert load_pretrained(ours, save(tmp_path, wrap(theirs.state_dict()))) is None
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x))


def test_last_layer_of_other_classes_is_left_out_and_named(tmp_path: Path) -> None:
    theirs = models.create("resnet20", num_classes=7, fused=False)
    ours = models.create("resnet20", num_classes=3, fused=False)
    head = ours.state_dict()["fc.weight"].clone()
    note = load_pretrained(ours, save(tmp_path, theirs.state_dict()))
    assert note is not None and "7 classes" in note and "fc" in note
    assert torch.equal(ours.state_dict()["fc.weight"], head)
    assert torch.equal(ours.state_dict()["layer1.0.conv1.weight"], theirs.state_dict()["layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: {"fc.weight": torch.zeros(2)}, r"it lacks .*more"),
        (lambda: {"epoch": 3}, "holds no state_dict"),
        (lambda: [1, 2], "holds no state_dict"),
        (lambda: {"model": nn.Linear(1, 1)}, "is truncated or not a file of tensors"),
        (lambda: models.create("resnet20", num_classes=3, width=2.0).state_dict(), r"conv1.weight is \(32, 3"),
    ],
    ids=["other names", "no tensors", "a list", "a pickled module", "other shapes"],
)
def test_weights_that_do_not_fit_are_refused(make: Callable[[], Any], expected: str, tmp_path: Path) -> None:
    model = models.create("resnet20", num_classes=3, fused=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"^pretrained: .*{expected}"):
        load_pretrained(model, save(tmp_path, make()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"^pretrained: no file of tensors at "):
        load_pretrained(model, tmp_path / "nothing.pt")


def test_training_starts_from_the_average_of_a_checkpoint(run: Callable[..., Summary], tmp_path: Path) -> None:
    run("first", epochs=1, ema_decay=0.5)
    average = load_model(tmp_path / "first").state_dict()
    model = load_model(tmp_path / "first")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    config = dataclasses.replace(TrainConfig(), pretrained=tmp_path / "first" / "last.pt")
    assert start_weights(model, config, make_data()) is None
    torch.testing.assert_close(model.state_dict(), average, rtol=0, atol=0)
