"""The compiled modules in this process.

A CPU module is a shared library on torch's stable ABI: it knows no Python, and what it says of itself are C functions.
The modules for a GPU are extensions of this Python and this torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch


class CpuLibrary:
    """A CPU module. Making one loads it, and with it the kernels of its operators.

    Raises:
        ImportError: it does not load.
    """

    def __init__(self, path: Path) -> None:
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
            # ctypes opens libraries with RTLD_LOCAL: what is compiled for this processor is not found by others.
            self._functions = ctypes.CDLL(str(path))
            for name in ("capability", "torch", "compiler"):
                getattr(self._functions, f"fastres_{name}").restype = ctypes.c_char_p
            self._functions.fastres_stable_abi.restype = ctypes.c_uint64
            self._functions.fastres_threads.restype = ctypes.c_int64
            self._functions.fastres_multiplies_pairs.restype = ctypes.c_bool
            self._functions.fastres_reuse_memory.restype = ctypes.c_bool
            self._functions.fastres_reuse_memory.argtypes = [ctypes.c_bool]
        except (OSError, AttributeError) as e:
            raise ImportError(f"{path} cannot be loaded: {e.__cause__ or e}") from e

    def capability(self) -> str:
        """The capability it was compiled for: DEFAULT, AVX2 or AVX512."""
        return self._text("capability")

    def build_info(self) -> dict[str, str]:
        """The torch whose headers it was compiled with, the first torch that it runs in, compiler and capability."""
        abi = self._functions.fastres_stable_abi()
        return {
            "torch": self._text("torch"),
            "stable ABI": f"{abi >> 56}.{abi >> 48 & 0xFF}",
            "compiler": self._text("compiler"),
            "capability": self.capability(),
        }

    def threads(self) -> int:
        """Threads that a loop of the kernels may run on, which are torch's."""
        return int(self._functions.fastres_threads())

    def multiplies_pairs(self) -> bool:
        """Whether kernels for bfloat16 multiply two numbers at a time, rounded to it, where they can."""
        return bool(self._functions.fastres_multiplies_pairs())

    def reuse_memory(self, enabled: bool) -> bool:
        """Make glibc keep freed buffers, or set its starting thresholds again; whether that was possible."""
        return bool(self._functions.fastres_reuse_memory(enabled))

    def _text(self, name: str) -> str:
        value: bytes = getattr(self._functions, f"fastres_{name}")()
        return value.decode()


def import_extension(name: str, path: Path) -> ModuleType:
    """Import an extension module as fastres.<name>.

    Raises:
        ImportError: it does not load.
    """
    qualified = f"fastres.{name}"
    spec = importlib.util.spec_from_file_location(qualified, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[qualified] = module
    return module
