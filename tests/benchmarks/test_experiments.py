"""The experiments of docs/experiments.md at tiny settings: what is altered, what is written, how they go on."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.experiments import __main__ as command
from benchmarks.experiments import alter, depth, study, trained
from fastres import models


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 8x8 images, told apart by which half is bright."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for label, name in enumerate(("left", "right")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (8, 8, 3), dtype=np.uint8)
                pixels[:, 4 * label : 4 * label + 4] += 150
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def ask(images, tmp_path, monkeypatch):
    """Run an experiment; gives its exit status."""
    monkeypatch.setattr(depth, "DEPTHS", (8, 14))
    monkeypatch.setattr(depth, "STEPS", 2)
    monkeypatch.setattr(trained, "RANGE_STEPS", 9)
    create = models.create
    # The trainer knows the published depths by name; the tests' smaller ones are made of the same class.
    monkeypatch.setattr(models, "create", lambda name, **options: small(create, name, **options))
    monkeypatch.setattr(models, "NAMES", (*models.NAMES, "resnet8", "resnet14"))
    monkeypatch.setattr(models, "why_unknown", lambda name: None, raising=False)

    def run(name, *args, to="out"):
        given = ["--data-dir", str(images), "--output-dir", str(tmp_path / to), "--model", "resnet8", "--width", "0.5",
                 "--epochs", "1", "--train-images", "24", "--test-images", "10", "--batch-size", "8"]  # fmt: skip
        return command.entry([name, *given, *args])

    return run


def small(create, name, *, num_classes, stem, dropout, width, fused):
    if name not in ("resnet8", "resnet14"):
        return create(name, num_classes=num_classes, stem=stem, dropout=dropout, width=width, fused=fused)
    from fastres.models.cifar import CifarResNet, PlainCifarResNet

    kind = CifarResNet if fused else PlainCifarResNet
    return kind(int(name[6:]), num_classes, stem=stem, dropout=dropout or 0.0, width=width)


@pytest.mark.parametrize("name", sorted(command.EXPERIMENTS))
def test_each_experiment_writes_figures_picture_and_section(ask, tmp_path, name):
    assert ask(name) == 0
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert found["name"] == name and found["settings"]["train_images"] == 24 and found["machine"]["processor"]
    with Image.open(tmp_path / "out" / f"{name}.png") as image:
        image.load()
        assert min(image.size) > 300
    text = (tmp_path / "out" / f"{name}.md").read_text()
    assert f"`python -m benchmarks.experiments {name} --data-dir" in text and "| --- |" in text
    for case, result in found["cases"].items():
        if "epochs" in result:
            assert len(result["epochs"]) == 1 or result["diverged"], case
    assert not list((tmp_path / "out").glob("run-*"))


def test_the_cases_are_those_of_the_question():
    assert [case.options["optimizer"] for case in trained.OPTIMIZERS.values()] == ["sgd", "momentum", "rmsprop", "adam"]
    assert [case.options["dropout"] for case in trained.DROPOUTS.values()] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert len({(case.options["lr"], case.options["weight_decay"]) for case in trained.GRID.values()}) == 9
    assert set(depth.DEPTHS) == {20, 32, 44, 56, 110}
    for altered in (case for case in trained.PARTS.values() if case.alter):
        assert altered.options == trained.PARTS["all"].options


def test_results_that_are_there_are_not_made_again(ask, tmp_path, monkeypatch):
    assert ask("optimizers") == 0
    before = json.loads((tmp_path / "out" / "optimizers.json").read_text())["cases"]
    monkeypatch.setattr(study, "train", None)
    assert ask("optimizers") == 0
    assert json.loads((tmp_path / "out" / "optimizers.json").read_text())["cases"] == before


def test_an_experiment_that_was_stopped_goes_on(ask, tmp_path, monkeypatch, capsys):
    train, calls = study.train, []

    def stop(config, **others):
        calls.append(config)
        summary = train(dataclasses.replace(config, max_steps=1 if len(calls) == 2 else None), **others)
        return dataclasses.replace(summary, finished=len(calls) != 2)

    monkeypatch.setattr(study, "train", stop)
    assert ask("optimizers") == 130 and "goes on" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").glob("run-*")] == ["run-Momentum"]
    assert ask("optimizers") == 0
    assert [config.optimizer for config in calls] == ["sgd", "momentum", "momentum", "rmsprop", "adam"]
    assert calls[2].resume is not None and calls[1].resume is None


def test_a_run_that_diverges_is_a_result(ask, tmp_path, monkeypatch):
    case = trained.Case("SGD", {"optimizer": "sgd", "lr": 1e30})
    monkeypatch.setitem(trained.OPTIMIZERS, "SGD", case)
    assert ask("optimizers") == 0
    found = json.loads((tmp_path / "out" / "optimizers.json").read_text())["cases"]["SGD"]
    assert "the loss is" in found["diverged"]
    assert "| SGD | diverged |" in (tmp_path / "out" / "optimizers.md").read_text()


def test_other_settings_need_another_folder(ask, tmp_path, capsys):
    assert ask("optimizers") == 0
    assert ask("optimizers", "--seed", "3") == 2
    assert "seed was 0, is 3" in capsys.readouterr().err
    (tmp_path / "out" / "rates.json").write_text("[]")
    assert ask("rates") == 2
    assert "does not hold results" in capsys.readouterr().err


def test_publishing_fills_the_section_of_the_document(ask, tmp_path, monkeypatch):
    document = tmp_path / "experiments.md"
    document.write_text(study.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    assert all(f"<!-- {name} -->\n" in document.read_text(encoding="utf-8") for name in command.EXPERIMENTS)
    monkeypatch.setattr(study, "DOCUMENT", document)
    monkeypatch.setattr(study, "PUBLISHED", tmp_path / "published")
    assert ask("dropout", "--publish") == 0
    text = document.read_text(encoding="utf-8")
    assert "![dropout](results/experiments/dropout.png)" in text and text.count("p = 0.3") == 1
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == ["dropout.json", "dropout.png"]
    document.write_text("no markers")
    assert ask("dropout", "--publish") == 2


# ---------------------------------------------------------------------------------------------------- what is altered


def plain(**options):
    return models.create("resnet20", num_classes=4, width=0.5, fused=False, **options)


def test_a_block_without_shortcut_is_its_two_convolutions():
    model = plain()
    alter.remove_shortcuts(model)
    x = torch.randn(2, 8, 6, 6)
    block = model.layer1[0]
    expected = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    assert torch.equal(block(x), expected)
    assert sum(type(m) is alter.WithoutShortcut for m in model.modules()) == 9
    with pytest.raises(ValueError, match="found none"):
        alter.remove_shortcuts(model)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_is_taken_away_is_gone_from_the_whole_network(dropout):
    x = torch.randn(4, 3, 16, 16)
    for take, kind in ((alter.remove_normalisations, "BatchNorm2d"), (alter.remove_activations, "ReLU")):
        model = plain(dropout=dropout).eval()
        before = model(x)
        take(model)
        assert not [m for m in model.modules() if type(m).__name__ == kind]
        assert not torch.equal(model(x), before)
    # Without ReLU the network is linear up to its constants.
    with torch.no_grad():
        zero = model(torch.zeros_like(x))
        torch.testing.assert_close(model(2 * x) - zero, 2 * (model(x) - zero), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="found none"):
        alter.remove_activations(model)


def test_gradient_norms_are_those_of_the_weights():
    model = plain()
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    found = depth.gradient_norms(model, x, labels)
    assert all(p.grad is None for p in model.parameters()) and int(model.bn1.num_batches_tracked) == 0
    F.cross_entropy(model(x), labels).backward()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    expected = [m.weight.grad.double().square().sum().sqrt().item() for m in convolutions]
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 19


def test_the_ratio_compares_the_first_block_with_the_last():
    assert depth.ratio([9.0, 1.0, 5.0, 4.0]) == 0.25
    assert math.isnan(depth.ratio(None)) and math.isnan(depth.ratio([1.0, 1.0, 0.0]))
