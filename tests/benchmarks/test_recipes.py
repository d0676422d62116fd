"""The table of what recipes reached: which runs it takes, what takes the place of what, and that the page has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipes
from benchmarks.recipes import Run
from benchmarks.records import PUBLISHED, ROOT

RUN = Run("fast", "fused", 0, "CIFAR-10", "A", "AVX2", 2, "2.14.1", "2026-01-02", 10_000, 0.9394, 1200.0, 420.0, 5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run as the trainer leaves it."""
    write(tmp_path / "run", {}, {})
    return tmp_path / "run"


def write(folder: Path, config: dict[str, Any], summary: dict[str, Any]) -> None:
    own = {"recipe": "fast", "fused": True, "seed": 3, "threads": None, "epochs": 9.9, "max_steps": None}
    told = {"finished": True, "test_images": 100, "last_accuracy": 0.5, "seconds": 60.0, "images_per_second": 7.0}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**own, "eval_epochs": 5, **config}))
    (folder / "summary.json").write_text(json.dumps({**told, **summary}))


def test_a_run_is_published_and_takes_the_place_of_its_own_older_one(folder: Path, tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "recipes.json"
    page.write_text("# Training\n<!-- recipes -->\n<!-- /recipes -->\nmore\n")
    given = [str(folder), "--images", "some images", "--file", str(file), "--page", str(page)]
    for share in (0.5, 0.75):
        write(folder, {}, {"last_accuracy": share})
        assert recipes.entry(given) == 0
    write(folder, {"seed": 4}, {})
    assert recipes.entry(given) == 0
    found = recipes.known(file)
    assert [(run.seed, run.test_accuracy, run.side) for run in found] == [(3, 0.75, "fused"), (4, 0.5, "fused")]
    assert recipes.table(found) in page.read_text() and page.read_text().endswith("<!-- /recipes -->\nmore\n")
    line = "| fast, some images | fused | 75.00, 50.00 | 62.50 | accuracy 94.0 % (airbench94) | 1.0 | 7 |"
    assert line in page.read_text()


@pytest.mark.parametrize(
    ("config", "summary", "message"),
    [
        ({"recipe": None}, {}, "expected a run of a recipe, got the recipe None"),
        ({"epochs": 2.0}, {}, "expected a run of all 9.9 epochs, that ended"),
        ({"max_steps": 3}, {}, "expected a run of all 9.9 epochs, that ended"),
        ({}, {"finished": False}, "expected a run of all 9.9 epochs, that ended"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_runs_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config, summary, message
) -> None:
    write(folder, config, summary)
    assert recipes.entry([str(folder), "--images", "x", "--file", str(tmp_path / "f"), "--page", "None"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.entry([str(tmp_path / "no"), "--images", "x", "--page", "None"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_rows_are_in_the_recipes_order_and_by_side_and_processor() -> None:
    he = replace(RUN, recipe="resnet20-he2015")
    runs = recipes.joined([RUN, replace(RUN, side="eager")], [he, replace(RUN, seed=1), replace(RUN, processor="B")])
    keys = dict.fromkeys(f"{run.recipe} {run.side} {run.processor}" for run in runs)
    assert list(keys) == ["resnet20-he2015 fused A", "fast eager A", "fast fused A", "fast fused B"]
    assert len(runs) == 5


def test_the_page_has_the_table_of_the_published_runs() -> None:
    runs = recipes.known(PUBLISHED / "recipes.json")
    assert runs and recipes.table(runs) in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
