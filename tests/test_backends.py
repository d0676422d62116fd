"""The parity tests again on every other backend that this machine has: a process each, as a capability is a
process's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres import _extension

TESTS = Path(__file__).parent
HERE = _extension.cpu_capability()


def backends() -> list[str]:
    """The CPU's capabilities up to this process's own, which the other tests run, and plain PyTorch."""
    order = ["default", "avx2", "avx512"] if platform.machine().lower() in ("x86_64", "amd64") else ["default"]
    return ["reference", *order[: order.index(HERE)]]


@pytest.mark.skipif("FASTRES_TEST_BACKEND" in os.environ, reason="this is one of those processes")
@pytest.mark.parametrize("backend", backends())
def test_the_parity_tests_pass_on(backend):
    environment = os.environ | {"FASTRES_TEST_BACKEND": backend, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if backend == "reference":
        environment["FASTRES_EXTENSION"] = "0"
    else:
        environment["ATEN_CPU_CAPABILITY"] = backend
    selected = [TESTS / "test_functional.py", TESTS / "ops"]
    # Compilation and hypothesis take long and do not depend on the backend.
    skip = "not compiles and not any_shape and not opcheck and not threads"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", skip, *map(str, selected)],
        env=environment, capture_output=True, text=True, cwd=TESTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
