"""The activations in Triton: the one file of this backend that names them.

Everything is element by element in float32. NaN passes where it passes in PyTorch; what happens at the kinks is said in
fastres/activations.py, whose formulas these are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastres.activations import KINDS
from fastres.contract import Act


class Functions(NamedTuple):
    """What the kernels call for a kind of activation: functions under @triton.jit, each of (z, alpha).

    Attributes:
        forward: f(z). None: z where `passes` is true and 0 elsewhere, and without `passes` z itself.
        gradient: f'(z). None: 1 where `passes` is true, and without `passes` everywhere.
        passes: as in `fastres.activations.Kind`.
    """

    forward: Any = None
    gradient: Any = None
    passes: Any = None


@triton.jit
def _is_not_below_zero(z, alpha):
    return ~(z <= 0)


@triton.jit
def _leaky_relu(z, alpha):
    return tl.where(z > 0, z, alpha * z)


@triton.jit
def _leaky_relu_gradient(z, alpha):
    return tl.where(z > 0, 1.0, alpha)


@triton.jit
def _is_above_zero(z, alpha):
    return z > 0


@triton.jit
def _relu6(z, alpha):
    return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))


@triton.jit
def _is_between_zero_and_six(z, alpha):
    return ~((z <= 0) | (z >= 6))


@triton.jit
def _hardswish(z, alpha):
    return z * (tl.minimum(tl.maximum(z + 3, 0.0), 6.0) * (1 / 6))


@triton.jit
def _hardswish_gradient(z, alpha):
    return tl.where(z <= -3, 0.0, tl.where(z < 3, z * (1 / 3) + 0.5, 1.0))


@triton.jit
def _silu(z, alpha):
    return z * tl.sigmoid(z)


@triton.jit
def _silu_gradient(z, alpha):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


# Phi(z) = (1 + erf(z / sqrt(2))) / 2, phi(z) = exp(-z^2 / 2) / sqrt(2 pi)
@triton.jit
def _gelu(z, alpha):
    return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_gradient(z, alpha):
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def _gelu_tanh_weight(z):
    """(1 + tanh(u)) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3): it is sigmoid(2 u), which does not cancel."""
    return tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _gelu_tanh(z, alpha):
    return z * _gelu_tanh_weight(z)


@triton.jit
def _gelu_tanh_gradient(z, alpha):
    s = _gelu_tanh_weight(z)
    return s + z * s * (1 - s) * (1.5957691216057308 * (1 + 3 * 0.044715 * z * z))


@triton.jit
def _elu(z, alpha):
    # Near 0 the exponential's difference from 1 cancels: its series up to z^5 is exact there to float32.
    series = z * (1 + z * (1 / 2) * (1 + z * (1 / 3) * (1 + z * (1 / 4) * (1 + z * (1 / 5)))))
    return tl.where(z > 0, z, alpha * tl.where(z > -0.1, series, tl.exp(z) - 1))


@triton.jit
def _elu_gradient(z, alpha):
    return tl.where(z > 0, 1.0, alpha * tl.exp(z))


FUNCTIONS: dict[str, Functions] = {
    "identity": Functions(),
    "relu": Functions(passes=_is_not_below_zero),
    "leaky_relu": Functions(_leaky_relu, _leaky_relu_gradient, _is_above_zero),
    "relu6": Functions(_relu6, passes=_is_between_zero_and_six),
    "hardswish": Functions(_hardswish, _hardswish_gradient),
    "silu": Functions(_silu, _silu_gradient),
    "gelu": Functions(_gelu, _gelu_gradient),
    "gelu_tanh": Functions(_gelu_tanh, _gelu_tanh_gradient),
    "elu": Functions(_elu, _elu_gradient),
}


def _functions(act: Act) -> Functions:
    if act.kind not in FUNCTIONS:
        raise ValueError(f"kind: expected one of {tuple(FUNCTIONS)}, which the Triton kernels know, got {act.kind!r}")
    return FUNCTIONS[act.kind]


def forward_arguments(act: Act) -> dict[str, Any]:
    """The arguments of the forward kernel that follow from the activation."""
    functions = _functions(act)
    return {"FORWARD": functions.forward, "PASSES": functions.passes if act.gated else None, "alpha": act.alpha}


def backward_arguments(act: Act, has_bits: bool) -> dict[str, Any]:
    """The arguments of the backward kernels that follow from the activation.

    PASSES and GRADIENT are of the activation's input, which is computed anew only where one of them is given.
    """
    functions = _functions(act)
    return {
        "PASSES": functions.passes if act.gated and not has_bits else None,
        "GRADIENT": None if act.gated else functions.gradient,
        "LEAKS": act.gated and KINDS[act.kind].leaks,
        "alpha": act.alpha,
    }
