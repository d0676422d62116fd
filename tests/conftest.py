"""What every test shares."""

from __future__ import annotations

import os

import pytest
import torch

import tests.backend
from tests.oracle import SEED

tests.backend.prepare(os.environ.get("FASTRES_TEST_BACKEND"))


# One core each: the tests' tensors are small, and a second thread is of little use to them.
PROCESSES = 2


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in processes side by side, where pytest-xdist is there and nobody asks for anything else."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.collectonly
    asked = getattr(config.option, "numprocesses", 0) is not None or config.option.usepdb
    if whole and not asked and (os.cpu_count() or 1) >= PROCESSES:
        config.option.numprocesses, config.option.dist = PROCESSES, "worksteal"
        # Each has a thread a core: one that spins where a parallel region ends takes the core from the other process.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # FASTRES_TEST_SHARD=i/n: every n-th test from the i-th on, for whoever runs n processes side by side.
    shard, _, shards = os.environ.get("FASTRES_TEST_SHARD", "0/1").partition("/")
    items[:] = items[int(shard) :: int(shards)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_report_header() -> str:
    return f"FASTRES_TEST_SEED={SEED}"
