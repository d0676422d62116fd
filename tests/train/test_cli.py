"""The command with the real network and the real digits, cut short."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastres.train import ImageData, Split, prepare
from fastres.train.__main__ import main
from fastres.train.checkpoint import load_checkpoint


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation on 20 of the 360 test images, which else is most of what the command does here."""
    load = prepare.load_data

    def load_few(*args: Any, **options: Any) -> ImageData:
        data = load(*args, **options)
        return dataclasses.replace(data, test=Split(data.test.images[:20], data.test.labels[:20]))

    monkeypatch.setattr(prepare, "load_data", load_few)


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("flag", ["--fused", "--no-fused"])
def test_command_trains_saves_and_resumes(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    common = [flag, "--dataset", "digits", "--batch-size", "8", "--device", "cpu"]
    assert main([*common, "--max-steps", "2", "--output-dir", str(folder)]) == 0
    assert "Training finished" in capsys.readouterr().out
    assert main(["--resume", str(folder), "--max-steps", "3"]) == 0
    assert "20 test images" in capsys.readouterr().out
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["fused"], summary["step"], summary["finished"]) == (flag == "--fused", 3, True)
    assert load_checkpoint(folder)["config"]["fused"] is summary["fused"]
    other = "--no-fused" if flag == "--fused" else "--fused"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["--resume", str(folder), other]) == 2
    assert "fused was" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
