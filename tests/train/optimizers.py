"""The trainer's optimizers, as parameters of tests."""

import importlib.util
from typing import Any, get_args

import pytest

from fastres.train.config import Optimizer

TIMM: list[Any] = ["lars", "muon"]
TORCH: list[Any] = [name for name in get_args(Optimizer) if name not in TIMM]
with_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
EACH: list[Any] = [*TORCH, *(pytest.param(name, marks=with_timm) for name in TIMM)]
