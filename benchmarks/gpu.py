"""`make gpu`, or `python -m benchmarks.gpu --output-dir DIR`: everything worth doing on a borrowed GPU, in ten minutes.

From a bare checkout, without a network: look around, build, test, let compute-sanitizer watch a small case, measure,
profile. Each stage has a time limit and is killed with all it started when that ends; a failure does not stop what
comes after. The folder gets summary.json and summary.md (written anew after every stage), a log for each of build,
checks and speed, results.json and trace.json.gz. The exit status is 1 where a stage failed.

Without a GPU it is a rehearsal: what needs none runs, tiny, and the summary says what was skipped and why.
docs/gpu.md describes the stages.
"""

# This module imports the standard library and rich only: it runs before anything is built, where torch may not even
# load. argparse rather than tyro, which a borrowed machine may lack.
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import gpu_report, records
from benchmarks.records import ROOT, write_text

DEADLINE_S = 570.0
GRACE_S = 3.0
LEAST_S = 3.0
LOG_BYTES = 2 << 20
OK, FAILED, STOPPED, SKIPPED = ("ok", "failed", "stopped", "skipped")
BUILD_LOG, CHECKS_LOG, SPEED_LOG, RESULTS, TRACE, SUMMARY_JSON, SUMMARY_MD = FILES = (
    "build.log", "checks.log", "speed.log", "results.json", "trace.json.gz", "summary.json", "summary.md",
)  # fmt: skip
SANITIZER_ERRORS = 99
MODULES = ("torch", "triton", "torchvision", "numpy", "ninja", "setuptools", "filelock", "rich", "tqdm", "pytest",
           "pytest_benchmark", "hypothesis", "sklearn", "torchmetrics", "PIL", "matplotlib", "tyro")  # fmt: skip

# Prints one line of JSON: what there is to work with.
LOOK = f"""
import importlib.util, json, platform
facts = {{"python": platform.python_version(), "cuda": False}}
facts["missing"] = [m for m in {MODULES!r} if importlib.util.find_spec(m) is None]
import torch
facts |= {{"torch": torch.__version__, "torch_cuda": torch.version.cuda, "cuda": torch.cuda.is_available()}}
if facts["cuda"]:
    device = torch.cuda.get_device_properties(0)
    facts |= {{"device": device.name, "capability": f"{{device.major}}.{{device.minor}}"}}
    torch.ones(1, device="cuda").add_(1).item()
print(json.dumps(facts))
"""


class Skip(Exception):
    """Why a stage does not run, or ran to no purpose; the message is for the summary."""


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    output_dir: Path
    skip: tuple[str, ...] = ()
    wheels: Path | None = None
    deadline_s: float = DEADLINE_S
    limits: dict[str, float] = field(default_factory=dict)
    python: str = sys.executable


@dataclass
class Context:
    """What stages know: settings, what the first stage saw, and a folder that is gone at the end."""

    settings: Settings
    scratch: Path
    facts: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 0.0

    @property
    def gpu(self) -> bool:
        return bool(self.facts.get("cuda"))

    @property
    def machine(self) -> str:
        """The GPU's name, or words for the want of one."""
        if self.gpu:
            return str(self.facts["device"])
        return "a rehearsal without a GPU" if self.facts else "a machine that could not be looked at"

    def module(self, name: str, *arguments: object) -> list[str]:
        """The command for `python -m name arguments`."""
        return [self.settings.python, "-m", name, *map(str, arguments)]


@dataclass(frozen=True)
class Output:
    """What the commands of a stage left: the exit status of the last one, and its part of the log."""

    status: int
    text: str

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        return next((line.strip() for line in reversed(self.text.splitlines()) if line.strip()), "no output")


@dataclass(frozen=True)
class Plan:
    """Commands, run in turn until one fails; more environment; and what to make of the output.

    `judge` returns words for the summary where all is well, raises Skip, or raises RuntimeError where the stage failed.
    """

    commands: Sequence[Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[[Output], str] | None = None


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        limit_s: seconds it may take.
        reserve_s: seconds before the deadline that belong to later stages.
        plan: what it does here; raises Skip.
    """

    name: str
    log: str
    limit_s: float
    reserve_s: float
    plan: Callable[[Context], Plan]


@dataclass
class Outcome:
    """What became of a stage."""

    name: str
    state: str
    seconds: float
    limit_s: float
    detail: str
    log: str
    commands: list[str] = field(default_factory=list)


# -------------------------------------------------------------------------------------------------------------- stages


def _checked(output: Output, good: str) -> str:
    if output.status != 0:
        raise RuntimeError(f"exit status {output.status}: {output.last_line}")
    return good


def look(context: Context) -> Plan:
    """What is installed, and which GPU there is."""

    def judge(output: Output) -> str:
        _checked(output, "")
        context.facts.update(json.loads(output.last_line))
        found = context.facts
        words = f"{found.get('device', 'no CUDA GPU')}, torch {found['torch']}, Python {found['python']}"
        return words + (f"; missing: {', '.join(found['missing'])}" if found["missing"] else "")

    return Plan([*([["nvidia-smi"]] if shutil.which("nvidia-smi") else []), [context.settings.python, "-c", LOOK]],
                judge=judge)  # fmt: skip


def wheels(context: Context) -> Plan:
    """Install the wheels that travelled along."""
    folder = context.settings.wheels
    if folder is None:
        raise Skip("no folder was given with --wheels")
    files = sorted(folder.glob("*.whl"))
    command = context.module("pip", "install", "--no-index", "--no-deps", "--no-cache-dir", *files)
    return Plan([command], judge=lambda output: _checked(output, f"{len(files)} installed"))


def build(context: Context) -> Plan:
    """Compile and install, against the torch that is there; then say which backends are live."""
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    commands = [context.module("pip", "install", *options, "-e", ROOT), context.module("fastres.info")]
    words = "" if context.gpu else "a rehearsal; "
    return Plan(commands, judge=lambda output: _checked(output, f"{words}CUDA code for {architecture(context)}"))


def architecture(context: Context) -> str:
    """The one architecture to compile for: the user's, or the GPU's own; without a GPU one stands for all."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or context.facts.get("capability") or "9.0"


def tests(context: Context) -> Plan:
    """Run the tests that are marked gpu."""
    report = context.scratch / "tests.xml"
    options = ("-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    command = context.module("pytest", ROOT / "tests", *options, f"--junitxml={report}")
    return Plan([command], judge=lambda output: judge_tests(output, report, context.gpu))


def judge_tests(output: Output, report: Path, gpu: bool) -> str:
    """Count by the report; files that could not be collected for want of a package are named, and are no failure.

    Where there is a GPU, a run in which nothing passed is a failure.
    """
    if not report.is_file():
        raise RuntimeError(f"exit status {output.status}: {output.last_line}")
    passed = failed = skipped = 0
    reasons: set[str] = set()
    lacking: dict[str, int] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        left = case.find("skipped")
        if bad is not None:
            absent = re.search(r"No module named '([\w.]+)'", bad.text or "")
            if bad.get("message") == "collection failure" and absent and not absent[1].startswith(("fastres", "tests")):
                lacking[absent[1]] = lacking.get(absent[1], 0) + 1
            else:
                failed += 1
        elif left is not None:
            skipped += 1
            reasons.add(left.get("message") or "")
        else:
            passed += 1
    words = f"{passed} passed, {failed} failed, {skipped} skipped"
    words += "".join(f"; {count} files left out, {name} is missing" for name, count in lacking.items())
    # 2: collection was interrupted, 5: nothing is marked gpu; both are known by the counts.
    if failed or output.status not in (0, 1, 2, 5):
        raise RuntimeError(f"{words} (exit status {output.status})")
    if not passed:
        words += f": {', '.join(sorted(reasons)) or 'no test is marked gpu'}"
        raise RuntimeError(words) if gpu else Skip(words)
    return words


def case(context: Context) -> Plan:
    """Run the sanitizer's case by itself, which also compiles the kernels that it needs."""
    return Plan([context.module("benchmarks.gpu_case")], judge=lambda output: _checked(output, output.last_line))


def sanitizer(tool: str) -> Callable[[Context], Plan]:
    """A stage that lets a tool of compute-sanitizer watch the case."""

    def plan(context: Context) -> Plan:
        _need_gpu(context)
        program = find_program("compute-sanitizer")
        options = ("--tool", tool, "--error-exitcode", str(SANITIZER_ERRORS), "--print-limit", "20")
        command = [program, *options, *context.module("benchmarks.gpu_case")]
        # Memory straight from the driver, so that the tool knows where each tensor ends.
        return Plan([command], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, judge_sanitizer)

    return plan


def judge_sanitizer(output: Output) -> str:
    """The tool's own summary; the kernels that it names where it found something."""
    refused = re.search(r"Device not supported.*|Unable to find injection library.*", output.text)
    if refused:
        raise Skip(f"compute-sanitizer does not work here: {refused[0]}")
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output.text)
    summary = found[-1] if found else output.last_line
    if output.status != 0:
        places = re.findall(r"^=+ +at (?:\w+ )*([\w:~]+)|access at (?:\w+ )*([\w:~]+)", output.text, re.MULTILINE)
        kernels = sorted({name for place in places for name in place if name})
        words = f"; in {', '.join(kernels[:5])}" if kernels else f" (exit status {output.status}: {output.last_line})"
        raise RuntimeError(summary + words)
    if not found:
        raise RuntimeError(f"no summary in the tool's output: {output.last_line}")
    return summary


def measure(context: Context) -> Plan:
    """Measure, for as long as the stage may last."""
    # What is under way when the budget ends is finished before the limit.
    budget = context.limit_s * 0.9 - 5 if context.gpu else min(45.0, context.limit_s / 2)
    folder = context.settings.output_dir
    command = context.module("benchmarks.gpu_measure", "--output-dir", folder, "--budget-s", f"{max(0.0, budget):.0f}")

    def judge(output: Output) -> str:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        count = len(results["entries"])
        words = f"{count} workloads" + ("" if results["complete"] else ", not everything")
        _checked(output, "")
        return words if context.gpu else f"a rehearsal on the CPU: {words}"

    return Plan([command], {} if context.gpu else {"FASTRES_BENCH_QUICK": "1"}, judge)


def profile(context: Context) -> Plan:
    """torch.profiler over a training step."""
    command = context.module("benchmarks.gpu_profile", "--trace", context.settings.output_dir / TRACE)
    words = "a table in the log, a trace" if context.gpu else "a rehearsal on the CPU: a table in the log, a trace"
    return Plan([command], {} if context.gpu else {"FASTRES_BENCH_QUICK": "1"}, lambda output: _checked(output, words))


def ncu(context: Context) -> Plan:
    """Nsight Compute on the kernels of one run of the operator."""
    _need_gpu(context)
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
    # Clocks are left as they are: the machine may be shared.
    options = ["--profile-from-start", "off", "--clock-control", "none", "--launch-count", "12"]
    options += [word for section in sections for word in ("--section", section)]
    return Plan([[find_program("ncu"), *options, *context.module("benchmarks.gpu_case", "--op")]], judge=judge_ncu)


def judge_ncu(output: Output) -> str:
    """How many kernels were profiled; Skip where the counters may not be read here."""
    refused = re.search(r"ERR_NVGPUCTRPERM|Failed to initialize the profiler.*|LibraryNotLoaded", output.text)
    if refused:
        raise Skip(f"the hardware counters cannot be read here: {refused[0]}")
    _checked(output, "")
    kernels = re.findall(r"^  (\S.*?) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\)", output.text, re.MULTILINE)
    if not kernels:
        raise RuntimeError(f"no kernel was profiled: {output.last_line}")
    return f"{len(kernels)} kernels: {', '.join(dict.fromkeys(kernels))}"


def _need_gpu(context: Context) -> None:
    if not context.gpu:
        raise Skip("no CUDA GPU is present")


def find_program(name: str) -> str:
    """The path of a program of the CUDA toolkit.

    Raises:
        Skip: it is not there.
    """
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places = [path for home in homes for path in (home / "bin" / name, home / "compute-sanitizer" / name)]
    places += sorted(Path("/opt/nvidia/nsight-compute").glob(f"*/{name}"), reverse=True)
    found = shutil.which(name) or next((str(path) for path in places if os.access(path, os.X_OK)), None)
    if found is None:
        raise Skip(f"{name} is not installed")
    return found


STAGES = (
    Stage("look", BUILD_LOG, 45, 0, look),
    Stage("wheels", BUILD_LOG, 60, 200, wheels),
    Stage("build", BUILD_LOG, 150, 200, build),
    Stage("tests", CHECKS_LOG, 120, 200, tests),
    Stage("case", CHECKS_LOG, 60, 200, case),
    Stage("memcheck", CHECKS_LOG, 60, 200, sanitizer("memcheck")),
    Stage("racecheck", CHECKS_LOG, 60, 200, sanitizer("racecheck")),
    Stage("initcheck", CHECKS_LOG, 60, 200, sanitizer("initcheck")),
    # It takes what there is, less what the last two need.
    Stage("measure", SPEED_LOG, 500, 80, measure),
    Stage("profile", SPEED_LOG, 45, 35, profile),
    Stage("ncu", SPEED_LOG, 45, 0, ncu),
)


# ------------------------------------------------------------------------------------------------------------- running


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
        outcome.detail = plan.judge(output) if plan.judge is not None else _checked(output, "")
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


# ------------------------------------------------------------------------------------------------------------- summary


def write_summary(context: Context, outcomes: Sequence[Outcome], started: str, seconds: float) -> None:
    """Write summary.json and summary.md."""
    folder = context.settings.output_dir
    data = {
        "rehearsal": not context.gpu,
        "machine": context.facts,
        "commit": records.commit(),
        "started": started,
        "seconds": round(seconds, 1),
        "deadline_s": context.settings.deadline_s,
        "stages": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    write_text(folder / SUMMARY_JSON, records.to_json(data))
    lines = [
        f"make gpu: {context.machine}; commit {data['commit'] or 'unknown'}, {started}, {seconds:.0f} s",
        "",
        "| stage | state | seconds | limit | what was seen |",
        records.row("---", "---", "---:", "---:", "---"),
    ]
    for outcome in outcomes:
        detail = outcome.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(
            records.row(outcome.name, outcome.state, f"{outcome.seconds:.1f}", f"{outcome.limit_s:.0f}", detail)
        )
    text = "\n".join(lines) + "\n"
    # Results are read as they are, also those of a run that was killed half-way.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        text += "\n" + gpu_report.markdown(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
    write_text(folder / SUMMARY_MD, text)


def show(outcomes: Sequence[Outcome], context: Context, console: Console) -> None:
    """The table at the end."""
    table = Table(title=f"make gpu: {context.machine}", title_justify="left")
    for name, justify in (("stage", "left"), ("state", "left"), ("seconds", "right"), ("what was seen", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    colours = {OK: "green", FAILED: "red", STOPPED: "red", SKIPPED: "yellow"}
    for outcome in outcomes:
        detail = outcome.detail.replace("[", r"\[")
        state = f"[{colours[outcome.state]}]{outcome.state}[/]"
        table.add_row(outcome.name, state, f"{outcome.seconds:.1f}", detail if len(detail) < 300 else detail[:300])
    console.print(table)
    files = [name for name in FILES if (context.settings.output_dir / name).is_file()]
    console.print(f"{context.settings.output_dir}: {', '.join(files)}", highlight=False, markup=False)


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether a stage failed or was killed."""
    return any(outcome.state in (FAILED, STOPPED) for outcome in outcomes)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, ends the stage under way and lets the summary be written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(arguments: Sequence[str] | None) -> Settings:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "gpu", help="folder for everything written")
    names = [stage.name for stage in STAGES[1:]]
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="STAGE", help=", ".join(names))
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install before the build")
    parser.add_argument("--limit", nargs="+", type=_limit, default=[], metavar="STAGE=S", help="other time limits")
    parser.add_argument("--deadline-s", type=float, default=DEADLINE_S, help="seconds for everything")
    options = parser.parse_args(arguments)
    folder: Path = options.output_dir.resolve()
    if folder.exists() and not folder.is_dir():
        parser.error(f"output-dir: expected a folder, got the file {folder}")
    if options.wheels is not None and not list(options.wheels.glob("*.whl")):
        parser.error(f"wheels: expected a folder that holds wheels, got {options.wheels}")
    if not math.isfinite(options.deadline_s) or options.deadline_s <= 0:
        parser.error(f"deadline-s: expected a positive number of seconds, got {options.deadline_s}")
    found = options.wheels.resolve() if options.wheels is not None else None
    return Settings(folder, tuple(options.skip), found, options.deadline_s, dict(options.limit))


def _limit(text: str) -> tuple[str, float]:
    """A stage's name and seconds, from "name=seconds"."""
    name, _, number = text.partition("=")
    names = [stage.name for stage in STAGES]
    try:
        seconds = float(number)
    except ValueError:
        seconds = math.nan
    if name not in names or not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected STAGE=SECONDS with a stage of {', '.join(names)}, got {text!r}")
    return name, seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 1 where a stage failed."""
    settings = parse(arguments)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (settings.output_dir / name).unlink(missing_ok=True)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fastres-gpu-") as scratch, _terminated_as_interrupted():
        context = Context(settings, Path(scratch))
        outcomes = run_all(STAGES, context, console)
    show(outcomes, context, console)
    return 1 if failed(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
