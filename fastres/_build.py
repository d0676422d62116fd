"""Compiles the C++ and CUDA modules: sources, flags, compilers, torch's extension cache.

One list of sources and flags serves both ways to a module:

- at install, where torch is visible to the build (`pip install --no-build-isolation`), setup.py compiles a module for
  each CPU capability, and those for a GPU, next to the package, and writes down what they were compiled from;
- at first use, where no such module fits the torch that is running: `fastres._extension` asks for the one module that
  is needed, which is compiled once through `torch.utils.cpp_extension` and kept in torch's extension cache.

A CPU module keeps to torch's stable ABI and serves every torch from STABLE_ABI on, under any Python. The modules for a
GPU serve the torch and the Python that they were compiled for.

Environment:
    FASTRES_CUDA: `0` leaves the modules for a GPU out.
    TORCH_CUDA_ARCH_LIST, TORCH_EXTENSIONS_DIR, CXX, MAX_JOBS, CUDA_HOME: as for every PyTorch extension.

setup.py loads this file by its path, so nothing above the functions may import torch or the rest of the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# In a wheel the sources lie inside the package, in a checkout beside it.
SOURCES = next((d for d in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if d.is_dir()), PACKAGE / "csrc")
RECORD = "_C_build.json"
# The first torch that the CPU modules run in; csrc/cpu/tensor.h has the same, TORCH_TARGET_VERSION.
STABLE_ABI = (2, 11)

# The last line takes back what Python's own build flags would add in setup.py and not at first use.
CXX_FLAGS = (
    *("-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-DNDEBUG", "-g0", "-fno-wrapv", "-Wno-unknown-pragmas"),
)
# GCC makes statics of inline functions unique in the whole process, also across RTLD_LOCAL; Clang neither does so nor
# knows the flag.
GCC_FLAGS = ("-fno-gnu-unique",)
# All that a CPU module needs. The C++ library comes first: of templates that torch has copies of, the linker would note
# that torch has them.
CPU_LIBRARIES = ("torch_cpu",) if sys.platform == "darwin" else ("stdc++", "torch_cpu")
NVCC_FLAGS = ("-O3", "-std=c++20", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden")
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")

# What ATen compiles its own kernels with, for each capability.
CAPABILITY_FLAGS = {
    "default": ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ),
}


class Unavailable(RuntimeError):
    """Why a backend cannot be had; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Module:
    """What one compiled module is made from.

    Attributes:
        name: inside the package.
        stable: a library on torch's stable ABI, for any Python; otherwise an extension module of this Python and torch.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    cxx_flags: tuple[str, ...]
    nvcc_flags: tuple[str, ...] = ()
    stable: bool = False

    @property
    def is_cuda(self) -> bool:
        return bool(self.nvcc_flags)

    @property
    def file(self) -> str:
        """The name of its file beside the package: that of an extension module says for which Python it is."""
        return self.name + (".so" if self.stable else sysconfig.get_config_var("EXT_SUFFIX"))

    @property
    def fingerprint(self) -> str:
        """A hash of sources, headers and flags. The compiler and torch are not in it."""
        digest = hashlib.sha256(repr((self.name, self.cxx_flags, self.nvcc_flags)).encode())
        for path in (*self.sources, *self.headers):
            digest.update(f"\n{path.relative_to(SOURCES).as_posix()}\n".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


# --- What is compiled, and with what: for setup.py and for the build at first use ----------------------------------


def capabilities() -> tuple[str, ...]:
    """The CPU capabilities that have a module on this kind of machine."""
    return tuple(CAPABILITY_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ("default",)


def cpu_module(capability: str) -> Module:
    """The CPU module for "default", "avx2" or "avx512"."""
    return Module(f"_C_cpu_{capability}", *_sources("cpu"), CXX_FLAGS + CAPABILITY_FLAGS[capability], stable=True)


def cuda_module() -> Module:
    """The CUDA module."""
    return Module("_C_cuda", *_sources("cuda"), CXX_FLAGS, NVCC_FLAGS)


def launch_module() -> Module:
    """The module that repeats launches on a GPU: it needs no nvcc."""
    return Module("_C_launch", *_sources("launch"), CXX_FLAGS)


def _sources(folder: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    files = sorted(p for d in ("common", folder) for p in (SOURCES / d).glob("*") if p.is_file())
    sources = tuple(p for p in files if p.suffix in (".cpp", ".cu"))
    if not sources:
        raise Unavailable(f"no sources in {SOURCES / folder}: the installation is incomplete")
    return sources, tuple(p for p in files if p.suffix in (".h", ".cuh"))


def compile_flags(module: Module) -> tuple[list[str], list[str]]:
    """The flags for the C++ compiler and for nvcc, as the compilers found here need them."""
    cxx = [*module.cxx_flags, *(GCC_FLAGS if _is_gcc() else ())]
    nvcc = list(module.nvcc_flags)
    if module.is_cuda:
        for folder in _nvidia_folders("include"):
            # After everything else: nvcc's own headers, where it has them, are the ones that fit it.
            cxx += ["-idirafter", str(folder)]
            nvcc += [f"-Xcompiler=-idirafter,{folder}"]
    else:
        # Paths of this machine do not belong into messages and modules.
        cxx += [f"-fmacro-prefix-map={SOURCES}=csrc", *(f"-fmacro-prefix-map={d}/=" for d in torch_folders("include"))]
    return cxx, nvcc


def torch_folders(kind: str) -> list[str]:
    """Those folders of the torch in use: "include" or "lib"."""
    import torch

    return [str(Path(root) / kind) for root in torch.__path__]


def library_folders(module: Module) -> list[str]:
    """Folders for the linker beyond those of torch."""
    return [str(folder) for folder in _nvidia_folders("lib")] if module.is_cuda else []


def compiler() -> list[str]:
    """The C++ compiler's command, chosen as torch chooses it.

    Raises:
        Unavailable: there is none.
    """
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        asked = f"{command[0]!r} from the environment variable CXX" if os.environ.get("CXX") else repr(command[0])
        raise Unavailable(f"no C++ compiler: {asked} was not found (Debian and Ubuntu: apt install g++)")
    return command


@functools.cache
def _version_text(*command: str) -> str:
    run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return run.stdout


def compiler_version() -> str:
    """First line of the compiler's --version.

    Raises:
        Unavailable: there is no compiler.
    """
    return next(iter(_version_text(*compiler()).splitlines()), "unknown")


def _is_gcc() -> bool:
    return "Free Software Foundation" in _version_text(*compiler())


def nvcc_version() -> str | None:
    """nvcc's release such as "13.0", or None where there is no nvcc."""
    home = cuda_home()
    if home is None:
        return None
    found = re.search(r"release (\d+\.\d+)", _version_text(str(home / "bin" / "nvcc")))
    return found.group(1) if found else None


@functools.cache
def cuda_home() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME or CUDA_PATH where set, else what nvcc itself says.

    The folder above the nvcc on PATH is only the last guess, since that nvcc may be a script that calls another.
    """
    guesses = [Path(v) for v in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if v]
    nvcc = shutil.which("nvcc")
    if not guesses and nvcc:
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        dryrun = subprocess.run(command, capture_output=True, text=True, check=False)
        said = re.search(r"^#\$ TOP=(.+)$", dryrun.stdout + dryrun.stderr, re.MULTILINE)
        guesses += [Path(said.group(1).strip())] if said else []
        guesses += [Path(nvcc).resolve().parent.parent]
    guesses.append(Path("/usr/local/cuda"))
    return next((g.resolve() for g in guesses if (g / "bin" / "nvcc").is_file()), None)


def _nvidia_folders(kind: str) -> list[Path]:
    """site-packages/nvidia/cu13/include and the like, beside the torch in use."""
    import torch

    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    together = [root / f"cu{(torch.version.cuda or '').split('.')[0]}" / kind for root in roots]
    # One folder for the whole toolkit since CUDA 13, one for each library before.
    apart = [d for root in roots for d in sorted(root.glob(f"*/{kind}")) if not re.match(r"cu\d+$", d.parent.name)]
    return [d for d in together if d.is_dir()] or apart


def check_cuda() -> None:
    """Check that the CUDA module can be compiled here.

    Raises:
        Unavailable: it cannot, or is not wanted; the message says why.
    """
    import torch

    if os.environ.get("FASTRES_CUDA") == "0":
        raise Unavailable("switched off by FASTRES_CUDA=0")
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} is not a CUDA build")
    if cuda_home() is None:
        raise Unavailable("nvcc was not found (set CUDA_HOME to the CUDA toolkit's folder)")
    release = nvcc_version() or "unknown"
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Unavailable(f"nvcc is of CUDA {release}, torch was built with CUDA {torch.version.cuda}")


def cuda_architectures() -> str:
    """The value for TORCH_CUDA_ARCH_LIST: the user's, that of the GPUs present, or a default that nvcc can compile."""
    import torch

    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return asked
    if torch.cuda.is_available():
        return "native"
    command = [str((cuda_home() or Path()) / "bin" / "nvcc"), "--list-gpu-arch"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    known = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in listed.split()]
    return ";".join(known or CUDA_ARCHITECTURES[:1]) + "+PTX"


@contextlib.contextmanager
def toolchain(module: Module) -> Iterator[ModuleType]:
    """torch.utils.cpp_extension with ninja on PATH, and for CUDA the right toolkit and architectures."""
    changes = {}
    # A virtual environment's python may be called without the environment being activated.
    changes["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if module.is_cuda:
        changes |= {"CUDA_HOME": str(cuda_home()), "TORCH_CUDA_ARCH_LIST": cuda_architectures()}
    before = {name: os.environ.get(name) for name in changes}
    # It warns at import about a toolkit without a GPU, which here is either known or of no interest.
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    os.environ.update(changes)
    try:
        try:
            from torch.utils import cpp_extension
        except ImportError as e:
            raise Unavailable(f"the Python package {e.name} is missing (pip install {e.name})") from e
        if not cpp_extension.is_ninja_available():
            raise Unavailable("ninja is missing (pip install ninja)")
        guessed = cpp_extension.CUDA_HOME
        # It was guessed when somebody first imported the module, perhaps before the environment was right.
        cpp_extension.CUDA_HOME = changes.get("CUDA_HOME", guessed)
        try:
            yield cpp_extension
        finally:
            cpp_extension.CUDA_HOME = guessed
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def first_error(text: str) -> str:
    """The first line of a compiler's output that reports an error, or the first line at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b\s*:|fatal error|undefined reference", line)), lines[0])


def write_record(folder: Path, modules: list[Module], errors: dict[str, str]) -> None:
    """Write beside the modules what they were compiled from, so that a stale one is never imported."""
    import torch

    record = {
        "stable_abi": ".".join(map(str, STABLE_ABI)),
        "torch": str(torch.__version__),
        "fingerprints": {m.name: m.fingerprint for m in modules},
        "errors": errors,
    }
    temporary = folder / f"{RECORD}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` left in a folder, or nothing where there is no such file or it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# --- The build at first use ----------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(f"fastres: {text}", file=sys.stderr, flush=True)


def _cache_folder(module: Module) -> Path:
    import torch
    import torch._appdirs

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        root = str(torch._appdirs.user_cache_dir(appname="torch_extensions"))  # type: ignore[no-untyped-call]
    facts: tuple[object, ...] = (module.fingerprint, compiler(), compiler_version())
    if not module.stable:
        facts += (compile_flags(module), torch.__version__, sys.version)
    if module.is_cuda:
        facts += (cuda_home(), nvcc_version(), _device_architectures())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Path(root) / f"fastres{module.name}_{digest}"


def _device_architectures() -> str | list[tuple[int, int]]:
    import torch

    asked = cuda_architectures()
    devices = range(torch.cuda.device_count())
    return [torch.cuda.get_device_capability(i) for i in devices] if asked == "native" else asked


def why_not_for_this_torch(module: Module, record: dict[str, Any]) -> str:
    """Why a module that came with such a record does not fit the torch that is running; empty where it does."""
    import torch

    if not module.stable:
        made_for = record.get("torch")
        fits = made_for == str(torch.__version__)
        return "" if fits else f"compiled for torch {made_for}, this is torch {torch.__version__}"
    first = record.get("stable_abi")
    numbers = [re.match(r"(\d+)\.(\d+)", str(version)) for version in (first, torch.__version__)]
    since, here = (n and (int(n[1]), int(n[2])) for n in numbers)
    fits = since is not None and here is not None and since <= here
    return "" if fits else f"compiled for torch {first} and later, this is torch {torch.__version__}"


def load(module: Module, path: Path) -> Any:
    """A compiled module in this process: a `fastres._library.CpuLibrary`, or an extension module.

    Raises:
        ImportError: it does not load.
    """
    from fastres import _library

    return _library.CpuLibrary(path) if module.stable else _library.import_extension(module.name, path)


def built(module: Module) -> tuple[Any, Path]:
    """The module and its file out of torch's extension cache, compiled first where it is not there.

    Raises:
        Unavailable: something that the build needs is missing.
        Exception: whatever torch raises when the build or the import fails.
    """
    import filelock

    folder = _cache_folder(module)
    library = folder / f"{module.name}.so"
    # Written last: a build that was cut short has none.
    complete = folder / "complete"
    if complete.is_file():
        with contextlib.suppress(ImportError):
            return load(module, library), library
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Unavailable(f"the folder for compiled modules cannot be written: {e}") from e
    lock = filelock.FileLock(folder / "fastres.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"waiting for another process that compiles {module.name} in {folder}")
        lock.acquire()
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        if complete.is_file():
            try:
                return load(module, library), library
            except ImportError:
                complete.unlink(missing_ok=True)
        # A damaged library: ninja would take it for up to date.
        library.unlink(missing_ok=True)
        # torch before 2.14 waits for as long as this file exists, also after its maker was killed. Nobody else is here.
        (folder / "lock").unlink(missing_ok=True)
        return _compile(module, folder, library, complete), library


def _link_flags(module: Module) -> list[str]:
    """What stands before the libraries of torch that cpp_extension names, which are all of them."""
    if not module.stable:
        return [f"-L{d}" for d in library_folders(module)]
    unused = [] if sys.platform == "darwin" else ["-Wl,--as-needed"]
    return [*unused, *(f"-L{d}" for d in torch_folders("lib")), *(f"-l{name}" for name in CPU_LIBRARIES)]


def _compile(module: Module, folder: Path, library: Path, complete: Path) -> Any:
    cxx_flags, nvcc_flags = compile_flags(module)
    start = time.monotonic()
    with toolchain(module) as cpp_extension:
        count = len(module.sources)
        _say(f"compiling {module.name} ({count} files) with {compiler_version()}, once, into {folder}")
        with _progress(folder, count):
            cpp_extension.load(
                name=module.name,
                sources=[str(p) for p in module.sources],
                extra_cflags=cxx_flags,
                extra_cuda_cflags=nvcc_flags,
                extra_ldflags=_link_flags(module),
                extra_include_paths=[str(SOURCES)],
                build_directory=str(folder),
                with_cuda=module.is_cuda,
                is_python_module=not module.stable,
                verbose=False,
            )
    loaded = load(module, library)
    complete.touch()
    _say(f"compiled {module.name} in {time.monotonic() - start:.0f} s")
    return loaded


@contextlib.contextmanager
def _progress(folder: Path, count: int) -> Iterator[None]:
    """A bar over the object files, on a terminal only."""
    from tqdm import tqdm

    done = threading.Event()
    began = time.time()

    def poll(bar: tqdm[Any]) -> None:
        while not done.wait(0.5):
            bar.n = sum(p.stat().st_mtime >= began for p in folder.glob("*.o"))
            bar.refresh()

    form = "fastres: {n_fmt}/{total_fmt} files |{bar}| {elapsed}"
    with tqdm(total=count, bar_format=form, leave=False, disable=None, file=sys.stderr) as bar:
        thread = threading.Thread(target=poll, args=(bar,), daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if not bar.disable:
                thread.join()
