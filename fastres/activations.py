"""The activations in plain PyTorch: what each computes, its derivative, and what backward has to know for it.

The other backends name the same kinds, a file each: csrc/cpu/activations.h and kernels/activations.py. A kind that only
this file names is computed by PyTorch's operators (docs/architecture.md, "How to add an activation").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

_TwoNumbers = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Kind:
    """One activation f, element by element.

    Attributes:
        forward: (z, alpha) -> f(z), differentiable any number of times.
        gradient: (z, alpha) -> f'(z), as torch's operator has it at the kinks; differentiable itself.
        alpha: the parameter's value where none is given.
        passes: (z, alpha) -> bool, for an f that is piecewise linear with two slopes: where f' is 1. One bit an element
            is then all that backward has to know. None for every other f.
        leaks: f' is alpha, instead of 0, where `passes` is false.
        compiled: the C++ and Triton kernels know the kind as well.
    """

    forward: _TwoNumbers
    gradient: _TwoNumbers
    alpha: float = 0.0
    passes: _TwoNumbers | None = None
    leaks: bool = False
    compiled: bool = False


def _gelu_gradient(z: Tensor, alpha: float) -> Tensor:
    """Phi(z) + z * phi(z), the normal distribution's function and density.

    Source: Hendrycks and Gimpel 2016, "Gaussian error linear units", section 2.
    """
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh_gradient(z: Tensor, alpha: float) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBE * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * z * z)


def _silu_gradient(z: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _hardswish_gradient(z: Tensor, alpha: float) -> Tensor:
    middle = z / 3 + 0.5
    return torch.where(z <= -3, 0.0, torch.where(z < 3, middle, 1.0))


# `~(z <= 0)`, for as through torch's ReLU NaN passes.
KINDS: dict[str, Kind] = {
    "identity": Kind(lambda z, _: z, lambda z, _: torch.ones_like(z), compiled=True),
    "relu": Kind(
        lambda z, _: F.relu(z), lambda z, _: (~(z <= 0)).to(z.dtype), passes=lambda z, _: ~(z <= 0), compiled=True
    ),
    "leaky_relu": Kind(
        lambda z, alpha: F.leaky_relu(z, alpha),
        lambda z, alpha: torch.where(z > 0, torch.ones_like(z), alpha),
        alpha=0.01,
        passes=lambda z, _: z > 0,
        leaks=True,
        compiled=True,
    ),
    "relu6": Kind(
        lambda z, _: F.relu6(z),
        lambda z, _: (~((z <= 0) | (z >= 6))).to(z.dtype),
        passes=lambda z, _: ~((z <= 0) | (z >= 6)),
        compiled=True,
    ),
    "hardswish": Kind(lambda z, _: F.hardswish(z), _hardswish_gradient, compiled=True),
    "silu": Kind(lambda z, _: F.silu(z), _silu_gradient, compiled=True),
    "gelu": Kind(lambda z, _: F.gelu(z), _gelu_gradient, compiled=True),
    "gelu_tanh": Kind(lambda z, _: F.gelu(z, approximate="tanh"), _gelu_tanh_gradient, compiled=True),
    "elu": Kind(
        lambda z, alpha: F.elu(z, alpha),
        lambda z, alpha: torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(torch.clamp(z, max=0))),
        alpha=1.0,
        compiled=True,
    ),
}

_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Identity: lambda m: Activation("identity"),
    nn.ReLU: lambda m: Activation("relu"),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),
    nn.ReLU6: lambda m: Activation("relu6"),
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.SiLU: lambda m: Activation("silu"),
    nn.GELU: lambda m: Activation("gelu" if m.approximate == "none" else "gelu_tanh"),
    nn.ELU: lambda m: Activation("elu", float(m.alpha)),
}


_MAKERS: dict[str, Callable[[float], nn.Module]] = {
    "identity": lambda _: nn.Identity(),
    "relu": lambda _: nn.ReLU(),
    "leaky_relu": lambda alpha: nn.LeakyReLU(alpha),
    "relu6": lambda _: nn.ReLU6(),
    "hardswish": lambda _: nn.Hardswish(),
    "silu": lambda _: nn.SiLU(),
    "gelu": lambda _: nn.GELU(),
    "gelu_tanh": lambda _: nn.GELU("tanh"),
    "elu": lambda alpha: nn.ELU(alpha),
}


class Activation(NamedTuple):
    """An activation with its parameter.

    Attributes:
        kind: a key of `KINDS`.
        alpha: leaky_relu's negative slope, elu's alpha; of no meaning elsewhere.
    """

    kind: str = "relu"
    alpha: float = 0.0

    @classmethod
    def of(cls, value: Activation | str | nn.Module, name: str = "activation") -> Activation:
        """The activation that somebody means by a name, by a module of torch's or by an `Activation`.

        Raises:
            TypeError: neither of these, or a module whose class is not exactly one of those in `for_module`.
            ValueError: an unknown kind.
        """
        if isinstance(value, nn.Module):
            found = cls.for_module(value)
            if found is None:
                known = ", ".join(c.__name__ for c in _MODULES)
                raise TypeError(f"{name}: expected a module of one of torch's classes {known}, got {value}")
            return found
        if isinstance(value, str):
            value = cls(value, KINDS[value].alpha if value in KINDS else 0.0)
        if not isinstance(value, cls):
            raise TypeError(f"{name}: expected an Activation, a string or a module, got {type(value).__name__}")
        if value.kind not in KINDS:
            raise ValueError(f"{name}: expected one of {tuple(KINDS)}, got {value.kind!r}")
        return value

    @classmethod
    def for_module(cls, module: nn.Module | None) -> Activation | None:
        """The activation that a module computes, going by its class; None where it is no activation known here."""
        make = None if module is None else _MODULES.get(type(module))
        return None if make is None else make(module)

    def module(self) -> nn.Module:
        """A module of torch's that computes it.

        Raises:
            ValueError: an activation that was registered without one.
        """
        if self.kind not in _MAKERS:
            raise ValueError(f"activation: expected one with a module, got {self.kind!r}, registered without")
        return _MAKERS[self.kind](self.alpha)

    def forward(self, z: Tensor) -> Tensor:
        """f(z), by operators of PyTorch that can be differentiated."""
        return KINDS[self.kind].forward(z, self.alpha)

    def gradient(self, z: Tensor) -> Tensor:
        """f'(z), likewise."""
        return KINDS[self.kind].gradient(z, self.alpha)


RELU, IDENTITY = Activation("relu"), Activation("identity")


def module_classes() -> Collection[type[nn.Module]]:
    """The classes of `Activation.for_module`."""
    return _MODULES.keys()


def register(kind: str, definition: Kind, module: type[nn.Module] | None = None) -> None:
    """Make an activation known under a name of its own.

    Args:
        kind: the name, which is not taken yet.
        definition: what it computes. `compiled` says that both kernel files have an entry for it, too.
        module: the class of modules, constructed without a parameter that changes the result, that compute it.
    Raises:
        ValueError: the name is taken.
    """
    if kind in KINDS:
        raise ValueError(f"kind: expected a new name, got {kind!r}, which is taken")
    KINDS[kind] = definition
    if module is not None:
        _MODULES[module] = lambda _: Activation(kind, definition.alpha)
        _MAKERS[kind] = lambda _: module()


def unregister(kind: str, module: type[nn.Module] | None = None) -> None:
    """Undo `register`."""
    del KINDS[kind]
    if module is not None:
        del _MODULES[module], _MAKERS[kind]
