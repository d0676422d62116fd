"""Which operators a call runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Where the derivative of an activation of PyTorch's jumps.
_KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,), "leaky_relu": (0.0,), "elu": (0.0,), "hardtanh": (0.0, 6.0), "hardswish": (-3.0, 3.0),
}  # fmt: skip


class Operators(TorchDispatchMode):
    """The fastres operators that were called, with their arguments, and the inputs of PyTorch's activations.

    `distances`: how far each input of an activation lies from each place where its derivative jumps (hardtanh's are
    those of ReLU6).
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[dict[str, Any]] = []
        self.relu_inputs: list[Tensor] = []
        self.distances: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fastres":
            self.names.append(func._schema.name.removeprefix("fastres::"))
            names = [argument.name for argument in func._schema.arguments]
            self.arguments.append(dict(zip(names, args, strict=False)))
        elif (kinks := _KINKS.get(func._schema.name.removeprefix("aten::").removesuffix("_"))) is not None:
            self.distances += [args[0] - kink for kink in kinks]
            if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
                self.relu_inputs.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def flat(operator: Any, *args: Any) -> tuple[Any, ...]:
    """The arguments of the operator's overload, from those of its caller in fastres.ops."""
    return operator.arguments.caller(lambda *flat: flat)(*args)


def opcheck(operator: Any, *args: Any) -> None:
    """torch.library.opcheck on the operator behind a caller in fastres.ops, with grouped arguments."""
    torch.library.opcheck(operator.overload, flat(operator, *args))


def check_compiled(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> None:
    """Check that a function traces into one graph that gives its values, with and without gradients, and gradients."""
    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        y = run(x, weight)
        with torch.no_grad():
            evaluated = run(x, weight)
        results.append([y, evaluated, *torch.autograd.grad(y, (x, weight), dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
