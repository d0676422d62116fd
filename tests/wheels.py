"""Builds the wheel out of the source distribution, and tests it in environments that have no C++ compiler.

    python -m tests.wheels                                        in this Python with this torch
    python -m tests.wheels --environment ENV [ENV ...]            in these environments' Python, with their packages
    python -m tests.wheels --torch 2.11.0 2.12.1 --python python3.10 python3.13     in new ones, a Python a torch

In each: the modules of the wheel are the ones that run, a network learns for a step on them, and tests of the operators
pass. Nothing may be compiled.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Beside torch, for the tests. The wheel's own requirements come with it.
REQUIRED = ("pytest", "hypothesis", "pytest-xdist")
# torchvision has to fit torch.
TORCHVISION = {"2.11": "0.26", "2.12": "0.27", "2.14": "0.29"}

SELECTED = (
    "tests/ops/test_batch_norm_act.py",
    "tests/ops/test_arguments.py",
    "tests/ops/test_projection_shortcut.py",
    "tests/ops/test_packed_convolution.py",
)

STEP = """
import torch
import fastres
from fastres import _extension
torch.manual_seed(0)
model = fastres.FusedResNet18(10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
losses = []
for _ in range(4):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
status = _extension.status().cpu
assert status.live and status.origin == "install", status
assert status.path.parent.name == "fastres" and "site-packages" in status.path.parts, status
print(f"torch {torch.__version__}: {status}; loss {losses[0]:.3f} -> {losses[-1]:.3f}")
"""


def run(*command: object, **options: object) -> None:
    """Run a command, and end with its words where it fails."""
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


def build(folder: Path) -> Path:
    """The wheel, made of the source distribution, in a folder. The build sees the torch that runs this."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    sources_at = folder / archive.name.removesuffix(".tar.gz")
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources_at)
    run(sys.executable, *command, env=os.environ | {"FASTRES_CUDA": "0"})
    shutil.rmtree(sources_at)
    (wheel,) = folder.glob("*.whl")
    return wheel


def beside(python: Path, folder: Path) -> Path:
    """The Python of a new environment that sees the packages of another one, and no fastres."""
    show = "import sys, sysconfig; print(sys._base_executable); print(sysconfig.get_path('purelib'))"
    shown = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.split()
    base, packages = shown
    run(base, "-m", "venv", "--without-pip", folder)
    (own,) = folder.glob("lib/python*/site-packages")
    # .pth files of the other environment are followed as well: it may be made of a third one.
    (own / "packages.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    return folder / "bin" / "python"


def fresh(python: str, torch: str, folder: Path) -> Path:
    """The Python of a new environment with a torch of its own."""
    run(python, "-m", "venv", folder)
    vision = TORCHVISION[".".join(torch.split(".")[:2])]
    wanted = (f"torch=={torch}", f"torchvision=={vision}.*", *REQUIRED)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted)
    return folder / "bin" / "python"


def check(wheel: Path, python: Path, folder: Path, tests: Sequence[str], *, requirements: bool) -> None:
    """Install the wheel and test it, with nothing on PATH."""
    # By the pip of the Python that runs this.
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--force-reinstall", "--no-deps", wheel)
    if requirements:
        run(*pip, wheel)
    empty, cache, work = folder / "empty", folder / "cache", folder / "work"
    empty.mkdir()
    shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", work)
    dropped = ("CXX", "PYTHONPATH", "FASTRES_EXTENSION", "ATEN_CPU_CAPABILITY")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {"PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(cache), "FASTRES_CUDA": "0", "COLUMNS": "160"}
    for command in (("-c", STEP), ("-m", "fastres.info"), ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)):
        run(python, *command, cwd=work, env=environment)
    assert not cache.exists(), f"something was compiled: {list(cache.iterdir())}"


def main() -> None:
    """Build once, and test in each environment."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "build" / "wheels")
    parser.add_argument("--wheel", type=Path, help="test this one, build none")
    parser.add_argument("--environment", type=Path, nargs="+", default=[], help="virtual environments with a torch")
    parser.add_argument("--torch", nargs="+", default=[], help="releases for new environments")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="commands, in turn for these")
    parser.add_argument("--tests", nargs="+", default=SELECTED, help="files of tests")
    asked = parser.parse_args()
    folder = asked.output_dir.resolve()
    wheel = asked.wheel.resolve() if asked.wheel else build(folder)
    print(f"{wheel}, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
    assert "-py3-none-" in wheel.name, wheel.name
    scratch = folder / "environments"
    shutil.rmtree(scratch, ignore_errors=True)
    here = [] if asked.environment or asked.torch else [Path(sys.executable)]
    others: Iterable[Path] = [*here, *(e / "bin" / "python" for e in asked.environment)]
    for number, python in enumerate(others):
        place = scratch / f"beside-{number}"
        check(wheel, beside(python, place / "venv"), place, asked.tests, requirements=False)
    for torch, python in zip(asked.torch, itertools.cycle(asked.python), strict=False):
        place = scratch / f"torch-{torch}"
        check(wheel, fresh(python, torch, place / "venv"), place, asked.tests, requirements=True)


if __name__ == "__main__":
    main()
