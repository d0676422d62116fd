"""What the compilers make of the kernels, on a machine without a GPU.

A launch that was recorded is compiled for an architecture that need not be present, and read back from the machine
code: registers, shared memory, stack, the widest access to global memory, and the occupancy that follows.
`python -m benchmarks.compiled.triton_table` makes a table of it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch, launch_options
from .plan import Device, register_limit


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A GPU to compile for, and what a multiprocessor of it holds.

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide, 3.6.
    """

    name: str
    backend: str
    arch: int | str
    threads: int
    registers: int
    shared_bytes: int
    blocks: int
    warp: int = 32

    @property
    def target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp)

    @property
    def device(self) -> Device:
        """What plans are made for: a GPU of this architecture with as many multiprocessors as an H100."""
        capability = (self.arch // 10, self.arch % 10) if isinstance(self.arch, int) else (0, 0)
        return Device(132, self.threads, self.warp, register_limit(self.threads, capability))


KB = 1024
ARCHITECTURES = (
    Architecture("sm_80", "cuda", 80, 2048, 65536, 164 * KB, 32),
    Architecture("sm_86", "cuda", 86, 1536, 65536, 100 * KB, 16),
    Architecture("sm_89", "cuda", 89, 1536, 65536, 100 * KB, 24),
    Architecture("sm_90", "cuda", 90, 2048, 65536, 228 * KB, 32),
    Architecture("sm_100", "cuda", 100, 2048, 65536, 228 * KB, 32),
    Architecture("sm_120", "cuda", 120, 1536, 65536, 100 * KB, 24),
    # A compute unit: 4 SIMDs of 8 waves, 512 vector registers of 64 lanes a SIMD, half of them accumulation registers.
    Architecture("gfx942", "hip", "gfx942", 2048, 4 * 512 * 64, 64 * KB, 32, 64),
)

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of one launch on one architecture.

    Attributes:
        registers: a thread.
        local_bytes: stack and spills, a thread.
        local_accesses: instructions that touch local memory.
        load_bytes, store_bytes: the widest access to global memory, bytes a thread.
        occupancy: resident threads over those a multiprocessor can hold.
        assembly: the machine code in words.
    """

    kernel: str
    architecture: str
    num_warps: int
    registers: int
    shared_bytes: int
    local_bytes: int
    local_accesses: int
    load_bytes: int
    store_bytes: int
    occupancy: float
    assembly: str = dataclasses.field(repr=False, default="")


def source(launch: Launch) -> ASTSource:
    """The launch as Triton's compiler takes it, specialised as at run time: tensors start at multiples of 16 bytes."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def signature(launch: Launch) -> tuple[object, ...]:
    """Equal for two launches that run the same machine code."""
    compiled = source(launch)
    return (
        launch.name,
        launch.num_warps,
        tuple(compiled.signature.items()),
        tuple(sorted((k, str(v)) for k, v in compiled.constants.items())),
        tuple(sorted((k, str(v)) for k, v in compiled.attrs.items())),
    )


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each machine code."""
    return list({signature(launch): launch for launch in launches}.values())


def compile_launch(launch: Launch, architecture: Architecture) -> Compiled:
    """Compile for an architecture that need not be present.

    Raises:
        RuntimeError: Triton brings no disassembler with it.
    """
    threads, num_warps = launch.num_warps * architecture.warp, launch.num_warps
    made = triton.compile(
        source(launch),
        target=architecture.target,
        options=launch_options(num_warps, launch.registers, architecture.backend),
    )
    if architecture.backend == "hip":
        return _from_amdgcn(launch.name, architecture, num_warps, made)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, sass = (_cuobjdump(cubin, flag) for flag in ("--dump-resource-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected the resource usage of {launch.name}, got {usage!r}")
    registers, stack, shared, local = map(int, found.groups())
    shared = max(shared, made.metadata.shared)
    return Compiled(
        kernel=launch.name,
        architecture=architecture.name,
        num_warps=num_warps,
        registers=registers,
        shared_bytes=shared,
        local_bytes=stack + local,
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        load_bytes=_widest(r"\bLDG\.E((?:\.\w+)*)", sass),
        store_bytes=_widest(r"\bSTG\.E((?:\.\w+)*)", sass),
        occupancy=_occupancy(architecture, threads, registers, shared),
        assembly=sass,
    )


def _widest(pattern: str, sass: str) -> int:
    """Bytes of the widest access: LDG.E.128 is 16, LDG.E without a width is 4."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    widths = [next((sizes[part] for part in m.split(".") if part in sizes), 4) for m in re.findall(pattern, sass)]
    return max(widths, default=0)


def _occupancy(architecture: Architecture, threads: int, registers: int, shared: int) -> float:
    # Registers are dealt out to warps in units of 256.
    warps = threads // architecture.warp
    if architecture.backend == "hip":
        # Eight registers a lane at a time, and at most eight waves a SIMD.
        waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4
        return min(waves // warps * warps, 32) / 32
    per_block = warps * -(-registers * 32 // 256) * 256
    blocks = min(
        architecture.threads // threads,
        architecture.registers // per_block,
        architecture.shared_bytes // (shared + KB),
        architecture.blocks,
    )
    return blocks * threads / architecture.threads


def _from_amdgcn(name: str, architecture: Architecture, num_warps: int, made: Any) -> Compiled:
    text = made.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    registers = number("vgpr_count")
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}

    def widest(kind: str) -> int:
        found = re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+)", text)
        return max((widths.get(w.removesuffix("_d16_hi").removesuffix("_d16"), 0) for w in found), default=0)

    return Compiled(
        kernel=name,
        architecture=architecture.name,
        num_warps=num_warps,
        registers=registers,
        shared_bytes=made.metadata.shared,
        local_bytes=number("private_segment_fixed_size"),
        local_accesses=len(re.findall(r"\bscratch_(?:load|store)", text)),
        load_bytes=widest("load"),
        store_bytes=widest("store"),
        occupancy=_occupancy(architecture, num_warps * architecture.warp, registers, made.metadata.shared),
        assembly=text,
    )


@functools.cache
def _tool() -> Path:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.is_file():
        raise RuntimeError(f"cuobjdump: expected it at {path}, where Triton's wheel brings it; it is not there")
    return path


def _cuobjdump(cubin: Path, flag: str) -> str:
    return subprocess.run([_tool(), flag, cubin], capture_output=True, text=True, check=True).stdout
