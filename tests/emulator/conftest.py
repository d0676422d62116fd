from __future__ import annotations

import pytest

from fastres import _extension
from tests.emulator.machine import Machine, build


@pytest.fixture(scope="session")
def machine() -> Machine:
    try:
        return Machine(build())
    except _extension.Unavailable as e:
        pytest.skip(str(e))
