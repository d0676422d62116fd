"""The groups of figures, and how each is counted."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

from benchmarks.gate import networks, replayed
from benchmarks.gate.calls import Call
from benchmarks.gate.figures import Counted, Unavailable


@cache
def calls() -> list[Call]:
    return replayed.calls()


@cache
def _of_networks() -> dict[str, Counted]:
    found: dict[str, Counted] = replayed.in_counted_process(networks.count)
    return found


def _of_triton(function: str, *arguments: str) -> Callable[[], Counted]:
    def count() -> Counted:
        # Imported when they are counted: Triton may be missing.
        try:
            module = importlib.import_module("benchmarks.gate.triton_kernels")
        except ImportError as error:
            raise Unavailable(f"Triton: {error}") from error
        counted: Counted = getattr(module, function)(*arguments)
        return counted

    return count


GROUPS: dict[str, Callable[[], Counted]] = {
    "instructions": lambda: replayed.count_instructions(calls()),
    "scratch bytes": lambda: replayed.count_scratch(calls()),
    "calls of fastres": lambda: _of_networks()["calls of fastres"],
    "calls of PyTorch": lambda: _of_networks()["calls of PyTorch"],
    "saved for backward": lambda: _of_networks()["saved for backward"],
    "graphs": lambda: _of_networks()["graphs"],
    "the backend's graphs": lambda: _of_networks()["the backend's graphs"],
    "launches": _of_triton("count_launches"),
    "kernels for sm_80": _of_triton("count_kernels", "sm_80"),
    "kernels for sm_90": _of_triton("count_kernels", "sm_90"),
}
"""Group -> what counts it, or raises Unavailable. Groups share processes, so each is counted once."""
