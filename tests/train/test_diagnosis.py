import copy
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastres import models
from fastres.train import DivergedError, ImageData, TrainConfig, load_checkpoint, parallel
from fastres.train.diagnosis import Diagnosis, diagnose
from fastres.train.distributed import Group
from fastres.train.engine import Engine, Position
from fastres.train.prepare import configured_model, prepare
from fastres.train.rewind import KEPT_STEPS, Rewind
from tests.train.conftest import TinyNet
from tests.train.test_distributed import Normed, Plain, Residual, in_processes, settings, train_here

LARGE = 3e38


class Joined(nn.Module):
    """A residual sum between modules."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.factor + self.conv(x) * self.factor
        return out


class Explode(torch.autograd.Function):
    """The identity with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * math.inf


class Exploding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Explode.apply(x)
        return out


def network(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.3),
        *middle,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8), torch.arange(6) % 4


def look(model: nn.Module, x: Tensor | None = None, loss_of: Callable[..., Tensor] = F.cross_entropy) -> Diagnosis:
    """Diagnose, and check that nothing else has changed."""
    images, labels = batch()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    generator, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    found = diagnose(model, images if x is None else x, labels, loss_of)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert not any(p._backward_hooks for p in model.parameters())
    assert "\n" not in found.what
    return found


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (-math.inf, "infinity")])
def test_input_is_looked_at_first(value: float, word: str) -> None:
    x = batch()[0]
    x[3, 1, 2, 5] = value
    assert look(network(), x) == Diagnosis("input", f"the input holds {word}")


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "6.bias"])
def test_broken_weight_is_named_with_the_step_before(name: str) -> None:
    model = network()
    model.get_parameter(name).data.flatten()[1] = math.nan
    assert look(model) == Diagnosis(name, f"{name} holds NaN: the step before overflowed")


def test_running_statistics_count_only_where_they_are_read() -> None:
    model = network()
    model.get_buffer("1.running_var")[2] = math.inf
    assert look(model).where == "nowhere"
    assert look(model.eval()) == Diagnosis("1.running_var", "1.running_var holds infinity: a step before overflowed")


def test_first_module_that_overflows_is_named() -> None:
    model = network(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU())
    model.get_parameter("4.weight").data.fill_(LARGE)
    found = look(model)
    assert found.where == "4"
    assert found.what.startswith("4 (Conv2d) is the first whose output is not finite (its inputs are, up to ")


def test_sum_between_modules_is_its_parents() -> None:
    found = look(network(Joined(LARGE)))
    assert found.where == "4"
    assert found.what.startswith("4 (Joined) is the first whose output is not finite (its inputs are, up to ")


def test_input_made_between_modules_is_told() -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 1e30 * 1e30)

    found = look(network(Scaled(nn.ReLU())))
    assert found == Diagnosis(
        "4.0", "4.0 (ReLU) is the first whose output is not finite, from inputs that no module before it returned"
    )


def test_loss_of_finite_outputs_is_told() -> None:
    found = look(network(), loss_of=lambda logits, labels: logits.sum() * math.inf)
    assert found.where == "loss"
    assert found.what.startswith("the loss is ")


def test_first_gradient_that_overflows_is_named() -> None:
    # Backward: 7 (flatten), 6 (pool), 5 (explodes): the output of 4 is the first to get an infinite gradient.
    found = look(network(nn.ReLU(), Exploding()))
    assert found.where == "4"
    assert found.what.startswith("the gradient of the output of 4 (ReLU) is the first that is not finite (those before")


def test_finite_step_is_called_so() -> None:
    found = look(network())
    assert found.where == "nowhere"
    assert "everything is finite" in found.what


@pytest.mark.parametrize("training", [True, False])
def test_layer_within_fused_blocks_is_named(training: bool) -> None:
    model = models.create("resnet18", num_classes=4, fused=True).train(training)
    model.get_parameter("layer2.0.conv1.weight").data.fill_(LARGE)
    assert look(model).what.startswith(
        "layer2.0.conv1 (Conv2d) is the first whose output is not finite (its inputs are, up to "
    )


# --- Several processes ---


def look_in_a_job(group: Group, case: str) -> Diagnosis:
    """Rank 1's share of the batch, or its weights, are the broken ones; every rank gets its word."""
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 3, 1, bias=False)
    model = Residual() if case == "synchronised" else network(layer, Loud(case))
    model = model.double()
    if case == "sharded":
        model = parallel.shard(model, group, torch.device("cpu"), sync_bn=False)
    compute = parallel.spread(model, group, torch.device("cpu"), static_graph=True, sync_bn=case == "synchronised")
    images, labels = torch.randn(3, 3, 8, 8).double(), torch.arange(3)
    x = images.clone()
    if case == "weight":
        layer.weight.data[0] = math.nan
    elif case in ("input", "synchronised") and group.rank == 1:
        # Squared by the statistics of a normalisation it is beyond float64.
        x[0, 0] *= math.nan if case == "input" else 1e200
    loss_of = (lambda out, y: out.sum() * math.inf) if case == "loss" and group.rank == 1 else F.cross_entropy
    found = diagnose(model, x, labels, loss_of, group)
    F.cross_entropy(compute(images), labels).backward()  # the others are not left waiting
    return found


class Loud(nn.Module):
    """The identity but in rank 1, where values or gradients may be infinite."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 0 or self.case not in ("sharded", "gradient"):
            return x
        out: Tensor = x * math.inf if self.case == "sharded" else Explode.apply(x)
        return out


@pytest.mark.parametrize(
    ("case", "where"),
    [
        ("input", "input"),
        ("weight", "4.weight"),
        ("synchronised", "1.0"),
        ("sharded", "5"),
        ("loss", "loss"),
        ("gradient", "4"),
    ],
)
def test_processes_agree_on_what_one_of_them_found(case: str, where: str) -> None:
    first, second = in_processes(2, look_in_a_job, case)
    assert first == second
    assert first.where == where
    # Weights, and statistics that are synchronised, are everybody's.
    rank = 0 if case in ("weight", "synchronised") else 1
    assert first.what.endswith(f" (rank {rank} of 2 processes)")


# --- Whole runs ---


LOST = {"optimizer": "sgd", "lr": 1e30, "warmup_epochs": 0.0, "save_minutes": 1e-9}


def lose(group: Group, kind: type[nn.Module], fields: dict[str, Any]) -> str:
    try:
        train_here(group, kind, settings(**fields), (45, 13))
    except DivergedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "options"), [(Normed, {}), (Residual, {"sync_bn": True}), (Plain, {"fsdp": True, "optimizer": "adam"})]
)
def test_job_says_which_layer_was_first_and_keeps_its_checkpoint(
    kind: type[nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first, second = in_processes(2, lose, kind, {**LOST, **options, "output_dir": folder})
    assert first == second
    assert re.search(
        r"the loss is (nan|inf) at step \d+ .*: \S+ \(\w+\) is the first whose output is not finite .*"
        r"\(rank \d of 2 processes\); the last checkpoint is of before",
        first,
    )
    state = load_checkpoint(folder)
    assert f"at step {state['step'] + 1} " in first
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.fixture
def unwatchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are looked at late, as on a GPU."""
    init = Engine.__init__

    def late(engine: Engine, run: Any) -> None:
        init(engine, run)
        engine.watchful = False

    monkeypatch.setattr(Engine, "__init__", late)


@pytest.mark.parametrize(("optimizer", "averages"), [("sgd", {}), ("adam", {"lookahead_period": 2, "ema_decay": None})])
def test_loss_that_is_looked_at_late_is_diagnosed_at_its_step(
    run: Any, tmp_path: Path, request: pytest.FixtureRequest, optimizer: str, averages: dict[str, Any]
) -> None:
    fields = {**LOST, **averages, "optimizer": optimizer, "lr": 1e19, "dropout": 0.3}
    said = []
    for folder in ("at once", "late"):
        if folder == "late":
            request.getfixturevalue("unwatchful")
        with pytest.raises(DivergedError, match=r"at step \d+ .* is the first .*") as caught:
            run(to=folder, **fields)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert (tmp_path / "late" / "steps.jsonl").read_bytes() == (tmp_path / "at once" / "steps.jsonl").read_bytes()


@pytest.mark.usefixtures("unwatchful")
def test_loss_that_is_finite_when_computed_again_is_said_to_be(run: Any) -> None:
    calls = 0

    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += self.training
            return x * (math.nan if calls == 9 else 1.0)

    def make_model(config: Any, classes: int) -> nn.Module:
        return nn.Sequential(Once(), TinyNet(classes, 0.3, "cifar"))

    with pytest.raises(
        DivergedError, match=r"the loss is nan at step 9 \(epoch 2\), but finite when the steps from 7 "
    ):
        run(make_model=make_model)


@pytest.mark.usefixtures("tiny_models")
def test_state_is_kept_and_comes_back(data: ImageData, tmp_path: Path) -> None:
    config = TrainConfig(device="cpu", reuse_memory=False, output_dir=tmp_path, optimizer="adam", dropout=0.5)
    engine = Engine(prepare(config, data, configured_model, Console(file=io.StringIO())))
    rewind = Rewind(engine)
    images = data.train.images
    assert isinstance(images, Tensor)

    def steps(first: int, last: int) -> list[float]:
        return [
            engine.train_step(images[:8], data.train.labels[:8], 0.01, Position(n, 99, 0, torch.arange(8))).item()
            for n in range(first, last)
        ]

    with pytest.raises(RuntimeError, match=r"nothing was kept"):
        rewind.restore()
    steps(0, 2)
    rewind.keep(2, 2)
    losses = steps(2, 5)
    rewind.keep(5, 5)  # too soon
    rewind.restore()
    assert (rewind.step, rewind.batch) == (2, 2)
    assert steps(2, 5) == losses
    rewind.keep(5, 5)
    rewind.keep(6, 0)  # another epoch
    assert rewind.step == 6
    rewind.keep(6 + KEPT_STEPS, KEPT_STEPS)
    assert rewind.step == 6 + KEPT_STEPS
