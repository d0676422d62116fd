"""What is printed reaches standard output as far as that can take it, and a run goes on without it."""

import io
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastres import predict
from fastres.train import ImageData, Summary, TrainConfig, load_data, train
from fastres.train import __main__ as cli
from tests.train.conftest import signal_in_call

Run = Callable[..., Summary]
WriteFolder = Callable[..., Path]


@contextmanager
def standard_output(file: Any) -> Iterator[None]:
    """Print to this file. No fixture, since pytest takes standard output anew between a fixture and its test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        yield


def utf8() -> io.TextIOWrapper:
    """A standard output of UTF-8 that takes nothing else."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def printed(output: io.TextIOWrapper) -> str:
    assert isinstance(output.buffer, io.BytesIO)
    return output.buffer.getvalue().decode()


@pytest.mark.parametrize("failure", ["nobody reads it", "No space left on device"])
@pytest.mark.usefixtures("tiny_models")
def test_run_goes_on_without_its_output(
    data: ImageData, tmp_path: Path, capfd: pytest.CaptureFixture[str], failure: str
) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    if failure == "nobody reads it":
        os.close(descriptor)
        reader, descriptor = os.pipe()
        os.close(reader)
    config = TrainConfig(
        device="cpu", batch_size=8, epochs=2, reuse_memory=False, report=False, output_dir=tmp_path / "run"
    )
    with os.fdopen(descriptor, "w") as output, standard_output(output):
        assert train(config, data=data).finished
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 12
    assert capfd.readouterr().err == f"standard output cannot be written ({failure}); the run goes on without\n"


@pytest.mark.parametrize("name", ["a[/b]", "a[bold]b", "a\udcffb"])
@pytest.mark.usefixtures("tiny_models")
def test_folders_may_have_any_name(write_folder: WriteFolder, tmp_path: Path, name: str) -> None:
    images, folder = write_folder(tmp_path / name / "images"), tmp_path / name / "run"
    args = ["--dataset", "imagefolder", "--data-dir", str(images), "--output-dir", str(folder), "--device", "cpu",
            "--epochs", "1", "--batch-size", "4", "--no-reuse-memory", "--no-report"]  # fmt: skip
    with standard_output(utf8()):
        assert cli.main(args) == 0
        text = printed(sys.stdout).replace(r"\udcff", "\udcff")
    assert f"Decoding 12 images from {images} ..." in text
    files = [line.split("│")[2].strip() for line in text[text.index("│ files") :].splitlines() if "│" in line]
    assert "".join(files).startswith(f"{folder}/")


def test_command_may_be_pasted(run: Run, tmp_path: Path) -> None:
    text = io.StringIO()
    with signal_in_call(3, signal.SIGTERM):
        run(to="a run; ls", console=Console(file=text, width=300))
    command = text.getvalue().partition("go on with: ")[2]
    assert shlex.split(command)[-2:] == ["--resume", str(tmp_path / "a run; ls")]


def test_images_may_have_any_name(run: Run, write_folder: WriteFolder, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images")
    data = load_data(TrainConfig(dataset="imagefolder", data_dir=images, image_size=8), notify=lambda text: None)
    run(dataset="imagefolder", batch_size=4, on=data)
    paths = [str(tmp_path / name) for name in ("a[b]c\udcff.png", ":cat:.png", "a\\[b].png")]
    for path in paths:
        shutil.copyfile(images / "test" / "cat" / "0.png", path)
    with standard_output(utf8()):
        assert predict.main([str(tmp_path / "run"), *paths, "--json"]) == 0
        assert [json.loads(line)["image"] for line in printed(sys.stdout).splitlines()] == paths
    with standard_output(utf8()):
        assert predict.main([str(tmp_path / "run"), *paths]) == 0
        lines = printed(sys.stdout).splitlines()
    table = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert all(path.replace("\udcff", r"\udcff") in table for path in paths)


@pytest.mark.parametrize(("error", "status"), [(BrokenPipeError(), 1), (KeyboardInterrupt(), 130)])
def test_prediction_that_is_cut_off_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    def cut(*args: Any) -> int:
        raise error

    monkeypatch.setattr(predict, "run", cut)
    assert predict.main(["run", "image.png"]) == status
    assert capsys.readouterr().err == ("interrupted\n" if status == 130 else "")
