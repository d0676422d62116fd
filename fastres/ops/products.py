"""How the CPU's kernels for bfloat16 tensors multiply: as float32, or two numbers at a time (AVX512_BF16)."""

from __future__ import annotations

import functools
import os

import torch

from fastres import _extension

_KNOWN = ("auto", "pairs", "float32")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_pairs() -> bool:
    """Whether 1x1 convolutions and those of frozen networks multiply bfloat16 numbers two at a time.

    A float32 weight, and an activation that is computed on the way, are rounded for that.

    Raises:
        ValueError: the environment variable FASTRES_BF16_PRODUCTS is none of auto, pairs and float32.
        RuntimeError: it is pairs, which this processor has none of.
    """
    return _chosen()


# A process's, as C++ reads the variable once.
@functools.cache
def _chosen() -> bool:
    asked = os.environ.get("FASTRES_BF16_PRODUCTS") or "auto"
    if asked not in _KNOWN:
        raise ValueError(f"FASTRES_BF16_PRODUCTS: expected one of {_KNOWN}, got {asked!r}")
    module = _extension.load_cpu()
    used = module is not None and module.multiplies_pairs()
    if asked == "pairs" and not used:
        raise RuntimeError("FASTRES_BF16_PRODUCTS=pairs: this processor, or the kernels in use, have no AVX512_BF16")
    return used
