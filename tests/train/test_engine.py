"""What the options do to a step and to an evaluation, against the formulas."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastres.train import ImageData, InputError, Summary, TrainConfig, load_model
from fastres.train.averages import Lookahead
from fastres.train.engine import Engine, Position
from fastres.train.prepare import configured_model, prepare
from tests.train.conftest import TinyNet, make_data

Run = Callable[..., Summary]


def make_engine(tmp_path: Path, data: ImageData, **fields: Any) -> Engine:
    settings = {"device": "cpu", "reuse_memory": False, "output_dir": tmp_path / "run", "lr": 0.1, **fields}
    run = prepare(TrainConfig(**settings), data, configured_model, Console(file=io.StringIO()))
    return Engine(run)


def step(engine: Engine, number: int = 0, *, count: int = 8) -> Tensor:
    split = engine.data.train
    assert isinstance(split.images, Tensor)
    at = Position(number, 10, 0, torch.arange(count))
    return engine.train_step(split.images[:count], split.labels[:count], 0.1, at)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.usefixtures("tiny_models")
def test_parts_of_a_batch_add_up_to_its_gradient(data: ImageData, tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 3):
        engine = make_engine(tmp_path, data, accumulate=accumulate, channels_last=False)
        # Running statistics make a part's result independent of the others, as without normalisation.
        engine.model.eval()
        loss = step(engine)
        found.append((loss, [p.grad for p in engine.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("tiny_models")
def test_torch_compile_gets_the_mode_and_trains_the_network(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_engine(tmp_path, data)
    modes = []

    def compiled(model: nn.Module, *, mode: str) -> nn.Module:
        modes.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    engines = [make_engine(tmp_path, data, compile=True, compile_mode=m) for m in ("default", "reduce-overhead")]
    assert modes == ["default", "reduce-overhead"]
    expected = step(plain)
    for engine in engines:
        torch.testing.assert_close(step(engine), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("tiny_models")
def test_long_gradients_are_shortened(data: ImageData, tmp_path: Path) -> None:
    long, short = (make_engine(tmp_path, data, clip_grad=clip) for clip in (None, 0.01))
    for engine in (long, short):
        step(engine)
    gradients = [
        torch.cat([p.grad.flatten() for p in e.model.parameters() if p.grad is not None]) for e in (long, short)
    ]
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0] * (0.01 / gradients[0].norm()), rtol=1e-3, atol=1e-8)


@pytest.mark.usefixtures("tiny_models")
def test_average_of_the_weights_is_the_formula_and_is_evaluated(data: ImageData, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, data, ema_decay=0.7)
    expected: dict[str, Tensor] = {}
    for number in range(4):
        engine.model.train()
        step(engine, number)
        for name, value in weights(engine.model).items():
            if value.is_floating_point():
                expected[name] = 0.7 * expected[name] + 0.3 * value if number else value
    assert engine.averaged is not None
    averaged = engine.averaged.module.state_dict()
    torch.testing.assert_close({name: averaged[name] for name in expected}, expected)
    found = engine.evaluate(lambda: False)
    engine.model.load_state_dict(averaged)
    engine.averaged = None
    oracle = engine.evaluate(lambda: False)
    assert found is not None and oracle is not None
    torch.testing.assert_close(found.logits, oracle.logits)


def test_lookahead_is_the_formula() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    slow = {name: value for name, value in weights(model).items() if value.is_floating_point()}
    lookahead = Lookahead(model, 2, 0.9)
    for number in range(1, 6):
        with torch.no_grad():
            for value in model.state_dict().values():
                value += 1
        fast = weights(model)
        lookahead.update(number, 5)
        if number % 2 == 0:
            d = 0.9**2 * (number / 5) ** 3
            slow = {name: d * value + (1 - d) * fast[name] for name, value in slow.items()}
        expected = fast if number in (1, 3) else {**fast, **slow}
        torch.testing.assert_close(weights(model), expected)


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("tta", ["none", "flip", "flip+shift"])
def test_logits_are_averaged_over_the_views(tta: Any, data: ImageData, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, data, tta=tta, eval_batch_size=5)
    found = engine.evaluate(lambda: False)
    assert found is not None and isinstance(data.test.images, Tensor)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    x = (data.test.images / 255 - mean) / std
    wide = F.pad(x, (1, 1, 1, 1), "reflect")

    def both(view: Tensor) -> Tensor:
        with torch.no_grad():
            return (engine.model(view) + engine.model(view.flip(-1))) / 2

    with torch.no_grad():
        plain = engine.model(x)
    shifted = both(x) / 2 + both(wide[:, :, :8, :8]) / 4 + both(wide[:, :, 2:, 2:]) / 4
    expected = {"none": plain, "flip": both(x), "flip+shift": shifted}[tta]
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert found.loss == pytest.approx(F.cross_entropy(expected, data.test.labels).item(), rel=1e-4)
    assert found.accuracy == pytest.approx((expected.argmax(1) == data.test.labels).float().mean().item())


def test_whitening_is_that_of_the_images_and_its_bias_stops(tmp_path: Path) -> None:
    data = make_data(16, 4, size=16)
    fields = {"model": "fast", "width": 0.1, "epochs": 10.0, "whitening_bias_epochs": 2.0, "threads": 1}
    engine = make_engine(tmp_path, data, **fields)
    whitening = engine.model.get_submodule("whitening")
    assert isinstance(data.train.images, Tensor)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    patches = F.unfold((data.train.images / 255 - mean) / std, 2).transpose(1, 2).flatten(0, 1)
    white = patches @ whitening.weight[:12].detach().flatten(1).T
    # Decorrelated: the second moments are the identity but for eps.
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(12), rtol=0, atol=0.05)
    biases = []
    for number in range(4):
        step(engine, number)
        biases.append(whitening.bias.detach().clone())
    assert not torch.equal(biases[0], biases[1])
    assert torch.equal(biases[1], biases[3])


@pytest.mark.usefixtures("tiny_models")
def test_bias_of_a_whitening_layer_needs_one(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^whitening_bias_epochs: expected a network with a whitening layer, got resnet18"
    ):
        make_engine(tmp_path, data, whitening_bias_epochs=1.0)


def test_last_gamma_starts_at_zero(tmp_path: Path) -> None:
    data = make_data(8, 4, size=16)
    engine = make_engine(tmp_path, data, model="resnet20", width=0.5, zero_init_gamma=True, threads=1)
    names = [n for n, p in engine.model.named_parameters() if p.dim() == 1 and n.endswith("weight") and not p.any()]
    assert names == [f"layer{i}.{j}.bn2.weight" for i in (1, 2, 3) for j in range(3)]
    with pytest.raises(InputError, match=r"^zero_init_gamma: .*article"):
        make_engine(tmp_path, data, model="article", width=0.1, zero_init_gamma=True, threads=1)


@pytest.mark.parametrize("fields", [{"ema_decay": 0.9}, {"lookahead_period": 2}])
def test_averages_go_on_after_a_resume(run: Run, tmp_path: Path, fields: dict[str, Any]) -> None:
    run("whole", epochs=2, **fields)
    run("part", epochs=2, max_steps=3, **fields)
    run("part", epochs=2, resume=tmp_path / "part", **fields)
    whole, part = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "part"))
    torch.testing.assert_close(part["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(part["engine"], whole["engine"], rtol=0, atol=0)
    one, other = (load_model(tmp_path / name).state_dict() for name in ("whole", "part"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_last_batch_may_be_dropped_and_epochs_be_broken(run: Run, tiny_models: list[TinyNet]) -> None:
    # 45 images are 5 batches of 8; 1.5 epochs of 5 steps are 8 steps.
    summary = run(epochs=1.5, drop_last=True)
    assert (summary.step, summary.epoch, summary.finished) == (8, 1, True)
