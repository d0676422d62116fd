import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastres.train import Summary, TrainConfig, load_model, train
from fastres.train import __main__ as cli
from fastres.train.checkpoint import saved_config
from fastres.train.config import OLD_DEFAULTS, check_config, to_dict
from fastres.train.recipes import RECIPES, recipe_config
from tests.train.conftest import make_data

LIGHT: dict[str, Any] = {"width": 0.05, "device": "cpu", "reuse_memory": False, "threads": 1, "batch_size": 4}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_takes_a_step(name: str, fused: bool, tmp_path: Path) -> None:
    data = make_data(8, 4, size=16)
    model = "wrn10-1" if name == "wrn28-10" else recipe_config(name).model
    config = dataclasses.replace(
        recipe_config(name), **LIGHT, model=model, fused=fused, max_steps=1, output_dir=tmp_path / "run"
    )
    quiet = Console(file=io.StringIO(), width=200)
    summary = train(config, data=data, console=quiet)
    assert (summary.step, summary.finished) == (1, True)
    saved = saved_config(tmp_path / "run")
    assert saved.recipe == name
    assert all(
        getattr(saved, field) == value
        for field, value in RECIPES[name].settings.items()
        if field not in ("dataset", "model", "batch_size")
    )
    load_model(tmp_path / "run")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_valid_configuration_that_names_itself(name: str) -> None:
    check_config(recipe_config(name))
    assert recipe_config(name).recipe == name


def test_option_given_besides_overrides_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []

    def record(config: TrainConfig) -> Any:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", record)
    command = ["--lr", "0.3", "--recipe", "resnet110-he2015", "--milestones", "7", "9", "--no-fused"]
    assert cli.main(command) == 130
    expected = {"lr": 0.3, "milestones": (7.0, 9.0), "fused": False}
    assert seen == [dataclasses.replace(recipe_config("resnet110-he2015"), **expected)]


def test_unknown_recipe_is_refused_with_the_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--recipe", "resnet19"]) == 2
    assert "resnet110-he2015" in capsys.readouterr().err


def test_list_shows_every_recipe_with_its_source_and_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--recipe", "list"]) == 0
    text = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"{name}: published: {recipe.published}\n  {recipe.source}\n" in text


def test_fast_updates_by_the_rates_of_its_source() -> None:
    config = recipe_config("fast")
    assert config.lr is not None and config.weight_decay is not None
    unit = 1 + 1 / (1 - 0.85)
    assert config.lr == pytest.approx(11.5 / unit)
    assert config.lr * config.weight_decay == pytest.approx(0.0153 / unit)


def test_checkpoint_older_than_the_options_goes_on_as_it_began(run: Callable[..., Summary], tmp_path: Path) -> None:
    run("whole", epochs=2)
    run("part", epochs=2, max_steps=3)
    file = tmp_path / "part" / "last.pt"
    state = torch.load(file, weights_only=True)
    for name in OLD_DEFAULTS:
        del state["config"][name]
    del state["engine"]
    for group in state["optimizer"]["param_groups"]:
        del group["lr_factor"]
    torch.save(state, file)
    run("part", epochs=2, resume=tmp_path / "part")
    whole, resumed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "part"))
    assert whole["model"].keys() == resumed["model"].keys()
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())


def test_old_defaults_are_those_of_today() -> None:
    now = to_dict(TrainConfig())
    assert {name: now[name] for name in OLD_DEFAULTS} == OLD_DEFAULTS
