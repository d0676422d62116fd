"""`python -m fastres.info`: versions, the CPU capability in use, which backends are live and why the others are not.

With --backend: how torch.compile knows the backend "fastres", what gets its graphs, and what it looks for in them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fastres
from fastres import _build, _extension, _triton
from fastres.backend.compiler import CHECKPOINTED_INNER, INNER, PATTERNS

Rows = list[tuple[str, str]]


def versions() -> Rows:
    """What is installed, and what there is to compile with."""
    rows = [("fastres", f"{fastres.__version__} in {_build.PACKAGE}"), ("python", platform.python_version())]
    rows.append(("torch", torch.__version__))
    for package in ("torchvision", "triton", "numpy"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    try:
        rows.append(("C++ compiler", _build.compiler_version()))
    except _build.Unavailable as e:
        rows.append(("C++ compiler", str(e)))
    release = _build.nvcc_version()
    rows.append(("nvcc", f"{release} in {_build.cuda_home()}" if release else "not found"))
    return rows


def processors() -> Rows:
    """The CPU as torch sees it, and the GPUs."""
    rows = [
        ("CPU", _cpu_model()),
        ("capability in use", f"{_extension.cpu_capability()} (ATen: {torch.backends.cpu.get_cpu_capability()})"),
        ("threads", str(torch.get_num_threads())),
    ]
    module = _extension.load_cuda() if torch.cuda.is_available() else None
    for index in range(torch.cuda.device_count()):
        words = torch.cuda.get_device_name(index)
        if module is not None:
            limits = module.device_limits(index)
            words += (
                f", {limits['multiprocessors']} multiprocessors, {limits['shared_bytes_per_block'] // 1024} KiB shared"
                f" memory a block, {limits['l2_bytes'] / 2**20:.0f} MiB L2"
            )
        rows.append((f"GPU {index}", words))
        rows.append((f"GPU {index} is served by", _served_by(_triton.why_not_served(index))))
    return rows


def backends() -> Rows:
    """Loads what can be loaded, and says what became of it."""
    cpu, cuda = _extension.load_cpu(), _extension.load_cuda()
    _extension.load_launch()
    status = _extension.status()
    rows = [("CPU", str(status.cpu)), ("CUDA", str(status.cuda))]
    launches = "repeated by compiled code" if status.launch.live else f"by Python: {status.launch.reason}"
    rows.append(("launches of Triton's kernels", launches))
    for name, module, state in (("CPU", cpu, status.cpu), ("CUDA", cuda, status.cuda)):
        if state.path is not None:
            rows.append((f"{name} module", str(state.path)))
        if module is not None:
            words = ", ".join(f"{key} {value}" for key, value in module.build_info().items())
            rows.append((f"{name} module compiled with", words))
        if state.error:
            rows.append((f"{name} compiler's first error", state.error))
    rows += [(f"made at install: {name}", reason or "usable") for name, reason in status.installed.items()]
    return rows


def compile_backend() -> Rows:
    """torch.compile's side of it."""
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    known = "fastres" in entries.names
    name = 'torch.compile(model, backend="fastres")'
    anew = "needs fastres to be installed anew with pip; fastres.compile(model) works"
    rows = [
        (name, "works without an import" if known else anew),
        ("inner backend of a graph", INNER),
        ("inner backend of one with checkpointed parts", CHECKPOINTED_INNER),
    ]
    try:
        rows.append(('options={"inner": "inductor"}', f"compiles with {_build.compiler_version()}"))
    except _build.Unavailable as e:
        rows.append(('options={"inner": "inductor"}', f"lacks a C++ compiler: {e}"))
    return [*rows, *PATTERNS]


def _served_by(problem: str) -> str:
    return f"plain PyTorch: {problem}" if problem else "the Triton kernels"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m fastres.info", description=__doc__)
    parser.add_argument("--backend", action="store_true", help="torch.compile's backend alone")
    if parser.parse_args().backend:
        tables = [("torch.compile", compile_backend())]
    else:
        tables = [("Versions", versions()), ("Processors", processors()), ("Backends", backends())]
    console = Console()
    for title, rows in tables:
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value.replace("[", r"\["))
        console.print(table)


if __name__ == "__main__":
    main()
