"""Launching a kernel by its plan: device, arrival counters, opt-in autotuning, and recording for those who look.

Environment:
    FASTRES_AUTOTUNE: `1` times a few plans for every new shape with `triton.autotune` and keeps the fastest, on disk as
        well. Off by default: a first step that takes seconds longer helps nobody who has not asked for it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from fastres import contract

from . import tape
from .plan import Device, Geometry, Plan, register_limit

# For tensors that no GPU holds: the interpreter's, where a few programs of every kind show whether they cooperate, and
# those of a trace.
INTERPRETED = Device(multiprocessors=2)
TRACED = Device(multiprocessors=132)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as it was asked for; `arguments` are the kernel's, by name."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    num_warps: int
    registers: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


_recorder: contextvars.ContextVar[tuple[list[Launch], Device] | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(device: Device = TRACED) -> Iterator[list[Launch]]:
    """Within it kernels are written down instead of launched, as for a GPU of `device`'s kind; tensors may be fake."""
    launches: list[Launch] = []
    token = _recorder.set((launches, device))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def geometry(x: Tensor) -> Geometry:
    """The geometry of a dense [N, C, H, W] tensor."""
    n, c, h, w = x.shape
    return Geometry(contract.rows_are_channels(x), n * h * w, c, h * w, x.element_size())


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    threads = properties.max_threads_per_multi_processor
    registers = register_limit(threads, (properties.major, properties.minor))
    return Device(properties.multi_processor_count, threads, properties.warp_size, registers)


def device_of(x: Tensor) -> Device:
    """What plans for `x` need to know of its device."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder[1]
    return _cuda_device(x.get_device()) if x.is_cuda else INTERPRETED


# ----------------------------------------------------------------------------------------------------- arrival counters


class _Counters:
    """Zeroed int32 counters on one device. A kernel leaves them at zero, so nobody clears them between launches.

    Launches on one stream follow each other and share a block of counters. Launches in a CUDA graph get counters that
    no other launch ever gets, since graphs may be replayed beside each other and beside any stream.

    Memory that outlives a call must not come from the pool of a CUDA graph, and the run by which torch.compile warms
    one up allocates from it without a capture. Such a pool serves one thread, so counters are made in another.
    """

    SHARED = 1024
    CAPTURED = 1 << 15

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_stream: dict[int, Tensor] = {}
        self.captured = self._zeros(self.CAPTURED)
        self.taken = 0
        if device.type == "cuda":
            # Once in the life of a process: a graph may be replayed on a stream that knows nothing of this one.
            torch.cuda.current_stream(device).synchronize()

    def take(self, size: int) -> Tensor:
        if self.device.type != "cuda":
            return self._shared(0, size)
        if torch.cuda.is_current_stream_capturing():
            if self.taken + size > self.CAPTURED:
                return torch.zeros(size, dtype=torch.int32, device=self.device)
            self.taken += size
            return self.captured[self.taken - size : self.taken]
        return self._shared(torch.cuda.current_stream(self.device).cuda_stream, size)

    def _shared(self, stream: int, size: int) -> Tensor:
        found = self.by_stream.get(stream)
        if found is None or found.numel() < size:
            found = self.by_stream[stream] = self._zeros(max(size, self.SHARED))
        return found

    def _zeros(self, size: int) -> Tensor:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def make() -> Tensor:
            # On the caller's stream, so that the fill comes before the launch that needs it.
            with torch.cuda.stream(stream):
                return torch.zeros(size, dtype=torch.int32, device=self.device)

        with ThreadPoolExecutor(1) as other:
            return other.submit(make).result()


_counters: dict[torch.device, _Counters] = {}


def arrival_counters(x: Tensor, size: int) -> Tensor:
    """int32 [size or more] on x's device, all 0, for the next launch on the current stream."""
    if _recorder.get() is not None:
        return x.new_empty(size, dtype=torch.int32)
    if x.device in _counters or not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        if x.device not in _counters:
            _counters[x.device] = _Counters(x.device)
        taken = _counters[x.device].take(size)
    else:
        # Whatever is allocated during a capture belongs to the graph.
        taken = torch.zeros(size, dtype=torch.int32, device=x.device)
    recording_tape = tape.current()
    if recording_tape is not None:
        recording_tape.counters.append(taken)
    return taken


def mark_updated(t: Tensor) -> None:
    """Say that a kernel writes to an argument: it does so past autograd, which has to know that t is another now."""
    torch.autograd.graph.increment_version(t)
    recording_tape = tape.current()
    if recording_tape is not None:
        recording_tape.updated.append(t)


# ------------------------------------------------------------------------------------------------------------ launching


def _meta(plan: Plan, image: Geometry, partials: bool) -> dict[str, Any]:
    meta = {
        "tiles": plan.tiles,
        "splits": plan.splits,
        "CHANNELS_LAST": image.channels_last,
        "INDEX_64": plan.index_64,
        "EVEN_S": plan.even_s,
        "EVEN_C": plan.even_c,
        "BLOCK_S": plan.block_s,
        "BLOCK_C": plan.block_c,
    }
    if partials:
        meta["BLOCK_P"] = plan.block_p
    return meta


_BACKEND = "hip" if torch.version.hip else "cuda"


@functools.cache
def launch_options(num_warps: int, registers: int, backend: str) -> dict[str, int]:
    """The compiler's options; only NVIDIA's takes a limit of registers."""
    return {"num_warps": num_warps} | ({"maxnreg": registers} if backend == "cuda" else {})


def _autotunes() -> bool:
    return os.environ.get("FASTRES_AUTOTUNE", "0") not in ("", "0")


def candidates(make: Callable[..., Plan], shape: Geometry, device: Device) -> list[Plan]:
    """The plans that may be worth trying for a shape: the one from arithmetic first, then other sizes of a program."""
    own = make(shape, device)
    plans = [own]
    for threads in (128, 256, 512, 1024):
        if threads // device.warp >= 1:
            plans.append(make(shape, device, threads))
    return list(dict.fromkeys(plans))


class _Prepared:
    """A kernel with its grid and options, and what it was compiled to for each set of arguments that are None.

    Triton's own way to a launch looks at every argument, by name, which takes longer than everything else that a call
    of an operator does before its kernel runs. So it is gone once; from then on what it compiled is called with the
    numbers that it takes. All else that Triton compiles for follows from what a plan is prepared for, but for pointers
    that are no multiple of 16: these take the long way each time.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.options = kernel, grid, options
        self.compiled: dict[tuple[bool, ...], tuple[Any, Any]] = {}
        self.last: tuple[Any, ...] = ()

    def run(self, values: Sequence[Any]) -> None:
        """Launch on the current stream.

        Raises:
            ValueError: the tensors are not all on one device; a kernel would follow an address of another.
        """
        devices = {v.device for v in values if isinstance(v, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"expected all tensors on one device, got them on {', '.join(sorted(map(str, devices)))}")
        pointers = [v.data_ptr() if isinstance(v, Tensor) else 0 for v in values]
        aligned = functools.reduce(operator.or_, pointers) % 16 == 0
        missing = tuple([v is None for v in values])
        compiled, run = self.compiled.get(missing, (None, None)) if aligned else (None, None)
        if run is not None:
            run(*[p if p else v for p, v in zip(pointers, values, strict=True)], *self.last)
        else:
            compiled = self.kernel[self.grid](*values, **self.options)
            if aligned and compiled is not None:  # the interpreter gives nothing
                self.last = tuple(self.options[name] for name in self.kernel.arg_names[len(values) :])
                self.compiled[missing] = compiled, compiled[self.grid]
        recording_tape = tape.current()
        if recording_tape is None:
            return
        if aligned and compiled is not None:
            recording_tape.launches.append(tape.Launched(compiled, self.grid, (*values, *self.last)))
        else:
            recording_tape.gap = "a launch was compiled for its addresses"


MOST_PREPARED = 1024
_prepared: dict[Any, tuple[_Prepared, Plan | None]] = {}


def _keep(key: Any, kernel: Any, plan: Plan | None, grid: tuple[int, int, int], options: dict[str, Any]) -> _Prepared:
    if len(_prepared) >= MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = _Prepared(kernel, grid, options), plan
    return _prepared[key][0]


def launch(
    kernel: Any,
    make: Callable[..., Plan],
    shape: Geometry,
    x: Tensor,
    arguments: Callable[[Plan], Sequence[Any]],
    *,
    depth: int = 1,
    partials: bool = False,
    restore: Sequence[str] = (),
    **flags: Any,
) -> None:
    """Launch `kernel` on x's device and the current stream.

    Args:
        make: reduce_plan or apply_plan.
        arguments: the kernel's positional arguments for a plan; workspaces depend on it.
        depth: the grid's third axis.
        partials: whether the kernel combines partial sums.
        restore: names of arguments that a launch updates; autotuning puts them back after every trial.
        flags: further arguments by name, compile-time ones among them.
    """
    recorder = _recorder.get()
    if recorder is not None:
        plan = make(shape, recorder[1])
        named = dict(zip(kernel.arg_names, arguments(plan), strict=False)) | _meta(plan, shape, partials) | flags
        grid = (plan.splits, plan.channel_blocks, depth)
        recorder[0].append(Launch(kernel, grid, named, plan.num_warps, plan.registers))
        return
    if not x.is_cuda or not _autotunes() or torch.cuda.is_current_stream_capturing():
        key = (kernel.__name__, make, shape, depth, x.dtype, x.device, *flags.values())
        prepared, known = _prepared.get(key, (None, None))
        plan = known or make(shape, device_of(x))
        if prepared is None:
            options = _meta(plan, shape, partials) | flags | launch_options(plan.num_warps, plan.registers, _BACKEND)
            prepared = _keep(key, kernel, plan, (plan.splits, plan.channel_blocks, depth), options)
        with _on_device(x):
            prepared.run(arguments(plan))
        return
    recording_tape = tape.current()
    if recording_tape is not None:
        recording_tape.gap = "a launch is tuned"
    plan = make(shape, device_of(x))
    plans = candidates(make, shape, device_of(x))
    # Workspaces that are large enough whichever plan is tried.
    roomy = dataclasses.replace(
        plan,
        splits=max(p.splits for p in plans),
        channel_blocks=max(p.channel_blocks for p in plans),
        block_c=max(p.block_c for p in plans),
    )
    tuner, grids = _tuner(kernel, tuple(plans), shape, depth, partials, tuple(restore))
    with _on_device(x):
        tuner[lambda meta: grids[meta["BLOCK_S"], meta["BLOCK_C"], meta["splits"]]](*arguments(roomy), **flags)


def launch_over_channels(kernel: Any, shape: Geometry, x: Tensor, arguments: Sequence[Any]) -> None:
    """Launch a kernel that touches only vectors of one value a channel."""
    block = 128
    grid = (1, -(-shape.channels // block), 1)
    recorder = _recorder.get()
    if recorder is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | {"BLOCK_C": block}
        recorder[0].append(Launch(kernel, grid, named, 4, recorder[1].registers))
        return
    key = (kernel.__name__, shape, x.device)
    prepared, _ = _prepared.get(key, (None, None))
    if prepared is None:
        prepared = _keep(key, kernel, None, grid, {"BLOCK_C": block, "num_warps": 4})
    with _on_device(x):
        prepared.run(arguments)


@functools.cache
def _tuner(
    kernel: Any, plans: tuple[Plan, ...], shape: Geometry, depth: int, partials: bool, restore: tuple[str, ...]
) -> tuple[Any, dict[tuple[int, int, int], tuple[int, int, int]]]:
    """The kernel under triton.autotune, and the grid of each of its configurations."""
    configs = [
        triton.Config(_meta(p, shape, partials), **launch_options(p.num_warps, p.registers, _BACKEND)) for p in plans
    ]
    grids = {(p.block_s, p.block_c, p.splits): (p.splits, p.channel_blocks, depth) for p in plans}
    tune = triton.autotune(
        configs, key=["positions", "channels", "image"], restore_value=list(restore) or None, cache_results=True
    )
    return tune(kernel), grids


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Entering the context costs more than asking whether it is needed.
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.get_device())
