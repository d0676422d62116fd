"""A frozen network as a package of AOTInductor's, in Python and in the C++ program of docs/examples."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from fastres import freeze
from fastres.nn import FusedBasicBlock
from tests.test_freeze import distance, exact, randomise

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "serve.cpp"
PAGE = ROOT / "docs" / "serving.md"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    stem = nn.Conv2d(3, 16, 3, stride=4, padding=1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 5))
    return randomise(nn.Sequential(stem, FusedBasicBlock(16, 16), *head), "package")


@pytest.fixture(scope="module")
def package(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("package") / "network.pt2"
    with torch.no_grad():
        program = torch.export.export(freeze(model, packed=False), (torch.randn(1, 3, 32, 32),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return file


@needs_compiler
def test_a_package_computes_what_the_network_does(model, package):
    run = torch._inductor.aoti_load_package(str(package))
    x = torch.randn(1, 3, 32, 32)
    assert distance(run(x), exact(model, x)) < 1e-5


@needs_compiler
def test_the_program_of_the_docs_loads_it_without_python(model, package, tmp_path):
    commands = re.findall(r"^g\+\+ .*?[^\\]$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(commands) == 1
    folder = Path(torch.__file__).parent
    command = commands[0].replace("\\\n", " ").replace("$TORCH", str(folder))
    command = command.replace("docs/examples/serve.cpp", str(EXAMPLE))
    words = shlex.split(command.replace("-o serve", f"-o {tmp_path / 'serve'}"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    built = subprocess.run([*COMPILER, abi, *words[1:]], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "serve", package], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    x: Tensor = torch.randn(1, 3, 32, 32)
    assert done.stdout == f"class {int(exact(model, x).argmax())}\n"
    without = subprocess.run([tmp_path / "serve"], capture_output=True, text=True, check=False)
    assert without.returncode == 2 and "usage" in without.stderr
