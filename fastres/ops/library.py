"""The `fastres` operator library: defining an operator, and the fallback that stands behind every compiled backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres import _extension, _triton

LIBRARY: Any = torch.library.Library("fastres", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    compiled_for: tuple[str, ...] = ("cpu",),
    launcher: tuple[str, str] | None = None,
) -> Any:
    """Define an operator and return its overload.

    The fallback is plain PyTorch and serves every device that has no kernel of its own. On tensors of the devices in
    `compiled_for` it loads the compiled kernels first (building them if need be), after which the dispatcher goes to
    those directly. CUDA tensors of an operator with a `launcher`, (module of fastres.kernels, function), go to that.
    """
    name = LIBRARY.define(schema)
    overload = getattr(torch.ops.fastres, name).default

    def dispatch(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        key = device.upper()
        if device in compiled_for and not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastres::{name}", key):
            {"cpu": _extension.load_cpu, "cuda": _extension.load_cuda}[device]()
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastres::{name}", key):
                return overload(*args)
        return fallback(*args)

    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    if launcher is not None:
        LIBRARY.impl(name, _triton.on_gpu(*launcher, fallback), "CUDA")
    torch.library.register_fake(f"fastres::{name}", fake, lib=LIBRARY)
    return overload


def differentiable_once(overload: Any, name: str) -> Callable[..., Any]:
    """A backward operator as a function whose results may be used, but not differentiated again.

    Under create_graph=True a second derivative that is never asked for costs nothing, and one that is raises instead of
    being silently zero.
    """

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return overload(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{name}: the backward pass was differentiated (double backward), expected one backward only; use "
                f"fastres.reference.{name} or fastres.unfuse(model) where second derivatives are needed"
            )

    def run(*args: Any) -> Any:
        return Once.apply(*args) if torch.is_grad_enabled() else overload(*args)

    return run
