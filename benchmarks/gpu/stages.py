"""The stages of `make gpu`: what each one runs, and how its output is judged.

This module imports the standard library only: it runs before anything is built, where torch may not even load.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import ROOT

DEADLINE_S = 570.0
OK, FAILED, STOPPED, SKIPPED = ("ok", "failed", "stopped", "skipped")
BUILD_LOG, CHECKS_LOG, SPEED_LOG, RESULTS, TRACE, SUMMARY_JSON, SUMMARY_MD = FILES = (
    "build.log", "checks.log", "speed.log", "results.json", "trace.json.gz", "summary.json", "summary.md",
)  # fmt: skip
SANITIZER_ERRORS = 99
MODULES = ("torch", "triton", "torchvision", "numpy", "ninja", "setuptools", "filelock", "rich", "tqdm", "pytest",
           "xdist", "pytest_benchmark", "hypothesis", "sklearn", "torchmetrics", "PIL", "matplotlib",
           "tyro")  # fmt: skip

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


def checked(output: Output, good: str) -> str:
    """`good` where the last command succeeded.

    Raises:
        RuntimeError: it failed; the message has its last line.
    """
    if output.status != 0:
        raise RuntimeError(f"exit status {output.status}: {output.last_line}")
    return good


def look(context: Context) -> Plan:
    """What is installed, and which GPU there is."""

    def judge(output: Output) -> str:
        checked(output, "")
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
    return Plan([command], judge=lambda output: checked(output, f"{len(files)} installed"))


def build(context: Context) -> Plan:
    """Compile and install, against the torch that is there; then say which backends are live."""
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    commands = [context.module("pip", "install", *options, "-e", ROOT), context.module("fastres.info")]
    words = "" if context.gpu else "a rehearsal; "
    return Plan(commands, judge=lambda output: checked(output, f"{words}CUDA code for {architecture(context)}"))


def architecture(context: Context) -> str:
    """The one architecture to compile for: the user's, or the GPU's own; without a GPU one stands for all."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or context.facts.get("capability") or "9.0"


def tests(context: Context) -> Plan:
    """Run the tests that are marked gpu."""
    report = context.scratch / "tests.xml"
    # Mostly the compilation of kernels, so several processes share the GPU.
    processes = () if "xdist" in context.facts.get("missing", ["xdist"]) else ("-n", "8")
    options = (*processes, "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors")
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
    return Plan([context.module("benchmarks.gpu.case")], judge=lambda output: checked(output, output.last_line))


def sanitizer(tool: str) -> Callable[[Context], Plan]:
    """A stage that lets a tool of compute-sanitizer watch the case."""

    def plan(context: Context) -> Plan:
        _need_gpu(context)
        program = find_program("compute-sanitizer")
        options = ("--tool", tool, "--error-exitcode", str(SANITIZER_ERRORS), "--print-limit", "20")
        command = [program, *options, *context.module("benchmarks.gpu.case")]
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
    command = context.module("benchmarks.gpu.measure", "--output-dir", folder, "--budget-s", f"{max(0.0, budget):.0f}")

    def judge(output: Output) -> str:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        count = len(results["entries"])
        words = f"{count} workloads" + ("" if results["complete"] else ", not everything")
        checked(output, "")
        return words if context.gpu else f"a rehearsal on the CPU: {words}"

    return Plan([command], {} if context.gpu else {"FASTRES_BENCH_QUICK": "1"}, judge)


def profile(context: Context) -> Plan:
    """torch.profiler over a training step."""
    command = context.module("benchmarks.gpu.profile", "--trace", context.settings.output_dir / TRACE)
    words = "a table in the log, a trace" if context.gpu else "a rehearsal on the CPU: a table in the log, a trace"
    return Plan([command], {} if context.gpu else {"FASTRES_BENCH_QUICK": "1"}, lambda output: checked(output, words))


def ncu(context: Context) -> Plan:
    """Nsight Compute on the kernels of one run of the operator."""
    _need_gpu(context)
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
    # Clocks are left as they are: the machine may be shared.
    options = ["--profile-from-start", "off", "--clock-control", "none", "--launch-count", "12"]
    options += [word for section in sections for word in ("--section", section)]
    return Plan([[find_program("ncu"), *options, *context.module("benchmarks.gpu.case", "--op")]], judge=judge_ncu)


def judge_ncu(output: Output) -> str:
    """How many kernels were profiled; Skip where the counters may not be read here."""
    refused = re.search(r"ERR_NVGPUCTRPERM|Failed to initialize the profiler.*|LibraryNotLoaded", output.text)
    if refused:
        raise Skip(f"the hardware counters cannot be read here: {refused[0]}")
    checked(output, "")
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
    Stage("build", BUILD_LOG, 180, 200, build),
    Stage("tests", CHECKS_LOG, 180, 160, tests),
    Stage("case", CHECKS_LOG, 60, 200, case),
    Stage("memcheck", CHECKS_LOG, 60, 200, sanitizer("memcheck")),
    Stage("racecheck", CHECKS_LOG, 60, 200, sanitizer("racecheck")),
    Stage("initcheck", CHECKS_LOG, 60, 200, sanitizer("initcheck")),
    # It takes what there is, less what the last two need.
    Stage("measure", SPEED_LOG, 500, 80, measure),
    Stage("profile", SPEED_LOG, 45, 35, profile),
    Stage("ncu", SPEED_LOG, 45, 0, ncu),
)
