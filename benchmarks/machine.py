"""What figures depend on, and a process of its own for what must know nothing of what was measured before."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torchvision

import fastres
from benchmarks import records, workloads
from fastres.info import processors

# What holds PyTorch's operators, and ours, oneDNN and MKL to an instruction set below the processor's.
ISA_SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")

_R = TypeVar("_R")


def in_own_process(function: Callable[..., _R], *arguments: Any) -> _R:
    """What a function of a module returns or raises in a new process, which knows nothing of this one's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


@contextmanager
def environment(**settings: str) -> Iterator[None]:
    """Environment variables that processes started within it have."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def describe_machine() -> dict[str, Any]:
    """What the figures depend on. Sets the allocator, and so has to come before any tensor."""
    reused = fastres.reuse_cpu_memory()
    found = dict(processors())
    return {
        "processor": found.get("GPU 0", found["CPU"]).split(",")[0] if workloads.CUDA else found["CPU"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "isa_settings": " ".join(f"{name}={os.environ[name]}" for name in ISA_SETTINGS if os.environ.get(name)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": workloads.DEVICE.type,
        "dtype": "bfloat16 autocast" if workloads.CUDA else "float32",
        "memory_format": "channels_last",
        "allocator": "large buffers kept (fastres.reuse_cpu_memory)" if reused else "the C library's default",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "fastres": fastres.__version__,
        "commit": records.commit(),
        "date": datetime.date.today().isoformat(),
        "load_average_at_start": os.getloadavg()[0],
        "quick": workloads.QUICK,
    }
