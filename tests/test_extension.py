"""Finding, building and loading the compiled modules. What a whole process decides once is asked of fresh processes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastres
from fastres import _build, _extension

ROOT = _build.SOURCES.parent

# Loads the CPU module from the sources in argv[1] and says what became of it, as JSON.
LOAD = """
import dataclasses, json, pathlib, sys, warnings
from fastres import _build, _extension
if len(sys.argv) > 1:
    _build.SOURCES = pathlib.Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    module = _extension.load_cpu()
    assert _extension.load_cpu() is module
state = dataclasses.asdict(_extension.status().cpu) | {"warnings": [str(w.message) for w in caught]}
if module is not None:
    state["module"] = [module.capability(), module.build_info()["torch"]]
print(json.dumps(state, default=str))
"""


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: int = 300) -> tuple[dict, str]:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def load(*arguments: object, **environment: str) -> tuple[dict, str]:
    return finish(start(LOAD, *arguments, **environment))


@pytest.fixture
def small_sources(tmp_path: Path) -> Path:
    """Sources that compile in a few seconds: the module without any operator."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    for name in ("module.cpp", "pairs.h", "tensor.h"):
        shutil.copy(_build.SOURCES / "cpu" / name, folder / "cpu")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    """An empty cache, and no module of the install."""
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "FASTRES_EXTENSION": "build"}


def needs_nvcc(test):
    missing = _build.nvcc_version() is None or torch.version.cuda is None
    return needs_compiler(pytest.mark.skipif(missing, reason="no nvcc, or torch for CPU")(test))


needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


@pytest.mark.parametrize(
    ("machine", "aten", "expected"),
    [
        ("x86_64", "AVX512", "avx512"),
        ("x86_64", "AVX512_VNNI", "avx512"),
        ("AMD64", "AVX2", "avx2"),
        ("x86_64", "NO AVX", "default"),
        ("x86_64", "DEFAULT", "default"),
        ("x86_64", "something new", "default"),
        ("aarch64", "SVE256", "default"),
        ("ppc64le", "VSX", "default"),
    ],
)
def test_every_capability_that_aten_names_has_a_module(machine, aten, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: aten)
    assert _extension.cpu_capability() == expected
    assert expected in _build.capabilities()


def machine_capabilities() -> list[str]:
    known = _build.capabilities()
    return list(known[: known.index(_extension.cpu_capability()) + 1])


@needs_compiler
@pytest.mark.parametrize("capability", machine_capabilities())
def test_the_module_of_each_capability_loads_where_aten_is_told_to_use_it(capability, small_sources, cache):
    state, _ = load(small_sources, ATEN_CPU_CAPABILITY=capability, **cache)
    assert state["live"] and state["warnings"] == []
    assert (state["capability"], state["origin"]) == (capability, "first use")
    assert state["module"] == [capability.upper(), torch.__version__.split("+")[0]]


@needs_compiler
def test_one_process_builds_for_all_that_start_at_once_also_after_one_was_killed(small_sources, cache):
    victim = start(LOAD, small_sources, **cache)
    assert victim.stderr is not None
    assert "compiling" in victim.stderr.readline()
    time.sleep(1)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    (folder,) = (p for p in Path(cache["TORCH_EXTENSIONS_DIR"]).iterdir())
    assert not (folder / "complete").exists()
    (folder / "lock").touch()  # what torch before 2.14 leaves behind when it is killed

    results = [finish(p) for p in [start(LOAD, small_sources, **cache) for _ in range(3)]]
    assert [state["live"] for state, _ in results] == [True] * 3
    assert sum("compiling" in err for _, err in results) == 1

    (library,) = folder.glob("*.so")
    library.write_bytes(b"damaged")
    state, err = load(small_sources, **cache)
    assert state["live"] and "compiling" in err

    state, err = load(small_sources, CXX=os.environ.get("CXX", "c++"), **cache)
    assert state["live"] and "compiling" not in err


@needs_compiler
def test_a_compile_error_is_one_warning_with_the_compilers_words(small_sources, cache):
    (small_sources / "cpu" / "broken.cpp").write_text("int f() {\n  return undeclared_name;\n}\n")
    state, _ = load(small_sources, **cache)
    assert not state["live"]
    assert "broken.cpp:2" in state["error"] and "undeclared_name" in state["error"]
    (warning,) = state["warnings"]
    assert state["error"] in warning and "only slower" in warning


def test_without_a_compiler_the_operators_run_on_plain_pytorch_after_one_warning(cache):
    code = """
import json, warnings
import torch
import fastres.functional
x, r, w, b = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.rand(3), torch.randn(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = fastres.functional.batch_norm_act(x, None, None, w, b, training=True, residual=r)
oracle = torch.relu(torch.nn.functional.batch_norm(x, None, None, w, b, training=True) + r)
print(json.dumps({"warnings": [str(w.message) for w in caught], "error": float((y - oracle).abs().max())}))
"""
    state, err = finish(start(code, CXX="/nonexistent/c++", **cache))
    (warning,) = state["warnings"]
    assert "/nonexistent/c++" in warning and "CXX" in warning and "plain PyTorch" in warning
    assert state["error"] < 1e-5
    assert "compiling" not in err


def test_the_modules_can_be_switched_off(cache):
    state, err = load(**(cache | {"FASTRES_EXTENSION": "0"}))
    assert not state["live"] and "FASTRES_EXTENSION=0" in state["reason"]
    assert state["warnings"] == [] and err == ""


def write_module_of_the_install(folder: Path, **changes: object) -> Path:
    module = _build.cpu_module("default")
    path = folder / module.file
    path.touch()
    _build.write_record(folder, [module], {})
    record = json.loads((folder / _build.RECORD).read_text())
    (folder / _build.RECORD).write_text(json.dumps(record | changes))
    return path


@pytest.mark.parametrize("running", ["2.11.0", "2.12.1+cpu", "2.14.1", "3.0.0a0+git1"])
def test_a_module_of_the_install_is_taken_by_every_torch_that_has_its_abi(running, tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch, "__version__", running)
    path = write_module_of_the_install(tmp_path)
    assert path.name == "_C_cpu_default.so"  # no Python in its name
    assert _extension._installed(_build.cpu_module("default")) == path


@pytest.mark.parametrize(("running", "fits"), [("2.11.0", True), ("2.11.1", False), ("2.12.0", False)])
def test_a_cuda_module_is_taken_only_by_its_own_torch(running, fits, monkeypatch):
    module, record = _build.cuda_module(), {"torch": "2.11.0", "stable_abi": "2.11"}
    monkeypatch.setattr(torch, "__version__", running)
    problem = _build.why_not_for_this_torch(module, record)
    assert problem == ("" if fits else f"compiled for torch 2.11.0, this is torch {running}")
    assert module.file.endswith(sysconfig.get_config_var("EXT_SUFFIX"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stable_abi": "99.0"}, "compiled for torch 99.0 and later, this is torch"),
        ({"stable_abi": "odd"}, "compiled for torch odd and later"),
        ({"fingerprints": {"_C_cpu_default": "0"}}, "other sources"),
        ({"fingerprints": {}}, "other sources"),
    ],
)
def test_a_stale_module_of_the_install_is_not_imported(changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    write_module_of_the_install(tmp_path, **changes)
    with pytest.raises(_build.Unavailable, match=words):
        _extension._installed(_build.cpu_module("default"))


def test_a_module_of_the_install_without_its_record_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    write_module_of_the_install(tmp_path)
    (tmp_path / _build.RECORD).write_text("{")
    with pytest.raises(_build.Unavailable, match="compiled for torch None"):
        _extension._installed(_build.cpu_module("default"))


def test_the_fingerprint_follows_sources_headers_and_flags(small_sources, monkeypatch):
    (small_sources / "common").mkdir()
    header = small_sources / "common" / "a.h"
    header.write_text("1")
    monkeypatch.setattr(_build, "SOURCES", small_sources)
    before = _build.cpu_module("default").fingerprint
    assert before == _build.cpu_module("default").fingerprint
    assert before != _build.cpu_module("avx2").fingerprint
    header.write_text("2")
    after_header = _build.cpu_module("default").fingerprint
    (small_sources / "cpu" / "more.cpp").touch()
    assert len({before, after_header, _build.cpu_module("default").fingerprint}) == 3


def test_a_wheel_carries_every_kind_of_source_file():
    files = [p for p in _build.SOURCES.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.suffix for p in files} <= {".cpp", ".h", ".cu", ".cuh"}


def test_the_first_error_is_the_first_line_that_reports_one():
    text = "\n[1/2] c++ -Werror a.cpp\na.cpp:1: warning: odd\na.cpp:3:5: error: no 'x'\nb.h:1: fatal error: none.h\n"
    assert _build.first_error(text) == "a.cpp:3:5: error: no 'x'"
    assert _build.first_error("\nnothing known\nmore") == "nothing known"


def test_the_toolkit_is_where_nvcc_itself_says(tmp_path, monkeypatch):
    toolkit = tmp_path / "toolkit-13"
    for folder in ("bin", "../scripts/bin"):
        (toolkit / folder).resolve().mkdir(parents=True)
    real, wrapper = toolkit / "bin" / "nvcc", tmp_path / "scripts" / "bin" / "nvcc"
    real.write_text(f'#!/bin/sh\necho "#\\$ _HERE_={toolkit}/bin" >&2\necho "#\\$ TOP={toolkit}/bin/.." >&2\n')
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    for script in (real, wrapper):
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    _build.cuda_home.cache_clear()
    try:
        assert _build.cuda_home() == toolkit.resolve()
    finally:
        _build.cuda_home.cache_clear()


@needs_nvcc
def test_the_cuda_module_builds_where_it_is_forced_and_says_what_it_was_compiled_for(cache):
    code = """
import json
import torch
from fastres import _extension, functional
module = _extension.load_cuda()
status = _extension.status().cuda
names = [f"fastres::projection_shortcut_{step}" for step in ("forward", "backward", "inference")]
kernels = [torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names]
info = plan = None
if module is not None:
    info = module.build_info()
    plan = module.launch_plan("forward", "bfloat16", (512, 64, 32, 32), 128, (2, 2))
print(json.dumps([info, status.reason, status.error, kernels, plan]))
"""
    environment = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0", "FASTRES_CUDA": "1"}
    (info, reason, error, kernels, plan), err = finish(start(code, **environment, **cache), timeout=900)
    assert info is not None, (reason, error, err)
    assert info["architectures"] == [800, 900]
    assert str(info["cuda"] // 1000) == str(_build.nvcc_version()).split(".")[0]
    assert kernels == [True] * 3
    # 512 x 16 x 16 positions in tiles of 128, 128 channels in tiles of 64.
    assert plan["grid"] == [2048, 1] and plan["vector_loads"] and plan["vector_stores"]


@needs_nvcc
def test_a_failed_cuda_build_leaves_the_cpu_kernels_and_is_shown_by_info(small_sources, cache):
    """FORCE_CUDA stands in for a GPU: it makes the build at first use happen."""
    (small_sources / "cuda").mkdir()
    (small_sources / "cuda" / "broken.cu").write_text("__global__ void f() {\n  undeclared_name();\n}\n")
    code = """
import json, pathlib, sys, warnings
import torch
from fastres import _build, _extension
_build.SOURCES = pathlib.Path(sys.argv[1])
from fastres import functional, info
shortcut = torch.ops.fastres.projection_shortcut_forward
y = shortcut(torch.ones(1, 2, 2, 2), torch.ones(3, 2, 1, 1), [1, 1], False)[0]
rows = dict(info.backends())
print(json.dumps([float(y.sum()), rows, _extension.load_cuda() is None]))
"""
    environment = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "FASTRES_CUDA": "1"}
    (total, rows, nothing), _ = finish(start(code, small_sources, **environment, **cache))
    assert nothing and total == 24
    assert rows["CPU"].startswith("compiled")
    assert "the build failed" in rows["CUDA"]
    assert "broken.cu(2)" in rows["CUDA compiler's first error"]
    assert "undeclared_name" in rows["CUDA compiler's first error"]


def test_the_cuda_module_can_be_left_out(monkeypatch):
    monkeypatch.setenv("FASTRES_CUDA", "0")
    with pytest.raises(_build.Unavailable, match="FASTRES_CUDA=0"):
        _build.check_cuda()


# What a shared library may need beside the C functions of torch: glibc's and the compiler's runtime, all of them
# versioned, and what the linker leaves to whoever has it.
RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
FOR_ARM = "aarch64-linux-gnu-g++"
ANYBODYS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}


def cpu_modules() -> list[Path]:
    """Every compiled CPU module here: the live one, and those of the install."""
    _extension.load_cpu()
    live = _extension.status().cpu.path
    installed = [_build.PACKAGE / _build.cpu_module(c).file for c in _build.capabilities()]
    found = {path.resolve() for path in (live, *installed) if path is not None and path.is_file()}
    return sorted(path for path in found if path.parent != _build.PACKAGE or _is_current(path))


def _is_current(path: Path) -> bool:
    recorded = _build.read_record(_build.PACKAGE).get("fingerprints", {})
    return recorded.get(path.stem) == _build.cpu_module(path.stem.removeprefix("_C_cpu_")).fingerprint


def check_needed_names(path: Path) -> None:
    """Check that a module needs torch's C functions and the runtime alone."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    of_torch = {name for name in names if re.match(r"(aoti_torch|torch)_\w+$", name)}
    others = {name for name in names - of_torch - ANYBODYS if not RUNTIME.search(name)}
    assert others == set(), path
    assert "torch_library_impl" in of_torch


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="no nm, or not ELF")
def test_the_cpu_modules_use_the_stable_abi_of_torch_and_nothing_of_python():
    modules = cpu_modules()
    assert modules
    for path in modules:
        check_needed_names(path)
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        libraries = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", needed))
        assert libraries <= {"libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc", "libmvec", "ld-linux-x86-64"}, (
            path
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(FOR_ARM) is None, reason=f"{FOR_ARM} is not installed")
def test_the_baseline_module_is_one_for_aarch64_as_well(tmp_path):
    """Compiled and linked without optimisation; nothing runs it here."""
    module = _build.cpu_module("default")
    flags = [flag for flag in module.cxx_flags if not flag.startswith("-O")]
    folders = [f"-I{_build.SOURCES}", *(f"-isystem{d}" for d in _build.torch_folders("include"))]

    def compiled(source: Path) -> Path:
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([FOR_ARM, *flags, "-fPIC", *folders, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, module.sources))
    library = tmp_path / module.file
    subprocess.run([FOR_ARM, "-shared", *objects, "-o", library], check=True)
    header = subprocess.run(["readelf", "-h", library], capture_output=True, text=True, check=True).stdout
    assert re.search(r"Machine:\s+AArch64", header)
    check_needed_names(library)


@needs_compiler
def test_the_cpu_modules_hold_no_path_of_the_machine_that_compiled_them():
    for path in cpu_modules():
        data = path.read_bytes()
        for folder in (_build.SOURCES.parent, Path(torch.__path__[0]), Path(sys.prefix)):
            assert str(folder).encode() not in data, path


@needs_compiler
def test_a_module_that_does_not_load_is_an_import_error(tmp_path):
    for content in (b"", b"damaged"):
        path = tmp_path / "_C_cpu_default.so"
        path.write_bytes(content)
        with pytest.raises(ImportError, match=r"_C_cpu_default\.so"):
            _build.load(_build.cpu_module("default"), path)


@needs_compiler
def test_parallel_regions_run_on_the_threads_of_torch():
    module = _extension.load_cpu()
    assert module is not None
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert module.threads() == threads
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_reusing_memory_spares_the_page_faults_of_later_buffers():
    code = """
import json, resource
import torch
import fastres
torch.set_num_threads(1)
def faults(buffers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(buffers):
        torch.ones(1 << 26, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3); fresh = faults(10)
done = fastres.reuse_cpu_memory()
faults(30); kept = faults(10)
print(json.dumps([done, fresh, kept]))
"""
    (done, fresh, kept), _ = finish(start(code))
    assert done is True
    assert kept < fresh / 4


def test_reusing_memory_says_where_it_cannot(monkeypatch):
    monkeypatch.setattr(_extension, "load_cpu", lambda: None)
    assert fastres.reuse_cpu_memory() is False
