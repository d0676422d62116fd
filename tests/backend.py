"""The backend that this process tests: the compiled CPU kernels, or what FASTRES_TEST_BACKEND names.

default, avx2, avx512   a capability of the CPU (together with ATEN_CPU_CAPABILITY)
float32                 bfloat16 numbers multiplied as float32 (together with FASTRES_BF16_PRODUCTS=float32)
reference               plain PyTorch (together with FASTRES_EXTENSION=0)
triton                  the Triton launchers on CPU tensors, interpreted (together with TRITON_INTERPRET=1)
cuda                    the Triton kernels on a GPU
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from fastres.ops.arguments import Arguments

NAME = os.environ.get("FASTRES_TEST_BACKEND")
DEVICE = torch.device("cuda" if NAME == "cuda" else "cpu")
# The GPU kernels compute in float32; float64 is for checks on the CPU.
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = GPU_DTYPES if NAME in ("triton", "cuda") else (*GPU_DTYPES, torch.float64)

_registered: list[Any] = []


def prepare(name: str | None) -> None:
    """Make this process run the backend of that name."""
    if name == "cuda":
        torch.set_default_device(DEVICE)
        # The oracle's convolutions are to be as exact as float32 is.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name != "triton" or _registered:
        return
    from fastres.kernels import batch_norm_act as launchers
    from fastres.ops import batch_norm_act as operators

    _patch_once()
    _round_to_nearest_even()
    library = torch.library.Library("fastres", "IMPL")
    for name in ("stats", "apply", "training", "inference", "backward_reduce", "backward_apply", "backward"):
        library.impl(
            f"batch_norm_act_{name}", _flat(getattr(launchers, name), getattr(operators, name).arguments), "CPU"
        )
    _registered.append(library)


def _flat(launcher: Callable[..., Any], arguments: Arguments) -> Callable[..., Any]:
    return lambda *flat: launcher(**arguments.group(*flat))


def _round_to_nearest_even() -> None:
    """Make the interpreter round float32 to bfloat16 as GPUs do; its own conversion cuts the low bits off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return own(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast


def _patch_once() -> None:
    """Make the interpreter prepare triton.language once a launch, not again at every call of a helper.

    Each preparation looks through all names of the language, which takes longer than what most helpers compute.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[tuple[bool, bool], Any] = {}

    def prepare_once(function: Any) -> Any:
        names = list(map(id, function.__globals__.values()))
        seen = id(tl) in names, id(tl.core) in names
        if seen not in scopes:
            scopes[seen] = prepare(function)
        return scopes[seen]

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        scopes.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = launch_afresh
