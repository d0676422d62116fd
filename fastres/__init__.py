"""Fused residual networks for PyTorch: drop-in models, modules and functions over custom kernels."""

from fastres import functional, models, nn, reference
from fastres.activations import Activation
from fastres.backend import compile, compile_report
from fastres.freeze import freeze, freeze_report
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.memory import reuse_cpu_memory
from fastres.models import (
    ArticleResNet18,
    FusedResNet18,
    FusedResNet34,
    FusedResNet50,
    FusedResNet101,
    FusedResNet152,
)

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "ArticleResNet18",
    "FusedResNet18",
    "FusedResNet34",
    "FusedResNet50",
    "FusedResNet101",
    "FusedResNet152",
    "compile",
    "compile_report",
    "freeze",
    "freeze_report",
    "functional",
    "fuse",
    "fuse_report",
    "models",
    "nn",
    "reference",
    "reuse_cpu_memory",
    "unfuse",
]
