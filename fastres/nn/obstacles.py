"""What stands in the way of leaving a module's own call out, or of giving its output another meaning.

`fastres.fuse` asks before it swaps a module, and the blocks and shortcuts ask again at each call: a hook that is
registered later, or pruning, which works through one, then runs as it would in torchvision's network.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch.nn as nn
from torch.nn.modules.module import _has_any_global_hook

_Module = TypeVar("_Module", bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks, forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def class_name(module_class: type) -> str:
    """torch's own classes under the name that users write, others with their module."""
    package = "torch.nn" if module_class.__module__.startswith("torch.nn.modules.") else module_class.__module__
    return f"{package}.{module_class.__qualname__}"


def obstacle(module: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """Why the module does more, or other, than the class `expected` says; None where it does exactly that.

    A subclass counts as other: normalisation that is synchronised, frozen, quantised or parametrised is one.
    """
    if type(module) is not expected:
        found = "missing" if module is None else class_name(type(module))
        return f"is {found}, expected exactly {class_name(expected)}"
    assert module is not None
    if has_hooks(module):
        return "has hooks, which would see other values or never run"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the instance"
    return None


def is_exactly(module: nn.Module, expected: type[_Module]) -> TypeGuard[_Module]:
    """Whether calling the module now does what the class `expected` says and no more.

    Other than for `obstacle`, hooks on all modules count, as profilers and counters register them for a while.
    """
    return obstacle(module, expected) is None and not _has_any_global_hook()  # type: ignore[no-untyped-call]
