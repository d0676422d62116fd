"""`make gpu`: stages, their limits, the summary; and the measuring command's budget. Nothing here needs a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import records, workloads
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import driver, measure, networks, report, stages, timing
from benchmarks.gpu.stages import FAILED, OK, SKIPPED, STOPPED, Context, Outcome, Output, Plan, Settings, Skip, Stage

# Starts a process that ignores every polite signal, writes its id to argv[1], and waits.
GRANDCHILD = """
import os, pathlib, subprocess, sys, time
stubborn = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print(flush=True); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("waiting", flush=True)
time.sleep(99)
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def stage(name: str, *commands: list[str], limit_s: float = 30.0, **plan: object) -> Stage:
    return Stage(name, "checks.log", limit_s, 0.0, lambda context: Plan(commands, **plan))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    folder = tmp_path / "out"
    folder.mkdir()
    return Context(Settings(folder), tmp_path, {"cuda": False})


def run_all(context: Context, *stages: Stage) -> list[Outcome]:
    return driver.run_all(stages, context, Console(quiet=True))


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --------------------------------------------------------------------------------------------------------------- stages


def test_a_stage_is_killed_at_its_limit_with_a_grandchild_that_ignores_signals(context, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "GRACE_S", 0.3)
    pid_file = tmp_path / "pid"
    began = time.monotonic()
    outcomes = run_all(
        context,
        stage("slow", python(GRANDCHILD, pid_file), limit_s=3.0),
        stage("next", python("print('still here')")),
    )
    assert time.monotonic() - began < 20
    assert [o.state for o in outcomes] == [STOPPED, OK]
    assert "limit of 3 s" in outcomes[0].detail
    assert not alive(int(pid_file.read_text()))
    assert driver.failed(outcomes)


def test_nothing_that_a_stage_started_outlives_it(context, tmp_path):
    code = "import pathlib, subprocess, sys\np = subprocess.Popen(['sleep', '99'])\n"
    code += "pathlib.Path(sys.argv[1]).write_text(str(p.pid))"
    (outcome,) = run_all(context, stage("daemon", python(code, tmp_path / "pid")))
    assert outcome.state == OK
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)  # it was sent SIGKILL; when it dies is the system's business
    assert not alive(pid)


def test_a_failure_does_not_stop_what_comes_after(context):
    def broken(_: Context) -> Plan:
        raise KeyError("nobody thought of this")

    outcomes = run_all(
        context,
        stage("exits", python("import sys; print('the reason'); sys.exit(3)"), python("print('not reached')")),
        stage("missing program", ["/nonexistent/program"]),
        Stage("broken", "checks.log", 30.0, 0.0, broken),
        stage("judged", python("print('odd')"), judge=lambda output: json.loads(output.text)["x"]),
        stage("good", python("print('fine')"), judge=lambda output: output.last_line),
    )
    assert [o.state for o in outcomes] == [FAILED] * 4 + [OK]
    assert outcomes[0].detail == "exit status 3: the reason"
    assert "/nonexistent/program" in outcomes[1].detail
    assert outcomes[-1].detail == "fine"
    log = (context.settings.output_dir / "checks.log").read_text()
    assert "the reason" in log and "fine" in log and "\nnot reached" not in log
    summary = json.loads((context.settings.output_dir / "summary.json").read_text())
    assert [s["state"] for s in summary["stages"]] == [o.state for o in outcomes]


def test_the_deadline_ends_a_stage_and_skips_the_others(context, monkeypatch):
    monkeypatch.setattr(driver, "LEAST_S", 0.5)
    context.settings = Settings(context.settings.output_dir, deadline_s=2.0)
    outcomes = run_all(context, stage("long", python("import time; time.sleep(3600)")), stage("late", python("")))
    assert [o.state for o in outcomes] == [STOPPED, SKIPPED]
    assert "no time left" in outcomes[1].detail


def test_time_that_later_stages_need_is_kept_for_them(context):
    context.settings = Settings(context.settings.output_dir, deadline_s=10.0, limits={"greedy": 50.0})
    seen = []

    def plan(context: Context) -> Plan:
        seen.append(context.limit_s)
        return Plan([])

    run_all(context, Stage("greedy", "checks.log", 30.0, 4.0, plan), Stage("last", "checks.log", 5.0, 0.0, plan))
    assert 5.0 < seen[0] <= 6.0 and seen[1] == 5.0


def test_a_log_that_runs_over_keeps_its_ends(context, monkeypatch):
    monkeypatch.setattr(driver, "LOG_BYTES", 1000)
    code = "print('first'); print('x' * 100000); print('last')"
    run_all(context, stage("chatty", python(code)), stage("next", python("print('after')")))
    log = (context.settings.output_dir / "checks.log").read_text()
    assert len(log) < 3000
    assert "first" in log and "last" in log and "bytes left out" in log and "after" in log


def test_sigterm_ends_the_stage_and_leaves_a_summary(tmp_path):
    code = """
import sys
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.stages import Plan, Stage
names = sys.argv[3:]
command.STAGES = [Stage(n, "checks.log", 60, 0, lambda c: Plan([[sys.executable, "-c", sys.argv[2], sys.argv[1]]]))
                  for n in names]
sys.exit(command.main(["--output-dir", sys.argv[1] + ".out"]))
"""
    pid_file = tmp_path / "pid"
    command = python(code, pid_file, GRANDCHILD, "waits", "later")
    process = subprocess.Popen(command, cwd=records.ROOT, stdout=subprocess.DEVNULL)
    for _ in range(300):
        if pid_file.is_file() and pid_file.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    assert not alive(int(pid_file.read_text()))
    stages = json.loads((tmp_path / "pid.out" / "summary.json").read_text())["stages"]
    assert [(s["name"], s["state"], s["detail"]) for s in stages] == [
        ("waits", FAILED, "interrupted"),
        ("later", SKIPPED, "interrupted"),
    ]


# ------------------------------------------------------------------------------------------------------------ the whole


def test_a_run_without_a_gpu_says_of_every_stage_what_was_skipped_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "results"
    asked = ["build", "tests", "case", "measure", "profile"]
    assert command.main(["--output-dir", str(folder), "--skip", *asked]) == 0
    names = {path.name for path in folder.rglob("*")}
    assert names <= set(stages.FILES) and {"summary.json", "summary.md"} <= names
    summary = json.loads((folder / "summary.json").read_text())
    reasons = {s["name"]: s["detail"] for s in summary["stages"] if s["state"] == SKIPPED}
    assert list(reasons) == [s.name for s in stages.STAGES[1:]]
    assert all("--skip" in reasons[name] for name in asked)
    assert "--wheels" in reasons["wheels"]
    for name in ("memcheck", "racecheck", "initcheck", "ncu"):
        assert reasons[name] == "no CUDA GPU is present"
    assert summary["rehearsal"] is True
    text, shown = (folder / "summary.md").read_text(), capsys.readouterr().out
    for name, reason in reasons.items():
        assert f"| {name} | skipped |" in text and reason in text
        assert name in shown


def test_files_are_few_flat_and_named_for_every_file_system():
    assert len(stages.FILES) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in stages.FILES)
    assert {s.log for s in stages.STAGES} <= set(stages.FILES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--skip", "nothing"], "--skip"),
        (["--limit", "tests"], "STAGE=SECONDS"),
        (["--limit", "unknown=5"], "unknown=5"),
        (["--limit", "tests=-1"], "tests=-1"),
        (["--deadline-s", "0"], "deadline-s"),
        (["--wheels", "{tmp}"], "wheels"),
        (["--output-dir", "{tmp}/file"], "output-dir"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_written(arguments, words, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if "--output-dir" not in arguments:
        arguments += ["--output-dir", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_the_driver_needs_nothing_that_has_to_be_built_and_the_commands_no_package_that_may_be_missing():
    code = """
import sys
for name in ("tyro", "torchmetrics", "sklearn", "hypothesis", "typer"):
    sys.modules[name] = None
import benchmarks.gpu.__main__
assert not {"torch", "numpy", "fastres", "matplotlib"} & set(sys.modules), sorted(sys.modules)
import benchmarks.gpu.measure, benchmarks.gpu.case, benchmarks.gpu.profile
"""
    run = subprocess.run(python(code), cwd=records.ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# ----------------------------------------------------------------------------------------------------- judging outputs


def run_pytest(folder: Path, **files: str) -> tuple[Output, Path]:
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(f"import pytest\n{text}\n")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    report = folder / "tests.xml"
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return Output(run.returncode, run.stdout), report


PASSES = "@pytest.mark.gpu\ndef test_a(): pass"
FAILS = "@pytest.mark.gpu\ndef test_b(): assert False"
SKIPS = "@pytest.mark.gpu\n@pytest.mark.skip(reason='no CUDA GPU')\ndef test_c(): pass"
LACKS = "import package_that_is_not_there"


def test_test_files_that_lack_a_package_are_named_and_are_no_failure(tmp_path):
    words = stages.judge_tests(*run_pytest(tmp_path, good=PASSES, lacking=LACKS), True)
    assert words == "1 passed, 0 failed, 0 skipped; 1 files left out, package_that_is_not_there is missing"


@pytest.mark.parametrize("bad", [FAILS, "import fastres_of_ours_that_broke", "raise ValueError('at import')"])
def test_a_failing_test_or_module_is_a_failure(bad, tmp_path):
    with pytest.raises(RuntimeError, match="1 passed, 1 failed"):
        stages.judge_tests(*run_pytest(tmp_path, good=PASSES, bad=bad), False)


@pytest.mark.parametrize("files", [{"unmarked": "def test_d(): pass"}, {"skipped": SKIPS}])
def test_where_no_test_ran_the_stage_is_skipped_without_a_gpu_and_failed_with_one(files, tmp_path):
    output, report = run_pytest(tmp_path, **files)
    with pytest.raises(Skip, match=r"no test is marked gpu|no CUDA GPU"):
        stages.judge_tests(output, report, False)
    with pytest.raises(RuntimeError, match="0 passed"):
        stages.judge_tests(output, report, True)


def test_the_sanitizers_findings_name_their_kernels():
    good = "========= COMPUTE-SANITIZER\nblock: fine\n========= ERROR SUMMARY: 0 errors\n"
    assert stages.judge_sanitizer(Output(0, good)) == "ERROR SUMMARY: 0 errors"
    bad = (
        "========= Invalid __global__ write of size 4 bytes\n"
        "=========     at void fastres::apply<float>(int)+0x50 in apply.cu:12\n"
        "=========     by thread (0,0,0) in block (0,0,0)\n"
        "========= ERROR SUMMARY: 1 error\n"
    )
    with pytest.raises(RuntimeError, match=r"1 error; in fastres::apply$"):
        stages.judge_sanitizer(Output(stages.SANITIZER_ERRORS, bad))
    race = (
        "========= Error: Race reported between Write access at reduce_kernel+0x10 in k.py:3\n"
        "=========     and Read access at reduce_kernel+0x30 in k.py:5 [8 hazards]\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    with pytest.raises(RuntimeError, match=r"1 hazard displayed .* in reduce_kernel$"):
        stages.judge_sanitizer(Output(stages.SANITIZER_ERRORS, race))
    with pytest.raises(RuntimeError, match="exit status 1: Oops"):
        stages.judge_sanitizer(Output(1, "========= ERROR SUMMARY: 0 errors\nOops\n"))
    with pytest.raises(RuntimeError, match="no summary"):
        stages.judge_sanitizer(Output(0, "nothing\n"))
    with pytest.raises(Skip, match="Device not supported"):
        stages.judge_sanitizer(Output(1, "========= Error: Device not supported. Please refer to the list\n"))


def test_ncu_names_the_kernels_or_says_why_it_cannot():
    text = "==PROF== Connected\n[7] python3@127.0.0.1\n"
    text += "  _stats_kernel (132, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0\n"
    text += "  void at::copy<float>(int) (8, 1, 1)x(64, 1, 1), Context 1, Stream 7, Device 0, CC 9.0\n"
    assert stages.judge_ncu(Output(0, text)) == "2 kernels: _stats_kernel, void at::copy<float>(int)"
    with pytest.raises(Skip, match="ERR_NVGPUCTRPERM"):
        stages.judge_ncu(Output(1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"))
    with pytest.raises(RuntimeError, match="no kernel"):
        stages.judge_ncu(Output(0, "==WARNING== No kernels were profiled.\n"))


# ------------------------------------------------------------------------------------------------ the measuring command


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def task(clock: Clock, key: str, seconds: float = 1.0, sides: tuple[str, ...] = ("eager", "fused")) -> timing.Task:
    """A task whose every run takes `seconds` of the clock; the side "broken" cannot be set up."""

    def set_up(side: str) -> workloads.Run:
        if side == "broken":
            raise ValueError("first line\nsecond line")

        def run() -> None:
            clock.now += seconds

        return run

    workload = workloads.Workload("op", key, key, images=4, rounds=5, set_up=set_up, sides=sides, shape=(4, 2, 2, 2),
                                  bytes=1000)  # fmt: skip
    return timing.Task(workload, sides, key)


@pytest.fixture
def results() -> dict:
    machine = dict.fromkeys(("device", "driver", "torch", "triton", "dtype", "memory_format", "commit"), "any")
    machine |= {"device": "NVIDIA Pretend(R) 9000", "date": "2026-01-02", "rehearsal": False, "quick": False}
    return {"machine": machine, "copy": {"bytes": 1000, "seconds": [1e-6, 2e-6, 3e-6]}, "budget_s": 30.0}


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(workloads, "CUDA", False)


def test_the_budget_ends_the_run_with_valid_partial_results(results, tmp_path):
    clock, file = Clock(), tmp_path / "results.json"
    states = []

    def todo():
        for key in "abcd":
            if file.is_file():
                states.append([e["key"] for e in json.loads(file.read_text())["entries"]])
            yield task(clock, key)

    measure.measure_all(todo(), timing.HostTimer(), timing.Budget(30.0, clock), results, file)
    found = json.loads(file.read_text())
    # A task takes two sides x (2 runs to set up, 5 rounds), so b begins at 14 and c at 28. That leaves c one side, with
    # the least number of rounds, and d nothing.
    assert states == [[], ["a"], ["a", "b"], ["a", "b", "c"]]
    counts = [{side: len(seen["seconds"]) for side, seen in e["sides"].items()} for e in found["entries"]]
    assert counts == [{"eager": 5, "fused": 5}, {"eager": 5, "fused": 5}, {"eager": timing.LEAST_ROUNDS}]
    assert found["left_out"] == ["d"] and found["complete"] is False
    assert "d" in report.markdown(found)
    assert "left out" in found["entries"][2]["missing"]["fused"]
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_run_leaves_what_it_had(results, tmp_path):
    clock, file = Clock(), tmp_path / "results.json"

    def todo():
        yield task(clock, "a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.measure_all(todo(), timing.HostTimer(), timing.Budget(99.0, clock), results, file)
    found = measure.read(file)
    assert [e["key"] for e in found["entries"]] == ["a"] and found["complete"] is False


def test_a_side_that_fails_does_not_take_the_others_with_it(results, tmp_path, capsys):
    clock, file = Clock(), tmp_path / "results.json"
    todo = [task(clock, "a", sides=("eager", "broken", "fused"))]
    measure.measure_all(todo, timing.HostTimer(), timing.Budget(99.0, clock), results, file)
    (entry,) = json.loads(file.read_text())["entries"]
    assert set(entry["sides"]) == {"eager", "fused"}
    assert entry["missing"] == {"broken": "failed: ValueError: first line"}
    assert "second line" in capsys.readouterr().err


def test_compiled_sides_are_not_begun_without_the_time_they_take():
    clock = Clock()
    todo = task(clock, "a", seconds=0.0, sides=("eager", "compile", "max-autotune"))
    entry = timing.measure(todo, timing.HostTimer(), timing.Budget(timing.COMPILE_S["compile"], clock))
    assert set(entry["sides"]) == {"eager", "compile"} and set(entry["missing"]) == {"max-autotune"}


def test_networks_are_measured_each_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--networks", "--output-dir", str(tmp_path)]
    settings = {"FASTRES_BENCH_QUICK": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=records.ROOT, env=os.environ | settings, check=True, capture_output=True)
    found = json.loads((tmp_path / stages.RESULTS).read_text())
    assert found["complete"] is True and found["networks"] is True
    (entry,) = found["entries"]
    assert {side: len(seen["seconds"]) for side, seen in entry["sides"].items()} == {"eager": 2, "backend": 2}
    assert "| fastres as the compiler's backend |" in report.markdown(found)


def test_a_network_whose_process_ends_is_left_out(results, tmp_path):
    file = tmp_path / "results.json"
    networks.measure_all(("of nobody",), timing.Budget(60.0), results, file)
    found = json.loads(file.read_text())
    assert found["left_out"] == ["of nobody"] and found["entries"] == [] and found["complete"] is False


def test_networks_have_a_file_of_their_own(results, tmp_path):
    results |= {"entries": [], "left_out": [], "networks": True}
    assert measure.publish(results, tmp_path).name == "nvidia-pretend-9000-networks-2026-01-02.json"


class Event:
    """A CUDA event of a device on which nothing but the spin kernel takes time."""

    clock = Clock()
    free_at = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = max(Event.clock.now, Event.free_at)

    def query(self) -> bool:
        return Event.clock.now >= self.at

    def synchronize(self) -> None:
        Event.clock.now = max(Event.clock.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize(("host_s", "kept_busy"), [(0.001, True), (10.0, False)])
def test_device_time_is_taken_from_a_queue_that_was_full_or_said_not_to_be(host_s, kept_busy, monkeypatch):
    event = Event
    event.clock, event.free_at = Clock(), 0.0
    clock = event.clock

    def spin(cycles: int) -> None:
        event.free_at = max(clock.now, event.free_at) + cycles * 1e-9

    def run() -> None:  # the host takes host_s to queue 0.25 ms of work
        clock.now += host_s
        event.free_at = max(clock.now, event.free_at) + 0.00025

    monkeypatch.setattr(timing.torch.cuda, "Event", event)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", spin)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: setattr(clock, "now", max(clock(), event.free_at)))
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    timer = timing.CudaTimer()
    side = timing.Timed(run, 0.0, 0.0)
    seconds = timer.device(side, 8)
    assert side.kept_busy is kept_busy
    assert seconds == pytest.approx(0.00025 if kept_busy else 10.0, rel=0.01)


def op_entry(batch: int, dropout: float, **milliseconds: float) -> dict:
    sides = {
        s: {"seconds": [t * 1e-3], "called_seconds": [t * 1e-3], "kept_busy": True} for s, t in milliseconds.items()
    }
    shape = [batch, 64, 32, 32]
    return {"key": f"{batch}-{dropout}", "group": "op", "name": f"op {batch} {dropout}", "images": batch,
            "shape": shape, "dropout": dropout, "bytes": 1_000_000, "timing": "device", "sides": sides,
            "missing": {}}  # fmt: skip


def test_targets_are_judged_at_the_weakest_place(results):
    results |= {"left_out": [], "complete": True}
    results["entries"] = [
        op_entry(512, 0.0, eager=6.2, compile=3.0, fused=2.0),
        op_entry(1024, 0.0, eager=14.0, compile=7.0, **{"max-autotune": 5.0}, fused=4.0),
        op_entry(512, 0.1, eager=6.0, compile=3.0, fused=2.0),
        op_entry(1024, 0.1, eager=6.0),
    ]
    found = {t.words: t.worst(results) for t in report.TARGETS}
    value, where = found["operator without dropout, over eager"]
    assert value == pytest.approx(3.1) and where == "op 512 0.0"
    value, where = found["operator without dropout, over torch.compile"]
    assert value == pytest.approx(1.25) and where == "op 1024 0.0"
    # 1 MB at the copy's 0.5 GB/s are 2 ms.
    value, where = found["operator at the largest shape, time over byte budget"]
    assert value == pytest.approx(2.0) and where == "op 1024 0.0"
    assert found["training step, over torch.compile"] is None
    text = report.markdown(results)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert rows["operator without dropout, over eager"].endswith("aim reached |")
    assert rows["operator without dropout, over torch.compile"].endswith("| reached |")
    assert rows["operator with dropout 0.1, over eager"].endswith("missed |")
    assert rows["operator at the largest shape, time over byte budget"].endswith("missed |")
    assert rows["projection shortcut, over eager"].endswith("not measured |")


def test_figures_of_a_gpu_are_published_and_those_of_a_rehearsal_never(results, tmp_path, monkeypatch):
    results |= {"entries": [], "left_out": [], "complete": True}
    for flag in ("rehearsal", "quick"):
        with pytest.raises(ValueError, match=r"publish: .*rehearsal"):
            measure.publish({**results, "machine": {**results["machine"], flag: True}}, tmp_path)
    assert not list(tmp_path.iterdir())
    file = measure.publish(results, tmp_path)
    assert file.name == "nvidia-pretend-9000-2026-01-02.json"
    assert measure.read(file) == results
    monkeypatch.setattr(workloads, "QUICK", True)
    with pytest.raises(SystemExit):
        measure.main(["--publish", "--output-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_without_a_gpu_only_a_rehearsal_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workloads, "QUICK", False)
    with pytest.raises(SystemExit):
        measure.main(["--output-dir", str(tmp_path / "new")])
    assert "FASTRES_BENCH_QUICK" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    file = tmp_path / "results.json"
    for text in ("", "[]", "{}", '{"machine": {}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="from-json"):
            measure.read(file)
    with pytest.raises(ValueError, match="from-json"):
        measure.read(Path(os.devnull) / "none")
