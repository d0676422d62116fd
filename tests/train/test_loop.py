import dataclasses
import io
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fastres.train import (
    DivergedError,
    ImageData,
    InputError,
    RunError,
    Split,
    Summary,
    TrainConfig,
    image_folder,
    load_checkpoint,
    load_model,
    saved_config,
    train,
)
from fastres.train import config as config_module
from fastres.train.augment import normalise
from fastres.train.checkpoint import AUTO
from tests.train.conftest import make_data, signal_in_call
from tests.train.optimizers import EACH

Run = Callable[..., Summary]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, generators, losses and metrics agree bit for bit; only times may differ."""
    first, second = load_checkpoint(one), load_checkpoint(other)
    for key in ("step", "epoch", "batch", "best_accuracy", "best_epoch"):
        assert first[key] == second[key]
    for key in ("model", "generator", "torch_rng"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    torch.testing.assert_close(first["optimizer"]["state"], second["optimizer"]["state"], rtol=0, atol=0)
    assert rows(one / "steps.jsonl") == rows(other / "steps.jsonl")
    timeless = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in rows(run / "metrics.jsonl")
        ]
        for run in (one, other)
    ]
    assert timeless[0] == timeless[1]


# --- Whole runs ---


def test_run_leaves_all_its_files(run: Run, tmp_path: Path) -> None:
    summary = run()
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "steps.jsonl", "last.pt", "previous.pt", "best.pt", "summary.json", ".lock",
    }  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == dataclasses.asdict(summary)
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr"], config["dataset"], config["epochs"]) == (0.01, "digits", 2)
    # 45 images make five batches of eight and one of five.
    assert [row["step"] for row in rows(folder / "steps.jsonl")] == list(range(1, 13))
    epochs = rows(folder / "metrics.jsonl")
    assert [(row["epoch"], row["step"], row["complete"]) for row in epochs] == [(1, 6, True), (2, 12, True)]
    assert (summary.epoch, summary.step, summary.finished) == (2, 12, True)
    assert summary.best_accuracy == max(row["test_accuracy"] for row in epochs)
    assert summary.images_per_second is not None


def test_evaluations_may_be_further_apart_than_epochs(run: Run, tmp_path: Path) -> None:
    each = run(epochs=5, to="each")
    summary = run(epochs=5, eval_epochs=2)
    found = {row["epoch"]: row["test_loss"] for row in rows(tmp_path / "run" / "metrics.jsonl")}
    wanted = {row["epoch"]: row["test_loss"] for row in rows(tmp_path / "each" / "metrics.jsonl")}
    assert found == {epoch: wanted[epoch] for epoch in (2, 4, 5)}  # the last of all is always evaluated
    assert rows(tmp_path / "run" / "steps.jsonl") == rows(tmp_path / "each" / "steps.jsonl")
    assert (summary.last_accuracy, summary.best_epoch in found) == (each.last_accuracy, True)


def test_run_between_two_evaluations_goes_on(run: Run, tmp_path: Path) -> None:
    run(epochs=5, eval_epochs=2, to="whole")
    assert run(epochs=5, eval_epochs=2, max_steps=15).step == 15
    run(resume=tmp_path / "run", epochs=5, max_steps=None, eval_epochs=2)
    found = [(row["epoch"], row["step"]) for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert found == [(2, 12), (3, 15), (4, 24), (5, 30)]  # with the end of the first sitting
    assert rows(tmp_path / "run" / "steps.jsonl") == rows(tmp_path / "whole" / "steps.jsonl")


def test_training_learns(run: Run) -> None:
    accuracy = run(epochs=10).best_accuracy
    assert accuracy is not None
    assert accuracy > 0.9


@pytest.mark.parametrize("optimizer", EACH)
def test_each_optimizer_lowers_the_loss(run: Run, tmp_path: Path, optimizer: str) -> None:
    run(optimizer=optimizer, epochs=6, warmup_epochs=0.0, schedule="constant")
    losses = [row["train_loss"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


def test_metrics_are_those_of_the_saved_weights(run: Run, data: ImageData, tmp_path: Path) -> None:
    summary = run()
    assert isinstance(data.test.images, Tensor)
    model = load_model(tmp_path / "run")
    assert not model.training
    with torch.no_grad():
        logits = model(normalise(data.test.images, data.mean, data.std))
    row = rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (logits.argmax(1) == data.test.labels).double().mean().item() == pytest.approx(summary.last_accuracy)
    assert nn.functional.cross_entropy(logits, data.test.labels).item() == pytest.approx(row["test_loss"], rel=1e-5)


def test_training_loss_of_an_epoch_is_the_mean_over_its_images(run: Run, tmp_path: Path) -> None:
    run(epochs=1)
    losses = [row["loss"] for row in rows(tmp_path / "run" / "steps.jsonl")]
    mean = sum(loss * count for loss, count in zip(losses, [8] * 5 + [5], strict=True)) / 45
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["train_loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("fields", [{"amp": "bf16"}, {"channels_last": False}, {"label_smoothing": 0.1},
                                    {"reuse_memory": True}, {"threads": 1}])  # fmt: skip
def test_variants_train(run: Run, fields: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    try:
        assert run(epochs=1, **fields).step == 6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("chosen", "dtype"), [("bf16", torch.bfloat16), ("none", torch.float32)])
def test_automatic_precision_is_what_runs_and_what_is_saved(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, dtype: torch.dtype
) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(config_module, "choose_amp", lambda device: seen.append(device) or chosen)
    found = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: found.add(output.dtype) if isinstance(module, nn.Conv2d) else None
    )
    text = io.StringIO()
    try:
        run(amp="auto", max_steps=6, console=Console(file=text, width=300))
    finally:
        hook.remove()
    assert found == {dtype}
    assert ("bfloat16" if chosen == "bf16" else "float32") in text.getvalue().splitlines()[0]
    assert seen == [torch.device("cpu")]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["amp"] == chosen
    # On a machine that would choose otherwise, the run goes on as it began.
    monkeypatch.setattr(config_module, "choose_amp", lambda *args, **fields: pytest.fail("chosen again"))
    assert run(amp="auto", resume=tmp_path / "run").step == 12


def test_algorithm_reaches_the_network_and_its_checkpoint(run: Run, tiny_models: list[Any], tmp_path: Path) -> None:
    run(max_steps=1, conv_algorithm="winograd")
    load_model(tmp_path / "run")
    run(to="plain", max_steps=1, fused=False)
    assert [model.conv_algorithm for model in tiny_models] == ["winograd", "winograd", None]


def test_network_of_ones_own_is_made_after_seeding(run: Run, tiny_models: list[Any]) -> None:
    seen: list[tuple[int, int, Tensor]] = []

    def make_model(config: TrainConfig, num_classes: int) -> nn.Module:
        seen.append((config.image_size or 0, num_classes, torch.rand(1)))
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))

    for name in ("one", "two"):
        run(to=name, seed=3, max_steps=1, make_model=make_model)
    torch.manual_seed(3)
    expected = (8, 3, torch.rand(1))
    assert seen == [expected, expected]
    assert not tiny_models


def test_same_seed_gives_the_same_run_and_another_seed_another(run: Run, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        run(to=name, seed=seed, dropout=0.3)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert rows(tmp_path / "one" / "steps.jsonl") != rows(tmp_path / "other" / "steps.jsonl")


def test_batches_do_not_depend_on_the_network(run: Run) -> None:
    seen: dict[str, list[Tensor]] = {}
    variants: dict[str, dict[str, Any]] = {
        "fused": {"fused": True},
        "plain": {"fused": False},
        "dropout": {"dropout": 0.5},
    }
    for name, fields in variants.items():
        seen[name] = []
        hook = nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs, name=name: (
                seen[name].append(inputs[0].clone()) if isinstance(module, nn.Conv2d) else None
            )
        )
        run(to=name, **fields)
        hook.remove()
    # Each of two epochs has six training batches and one of the test images.
    assert len(seen["fused"]) == 2 * (6 + 1)
    torch.testing.assert_close(seen["plain"], seen["fused"], rtol=0, atol=0)
    torch.testing.assert_close(seen["dropout"], seen["fused"], rtol=0, atol=0)


def test_short_run_is_the_beginning_of_a_long_one(run: Run, tmp_path: Path) -> None:
    assert run(to="short", max_steps=4).step == 4
    run(to="long")
    assert rows(tmp_path / "short" / "steps.jsonl") == rows(tmp_path / "long" / "steps.jsonl")[:4]
    assert [row["complete"] for row in rows(tmp_path / "short" / "metrics.jsonl")] == [False]


def test_images_left_on_disk_train_alike(
    tiny_models: list[nn.Module],
    write_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_folder(tmp_path / "images", size=(8, 8))
    held = image_folder.load_image_folder(tmp_path / "images", image_size=None)
    monkeypatch.setattr(image_folder, "IMAGENET_MEAN", held.mean)
    monkeypatch.setattr(image_folder, "IMAGENET_STD", held.std)
    for name, limit in (("held", 2**30), ("disk", 0)):
        monkeypatch.setattr(image_folder, "MEMORY_LIMIT", limit)
        train(
            TrainConfig(dataset="imagefolder", data_dir=tmp_path / "images", output_dir=tmp_path / name, batch_size=3,
                        epochs=2, dropout=0.5, device="cpu", workers=0),
            console=Console(file=io.StringIO()),
        )  # fmt: skip
    assert_same_run(tmp_path / "held", tmp_path / "disk")


# --- Report ---


def test_stand_in_for_another_data_set_is_said_at_the_start_and_at_the_end(run: Run, data: ImageData) -> None:
    text = io.StringIO()
    summary = run(
        on=dataclasses.replace(data, instead_of="CIFAR-10 has no network"), console=Console(file=text, width=150)
    )
    start, end = text.getvalue().split("epoch 1/2", maxsplit=1)
    assert "HANDWRITTEN DIGITS instead. CIFAR-10 has no network." in start
    assert "45 training and 12 test images of 8 pixels" in start
    assert "NOT CIFAR-10" in end
    assert summary.instead_of == "CIFAR-10 has no network"


def test_default_folder_names_the_run_and_is_never_used_twice(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260102-030405")
    folders = [run(output_dir=None, fused=False, max_steps=1).output_dir for _ in range(2)]
    assert folders == [f"runs/digits-resnet18-plain-20260102-030405{end}" for end in ("", "-2")]


# --- Resume ---


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_resumed_run_equals_an_uninterrupted_one(run: Run, tmp_path: Path, optimizer: str, stop: int) -> None:
    fields = {"dropout": 0.3, "optimizer": optimizer}
    run(to="whole", **fields)
    run(to="parts", max_steps=stop, **fields)
    summary = run(to="parts", resume=tmp_path / "parts", **fields)
    assert summary.finished
    # The evaluation in the middle of an epoch may have found a better best, so it is compared apart.
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_checkpoint(one), load_checkpoint(other)
    for key in ("model", "generator", "torch_rng"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    assert rows(one / "steps.jsonl") == rows(other / "steps.jsonl")
    compared = ("epoch", "step", "complete", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    metrics = [[[row[key] for key in compared] for row in rows(run / "metrics.jsonl")] for run in (one, other)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("calls", [1, 3, 7, 8, 13])
def test_interrupted_run_saves_and_goes_on_as_if_nothing_had_been(run: Run, tmp_path: Path, calls: int) -> None:
    """Ctrl-C arrives during the given call of the network: in a step, in an evaluation, in the last step."""
    run(to="whole", dropout=0.3)
    text = io.StringIO()
    with signal_in_call(calls, signal.SIGINT):
        summary = run(to="parts", dropout=0.3, console=Console(file=text, width=300))
    assert not summary.finished
    assert f"--resume {tmp_path / 'parts'}" in text.getvalue()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(to="parts", dropout=0.3, resume=tmp_path / "parts" / "last.pt").finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_drops_rows_after_the_checkpoint(run: Run, tmp_path: Path) -> None:
    run(to="whole")
    run(to="parts", max_steps=6)
    with (tmp_path / "parts" / "steps.jsonl").open("a") as file:
        file.write('{"step": 7, "epoch": 2, "loss": 9.0}\n{"step": 8, "ep')
    run(to="parts", resume=tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_into_another_folder_leaves_the_first_alone(run: Run, tmp_path: Path) -> None:
    run(to="first", max_steps=6)
    before = contents(tmp_path / "first")
    run(to="second", resume=tmp_path / "first")
    assert contents(tmp_path / "first") == before
    assert [row["step"] for row in rows(tmp_path / "second" / "steps.jsonl")] == list(range(7, 13))


def test_finished_run_goes_on_with_more_epochs(run: Run, tmp_path: Path) -> None:
    run(epochs=1)
    assert run(epochs=3, resume=tmp_path / "run").epoch == 3


def test_options_left_open_are_those_of_the_checkpoint(run: Run, tmp_path: Path) -> None:
    run(lr=0.02, dropout=0.25, max_steps=6)
    config = saved_config(tmp_path / "run")
    assert (config.lr, config.dropout, config.batch_size, config.max_steps) == (0.02, 0.25, 8, None)
    assert run(epochs=None, batch_size=None, output_dir=None, resume=tmp_path / "run").step == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "article"}, "model was 'resnet18', is 'article'"),
        ({"lr": 0.05}, "lr was 0.01, is 0.05"),
        ({"batch_size": 9}, "batch_size was 8, is 9"),
        ({"optimizer": "adam"}, "optimizer was 'nesterov', is 'adam'"),
        ({"fused": False}, "fused was True, is False"),
        ({"conv_algorithm": "winograd"}, "conv_algorithm was 'auto', is 'winograd'"),
        ({"amp": "bf16"}, "amp was 'none', is 'bf16'"),
        ({"seed": 1}, "seed was 0, is 1"),
    ],
)
def test_checkpoint_of_another_run_is_refused(run: Run, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    run(max_steps=6)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"^resume: .*of another run") as caught:
        run(resume=tmp_path / "run", **change)
    assert said in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_algorithm_of_a_plain_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    run(max_steps=6, fused=False)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"conv_algorithm was None, is 'torch'"):
        run(resume=tmp_path / "run", fused=False, conv_algorithm="torch")
    assert contents(tmp_path / "run") == before


def test_automatic_algorithm_asked_for_is_not_the_checkpoints(run: Run, tmp_path: Path) -> None:
    run(max_steps=6, conv_algorithm="winograd")
    with pytest.raises(InputError, match=r"conv_algorithm was 'winograd', is 'auto'"):
        run(resume=tmp_path / "run", conv_algorithm="auto")
    assert run(resume=tmp_path / "run").step == 12


@pytest.mark.parametrize(
    ("fused", "algorithm", "name"), [(True, "torch", None), (False, None, None), (True, "torch", "direct")]
)
def test_checkpoint_from_before_algorithms_had_their_names_goes_on_with_pytorchs(
    run: Run, tiny_models: list[Any], tmp_path: Path, fused: bool, algorithm: str | None, name: str | None
) -> None:
    run(max_steps=6, fused=fused, conv_algorithm=algorithm)
    state = load_checkpoint(tmp_path / "run")
    if name is None:
        del state["config"]["conv_algorithm"]
    else:
        state["config"]["conv_algorithm"] = name
    torch.save(state, tmp_path / "run" / "last.pt")
    assert run(resume=tmp_path / "run", fused=fused).step == 12
    load_model(tmp_path / "run")
    assert [model.conv_algorithm for model in tiny_models] == [algorithm] * 3


def test_checkpoint_of_other_classes_is_refused(run: Run, data: ImageData, tmp_path: Path) -> None:
    run(max_steps=6)
    with pytest.raises(InputError, match=r"classes were"):
        run(resume=tmp_path / "run", on=dataclasses.replace(data, classes=("a", "b", "c")))


def test_weights_that_do_not_fit_the_model_are_refused(run: Run, tmp_path: Path) -> None:
    run(max_steps=6)
    state = load_checkpoint(tmp_path / "run")
    state["model"]["0.weight"] = torch.zeros(4, 3, 3, 3)
    torch.save(state, tmp_path / "run" / "last.pt")
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"^resume: .*does not fit the model resnet18.*0\.weight"):
        run(resume=tmp_path / "run")
    with pytest.raises(InputError, match=r"does not fit the model resnet18"):
        load_model(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_truncated_checkpoint_stops_the_resume_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    run(max_steps=6)
    for name in ("last.pt", "best.pt"):
        file = tmp_path / "run" / name
        file.write_bytes(file.read_bytes()[:500])
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"last\.pt is truncated"):
        run(resume=tmp_path / "run")
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("fields", [{}, {"max_steps": 4}])
def test_nothing_left_to_do_is_said(run: Run, tmp_path: Path, fields: dict[str, Any]) -> None:
    run(**fields)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"^resume: .*already done .* (12|4) steps"):
        run(resume=tmp_path / "run", **fields)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(("stop", "epochs"), [(18, 3), (18, 2), (18, 1.5), (15, 2), (15, 2.5), (15, None)])
def test_end_that_lies_behind_the_checkpoint_is_evaluated(
    run: Run, data: ImageData, tmp_path: Path, stop: int, epochs: float | None
) -> None:
    """Between two epochs or in one, where the run was not evaluated; the end is an earlier step or this one."""
    with signal_in_call(stop, signal.SIGINT):
        run(epochs=5, eval_epochs=5)
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == stop and not (tmp_path / "run" / "metrics.jsonl").exists()
    more = {"epochs": 5, "max_steps": 14} if epochs is None else {"epochs": epochs}
    summary = run(resume=tmp_path / "run", eval_epochs=5, **more)
    assert summary.finished and summary.step == stop and summary.last_accuracy is not None
    after = load_checkpoint(tmp_path / "run")
    for key in ("model", "order", "generator"):
        torch.testing.assert_close(after[key], None if key == "order" and stop == 18 else state[key], rtol=0, atol=0)
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert (row["epoch"], row["step"], row["complete"]) == (3, stop, stop == 18)
    losses = [step["loss"] for step in rows(tmp_path / "run" / "steps.jsonl")][12:]
    sizes = ([8] * 5 + [5])[: len(losses)]
    mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert row["train_loss"] == pytest.approx(mean, rel=1e-5)
    with pytest.raises(InputError, match=r"already done"):
        run(resume=tmp_path / "run", eval_epochs=5, **more)


def test_run_may_end_within_its_warm_up(run: Run, tmp_path: Path) -> None:
    with signal_in_call(4, signal.SIGINT):
        run(epochs=5, warmup_epochs=2.0)
    assert run(resume=tmp_path / "run", epochs=1, warmup_epochs=2.0).step == 6


def test_run_is_as_long_as_its_epochs_are_written(run: Run) -> None:
    assert math.ceil(2.2 * 25) == 56
    assert run(on=make_data(50), batch_size=2, epochs=2.2).step == 55


def test_end_between_two_evaluations_is_evaluated(run: Run, tmp_path: Path) -> None:
    with signal_in_call(20, signal.SIGINT):  # 12 steps, an evaluation, 7 steps
        run(epochs=5, eval_epochs=2)
    last = load_checkpoint(tmp_path / "run")
    assert last["step"] == 19 and last["evaluated_step"] == 12
    previous = load_checkpoint(tmp_path / "run" / "previous.pt")
    assert previous["step"] == 18 and previous["evaluated_step"] == 12
    summary = run(resume=tmp_path / "run" / "previous.pt", epochs=3, eval_epochs=2)
    assert summary.step == 18 and summary.epoch == 3
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [12, 18]


def test_checkpoint_from_before_evaluations_were_noted_counts_as_evaluated(run: Run, tmp_path: Path) -> None:
    run(max_steps=4)
    state = load_checkpoint(tmp_path / "run")
    del state["evaluated_step"]
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(InputError, match=r"already done"):
        run(resume=tmp_path / "run", max_steps=4)
    assert run(resume=tmp_path / "run").step == 12


@pytest.mark.parametrize("more", [{"epochs": 1.5}, {"epochs": 2, "max_steps": 9}])
def test_interruption_of_the_last_evaluation_within_an_epoch_is_made_good(
    run: Run, tmp_path: Path, more: dict[str, Any]
) -> None:
    more = {"dropout": 0.3, "eval_batch_size": 6, **more}
    run(to="whole", **more)
    with signal_in_call(12, signal.SIGINT):  # six steps, an evaluation in two batches, three steps
        assert not run(to="parts", **more).finished
    assert load_checkpoint(tmp_path / "parts")["step"] == 9
    summary = run(to="parts", resume=AUTO, **more)
    assert summary.finished and summary.last_accuracy is not None
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# --- Errors ---


def test_folder_that_holds_a_run_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    run(max_steps=1)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"^output_dir: .*already holds a run"):
        run()
    assert contents(tmp_path / "run") == before


def test_file_in_place_of_the_output_folder_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match=r"^output_dir: expected a folder"):
        run()
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("fields", [{"lr": -1.0}, {"resume": Path("nowhere")}, {"dataset": "mnist"}])
def test_wrong_input_leaves_no_folder_behind(run: Run, tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        run(**fields)
    assert not list(tmp_path.iterdir())


def test_broken_image_stops_the_run_before_its_folder_is_made(
    tiny_models: list[nn.Module], write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    culprit = write_folder(tmp_path / "images") / "test" / "dog" / "1.png"
    culprit.write_bytes(culprit.read_bytes()[:60])
    config = TrainConfig(dataset="imagefolder", data_dir=tmp_path / "images", output_dir=tmp_path / "run")
    with pytest.raises(InputError, match=r"broken image") as caught:
        train(config, console=Console(file=io.StringIO()))
    assert str(culprit) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_too_few_images_are_refused(run: Run, data: ImageData, tmp_path: Path) -> None:
    lone = dataclasses.replace(data, train=Split(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1).long()))
    with pytest.raises(InputError, match=r"2 training images"):
        run(on=lone)
    assert not list(tmp_path.iterdir())


def test_one_class_is_refused(run: Run, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data: expected 2 classes or more, got \['left'\]"):
        run(on=dataclasses.replace(data, classes=("left",)))
    assert not list(tmp_path.iterdir())


def test_missing_gpu_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^device: cuda:99"):
        run(device="cuda:99")
    assert not list(tmp_path.iterdir())


def test_loss_that_is_not_finite_stops_the_run_with_its_step(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"loss is (nan|inf) at step \d+ \(epoch 1\)") as caught:
        run(optimizer="sgd", lr=1e30, warmup_epochs=0.0)
    steps = rows(tmp_path / "run" / "steps.jsonl")
    assert f"at step {len(steps) + 1} " in str(caught.value)
    assert not (tmp_path / "run" / "last.pt").exists()
