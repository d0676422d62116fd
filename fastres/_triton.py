"""Which GPUs the Triton kernels in fastres.kernels serve, and the way from an operator to its launcher.

An operator's first call with arguments of a kind goes through the launcher, in Python; csrc/launch repeats it from then
on (kernels/tape.py).

Environment:
    FASTRES_TRITON: `0` leaves every GPU to plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres import _extension

OLDEST = (8, 0)


@functools.cache
def why_not_served(device: int) -> str:
    """Why the GPU of this index is served by plain PyTorch; "" where the Triton kernels serve it."""
    if os.environ.get("FASTRES_TRITON") == "0":
        return "switched off by FASTRES_TRITON=0"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"compute capability {capability[0]}.{capability[1]}, the kernels start at {OLDEST[0]}.{OLDEST[1]}"
    return ""


def on_gpu(
    module: str,
    function: str,
    fallback: Callable[..., Any],
    group: Callable[..., dict[str, Any]],
) -> Callable[..., Any]:
    """An operator's kernel for CUDA tensors: the launcher `function` of fastres.kernels.<module>, or the fallback.

    Both take grouped arguments, which `group` makes of the operator's.

    Triton is imported at the first call, since the import takes longer than the rest of fastres.
    """

    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"fastres.kernels.{module}"), function)  # type: ignore[no-any-return]

    def run(*args: Any) -> Any:
        x = next(a for a in args if isinstance(a, Tensor))
        if x.dtype == torch.float64 or why_not_served(x.get_device()):
            return fallback(**group(*args))
        repeats = _extension.load_launch()
        if repeats is None or not repeats.is_asked():
            return launcher()(**group(*args))
        tape = importlib.import_module("fastres.kernels.tape")
        return tape.teach(repeats, args, lambda: launcher()(**group(*args)))

    return run
