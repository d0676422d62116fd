"""The parity tests again on every other backend that this machine has: a process each, as a capability is a
process's.

A run of a CPU takes every sixth case, which ones its seed says: a kernel that is wrong fails many of them, and all
take minutes. `pytest -m slow` takes all.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres import _extension
from fastres.ops.products import multiplies_pairs
from tests.oracle import SEED

TESTS = Path(__file__).parent
HERE = _extension.cpu_capability()


def capabilities() -> list[str]:
    """The CPU's capabilities up to this process's own, which the other tests run."""
    order = ["default", "avx2", "avx512"] if platform.machine().lower() in ("x86_64", "amd64") else ["default"]
    return order[: order.index(HERE)]


ENVIRONMENT = {
    "reference": {"FASTRES_EXTENSION": "0"},
    "triton": {"FASTRES_EXTENSION": "0", "TRITON_INTERPRET": "1"},
    "cuda": {},
} | {capability: {"ATEN_CPU_CAPABILITY": capability} for capability in capabilities()}


def interpreter_obstacle() -> str:
    """Why Triton's interpreter cannot run here, if it cannot."""
    found = importlib.metadata.version("triton"), importlib.metadata.version("numpy")
    triton, numpy = (tuple(map(int, version.split(".")[:2])) for version in found)
    return f"Triton {found[0]}'s interpreter needs NumPy below 2.4, got {found[1]}" * (
        triton < (3, 7) and numpy >= (2, 4)
    )


if multiplies_pairs():
    # This process's own capability again, whose kernels have another way with bfloat16.
    ENVIRONMENT["float32"] = {"FASTRES_BF16_PRODUCTS": "float32"}
BACKENDS = [name for name in ENVIRONMENT if name != "cuda"]
PARTS = 6
SHARERS = min(8, os.cpu_count() or 1)


@pytest.mark.skipif("FASTRES_TEST_BACKEND" in os.environ, reason="this is one of those processes")
@pytest.mark.parametrize(
    ("backend", "shards"),
    [
        *((backend, [f"{SEED % PARTS}/{PARTS}"]) for backend in BACKENDS),
        *(pytest.param(backend, ["0/1"], marks=pytest.mark.slow) for backend in BACKENDS),
        # A GPU's kernels are compiled one by one, so several processes share them.
        pytest.param("cuda", [f"{i}/{SHARERS}" for i in range(SHARERS)], marks=pytest.mark.gpu),
    ],
    ids=lambda value: value if isinstance(value, str) else "all" if "0/1" in value else "part",
)
def test_the_parity_tests_pass_on(backend, shards):
    if backend == "triton" and interpreter_obstacle():
        pytest.skip(interpreter_obstacle())
    environment = os.environ | ENVIRONMENT[backend]
    environment |= {"FASTRES_TEST_BACKEND": backend, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    names = ("batch_norm_act", "activations", "two_gradients", "shared_statistics")
    selected = [TESTS / "test_functional.py", *[TESTS / "ops" / f"test_{name}.py" for name in names]]
    if backend == "triton":
        selected += [TESTS / "kernels" / f"test_{name}.py" for name in ("parity", "interpreted")]
    else:
        selected.append(TESTS / "ops" / "test_projection_shortcut.py")
    if backend not in ("triton", "cuda"):
        selected.append(TESTS / "ops" / "test_max_pool.py")
    if backend not in ("default", "triton", "cuda"):
        # The CPU's alone; the baseline module leaves them to plain PyTorch, which is the reference.
        names = (
            "conv3x3",
            "conv3x3_bfloat16",
            "conv3x3_gemm",
            "conv3x3_range",
            "grouped_conv",
            "packed_convolution",
            "norm_act_conv3x3",
            "norm_act_conv3x3_activations",
        )
        selected += [TESTS / "ops" / f"test_{name}.py" for name in names]
    if backend == "float32":
        selected = [TESTS / "ops" / f"test_{name}.py" for name in ("conv3x3_bfloat16", "packed_convolution")]
    # Compilation and hypothesis take long and do not depend on the backend.
    skip = "not compiles and not any_shape and not opcheck and not threads"
    if backend == "triton":
        # The interpreter is slow. kernels/test_parity.py has in few cases what these have in many.
        for name in ("agrees_with_float64", "shapes_that_fit", "million", "gradients_that_are_needed", "projection"):
            skip += f" and not {name}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", skip, *map(str, selected)]
    running = [
        subprocess.Popen(
            command, env=environment | {"FASTRES_TEST_SHARD": shard}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=TESTS.parent,
        )
        for shard in shards
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-8000:]
