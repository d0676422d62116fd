"""`python -m benchmarks.gpu.profile --trace FILE`: torch.profiler over one training step of FusedResNet18.

Prints where the time goes, operator by operator, and writes the step as a Chrome trace (chrome://tracing, Perfetto).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks import workloads
from benchmarks.sides import FUSED
from benchmarks.workloads import CUDA


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile one step, after the warm-up."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--trace", type=Path, required=True, help="the trace's file; .gz compresses it")
    options = parser.parse_args(arguments)
    (workload,) = workloads.train_workloads()
    run = workload.make(FUSED)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    # The profiler's own first start costs time inside the range.
    with profile(activities=activities):
        for _ in range(workload.warmup_rounds):
            run()
    with profile(activities=activities) as profiler:
        run()
    order = "self_device_time_total" if CUDA else "self_cpu_time_total"
    print(workload.name)
    print(profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60))
    profiler.export_chrome_trace(str(options.trace))
    print(f"trace: {options.trace}, {options.trace.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
