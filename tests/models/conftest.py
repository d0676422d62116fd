"""What the tests of whole networks share."""

from tests.parity import one_thread  # noqa: F401
