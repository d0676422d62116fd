from __future__ import annotations

import os
import shutil

import pytest

from tests.emulator.machine import Machine, build


@pytest.fixture(scope="session")
def machine() -> Machine:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    return Machine(build())
