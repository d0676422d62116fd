"""The learning-rate range test, against gradient descent in closed form and on tiny networks."""

import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from fastres.train import DivergedError, InputError, RangeTest, TrainConfig, find_learning_rate, prepare, train
from fastres.train.__main__ import main
from fastres.train.config import check_config
from fastres.train.distributed import Group
from fastres.train.find_lr import CURVE, FEWEST_STEPS, HIGH, LOW, PICTURE
from fastres.train.prepare import RUN_FILES
from tests.train.conftest import TinyNet, make_data, signal_in_call
from tests.train.optimizers import EACH
from tests.train.test_distributed import Plain, in_processes, torchrun

SCALE = 10.0
START = 0.3
EDGE = 9 / SCALE**2
"""The largest learning rate with which descent on `Slope` converges: 2 over the second derivative at the minimum."""


class Slope(nn.Module):
    """One weight, whose multiple is the first of three logits.

    Where a third of the labels is of the first class, the mean loss is log(exp(z) + 2) - z / 3 with z = SCALE * weight:
    smallest at z = 0, with a second derivative of 2/9 there, and of 2/9 SCALE**2 by the weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(START))

    def forward(self, x: Tensor) -> Tensor:
        z = SCALE * self.weight
        return torch.stack([z, 0 * z, 0 * z]).expand(len(x), 3)


def find(folder: Path, kind: Any = None, *, text: io.StringIO | None = None, **fields: Any) -> RangeTest:
    """The range test of a tiny network on 45 images."""
    fields = {"device": "cpu", "batch_size": 9, "reuse_memory": False, "output_dir": folder, **fields}

    def make_model(config: TrainConfig, classes: int) -> nn.Module:
        return TinyNet(classes, 0.3, "cifar") if kind is None else kind()

    console = Console(file=text or io.StringIO(), width=300)
    return find_learning_rate(TrainConfig(**fields), data=make_data(), make_model=make_model, console=console)


def test_curve_is_that_of_gradient_descent(tmp_path: Path) -> None:
    """All images in each batch, in float64 by hand, up to half the edge, beyond which rounding grows."""
    found = find(tmp_path / "run", Slope, batch_size=45, optimizer="sgd", weight_decay=0.0, max_steps=100)
    weight = START
    for number, (rate, loss) in enumerate(zip(found.rates, found.losses, strict=True)):
        assert rate == pytest.approx(LOW * (HIGH / LOW) ** (number / 99))
        if rate > EDGE / 2:
            break
        z = SCALE * weight
        assert loss == pytest.approx(math.log(math.exp(z) + 2) - z / 3, rel=1e-5)
        weight -= rate * SCALE * (math.exp(z) / (math.exp(z) + 2) - 1 / 3)
    assert found.losses[number] == pytest.approx(math.log(3), rel=1e-3)


def test_suggestion_follows_the_edge_of_stability(tmp_path: Path) -> None:
    """Batches that differ keep the weight off the minimum, so that the loss rises soon after the edge."""
    found = find(tmp_path / "run", Slope, optimizer="sgd", weight_decay=0.0, max_steps=100)
    assert found.ended == "diverged"
    assert EDGE / 5 < found.best_rate < 5 * EDGE
    assert found.suggestion == found.best_rate / 10
    before = [loss for rate, loss in zip(found.rates, found.losses, strict=True) if rate < 0.3 * EDGE]
    assert found.losses[-1] > 2 * found.losses[0] > 2 * min(before)


def test_mean_of_the_losses_is_free_of_its_beginning() -> None:
    assert RangeTest([1.0] * 3, [2.0] * 3).smoothed == pytest.approx([2.0] * 3)
    assert RangeTest([1.0] * 2, [1.0, 0.0]).smoothed == pytest.approx([1.0, 0.9 / 1.9])


def test_smallest_loss_of_too_few_steps_does_not_count() -> None:
    rates = [10.0**k for k in range(-20, 2)]
    losses = [1.0, *[9.0] * 14, 0.0, *[90.0] * 6]
    assert RangeTest(rates, losses).best_rate == rates[15]
    assert RangeTest(rates[:3], losses[:3]).best_rate == rates[2]


@pytest.mark.parametrize("optimizer", EACH)
def test_every_optimizer_has_a_curve(tmp_path: Path, optimizer: str) -> None:
    text = io.StringIO()
    found = find(tmp_path / "run", optimizer=optimizer, text=text, amp="bf16" if optimizer == "adam" else "none")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", CURVE, PICTURE}
    saved = json.loads((tmp_path / "run" / CURVE).read_text())
    assert (saved["rates"], saved["losses"], saved["smoothed"]) == (found.rates, found.losses, found.smoothed)
    assert saved["suggestion"] == found.suggestion and saved["config"]["optimizer"] == optimizer
    with Image.open(tmp_path / "run" / PICTURE) as image:
        image.load()
    # 5 steps an epoch are too few for a curve.
    assert 10 < len(found.rates) <= FEWEST_STEPS and found.rates[0] == (1e-3 if optimizer == "lars" else LOW)
    assert found.smoothed[found.best] < found.losses[0]
    assert f"Suggested lr: {found.suggestion:.2g}, a tenth of {found.best_rate:.2g}" in text.getvalue()
    assert f"Train with --lr {found.suggestion:.2g}" in text.getvalue()


def test_a_seed_gives_a_curve(tmp_path: Path) -> None:
    one, same, other = (find(tmp_path / "run", seed=seed) for seed in (3, 3, 4))
    assert one == same != other


def test_folder_is_free_for_a_run_and_then_taken(tmp_path: Path) -> None:
    found = find(tmp_path / "run")
    fields: dict[str, Any] = {"device": "cpu", "reuse_memory": False, "report": False, "output_dir": tmp_path / "run"}
    config = TrainConfig(lr=found.suggestion, batch_size=9, epochs=1, **fields)
    summary = train(
        config, data=make_data(), make_model=lambda c, n: TinyNet(n, 0.0, "cifar"), console=Console(file=io.StringIO())
    )
    assert summary.finished
    with pytest.raises(InputError, match=r"^output_dir: .*already holds a run"):
        find(tmp_path / "run")


def test_folder_of_its_own_is_named_after_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    find(None)  # type: ignore[arg-type]
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-resnet18-fused-lr-test-") and (folder / CURVE).is_file()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_ends_the_test_and_nothing_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "load_data", lambda *args, **options: make_data())
    monkeypatch.setattr("fastres.models.create", lambda *args, **options: TinyNet(3, 0.0, "cifar"))
    before = signal.getsignal(signal.Signals[name])
    with signal_in_call(3, signal.Signals[name]):
        status = main(["--find-lr", "--device", "cpu", "--no-reuse-memory", "--output-dir", str(tmp_path / "run")])
    assert status == {"SIGTERM": 143, "SIGINT": 130}[name]
    assert f"Stopped by {name}; nothing is written" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert signal.getsignal(signal.Signals[name]) is before


def test_test_of_a_run_that_has_begun_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^find_lr: .*expected no resume, got 'there'"):
        check_config(TrainConfig(find_lr=True, resume=Path("there")))
    with pytest.raises(InputError, match=r"^find_lr: .*test_only"):
        check_config(TrainConfig(find_lr=True, test_only=True, pretrained=Path("there")))
    assert main(["--find-lr", "--resume", "auto", "--output-dir", str(tmp_path / "run")]) == 2
    assert "error: find_lr: " in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^find_lr: train\(\) trains"):
        train(TrainConfig(find_lr=True))
    assert not list(tmp_path.iterdir())


class Broken(Slope):
    """Whose loss is not finite, from a step on."""

    first = 1

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (math.inf if self.calls >= self.first else 1)


class BrokenLater(Broken):
    first = 20


def test_loss_that_is_not_finite_ends_the_test(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"the loss is nan at step 1 "):
        find(tmp_path / "first", Broken)
    found = find(tmp_path / "later", BrokenLater, text=(text := io.StringIO()))
    assert (found.ended, len(found.rates)) == ("not finite", 19)
    assert "the loss was not finite after" in text.getvalue()
    assert all(map(math.isfinite, json.loads((tmp_path / "later" / CURVE).read_text())["losses"]))


def test_curve_may_not_diverge(tmp_path: Path) -> None:
    found = find(tmp_path / "run", max_steps=2, text=(text := io.StringIO()))
    assert (found.ended, found.rates) == ("range", [LOW, HIGH])
    assert "the loss did not diverge up to 10" in text.getvalue()


def plain_curve(group: Group, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return find(folder, Plain, batch_size=8)._asdict()


def test_several_processes_find_what_one_does(tmp_path: Path) -> None:
    [one] = in_processes(1, plain_curve, tmp_path / "one")
    first, second = in_processes(2, plain_curve, tmp_path / "two")
    assert first == second
    calm = one["losses"][:30]
    assert first["losses"][:30] == pytest.approx(calm, rel=1e-4)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {".lock", CURVE, PICTURE}


def test_torchrun_makes_one_curve(tmp_path: Path) -> None:
    done = torchrun("--find-lr", "--max-steps", "12", to=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Suggested lr") == 1
    assert len(json.loads((tmp_path / "run" / CURVE).read_text())["rates"]) == 12
    assert not [name for name in RUN_FILES if (tmp_path / "run" / name).exists()]
