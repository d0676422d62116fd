from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from fastres import _build, _extension


def info(*arguments: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "fastres.info", *arguments],
        cwd=_build.SOURCES.parent,
        env=os.environ | {"COLUMNS": "300"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_it_names_the_versions_and_why_nothing_compiled_is_live():
    text = info(FASTRES_EXTENSION="0")
    assert torch.__version__ in text
    assert text.count("FASTRES_EXTENSION=0") == 3, "kernels for the CPU and for CUDA, and launches"
    assert _extension.cpu_capability() in text


def test_it_names_the_missing_compiler(tmp_path: Path):
    text = info(FASTRES_EXTENSION="build", TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/nonexistent/c++")
    assert text.count("/nonexistent/c++") >= 2
    assert "plain PyTorch" in text


def test_it_says_what_the_backend_looks_for_and_what_gets_its_graphs():
    text = info("--backend", CXX="/nonexistent/c++")
    assert 'backend="fastres"' in text and "inner backend" in text and "lacks a C++ compiler" in text
    assert all(
        name in text for name in ("batch_norm_act", "projection_shortcut", "norm_act_conv3x3", "conv3x3_norm_act")
    )
    assert "Versions" not in text
