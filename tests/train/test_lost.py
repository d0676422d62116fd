"""Nothing is lost: kills, signals, full disks, broken files, and two runs in one folder."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fastres.train import DivergedError, InputError, RunError, Summary, __main__, boards, load_checkpoint, loop
from fastres.train.checkpoint import AUTO, BEST, LAST, PREVIOUS
from fastres.train.folder import append_json, atomic, claim, keep_rows, write_text
from tests.oracle import SEED
from tests.train.conftest import signal_in_call
from tests.train.test_loop import assert_same_run, assert_same_weights, contents, rows

Run = Callable[..., Summary]
ROOT = Path(__file__).resolve().parents[2]

# --- Kills ---


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path, kills: int) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tests.train.kills", str(folder), str(kills), str(SEED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run-whole", folder)
    assert load_checkpoint(folder / BEST)["step"] == load_checkpoint(tmp_path / "run-whole" / BEST)["step"]
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(("between", "epoch"), [("best and last", 1), ("best and last", 2), ("last and previous", 2)])
def test_kill_between_two_files_loses_neither(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str, epoch: int
) -> None:
    """The kill comes between the writing of best.pt and of last.pt, or while last.pt is given its other name."""
    run(to="whole", dropout=0.3)

    class Kill(BaseException):
        pass

    real, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        name = Path(target).name
        count += name == LAST
        if count == epoch and name == LAST and between == "best and last":
            raise Kill
        real(source, target)
        if name == PREVIOUS and between == "last and previous":
            raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(os, "replace", replace)
        run(to="parts", dropout=0.3)
    assert load_checkpoint(tmp_path / "parts")["step"] == 6
    assert run(to="parts", dropout=0.3, resume=AUTO).finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert load_checkpoint(tmp_path / "parts" / BEST)["step"] == load_checkpoint(tmp_path / "whole" / BEST)["step"]


def test_automatic_resume_begins_where_there_is_nothing(run: Run, tmp_path: Path) -> None:
    run(to="plain", dropout=0.3)
    run(to="auto", dropout=0.3, resume=AUTO)
    assert_same_run(tmp_path / "plain", tmp_path / "auto")


def test_automatic_resume_needs_a_folder(run: Run) -> None:
    with pytest.raises(InputError, match=r"^resume: auto .*output_dir"):
        run(resume=AUTO, output_dir=None)


@pytest.mark.parametrize("resume", [None, AUTO])
def test_run_without_a_checkpoint_is_begun_anew(run: Run, tmp_path: Path, resume: Path | None) -> None:
    run(to="whole")
    run(to="killed")
    for name in (LAST, PREVIOUS, BEST, "summary.json", "metrics.jsonl"):
        (tmp_path / "killed" / name).unlink()
    assert run(to="killed", resume=resume).finished
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"model": "mine"}'])
def test_files_of_somebody_else_are_not_overwritten(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"already holds a run"):
        run()
    assert (tmp_path / "run" / "config.json").read_text() == content


def test_checkpoints_come_by_the_clock_and_change_nothing(run: Run, tmp_path: Path) -> None:
    run(to="rarely", dropout=0.3)
    run(to="often", dropout=0.3, save_minutes=1e-9)
    assert_same_run(tmp_path / "rarely", tmp_path / "often")
    # Six steps an epoch: the one before the last is of the step before, and not of the epoch before.
    assert load_checkpoint(tmp_path / "often" / PREVIOUS)["step"] == 11
    assert load_checkpoint(tmp_path / "rarely" / PREVIOUS)["step"] == 6


# --- Broken files ---


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_previous_checkpoint_serves_where_the_last_one_is_broken(run: Run, tmp_path: Path, damage: str) -> None:
    run(to="whole", dropout=0.3)
    run(to="parts", dropout=0.3)
    last = tmp_path / "parts" / LAST
    last.write_bytes(last.read_bytes()[:500])
    if damage == "missing":
        last.unlink()
    text = io.StringIO()
    run(to="parts", dropout=0.3, resume=tmp_path / "parts", console=Console(file=text, width=400))
    assert f"going on from {PREVIOUS}, of step 6" in text.getvalue()
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stop", [6, 9])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_best_checkpoint_is_made_good(run: Run, tmp_path: Path, damage: str, stop: int) -> None:
    run(max_steps=stop, save_minutes=1e-9)
    best = tmp_path / "run" / BEST
    was = load_checkpoint(best)
    best.write_bytes(best.read_bytes()[:500])
    if damage == "missing":
        best.unlink()
    text = io.StringIO()
    run(resume=AUTO, console=Console(file=text, width=400))
    assert "best.pt: " in text.getvalue()
    now, last = load_checkpoint(best), load_checkpoint(tmp_path / "run")
    assert now["step"] == last["best_step"] and now["best_accuracy"] == last["best_accuracy"]
    if "written again" in text.getvalue():
        assert was["step"] == stop
    else:
        assert now["step"] > stop


def test_best_checkpoint_that_nobody_has_is_found_anew(run: Run, tmp_path: Path) -> None:
    run(max_steps=6)
    folder = tmp_path / "run"
    state = load_checkpoint(folder)
    torch.save({**state, "best_step": 3, "best_accuracy": 2.0}, folder / LAST)  # no accuracy can be better
    (folder / BEST).unlink()
    text = io.StringIO()
    summary = run(resume=AUTO, console=Console(file=text, width=400))
    assert "is lost; the next evaluation counts as the best" in text.getvalue()
    assert summary.best_epoch == 2 and load_checkpoint(folder / BEST)["step"] == 12


def test_broken_lines_of_the_logs_are_told_and_dropped(run: Run, tmp_path: Path) -> None:
    run(to="whole")
    run(to="parts", max_steps=6)
    for name in ("steps.jsonl", "metrics.jsonl"):
        file = tmp_path / "parts" / name
        file.write_bytes(
            b'\xff\xfe\n[1]\n"text"\n{"epoch": 1}\n{"step": "x"}\n' + file.read_bytes() + b'{"step": 7, "lo'
        )
    text = io.StringIO()
    run(to="parts", resume=AUTO, console=Console(file=text, width=400))
    assert "steps.jsonl: 5 lines were no records" in text.getvalue()
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("cut_short", "kept"), [(False, [1, 2, 3]), (True, [1, 3])])
def test_rows_are_kept_up_to_a_step(cut_short: bool, kept: list[int], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert keep_rows(file, 3, cut_short=cut_short) == 0 and not file.exists()
    for step, complete in ((1, True), (2, False), (3, True), (4, True)):
        append_json(file, {"step": step, "complete": complete})
    assert keep_rows(file, 3, cut_short=cut_short) == 0
    assert [row["step"] for row in rows(file)] == kept


# --- Writing ---


def test_full_disk_ends_the_run_in_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files cannot grow beyond a limit that the system sets: the first checkpoints fit, the log of steps does not."""
    run(to="whole")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = torch.save

    def save(state: Any, file: Any) -> None:
        if state["step"] > 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        real(state, file)

    try:
        with (
            monkeypatch.context() as patch,
            pytest.raises(RunError, match=r"^cannot write .*pt: ") as caught,
        ):
            patch.setattr(torch, "save", save)
            run(to="full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert load_checkpoint(tmp_path / "full")["step"] == 6
    assert not list((tmp_path / "full").glob(".*.tmp"))
    run(to="full", resume=AUTO)
    assert_same_run(tmp_path / "whole", tmp_path / "full")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("enforce fail at x\nat y")]
)
def test_any_failed_write_is_one_sentence_and_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with (
        pytest.raises(RunError, match=r"^cannot write .*a\.txt: (No space left on device|enforce fail at x)$"),
        atomic(file) as temporary,
    ):
        temporary.write_text("half")
        raise error
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_full_disk_is_named_whatever_the_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"a\.txt: no space left on the disk$"), atomic(tmp_path / "a.txt"):
        raise RuntimeError("enforce fail at x")


def test_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems; of a file it is an error."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if broken(Path(f"/proc/self/fd/{descriptor}").resolve()):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    broken = Path.is_dir
    write_text(tmp_path / "a.txt", "new")
    broken = Path.is_file
    with pytest.raises(RunError, match=r"a\.txt: Invalid argument$"):
        write_text(tmp_path / "a.txt", "newer")
    assert contents(tmp_path) == {"a.txt": b"new"}


def test_picture_that_cannot_be_written_is_told_and_ends_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / "curves.png" / "mine").mkdir(parents=True)
    text = io.StringIO()
    assert run(report=True, console=Console(file=text, width=400)).finished
    assert "curves.png" in text.getvalue().split("epoch 2/2")[1].split("Training finished")[0]
    assert (tmp_path / "run" / "confusion.png").is_file() and (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
@pytest.mark.parametrize("resume", [None, AUTO])
def test_impossible_folder_is_one_sentence(run: Run, tmp_path: Path, name: str, resume: Path | None) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"^cannot write .*: (Not a directory|File name too long)$"):
        run(output_dir=tmp_path / name, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["resume", "pretrained"])
def test_impossible_file_is_one_sentence(run: Run, option: str) -> None:
    with pytest.raises(InputError, match=rf"^{option}: cannot read x{{200}}\.\.\.: File name too long$"):
        run(**{option: Path("x" * 300)})


def test_folder_that_nobody_may_write_is_one_sentence(run: Run) -> None:
    with pytest.raises(RunError, match=r"^cannot write /proc/.*: "):
        run(output_dir=Path("/proc/fastres/run"))


def test_second_run_in_a_folder_is_refused(run: Run, tmp_path: Path) -> None:
    refused: list[str] = []

    def intrude(module: nn.Module, inputs: Any) -> None:
        if not refused:
            with pytest.raises(InputError) as caught:
                claim(tmp_path / "run")
            refused.append(str(caught.value))

    hook = nn.modules.module.register_module_forward_pre_hook(intrude)
    try:
        run()
    finally:
        hook.remove()
    assert refused == [f"output_dir: another process is training in {tmp_path / 'run'}"]
    claim(tmp_path / "run").release()


def test_temporary_files_of_a_killed_process_go(run: Run, tmp_path: Path) -> None:
    run(max_steps=6)
    (tmp_path / "run" / ".best.pt.3627.tmp").write_bytes(b"half")
    (tmp_path / "run" / ".mine.tmp").write_bytes(b"somebody's")
    run(resume=AUTO)
    assert [file.name for file in (tmp_path / "run").glob(".*.tmp")] == [".mine.tmp"]


def test_end_that_was_killed_before_its_report_is_reported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(BaseException):
        pass

    def kill(summary: Summary) -> None:
        raise Kill

    whole = run(to="whole")
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(loop, "write_summary", kill)
        run(to="parts")
    with signal_in_call(1, signal.SIGINT):
        assert not run(to="parts", eval_batch_size=6, resume=AUTO).finished
    summary = run(to="parts", resume=AUTO)
    assert summary.finished and (summary.best_epoch, summary.last_accuracy) == (whole.best_epoch, whole.last_accuracy)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(InputError, match=r"already done"):
        run(to="parts", resume=AUTO)


def test_run_at_work_has_no_summary_of_the_sitting_before(run: Run, tmp_path: Path) -> None:
    run(epochs=1)
    with pytest.raises(DivergedError), stopping_at(3):
        run(epochs=2, resume=AUTO)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run(epochs=2, resume=AUTO).finished


@contextmanager
def stopping_at(call: int) -> Iterator[None]:
    """Let a run's loss be NaN in the given call of the network."""
    count = 0

    def spoil(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal count
        count += isinstance(module, nn.Linear)
        return output * float("nan") if count == call and isinstance(module, nn.Linear) else None

    hook = nn.modules.module.register_module_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def test_tensorboard_gets_the_steps_before_a_divergence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(boards.Board, "close", lambda board: closed.append(board))
    with pytest.raises(DivergedError), stopping_at(3):
        run()
    assert len(closed) == 1


# --- Signals ---


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("calls", [1, 7, 8])
def test_signal_finishes_the_step_saves_and_gives_its_status(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int
) -> None:
    """The signal comes in the first step, in an evaluation, and after it."""
    run(to="whole", dropout=0.3)
    before = signal.getsignal(signal.Signals[name])
    with signal_in_call(calls, signal.Signals[name]):
        summary = run(to="parts", dropout=0.3)
    assert summary.stopped_by == name and not summary.finished
    assert signal.getsignal(signal.Signals[name]) is before
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["stopped_by"] == name
    assert load_checkpoint(tmp_path / "parts")["step"] == {1: 1, 7: 6, 8: 7}[calls]
    monkeypatch.setattr(__main__, "train", lambda config: summary)
    assert __main__.main([]) == {"SIGTERM": 143, "SIGINT": 130}[name]
    run(to="parts", dropout=0.3, resume=AUTO)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("handler", "stopped_by", "status"), [(signal.SIG_DFL, "SIGHUP", 129), (signal.SIG_IGN, None, 0)]
)
def test_a_terminal_that_goes_ends_a_run_unless_under_nohup(
    run: Run, monkeypatch: pytest.MonkeyPatch, handler: Any, stopped_by: str | None, status: int
) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with signal_in_call(3, signal.SIGHUP):
            summary = run()
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (summary.stopped_by, summary.step) == (stopped_by, 12 if stopped_by is None else 3)
    monkeypatch.setattr(__main__, "train", lambda config: summary)
    assert __main__.main([]) == status


def test_run_in_another_thread_leaves_signals_alone(run: Run) -> None:
    """Python sets handlers in the main thread only."""
    before, found = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: found.append(run(max_steps=2)))
    thread.start()
    thread.join()
    assert found[0].finished and signal.getsignal(signal.SIGINT) is before


def test_interruption_before_the_loop_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "train", interrupt)
    assert __main__.main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_checkpoint_carries_what_prediction_needs(run: Run, tmp_path: Path) -> None:
    run()
    state = load_checkpoint(tmp_path / "run")
    assert (state["mean"], state["std"], state["image_size"]) == ([0.4] * 3, [0.3] * 3, 8)
    assert torch.is_tensor(state["generator"])
