"""Which operators a call runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """The fastres operators that were called, with their arguments, and the inputs of every ReLU of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[dict[str, Any]] = []
        self.relu_inputs: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fastres":
            self.names.append(func._schema.name.removeprefix("fastres::"))
            names = [argument.name for argument in func._schema.arguments]
            self.arguments.append(dict(zip(names, args, strict=False)))
        elif func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            self.relu_inputs.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def flat(operator: Any, *args: Any) -> tuple[Any, ...]:
    """The arguments of the operator's overload, from those of its caller in fastres.ops."""
    return operator.arguments.caller(lambda *flat: flat)(*args)


def opcheck(operator: Any, *args: Any) -> None:
    """torch.library.opcheck on the operator behind a caller in fastres.ops, with grouped arguments."""
    torch.library.opcheck(operator.overload, flat(operator, *args))
