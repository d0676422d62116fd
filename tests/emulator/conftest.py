from __future__ import annotations

import pytest

from fastres import _build
from tests.emulator.machine import Machine, build


@pytest.fixture(scope="session")
def machine() -> Machine:
    try:
        return Machine(build())
    except _build.Unavailable as e:
        pytest.skip(str(e))
