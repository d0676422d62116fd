"""The option test_only: what is evaluated, and that nothing is written."""

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from fastres.train import (
    ImageData,
    InputError,
    Summary,
    TrainConfig,
    evaluate,
    load_checkpoint,
    load_model,
    prepare,
    saved_config,
    train,
)
from fastres.train import __main__ as cli
from fastres.train.augment import normalise
from fastres.train.distributed import Group
from tests.train.conftest import TinyNet, make_data
from tests.train.test_distributed import Normed, errors, in_processes, job, torchrun

Run = Callable[..., Summary]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def command(tiny_models: list[TinyNet], data: ImageData, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """The command line on the tiny data: its exit status and what it says."""
    monkeypatch.setattr(prepare, "load_data", lambda *args, **options: data)

    def say(*arguments: object) -> tuple[int, str]:
        status = cli.main([*map(str, arguments), "--device", "cpu", "--no-reuse-memory"])
        said = capsys.readouterr()
        return status, said.err if status else said.out

    return say


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.8}, {"lookahead_period": 2}], ids=str)
def test_checkpoint_is_evaluated_and_nothing_written(
    fields: dict[str, Any], run: Run, command: Any, data: ImageData, tmp_path: Path
) -> None:
    """What the loop evaluates: the average of the weights where there is one. A finished run too."""
    run("run", dropout=0.2, **fields)
    before = files(tmp_path)
    model = load_model(tmp_path / "run")
    assert isinstance(data.test.images, torch.Tensor)
    with torch.no_grad():
        logits = model(normalise(data.test.images, data.mean, data.std))
    loss = F.cross_entropy(logits.double(), data.test.labels).item()
    accuracy = (logits.argmax(1) == data.test.labels).double().mean().item()
    for folder in (["--resume", tmp_path / "run"], ["--resume", "auto", "--output-dir", tmp_path / "run"]):
        status, said = command(*folder, "--test-only")
        assert status == 0
        assert f"test loss {loss:.4f}  accuracy {accuracy:.2%}" in said and "12 test images" in said
    assert files(tmp_path) == before


def test_file_of_a_run_is_the_one_evaluated(run: Run, command: Any, tmp_path: Path) -> None:
    run("run")
    state = load_checkpoint(tmp_path / "run")
    for value in state["model"].values():
        value.zero_()
    torch.save(state, tmp_path / "zero.pt")
    status, said = command("--resume", tmp_path / "zero.pt", "--test-only")
    assert status == 0
    # All classes alike: ln 3.
    assert "test loss 1.0986" in said and "zero.pt" in said


def test_pretrained_weights_are_evaluated(run: Run, command: Any, tmp_path: Path) -> None:
    run("run")
    torch.save(load_model(tmp_path / "run").state_dict(), tmp_path / "weights.pt")
    before = files(tmp_path)
    said = [command(*source, "--test-only") for source in (
        ("--pretrained", tmp_path / "weights.pt"), ("--pretrained", tmp_path / "run" / "last.pt"),
        ("--resume", tmp_path / "run"),
    )]  # fmt: skip
    assert all(status == 0 for status, _ in said)
    assert len({re.search(r"test loss.*", text)[0] for _, text in said}) == 1  # type: ignore[index]
    assert files(tmp_path) == before


def test_what_only_evaluates_otherwise_may_differ(run: Run, command: Any, tmp_path: Path) -> None:
    run("run")
    assert command("--resume", tmp_path / "run", "--test-only", "--tta", "flip", "--no-fused", "--amp", "bf16")[0] == 0
    status, said = command("--resume", tmp_path / "run", "--test-only", "--seed", "5")
    assert status == 2 and "seed was 0, is 5" in said


def test_what_cannot_be_tested_is_refused(run: Run, command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(TinyNet(7, 0.0, "cifar").state_dict(), tmp_path / "seven.pt")
    before = files(tmp_path)
    for arguments, message in (
        ([], r"test_only: expected a checkpoint \(resume\) or weights \(pretrained\) to test, got neither"),
        (["--resume", "auto"], r"resume: auto looks for a checkpoint in output_dir"),
        (["--resume", "auto", "--output-dir", "none"], r"resume: test_only needs a checkpoint, .* found none in none"),
        (["--resume", "none"], r"resume: no checkpoint at none"),
        (["--pretrained", "seven.pt"], r"pretrained: expected weights to test, but seven.pt has 7 classes"),
    ):  # fmt: skip
        status, said = command("--test-only", *arguments)
        assert status == 2 and re.search(message, said) and said.count("\n") == 1
    assert files(tmp_path) == before
    with pytest.raises(InputError, match=r"^test_only: .*evaluate"):
        train(TrainConfig(test_only=True, resume=tmp_path / "run"))


def evaluated_here(group: Group, folder: Path) -> tuple[list[int], tuple[float, float], str]:
    """In a process: the sizes of the batches it evaluated, what came out, and what it said."""
    seen: list[int] = []

    def make_model(config: TrainConfig, classes: int) -> Normed:
        model = Normed()
        model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        return model

    console = Console(file=io.StringIO(), width=200)
    config = dataclasses.replace(saved_config(folder), reuse_memory=False)
    found = evaluate(config, data=make_data(45, 13), make_model=make_model, console=console)
    return seen, (found.loss, found.accuracy), console.file.getvalue()


@pytest.mark.parametrize(("trained", "tested"), [(2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("fsdp", [False, True])
def test_processes_evaluate_each_image_once_however_many_trained(
    trained: int, tested: int, fsdp: bool, tmp_path: Path
) -> None:
    job(trained, Normed, tmp_path / "run", epochs=1, report=False, fsdp=fsdp and trained > 1)
    before = files(tmp_path)
    found = in_processes(tested, evaluated_here, tmp_path / "run")
    whole = load_checkpoint(tmp_path / "run")["best_accuracy"]
    assert sum(sum(seen) for seen, _, _ in found) == 13
    assert len({values for _, values, _ in found}) == 1 and found[0][1][1] == whole
    assert [bool(said) for _, _, said in found] == [True] + [False] * (tested - 1)
    assert files(tmp_path) == before


def test_torchrun_tests_and_says_so_once(run: Run, tmp_path: Path) -> None:
    trained = torchrun(to=tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    tested = torchrun("--resume", "auto", "--test-only", to=tmp_path / "run", restarts=1)
    assert tested.returncode == 0 and tested.stdout.count("test loss") == 1, tested.stderr
    none = torchrun("--resume", "auto", "--test-only", to=tmp_path / "none")
    assert none.returncode != 0 and len(errors(none.stderr)) == 1 and "found none" in errors(none.stderr)[0]
