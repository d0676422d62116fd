"""What every test shares."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import SEED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_report_header() -> str:
    return f"FASTRES_TEST_SEED={SEED}"
