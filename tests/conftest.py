"""What every test shares."""

from __future__ import annotations

import os

import pytest
import torch

import tests.backend
from tests.oracle import SEED

tests.backend.prepare(os.environ.get("FASTRES_TEST_BACKEND"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # FASTRES_TEST_SHARD=i/n: every n-th test from the i-th on, for whoever runs n processes side by side.
    shard, _, shards = os.environ.get("FASTRES_TEST_SHARD", "0/1").partition("/")
    items[:] = items[int(shard) :: int(shards)]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_report_header() -> str:
    return f"FASTRES_TEST_SEED={SEED}"
