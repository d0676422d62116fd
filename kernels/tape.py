"""What a call of an operator did on a GPU, written down so that it can be repeated without Python.

Python takes longer over a call than the GPU does: a launcher looks at shapes, makes a plan, allocates, and hands two
dozen arguments to Triton. All of that is the same for every call with arguments of the same kind, but for addresses. So
the first such call leaves a recipe with csrc/launch, which the operator looks for before it comes here.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launched(NamedTuple):
    """A launch that took place: what Triton compiled, and a value for each parameter of the kernel's source."""

    compiled: Any
    grid: tuple[int, int, int]
    values: tuple[Any, ...]


@dataclasses.dataclass
class Tape:
    """One call. `gap` says what happened that cannot be repeated from here."""

    launches: list[Launched] = dataclasses.field(default_factory=list)
    counters: list[Tensor] = dataclasses.field(default_factory=list)
    updated: list[Tensor] = dataclasses.field(default_factory=list)
    gap: str = ""


class Recipe(NamedTuple):
    """A call as csrc/launch takes it; replay.h has the same."""

    made: list[Tensor]
    results: list[int]
    updated: list[int]
    launches: list[tuple[int, tuple[int, int, int], int, int, list[tuple[int, int, bytes]]]]
    counters: int
    device: torch.device


class Gap(Exception):
    """Why a call cannot be repeated."""


INPUT, MADE, COUNTERS, VALUE = range(4)
_NUMBERS = {"i1": "?", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}

_tape: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("tape", default=None)
current: Callable[[], Tape | None] = _tape.get

# A recipe has the address of a function that its module must outlive.
_kept: dict[int, Any] = {}


@contextlib.contextmanager
def recorded() -> Iterator[Tape]:
    """Within it, launches of this thread are written down."""
    token = _tape.set(tape := Tape())
    try:
        yield tape
    finally:
        _tape.reset(token)


def recipe(arguments: Sequence[Any], results: Sequence[Tensor], tape: Tape) -> Recipe:
    """
    Args:
        arguments: the operator's, flat.
        results: the operator's.
    Raises:
        Gap: this call says too little of others like it.
    """
    if tape.gap:
        raise Gap(tape.gap)
    inputs = {id(t): i for i, t in enumerate(arguments) if isinstance(t, Tensor)}
    given = [t for t in arguments if isinstance(t, Tensor) and t.numel() > 0]
    if len({t.data_ptr() for t in given}) < len(given):
        raise Gap("two arguments are one tensor, which in another call they need not be")
    counters = {id(t) for t in tape.counters}
    taken = {t.untyped_storage().data_ptr() for t in [*given, *tape.counters]}
    made: dict[int, tuple[int, Tensor]] = {}

    def place_of(t: Tensor) -> int:
        if id(t) in inputs or (t.numel() > 0 and t.untyped_storage().data_ptr() in taken and id(t) not in made):
            raise Gap("a tensor shares its memory with another")
        if id(t) not in made:
            made[id(t)] = (len(made), t)
            taken.add(t.untyped_storage().data_ptr())
        return made[id(t)][0]

    def source_of(value: Any, kind: str) -> tuple[int, int, bytes]:
        if not kind.startswith("*"):
            return VALUE, 0, struct.pack(_NUMBERS[kind], value)
        if id(value) in inputs:
            return INPUT, inputs[id(value)], b""
        return (COUNTERS, 0, b"") if id(value) in counters else (MADE, place_of(value), b"")

    launches = []
    for compiled, grid, values in tape.launches:
        metadata = compiled.metadata
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl:
            raise Gap("a launch has attributes")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Gap("a launch takes scratch memory")
        kinds = list(compiled.src.signature.values())
        if len(kinds) != len(values):
            raise Gap(f"{len(values)} values for a signature of {len(kinds)}")
        sources = [source_of(v, k) for v, k in zip(values, kinds, strict=True) if k != "constexpr"]
        launches.append((compiled.function, grid, 32 * metadata.num_warps, metadata.shared, sources))
        _kept[compiled.function] = compiled
    places = [place_of(t) for t in results]
    templates = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for _, t in made.values()]
    updated = [inputs[id(t)] for t in tape.updated]
    size = max((t.numel() for t in tape.counters), default=0)
    return Recipe(templates, places, updated, launches, size, given[0].device)


def teach(module: Any, arguments: Sequence[Any], run: Callable[[], Any]) -> Any:
    """The results of `run`, an operator's launcher on these arguments; leaves a recipe with csrc/launch if it can."""
    with recorded() as tape:
        results = run()
    # A kernel of other parameters than these, which csrc/launch finds, is of another Triton than those known here.
    with contextlib.suppress(Gap, KeyError, RuntimeError):
        module.learn(*recipe(arguments, [results] if isinstance(results, Tensor) else results, tape))
    return results
