"""`python -m benchmarks.gpu.measure`: fastres on a GPU against eager, torch.compile and torch.compile with autotuning.

The workloads stand in the order of their importance; the run stops cleanly where `--budget-s` ends. After each one
results.json is written whole, so that a run that is cut short leaves what it has.

How time is taken stands in benchmarks/gpu/timing.py. Without a GPU only a rehearsal runs (FASTRES_BENCH_QUICK=1): tiny,
timed by the host's clock, and never published.
"""

# argparse rather than tyro: a borrowed machine has torch and little else.
from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastres
from benchmarks import records, workloads
from benchmarks.gpu import networks, report
from benchmarks.gpu.stages import RESULTS
from benchmarks.gpu.timing import Budget, CudaTimer, HostTimer, Task, Timer, copy_bandwidth, measure
from benchmarks.records import PUBLISHED, ROOT, write_text
from benchmarks.sides import FUSED_COMPILE, MAX_AUTOTUNE
from benchmarks.workloads import Workload
from fastres.info import backends

BATCHES = (512, 1024)


def tasks(batches: Sequence[int]) -> Iterable[Task]:
    """Everything, the most important first. The first batch comes whole before the second."""
    for index, batch in enumerate(batches):
        ops = list(workloads.op_workloads(batch))
        (step,) = workloads.train_workloads(batch)
        (with_dropout,) = workloads.train_workloads(batch, max(workloads.DROPOUTS))
        rates = len(workloads.DROPOUTS)
        # Autotuning the whole network takes longer than all else, so it waits; then every side is measured again, in
        # the same rounds.
        yield Task(step, tuple(side for side in step.sides if side != MAX_AUTOTUNE), f"{step.group}-{step.key}")
        yield from map(_whole, ops[:rates])
        if index == 0:
            yield from map(_whole, workloads.projection_workloads(batch))
        yield from map(_whole, ops[rates:])
        if index == 0:
            yield from map(_whole, workloads.inference_workloads())
        # Mostly for its memory: dropout is where eager keeps whole tensors.
        few = tuple(side for side in with_dropout.sides if side not in (MAX_AUTOTUNE, FUSED_COMPILE))
        yield Task(with_dropout, few, f"{step.group}-{with_dropout.key}")
        if MAX_AUTOTUNE in step.sides:
            yield Task(step, step.sides, f"{step.group}-{step.key}-{MAX_AUTOTUNE}")


def _whole(workload: Workload) -> Task:
    return Task(workload, workload.sides, f"{workload.group}-{workload.key}")


def measure_all(todo: Iterable[Task], timer: Timer, budget: Budget, results: dict[str, Any], file: Path) -> None:
    """Measure task after task into `results`, writing `file` after each. Where the budget is over, say what is left."""
    results |= {"entries": [], "left_out": [], "complete": False}
    write_text(file, records.to_json(results))
    for task in todo:
        if budget.left() <= 0:
            results["left_out"].append(task.key)
            continue
        print(f"{task.key} ({budget.left():.0f} s left)", flush=True)
        results["entries"].append(measure(task, timer, budget))
        write_text(file, records.to_json(results))
    results["complete"] = not results["left_out"] and not any(entry["missing"] for entry in results["entries"])
    write_text(file, records.to_json(results))


# ------------------------------------------------------------------------------------------------------------- machine


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    machine: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "rehearsal": not workloads.CUDA,
        "quick": workloads.QUICK,
        "dtype": str(workloads.DTYPE).removeprefix("torch."),
        "memory_format": "channels_last",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "fastres": fastres.__version__,
        "python": platform.python_version(),
        "commit": records.commit(),
        "date": datetime.date.today().isoformat(),
        "backends": {name: words.replace(f"{records.ROOT}/", "") for name, words in backends()},
    }
    if workloads.CUDA:
        device = torch.cuda.get_device_properties(workloads.DEVICE)
        machine |= {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_bytes": device.total_memory,
            "l2_bytes": device.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    return machine


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return said[0] if said else None


# ----------------------------------------------------------------------------------------------------------- publishing


def read(file: Path) -> dict[str, Any]:
    """What an earlier run wrote.

    Raises:
        ValueError: the file is missing or not one of ours.
    """
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        report.markdown(results)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"from-json: {file} does not hold results of this script ({error})") from error
    return results


def publish(results: dict[str, Any], folder: Path) -> Path:
    """Write results to <folder>/<device>-<date>.json, those of networks to <device>-networks-<date>.json.

    Raises:
        ValueError: they are of a rehearsal or of a quick run.
    """
    machine = results["machine"]
    if machine["rehearsal"] or machine["quick"]:
        raise ValueError("publish: expected figures of a GPU at full size, got those of a rehearsal or a quick run")
    kind = "-networks" if results.get("networks") else ""
    file = folder / f"{records.slug(machine['device'])}{kind}-{machine['date']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, records.to_json(results))
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read; write, print; 1 where a side failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.measure", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "gpu", help=f"folder for {RESULTS}")
    parser.add_argument("--budget-s", type=float, default=1500.0, help="seconds after which nothing new is started")
    parser.add_argument("--batch", type=int, nargs="+", default=None, help=f"batch sizes (default {BATCHES})")
    parser.add_argument("--networks", action="store_true", help="other networks and frozen ones instead of ResNet-18")
    parser.add_argument("--publish", action="store_true", help="copy to docs/results/<device>-<date>.json")
    parser.add_argument("--from-json", type=Path, help="print, and publish, what an earlier run wrote")
    options = parser.parse_args(arguments)
    if options.from_json is not None:
        try:
            results = read(options.from_json)
            print(report.markdown(results))
            if options.publish:
                print(f"published: {publish(results, PUBLISHED)}")
        except ValueError as error:
            parser.error(str(error))
        return 0
    if not workloads.CUDA and not workloads.QUICK:
        parser.error("no CUDA GPU is present; FASTRES_BENCH_QUICK=1 runs a rehearsal on the CPU")
    if options.publish and (workloads.QUICK or not workloads.CUDA):
        parser.error("publish: figures of a rehearsal or a quick run are not published (FASTRES_BENCH_QUICK is set)")
    if not math.isfinite(options.budget_s) or options.budget_s < 0:
        parser.error(f"budget-s: expected a number of seconds, at least 0, got {options.budget_s}")
    if options.batch is not None and min(options.batch) < 2:
        parser.error(f"batch: expected at least 2, got {min(options.batch)}")
    budget = Budget(options.budget_s)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    fastres.reuse_cpu_memory()
    # Shapes are fixed, so every side may let cuDNN try its algorithms, as one would in training.
    torch.backends.cudnn.benchmark = True
    timer: Timer = CudaTimer() if workloads.CUDA else HostTimer()
    batches = options.batch or ((workloads.BATCH,) if workloads.QUICK else BATCHES)
    results = {"machine": describe_machine(), "copy": copy_bandwidth(timer), "budget_s": options.budget_s}
    results["networks"] = options.networks
    file = options.output_dir / RESULTS
    if options.networks:
        networks.measure_all(networks.NAMES, budget, results, file)
    else:
        measure_all(tasks(batches), timer, budget, results, file)
    print(report.markdown(results))
    print(f"raw figures: {file}")
    failures = [why for entry in results["entries"] for why in entry["missing"].values() if why.startswith("failed")]
    if options.publish and results["entries"]:
        print(f"published: {publish(results, PUBLISHED)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
