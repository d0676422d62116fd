"""The accuracy study on a few made-up images: what runs, what is written, and what a second call leaves alone."""

import dataclasses
import json
import math
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

# The study describes the machine as the other benchmarks do, and those draw.
pytest.importorskip("matplotlib")

from benchmarks import accuracy
from benchmarks.accuracy import (
    Config,
    Run,
    Study,
    difference,
    main,
    mean_and_deviation,
    read,
    subset,
    table,
)
from fastres.train import Split
from fastres.train.engine import Engine
from tests.parity import one_thread  # noqa: F401

needs_kernels = pytest.mark.skipif(not accuracy.has_winograd_kernels(), reason="needs the compiled Winograd kernels")
CLASSES = ("dark", "light")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image folder of two classes, 24 training images and 8 test images each, told apart by their brightness."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(random.getrandbits(32))
    for split, count in (("train", 24), ("test", 8)):
        for index, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(100 * index, 156 + 100 * index, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def study_in(folder, images, seeds=2):
    return Config(images, folder, seeds, epochs=2, train_images=40, test_images=12, model="resnet20", batch_size=8)


@pytest.fixture
def config(images, tmp_path):
    return study_in(tmp_path / "out", images)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of a study of one seed, made by the command "first"; to be copied, not written to."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main(study_in(folder, images, seeds=1), "first")
    return folder


@pytest.fixture
def trained(monkeypatch):
    """(fused, seed) of every training that starts."""
    seen = []
    real = accuracy.train
    monkeypatch.setattr(accuracy, "train", lambda c, **k: seen.append((c.fused, c.seed)) or real(c, **k))
    return seen


def made_up(seed, side, accuracy, machine="machine", command="command"):
    facts = {"processor": machine, "capability": "AVX512", "threads": 2, "torch": "2", "torchvision": "0",
             "fastres": "1", "commit": "c0ffee", "date": "2026-11-23"}  # fmt: skip
    return Run(seed, side, "cpu", accuracy, 1.5, 1.25, [], [], facts, command)


SETTINGS = {"data": "digits", "data_sha256": "", "classes": 2, "image_size": 8, "model": "resnet18",
            "train_images": 4000, "test_images": 10, "epochs": 1, "batch_size": 8, "lr": 0.05}  # fmt: skip


# --- A study ---


@needs_kernels
def test_both_sides_are_trained_alike_and_written_down(config, trained):
    assert main(config, "the command")
    assert trained == [(True, 0), (False, 0), (True, 1), (False, 1)]
    assert {path.name for path in config.output_dir.iterdir()} == {"accuracy-resnet20.json", "accuracy-resnet20.md"}
    study = json.loads((config.output_dir / "accuracy-resnet20.json").read_text())
    for run in study["runs"]:
        # 40 images are five batches of eight; two epochs.
        assert len(run["losses"]) == 10
        assert [line["epoch"] for line in run["epochs"]] == [1, 2]
        assert run["train_loss"] == pytest.approx(sum(run["losses"][5:]) / 5, rel=1e-5)
        assert run["test_accuracy"] == run["epochs"][-1]["test_accuracy"]
        assert run["command"] == "the command"
        assert run["machine"]["torch"] == torch.__version__
    losses = {(run["seed"], run["side"]): run["losses"] for run in study["runs"]}
    for seed in (0, 1):
        fused, plain = losses[seed, "fused"], losses[seed, "eager"]
        # The same weights and batch: equal but for rounding, which Winograd's sums do otherwise.
        assert fused[0] == pytest.approx(plain[0], rel=1e-4)
        assert fused != plain
    assert losses[0, "fused"] != losses[1, "fused"]
    text = (config.output_dir / "accuracy-resnet20.md").read_text()
    assert "`the command`" in text
    assert all(f"| {seed} |" in text for seed in (0, 1))


@needs_kernels
@pytest.mark.parametrize("model", ["resnet18", "resnet20"])
def test_only_the_fused_side_runs_winograds_kernels(config, monkeypatch, model):
    called = {}
    real = Engine.train_step

    def profiled(self, *batch):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = real(self, *batch)
        called.setdefault(self.config.fused, set()).update(event.key for event in profile.key_averages())
        return loss

    monkeypatch.setattr(Engine, "train_step", profiled)
    main(dataclasses.replace(config, seeds=1, epochs=1, train_images=8, model=model), "")
    ours = {fused: {name for name in names if name.startswith("fastres::")} for fused, names in called.items()}
    assert any("conv3x3" in name for name in ours[True])
    assert not ours[False]


@needs_kernels
def test_what_is_written_is_not_done_again_and_seeds_can_be_added(config, whole, trained):
    shutil.copytree(whole, config.output_dir)
    first = json.loads((whole / "accuracy-resnet20.json").read_text())["runs"]
    assert main(config, "second")
    assert trained == [(True, 1), (False, 1)]
    runs = json.loads((config.output_dir / "accuracy-resnet20.json").read_text())["runs"]
    assert runs[:2] == first
    assert [run["command"] for run in runs] == ["first", "first", "second", "second"]
    assert main(config, "third")
    assert len(trained) == 2


@needs_kernels
@pytest.mark.parametrize("step", [3, 10, 14])
def test_interrupted_study_goes_on_as_if_nothing_had_been(config, whole, monkeypatch, step):
    """Ctrl-C in the first run, at its end, and in the second."""
    config = dataclasses.replace(config, seeds=1)
    real, count = Engine.train_step, 0

    def press(self, *batch):
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGINT)
        return real(self, *batch)

    monkeypatch.setattr(Engine, "train_step", press)
    assert not main(config, "")
    assert main(config, "")
    assert count == 20
    parts, uninterrupted = (
        json.loads((folder / "accuracy-resnet20.json").read_text())["runs"] for folder in (config.output_dir, whole)
    )
    assert [run["losses"] for run in parts] == [run["losses"] for run in uninterrupted]
    assert [run["test_accuracy"] for run in parts] == [run["test_accuracy"] for run in uninterrupted]


@needs_kernels
def test_run_that_ended_but_was_not_written_is_taken_from_its_checkpoint(config, monkeypatch, trained):
    config = dataclasses.replace(config, seeds=1)

    def fail(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        real = accuracy.write_text
        patch.setattr(accuracy, "write_text", lambda path, text: fail() if '"losses"' in text else real(path, text))
        with pytest.raises(OSError, match="no space"):
            main(config, "")
    assert main(config, "")
    assert trained == [(True, 0), (False, 0)]


@needs_kernels
def test_leftovers_of_a_run_without_a_checkpoint_are_cleared(config):
    folder = config.output_dir / "accuracy-resnet20-fused-seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert main(dataclasses.replace(config, seeds=1, epochs=1), "")


@needs_kernels
@pytest.mark.parametrize("change", [{"epochs": 3}, {"train_images": 38}, {"lr": 0.1}, {"batch_size": 9}])
def test_results_of_other_settings_are_not_mixed(config, whole, change):
    shutil.copytree(whole, config.output_dir)
    before = {path.name: path.read_bytes() for path in config.output_dir.iterdir()}
    with pytest.raises(ValueError, match=rf"^output_dir: .*other settings: .*{next(iter(change))} was"):
        main(dataclasses.replace(config, seeds=1, **change), "")
    assert {path.name: path.read_bytes() for path in config.output_dir.iterdir()} == before


@needs_kernels
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": 0}, r"^seeds: expected at least 1, got 0"),
        ({"epochs": 0}, r"^epochs: "),
        ({"model": "vgg"}, r"^model: .*resnet20, .*, got 'vgg'"),
        ({"train_images": 49}, r"^train_images: expected at most the 48"),
        ({"test_images": 15}, r"^test_images: 15 of 16 cannot be drawn"),
        ({"test_images": 1}, r"^test_images: "),
        ({"data_dir": Path(__file__).parent / "nowhere" / "train"}, r"^data_dir: |cannot be downloaded"),
        ({"lr": -1.0}, r"^lr: "),
        ({"batch_size": 1}, r"^batch_size: "),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(config, change, said, monkeypatch):
    monkeypatch.setattr("fastres.train.data._unreachable", lambda url: "no network")
    with pytest.raises((ValueError, RuntimeError), match=said):
        main(dataclasses.replace(config, **change), "")
    assert not config.output_dir.exists()


def test_without_winograd_there_is_nothing_to_compare(config, monkeypatch):
    monkeypatch.setattr(accuracy, "has_winograd_kernels", lambda: False)
    with pytest.raises(RuntimeError, match="compiled kernels"):
        main(config, "")
    assert not config.output_dir.exists()


# --- Its parts ---


def test_subset_has_as_many_images_of_each_class_and_is_always_the_same():
    labels = torch.arange(90) % 3
    split = Split(torch.randint(0, 256, (90, 3, 4, 4), dtype=torch.uint8), labels[torch.randperm(90)])
    part, again = subset(split, 30, "train_images"), subset(split, 30, "train_images")
    assert part.labels.bincount().tolist() == [10, 10, 10]
    torch.testing.assert_close(part.images, again.images, rtol=0, atol=0)
    whole = {(image.numpy().tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)}
    chosen = {(image.numpy().tobytes(), int(label)) for image, label in zip(part.images, part.labels, strict=True)}
    assert len(chosen) == 30
    assert chosen < whole
    assert subset(split, 90, "train_images") is split


def test_statistics_are_those_of_the_textbook():
    first, second = ([random.random() for _ in range(count)] for count in (4, 3))
    mean, deviation = mean_and_deviation(first)
    assert (mean, deviation) == pytest.approx((np.mean(first), np.std(first, ddof=1)))
    apart, error = difference(first, second)
    welch = scipy.stats.ttest_ind(first, second, equal_var=False)
    assert apart / error == pytest.approx(welch.statistic)
    assert math.isnan(mean_and_deviation([0.5])[1])
    assert math.isnan(difference([0.5], [])[0])


def test_table_gives_runs_means_and_their_difference():
    accuracies = {"fused": [0.5, 0.52, 0.57], "eager": [0.51, 0.53, 0.52]}
    study = Study(SETTINGS, [made_up(s, side, a) for side, found in accuracies.items() for s, a in enumerate(found)])
    lines = table(study).splitlines()
    assert "| 1 | 52.00 | 53.00 | 1.2500 | 1.2500 | 1.5000 | 1.5000 |" in lines
    # By hand: deviations sqrt(0.0013) and 0.01; the error is sqrt((0.0013 + 0.0001) / 3).
    mean, apart = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("mean", "fused - plain"))
    assert mean.split(" | ")[1:3] == ["53.00 ± 3.61", "52.00 ± 1.00"]
    assert apart.split(" | ")[1] == "+1.00 ± 2.16"
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}


def test_table_of_an_unfinished_study_leaves_blanks_and_names_every_machine_and_command():
    runs = [made_up(0, "fused", 0.5, "one", "first"), made_up(0, "eager", 0.4, "two", "first"),
            made_up(1, "fused", 0.7, "two", "second")]  # fmt: skip
    text = table(Study(SETTINGS, runs))
    assert "| 1 | 70.00 |  | 1.2500 |  | 1.5000 |  |" in text
    assert "| mean | 60.00 ± 14.14 | 40.00 |" in text
    assert "+20.00 |" in text
    assert "nan" not in text
    assert [text.count(word) for word in ("one, AVX512", "two, AVX512", "`first`", "`second`")] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"settings": {}, "runs": [{"seed": 0}]}', '{"settings": 1, "runs": []}']
)
def test_file_of_another_program_is_refused(tmp_path, content):
    (tmp_path / "accuracy.json").write_text(content)
    with pytest.raises(ValueError, match=r"^output_dir: .*does not hold results of this program"):
        read(tmp_path / "accuracy.json", SETTINGS)
