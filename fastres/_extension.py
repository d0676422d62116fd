"""Loads the compiled modules: those made at install where they fit, else what `fastres._build` compiles at first use.

The modules register kernels for operators that `fastres.ops` defines; without them the library works on plain PyTorch.

Environment:
    FASTRES_EXTENSION: `0` loads nothing compiled; `build` passes over the modules made at install.
    FASTRES_CUDA: `0` leaves the modules for a GPU out. FORCE_CUDA: `1` builds the CUDA module where no GPU is present.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastres import _build
from fastres._build import PACKAGE, Module, Unavailable

if TYPE_CHECKING:
    from fastres._library import CpuLibrary

_SPEED_ONLY = "the results are the same, only slower."


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """What became of one backend in this process.

    Attributes:
        live: its kernels are loaded and have a device to run on.
        reason: why it is not live, or why the module made at install was not taken.
        path: the file of the module that was loaded.
        origin: "install" or "first use".
        capability: "default" | "avx2" | "avx512" for the CPU, None for CUDA.
        error: the compiler's first error, where there was one.
    """

    live: bool
    reason: str
    path: Path | None = None
    origin: str | None = None
    capability: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        kind = f" ({self.capability})" if self.capability else ""
        return f"compiled{kind}, built at {self.origin}" if self.live else f"plain PyTorch{kind}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Status:
    """`status()`: the backends, and the modules that the install left: name -> "" where usable, or why it is not."""

    cpu: BackendStatus
    cuda: BackendStatus
    launch: BackendStatus
    installed: dict[str, str]

    def __str__(self) -> str:
        return f"cpu: {self.cpu}; cuda: {self.cuda}"


# The first call for a backend decides for the process.
_lock = threading.RLock()
_loaded: dict[str, tuple[Any, BackendStatus]] = {}


def cpu_capability() -> str:
    """The capability whose module fits: "default", "avx2" or "avx512".

    It is ATen's own choice, so the environment variable ATEN_CPU_CAPABILITY is honoured.
    """
    import torch

    known = torch.backends.cpu.get_cpu_capability().lower()
    # A capability beyond AVX-512 includes it; anything else that ATen may name is served by the portable module.
    name = "avx512" if known.startswith("avx512") else known
    return name if name in _build.capabilities() else "default"


def load_cpu() -> CpuLibrary | None:
    """Load the CPU kernels, compiled first where need be.

    Returns:
        The module, or None where it cannot be had: one warning says why, and the operators run on plain PyTorch. The
        first call decides for the process.
    """
    module: CpuLibrary | None = _load("cpu", lambda: _build.cpu_module(cpu_capability()), _check_cpu_build)
    return module


def load_cuda() -> ModuleType | None:
    """Load the CUDA module, compiled first where a GPU is present and need be.

    Returns:
        The module, or None where it cannot be had. Where a GPU is present one warning says why.
    """
    module: ModuleType | None = _load("cuda", _build.cuda_module, _check_cuda_build)
    return module


def load_launch() -> ModuleType | None:
    """Load the module that repeats launches of Triton's kernels, compiled first where a GPU is present and need be.

    Returns:
        The module, ready to install operators, or None where it cannot be had: launches then take Python's time.
    """
    module: ModuleType | None = _load("launch", _build.launch_module, _check_launch_build)
    return module if _loaded["launch"][1].live else None


def status() -> Status:
    """What became of the backends so far. Loads nothing: call `load_cpu` and `load_cuda` first to know all."""
    unasked = BackendStatus(live=False, reason="not used yet")
    installed = {}
    made: dict[str, Callable[[], Module]] = {
        **{f"cpu {c}": functools.partial(_build.cpu_module, c) for c in _build.capabilities()},
        "cuda": _build.cuda_module,
        "launch": _build.launch_module,
    }
    for name, make in made.items():
        try:
            _installed(make())
            installed[name] = ""
        except Unavailable as e:
            installed[name] = str(e)
    with _lock:
        states = {name: _loaded[name][1] if name in _loaded else unasked for name in ("cpu", "cuda", "launch")}
    return Status(states["cpu"], states["cuda"], states["launch"], installed)


def _installed(module: Module) -> Path:
    """The file of a module made at install.

    Raises:
        Unavailable: there is none, or it does not fit the torch that is running or the sources.
    """
    path = PACKAGE / module.file
    if not path.is_file():
        raise Unavailable("not compiled at install")
    record = _build.read_record(PACKAGE)
    problem = _build.why_not_for_this_torch(module, record)
    if problem:
        raise Unavailable(problem)
    if record.get("fingerprints", {}).get(module.name) != module.fingerprint:
        raise Unavailable("compiled from other sources than those here")
    return path


def _check_cpu_build() -> None:
    if sys.platform == "win32":
        raise Unavailable("the sources need GCC or Clang")
    _build.compiler()


def _check_cuda_build() -> None:
    import torch

    _build.check_cuda()
    if not torch.cuda.is_available() and os.environ.get("FORCE_CUDA") != "1":
        recorded = _build.read_record(PACKAGE).get("errors", {}).get("_C_cuda")
        raise Unavailable(f"the build at install failed: {recorded}" if recorded else "no GPU is present")
    _build.compiler()


def _check_launch_build() -> None:
    if not _gpu_present():
        raise Unavailable("no GPU is present")
    _check_cpu_build()


def _load(backend: str, make: Callable[[], Module], check_build: Callable[[], None]) -> Any:
    with _lock:
        if backend not in _loaded:
            _loaded[backend] = _find(backend, make, check_build)
        return _loaded[backend][0]


def _find(backend: str, make: Callable[[], Module], check_build: Callable[[], None]) -> tuple[Any, BackendStatus]:
    capability = cpu_capability() if backend == "cpu" else None
    error = None
    flags = sys.getdlopenflags() if hasattr(sys, "getdlopenflags") else None
    try:
        if os.environ.get("FASTRES_EXTENSION") == "0":
            return None, BackendStatus(False, "switched off by FASTRES_EXTENSION=0", capability=capability)
        if backend != "cpu" and os.environ.get("FASTRES_CUDA") == "0":
            raise Unavailable("switched off by FASTRES_CUDA=0")
        module = make()
        if flags is not None:
            # Inline functions compiled for this processor must not be found by other libraries.
            sys.setdlopenflags(os.RTLD_NOW | os.RTLD_LOCAL)
        try:
            if os.environ.get("FASTRES_EXTENSION") == "build":
                raise Unavailable("passed over by FASTRES_EXTENSION=build")
            path, origin, reason = _installed(module), "install", ""
            loaded = _build.load(module, path)
        except (Unavailable, ImportError) as e:
            check_build()
            loaded, path = _build.built(module)
            origin, reason = "first use", f"module of the install: {e}"
        live = backend == "cpu" or _gpu_present()
        if backend == "launch" and live:
            loaded.load("libcuda.so.1", "libtorch_cuda.so")
        return loaded, BackendStatus(live, reason if live else "no GPU is present", path, origin, capability)
    except Unavailable as e:
        reason = str(e)
    except Exception as e:
        # Whatever goes wrong in compiling or loading must not take the library with it.
        error = _build.first_error(str(e) or repr(e))
        reason = f"the {'module does not load' if isinstance(e, ImportError) else 'build failed'}: {error}"
    finally:
        if flags is not None:
            sys.setdlopenflags(flags)
    if backend == "cpu" or _gpu_present():
        message = f"no compiled {backend.upper()} kernels: {reason}. fastres goes on with plain PyTorch: {_SPEED_ONLY}"
        if backend == "launch":
            message = f"no compiled launches: {reason}. fastres goes on launching its kernels by Python: {_SPEED_ONLY}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return None, BackendStatus(False, reason, capability=capability, error=error)


def _gpu_present() -> bool:
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available() and os.environ.get("FASTRES_CUDA") != "0"
