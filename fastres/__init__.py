"""Fused residual networks for PyTorch."""

from fastres.memory import reuse_cpu_memory

__version__ = "0.1.0"

__all__ = ["reuse_cpu_memory"]
