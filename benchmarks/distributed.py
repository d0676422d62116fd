"""What the processes of a training job send in a step, counted by the profiler, beside what the formulas say.

    python -m benchmarks.distributed --output-dir runs/distributed

One step of ResNet-18 in 1, 2 and 3 processes on this machine's CPU, with gloo, for each way of spreading it. Bytes are
those that a process hands to a collective; what it sends follows by the ring algorithm's factor. No time is measured.
"""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity, profile

from benchmarks.records import commit, insert_table, row, to_json, write_text
from fastres import FusedResNet18
from fastres.train import parallel
from fastres.train.distributed import leave_group, start_group

WAYS: dict[str, dict[str, bool]] = {
    "DDP": {},
    "DDP, --sync-bn": {"sync_bn": True},
    "FSDP": {"fsdp": True},
    "FSDP, --sync-bn": {"sync_bn": True, "fsdp": True},
}
SIZES = {"float": 4, "double": 8, "long int": 8, "int": 4}
BANDWIDTHS = {"1 Gbit/s": 0.125, "10 Gbit/s": 1.25, "25 Gbit/s": 3.125, "100 Gbit/s": 12.5}
"""GB/s that a process can send."""
STEPS = {"2 s": 2.0, "100 ms": 0.1, "25 ms": 0.025}
"""Seconds of a step, for the predictions."""


def sent(name: str, payload: float, processes: int) -> float:
    """Bytes that a process sends for a collective of `payload` bytes a process, by the ring algorithm."""
    factor = {
        "all_reduce": 2 * (processes - 1) / processes,
        "reduce_scatter": (processes - 1) / processes,
        "all_gather": processes - 1,
        "broadcast": 1,
    }
    return factor[name] * payload


def expected(model: nn.Module, processes: int, *, sync_bn: bool = False, fsdp: bool = False) -> dict[str, float]:
    """What a process hands to the collectives of a step: gradients or shards, and the batch statistics."""
    weights = 4 * sum(p.numel() for p in model.parameters())
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    statistics = 4 * (2 + 2) * channels if sync_bn else 0  # mean, M2; backward's two sums
    if processes == 1:
        return {"weights": 0, "statistics": 0}
    # Blocks gather their shards before forward and again before backward, then reduce their gradients.
    return {"weights": (2 / processes + 1) * weights if fsdp else weights, "statistics": statistics}


def scaling(step: float, payload: float, processes: int, bandwidth: float) -> float:
    """Predicted share of perfect scaling where nothing overlaps: step / (step + time to send).

    Args:
        step: seconds of a process's own work.
        payload: bytes of an all-reduce.
        bandwidth: GB/s.
    """
    return step / (step + sent("all_reduce", payload, processes) / bandwidth / 1e9)


def count_step(rank: int, processes: int, port: int, folder: str, options: dict[str, bool]) -> None:
    """Take five steps, the last one under the profiler; rank 0 writes its collectives: name, elements, type."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    cpu = torch.device("cpu")
    group = start_group(cpu)
    sync_bn, fsdp = options.get("sync_bn", False), options.get("fsdp", False)
    model: nn.Module = FusedResNet18(num_classes=10)
    if fsdp and processes > 1:
        model = parallel.shard(model, group, cpu, sync_bn=sync_bn)
    compute = parallel.spread(model, group, cpu, static_graph=True, sync_bn=sync_bn)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.rand(2, 3, 16, 16)

    def step() -> None:
        optimizer.zero_grad()
        compute(images).sum().backward()
        optimizer.step()

    for _ in range(4):  # DDP settles its buckets after the first ones
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    group.barrier()
    if group.is_main:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        found = [
            [
                event["name"].removeprefix("gloo:"),
                math.prod(event["args"]["Input Dims"][0]),
                event["args"]["Input type"][0],
            ]
            for event in events
            if event.get("name", "").startswith("gloo:")
        ]
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    leave_group()


def measure(processes: int, options: dict[str, bool]) -> list[list[Any]]:
    """The collectives of one step in so many processes."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        work = (processes, port, folder, options)
        spawn(count_step, work, nprocs=processes)  # type: ignore[no-untyped-call]
        found: list[list[Any]] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
        return found


def summary(way: str, processes: int, collectives: Iterable[list[Any]], model: nn.Module) -> dict[str, Any]:
    """Bytes handed to collectives, counted and by the formulas."""
    counted: dict[str, int] = {}
    calls: dict[str, int] = {}
    for name, elements, kind in collectives:
        counted[name] = counted.get(name, 0) + elements * SIZES[kind]
        calls[name] = calls.get(name, 0) + 1
    formula = expected(model, processes, **WAYS[way])
    return {
        "way": way, "processes": processes, "calls": calls, "bytes": counted, "total": sum(counted.values()),
        "expected": round(sum(formula.values())),
        "sent": round(sum(sent(name, size, processes) for name, size in counted.items())),
    }  # fmt: skip


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A row a measurement."""
    lines = [
        row("way", "processes", "collectives", "handed over, bytes", "by the formula", "sent in a ring, bytes"),
        row("---", "---:", "---", "---:", "---:", "---:"),
    ]
    for r in rows:
        calls = ", ".join(f"{count} {name}" for name, count in r["calls"].items()) or "none"
        cells = (str(r["processes"]), calls, f"{r['total']:,}", f"{r['expected']:,}", f"{r['sent']:,}")
        lines.append(row(r["way"], *cells))
    return "\n".join(lines) + "\n"


def predictions(steps: dict[str, float], payload: float, counts: Iterable[int] = (2, 8)) -> str:
    """A table of predicted scaling: a row a machine's step, a column a network and number of processes."""
    columns = [(name, speed, n) for n in counts for name, speed in BANDWIDTHS.items()]
    lines = [
        row("step of a process", *(f"{n} x {name}" for name, _, n in columns)),
        row("---", *("---:" for _ in columns)),
    ]
    lines += [
        row(name, *(f"{scaling(step, payload, n, speed):.0%}" for _, speed, n in columns))
        for name, step in steps.items()
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/distributed"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--page", type=Path, help="a document whose tables `counted` and `predicted` are renewed")
    options = parser.parse_args(arguments)
    model = FusedResNet18(num_classes=10)
    rows = [summary(way, n, measure(n, WAYS[way]), model) for way in WAYS for n in options.processes]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    data = {"network": "resnet18, 10 classes, cifar stem", "torch": torch.__version__, "commit": commit(), "rows": rows}
    gradients = 4 * sum(p.numel() for p in model.parameters())
    tables = {"counted": table(rows), "predicted": predictions(STEPS, gradients)}
    write_text(options.output_dir / "distributed.json", to_json(data))
    write_text(options.output_dir / "distributed.md", "\n".join(tables.values()))
    if options.page is not None:
        for name, text in tables.items():
            insert_table(options.page, text, name)
    print(*tables.values(), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
