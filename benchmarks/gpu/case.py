"""`python -m benchmarks.gpu.case`: what compute-sanitizer and ncu watch.

Without arguments: small residual blocks with a projection and dropout, forward, backward and evaluation, in both memory
formats and both precisions, at sizes that are no multiples of any tile. With `--op`: one forward + backward of the
operator at its largest shape in ResNet-18, between cudaProfilerStart and cudaProfilerStop.
Runs on the CPU where there is no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn as nn

from benchmarks import workloads
from benchmarks.sides import FUSED
from benchmarks.workloads import CUDA, DEVICE
from fastres.nn import FusedBasicBlock


def blocks() -> None:
    """Run the blocks; an error where a result or a gradient is missing or not finite."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            projection = nn.Sequential(nn.Conv2d(24, 40, 1, 2, bias=False), nn.BatchNorm2d(40))
            block = FusedBasicBlock(24, 40, 2, projection, dropout=0.1)
            block.to(DEVICE, dtype).to(memory_format=memory_format)
            x = torch.randn(3, 24, 9, 11, device=DEVICE).to(dtype, memory_format=memory_format).requires_grad_()
            y = block(x)
            torch.autograd.backward(y, torch.randn_like(y))
            with torch.no_grad():
                evaluated = block.eval()(x)
            tensors = {"output": y, "evaluation": evaluated, "input's gradient": x.grad}
            tensors |= {f"{name}'s gradient": parameter.grad for name, parameter in block.named_parameters()}
            for name, tensor in tensors.items():
                if tensor is None or not bool(torch.isfinite(tensor).all()):
                    raise RuntimeError(f"{name}: expected finite values, got {tensor} ({dtype}, {memory_format})")
            print(f"block, {dtype}, {memory_format}: {len(tensors)} finite tensors", flush=True)


def op() -> None:
    """One run of the operator with dropout, inside the profiler's range."""
    workload = next(w for w in workloads.op_workloads() if w.dropout)
    run = workload.make(FUSED)
    for _ in range(3):
        run()
    if CUDA:
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    run()
    if CUDA:
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
    print(workload.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.case", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", action="store_true", help="the operator in the profiler's range, not the blocks")
    if parser.parse_args(arguments).op:
        op()
    else:
        blocks()


if __name__ == "__main__":
    main()
