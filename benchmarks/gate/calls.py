"""Calls of every operator of the CPU on small tensors, recorded from the functions that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

import fastres
from fastres import models
from fastres.activations import RELU
from fastres.contract import Act, ConvShape, Norm, NormParams, Residual, Statistics, Sums
from fastres.functional import (
    batch_norm_act,
    batch_norm_act_max_pool2d,
    conv1x1_with_statistics,
    conv3x3,
    conv3x3_norm_act,
    conv3x3_with_statistics,
    grouped_conv2d_with_statistics,
    max_pool2d,
    norm_act_conv1x1,
    norm_act_conv3x3,
    projection_shortcut,
)
from fastres.nn import FusedBottleneck
from fastres.nn.plan import plan_for, why_not_planned
from fastres.ops import batch_norm_act as pointwise
from fastres.ops import norm_act_conv3x3 as norm_act_conv
from fastres.ops.packed import pack
from fastres.ops.packed_convolution import packed_convolution

POINTWISE = (2, 64, 8, 8)
SHAPE = (2, 16, 16, 16)
"""Of convolutions' inputs: so few channels that one pass more over a tensor shows beside their products."""
CHANNELS = SHAPE[1]
ACT = Act("relu", 0.0, 0.0, "add_act")


class Call(NamedTuple):
    """A call of torch.ops.fastres.<operator> with these flat arguments, named by the operator and what is special."""

    name: str
    operator: str
    arguments: tuple[Any, ...]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the fastres operators that are called, with copies of their arguments: some are updated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastres":
            copied = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args)
            self.calls.append((func._schema.name.removeprefix("fastres::"), copied))
        return func(*args, **(kwargs or {}))


def record() -> list[Call]:
    """The calls of every scenario.

    Raises:
        RuntimeError: a scenario calls an operator twice, so that its calls have one name.
    """
    found: dict[str, Call] = {}
    for scenario, run in SCENARIOS.items():
        torch.manual_seed(0)
        with _Recorder() as recorder:
            run()
        for operator, arguments in recorder.calls:
            name = f"{operator}: {scenario}"
            if name in found:
                raise RuntimeError(f"{scenario}: expected one call of each operator, got another of {operator}")
            found[name] = Call(name, operator, arguments)
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------- arguments


def _x(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, layout: Any = torch.channels_last) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()


def _weight(kernel: int, outputs: int = CHANNELS) -> Tensor:
    return _x((outputs, CHANNELS, kernel, kernel))


def _norm(channels: int = CHANNELS) -> NormParams:
    vectors = torch.rand(2, channels) + 0.5
    return NormParams(torch.zeros(channels), torch.ones(channels), *(v.requires_grad_() for v in vectors))


def _wide_norm() -> NormParams:
    return _norm(POINTWISE[1])


def _backward(y: Tensor) -> None:
    torch.autograd.backward(y, torch.randn_like(y))


# ---------------------------------------------------------------------------------------------------------- scenarios


def _pointwise(
    shape: tuple[int, ...] = POINTWISE,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Any = torch.channels_last,
    residual: bool = True,
    **options: Any,
) -> Callable[[], None]:
    """batch_norm_act, forward and backward."""

    def run() -> None:
        r = _x(shape, dtype, layout) if residual else None
        given = {"training": True} | {k: v() if callable(v) else v for k, v in options.items()}
        _backward(batch_norm_act(_x(shape, dtype, layout), *_norm(shape[1])[:4], residual=r, **given))

    return run


def _inference(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def _norm_pool(**options: Any) -> Callable[[], None]:
    def run() -> None:
        _backward(batch_norm_act_max_pool2d(_x(POINTWISE), _wide_norm(), 3, 2, 1, training=True, **options))

    return run


def _norm_act_conv(
    function: Callable[..., Any], kernel: int, algorithm: str, residual: bool = False, stride: int = 1
) -> Callable[[], None]:
    def run() -> None:
        r = _x() if residual else None
        weight = _weight(kernel)
        _backward(function(_x(), _norm(), weight, residual=r, stride=stride, algorithm=algorithm)[0])

    return run


def _grouped(kernel: int, inputs: int, stride: int = 1) -> Callable[[], None]:
    def run() -> None:
        weight = _x((CHANNELS, inputs, kernel, kernel))
        _backward(grouped_conv2d_with_statistics(_x(), weight, stride=stride, algorithm="grouped").y)

    return run


def _projection() -> None:
    """Training; what follows its product is a batch_norm_act of both branches."""
    x, stride = _x((2, 2 * CHANNELS, 8, 8)), 2
    norm, x_norm = _norm(2 * CHANNELS), _norm(2 * CHANNELS)
    _backward(projection_shortcut(_x(), _weight(1, 2 * CHANNELS), norm, x, x_norm, stride=stride, training=True))


def _projection_inference() -> None:
    x, norms = _x((2, 2 * CHANNELS, 8, 8)), (_norm(2 * CHANNELS), _norm(2 * CHANNELS))
    projection_shortcut(_x(), _weight(1, 2 * CHANNELS), norms[0], x, norms[1], stride=2)


def _stages() -> None:
    """What several processes call, between whose sums they exchange messages."""
    x, r, dy = (_x(POINTWISE).detach() for _ in range(3))
    channels = POINTWISE[1]
    norm = Norm(torch.zeros(channels), torch.ones(channels), *torch.rand(2, channels))
    count, *_ = pointwise.stats(x)
    _, bits = pointwise.apply(x, norm, Residual(r), None, ACT, True)
    dweight, dbias, *_ = pointwise.backward_reduce(dy, None, x, norm, None, bits, ACT)
    pointwise.backward_apply(dy, x, norm, None, bits, Sums(dweight, dbias), count, ACT, [True, False])


def _stages_of_convolution() -> None:
    x, dy, weight = _x().detach(), _x().detach(), _weight(3).detach()
    vectors = torch.rand(4, CHANNELS)
    params = NormParams(torch.zeros(CHANNELS), torch.ones(CHANNELS), *vectors[:2])
    statistics = Statistics(torch.zeros(CHANNELS), 512 * torch.ones(CHANNELS))
    *_, mean, rstd, keep = norm_act_conv.forward(x, params, statistics, None, None, weight, ACT, False, 1)
    norm = Norm(mean, rstd, *vectors[:2])
    norm_act_conv.backward_reduce(dy, x, norm, None, keep, weight, ACT, [True, False, True], 1)


def _packed(kernel: int, algorithm: str) -> Callable[[], None]:
    def run() -> None:
        packed = pack(_weight(kernel).detach(), padded=algorithm == "winograd")
        shape = ConvShape(CHANNELS, kernel, 1, kernel // 2)
        packed_convolution(_x().detach(), packed, torch.rand(CHANNELS), None, RELU, shape, algorithm)

    return run


def _frozen(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Callable[[], None]:
    def run() -> None:
        network = fastres.freeze(make().to(memory_format=torch.channels_last).eval())
        x = _x(shape).detach()
        with torch.no_grad():
            with _disable_current_modes():  # under a mode the layers are called one by one
                plan = plan_for(network, x, cast(Callable[[Any], Any], network._layer_by_layer))
            if plan is None:
                raise RuntimeError(f"frozen network: expected one call, got {why_not_planned(network)}")
            plan.run(x)

    return run


SCENARIOS: dict[str, Callable[[], None]] = {
    "no residual": _pointwise(residual=False),
    "residual": _pointwise(),
    "residual with its own norm": _pointwise(residual_norm=_wide_norm),
    "dropout": _pointwise(dropout_p=0.1),
    "SiLU": _pointwise(residual=False, activation="silu"),
    "few channels": _pointwise((2, 24, 8, 8)),
    "NCHW": _pointwise(layout=torch.contiguous_format),
    "bfloat16": _pointwise(dtype=torch.bfloat16),
    "evaluation with gradients": _pointwise(training=False),
    "evaluation": _inference(lambda: batch_norm_act(_x(POINTWISE), *_wide_norm()[:4], residual=_x(POINTWISE))),
    "stages": _stages,
    "3x3, stride 2": _norm_pool(),
    "3x3, stride 2, SiLU": _norm_pool(activation="silu"),
    "3x3, stride 2, evaluation": _inference(lambda: batch_norm_act_max_pool2d(_x(POINTWISE), _wide_norm(), 3, 2, 1)),
    "pool of 2x2": lambda: _backward(max_pool2d(_x(POINTWISE), 2)),
    "Winograd": lambda: _backward(conv3x3(_x(), _weight(3), algorithm="winograd")),
    "Winograd, tiles of 3x3": lambda: _backward(conv3x3(_x((2, CHANNELS, 6, 6)), _weight(3), algorithm="winograd")),
    "Winograd, tiles of 5x5": lambda: _backward(conv3x3(_x((2, CHANNELS, 10, 10)), _weight(3), algorithm="winograd")),
    "Winograd, stride 2": lambda: _backward(conv3x3(_x(), _weight(3), stride=2, algorithm="winograd")),
    "small images": lambda: _backward(conv3x3(_x((2, CHANNELS, 2, 2)), _weight(3), algorithm="winograd")),
    "small images, stride 2": lambda: _backward(
        conv3x3(_x((2, CHANNELS, 4, 4)), _weight(3), stride=2, algorithm="winograd")
    ),
    "Winograd, statistics": lambda: _backward(conv3x3_with_statistics(_x(), _weight(3), algorithm="winograd").y),
    "1x1, statistics": lambda: _backward(conv1x1_with_statistics(_x(), _weight(1), algorithm="gemm").y),
    "in groups of 8": _grouped(3, 8),
    "in groups of 4, stride 2": _grouped(3, 4, 2),
    "depthwise, 5x5": _grouped(5, 1),
    "norm, Winograd": _norm_act_conv(norm_act_conv3x3, 3, "winograd"),
    "norm and residual, Winograd": _norm_act_conv(norm_act_conv3x3, 3, "winograd", residual=True),
    "norm, Winograd, stride 2": _norm_act_conv(norm_act_conv3x3, 3, "winograd", stride=2),
    "norm, 1x1": _norm_act_conv(norm_act_conv1x1, 1, "gemm"),
    "norm, Winograd, stages": _stages_of_convolution,
    "evaluation, Winograd": _inference(lambda: conv3x3_norm_act(_x(), _weight(3), _norm(), algorithm="winograd")),
    "evaluation, matrix product": _inference(lambda: conv3x3_norm_act(_x(), _weight(3), _norm(), algorithm="gemm")),
    "projection": _projection,
    "projection, evaluation": _inference(_projection_inference),
    "packed, Winograd": _packed(3, "winograd"),
    "packed, matrix product": _packed(3, "gemm"),
    "packed, 1x1": _packed(1, "gemm"),
    "WRN-10-2": _frozen(lambda: models.create("wrn10-2", num_classes=10), (2, 3, 16, 16)),
    "a bottleneck in groups": _frozen(lambda: FusedBottleneck(CHANNELS, CHANNELS // 4, groups=4), (2, CHANNELS, 8, 8)),
}
"""What is special about some calls -> a function that makes them, each operator once."""
