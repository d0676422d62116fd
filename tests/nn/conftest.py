from tests.parity import one_thread

__all__ = ["one_thread"]
