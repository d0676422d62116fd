"""Runs the stages of `make gpu` in turn, each within its limit, whatever became of the one before.

The standard library and rich only, as in stages.py.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.gpu.stages import (
    FAILED,
    OK,
    SKIPPED,
    STOPPED,
    Context,
    Outcome,
    Output,
    Skip,
    Stage,
    architecture,
    checked,
)
from benchmarks.gpu.summary import write_summary
from benchmarks.records import ROOT

GRACE_S = 10.0
LEAST_S = 3.0
LOG_BYTES = 2 << 20


def execute(command: Sequence[str], log: Path, environment: dict[str, str], limit_s: float) -> int | None:
    """Run a command with its output in a log.

    Returns:
        Its exit status, or None where it was killed at its limit. Nothing of its process group lives on in either case.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # As Ctrl-C would: pytest then says what it has seen so far.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_stage(stage: Stage, context: Context, left_s: float) -> Outcome:
    """Run one stage with `left_s` seconds until the deadline, and judge it. Raises nothing but KeyboardInterrupt."""
    log = context.settings.output_dir / stage.log
    most_s = context.settings.limits.get(stage.name, stage.limit_s)
    limit_s = context.limit_s = min(most_s, left_s - stage.reserve_s)
    outcome = Outcome(stage.name, SKIPPED, 0.0, max(0.0, limit_s), "", stage.log)
    began = time.monotonic()
    try:
        if stage.name in context.settings.skip:
            raise Skip("asked for with --skip")
        plan = stage.plan(context)
        if limit_s < LEAST_S:
            raise Skip(f"no time left: {left_s:.0f} s until the deadline, {stage.reserve_s:.0f} s of them reserved")
        environment = {"PYTHONUNBUFFERED": "1", "TORCH_CUDA_ARCH_LIST": architecture(context)} | plan.environment
        outcome.commands = [" ".join(command) for command in plan.commands]
        _write(log, f"==== {stage.name}, limit {limit_s:.0f} s\n")
        status, text = 0, ""
        for command, shown in zip(plan.commands, outcome.commands, strict=True):
            _write(log, f"$ {shown}\n")
            start = log.stat().st_size
            ended = execute(command, log, environment, max(0.1, began + limit_s - time.monotonic()))
            text = _shortened(log, start)
            if ended is None:
                outcome.state = STOPPED
                outcome.detail = f"killed at its limit of {limit_s:.0f} s; last: {Output(1, text).last_line}"
                return outcome
            status = ended
            if status != 0:
                break
        output = Output(status, text)
        outcome.detail = plan.judge(output) if plan.judge is not None else checked(output, "")
        outcome.state = OK
    except Skip as why:
        outcome.detail = str(why)
    except Exception as error:
        outcome.state = FAILED
        outcome.detail = str(error) or type(error).__name__
    finally:
        outcome.seconds = time.monotonic() - began
        _write(log, f"==== {stage.name}: {outcome.state}, {outcome.seconds:.1f} s: {outcome.detail}\n\n")
    return outcome


def _write(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as stream:
        stream.write(text)


def _shortened(log: Path, start: int) -> str:
    """The log from `start` on, whose middle is taken out of the file where it is too long."""
    with log.open("rb+") as stream:
        stream.seek(start)
        text = stream.read()
        if len(text) > LOG_BYTES:
            half = LOG_BYTES // 2
            text = text[:half] + b"\n[... %d bytes left out ...]\n" % (len(text) - 2 * half) + text[-half:]
            stream.seek(start)
            stream.write(text)
            stream.truncate()
    return text.decode("utf-8", errors="replace")


def run_all(stages: Sequence[Stage], context: Context, console: Console) -> list[Outcome]:
    """Run the stages in turn, write the summary after each. An interrupt ends the stage and skips the others."""
    began = time.monotonic()
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    outcomes: list[Outcome] = []
    interrupted = False
    for stage in stages:
        if interrupted:
            outcomes.append(Outcome(stage.name, SKIPPED, 0.0, 0.0, "interrupted", stage.log))
            continue
        console.print(f"{stage.name} ...", style="dim", highlight=False)
        left_s = context.settings.deadline_s - (time.monotonic() - began)
        try:
            outcome = run_stage(stage, context, left_s)
        except KeyboardInterrupt:
            interrupted = True
            outcome = Outcome(stage.name, FAILED, 0.0, 0.0, "interrupted", stage.log)
        outcomes.append(outcome)
        console.print(f"  {outcome.state}, {outcome.seconds:.0f} s: {outcome.detail}", markup=False, highlight=False)
        write_summary(context, outcomes, started, time.monotonic() - began)
    write_summary(context, outcomes, started, time.monotonic() - began)
    return outcomes


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether a stage failed or was killed."""
    return any(outcome.state in (FAILED, STOPPED) for outcome in outcomes)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, ends the stage under way and lets the summary be written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
