"""Inputs: layouts and strides, subclasses, what is refused, and numbers at the ends of their range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torchvision import tv_tensors

from tests.altered.compare import Draw, Results, backward, differs, observe, record, state, step
from tests.altered.subjects import (
    BASIC,
    BLOCKS,
    BOTTLENECK,
    DIRECT_BASIC,
    NETWORK,
    NORM_ACT,
    PREACTIVATION,
    PROJECTED,
    RESIDUAL,
    SHORTCUT,
    SKIP,
    STEM,
    SUBJECTS,
)
from tests.altered.table import Table, check

TABLE = Table()
use = TABLE.use
ALL = (*SUBJECTS, DIRECT_BASIC)
MAPS = (*BLOCKS, DIRECT_BASIC, NORM_ACT, SKIP, RESIDUAL, PREACTIVATION, SHORTCUT)  # whose output is a map as well


class Plain(Tensor):
    """A subclass that adds nothing."""


class Watching(Tensor):
    """One that sees each function."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Halving(Tensor):
    """One that gives a function another meaning."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y / 2 if func is torch.nn.functional.batch_norm else y


def both(m: nn.Module, draw: Draw, make: Callable[[Tensor], Tensor]) -> Results:
    """A training step and an evaluation on what `make` gives of an ordinary input."""
    results: Results = {}
    for mode in (m.train(), m.eval()):
        x = draw.x()
        y = mode(make(x))
        when = f"training {m.training}"
        backward(y, draw)
        record(results, when, y=torch.Tensor.as_subclass(y, Tensor) if isinstance(y, Tensor) else y, x=x.grad)
        state(results, when, m)
        m.zero_grad()
        with torch.no_grad():
            y = mode(make(x.detach()))
            record(results, f"{when}, no gradient", y=torch.Tensor.as_subclass(y, Tensor))
    return results


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "other strides": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "a slice": lambda x: torch.cat([x, x], 3)[..., ::2],
    "a narrow": lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    "an offset": lambda x: torch.cat([x.reshape(-1)[:3], x.reshape(-1)])[3:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded in space": lambda x: x[..., :1].expand_as(x),
    "flipped": lambda x: x.flip(3),
    "transposed": lambda x: x.mT.contiguous().mT,
    "one image": lambda x: x[:1],
    "one pixel an image": lambda x: x[..., :1, :1],
    "one row": lambda x: x[..., :1, :],
    "a subclass": lambda x: x.as_subclass(Plain),
    "a subclass that watches": lambda x: x.as_subclass(Watching),
    "a subclass that alters": lambda x: x.as_subclass(Halving),
    "an image of torchvision": lambda x: tv_tensors.Image(x),
    "not a leaf": lambda x: x * 1,
    "a view of a leaf": lambda x: x.view_as(x),
    "odd sizes": lambda x: x[..., :5, :7],
    "large values": lambda x: x * 1e4,
    "tiny values": lambda x: x * 1e-20,
    "constant": lambda x: x * 0 + 1,
    "far from zero": lambda x: x + 1e3,
}  # fmt: skip
for name, make in INPUTS.items():
    refused = ()
    exact = "values" not in name and name not in ("constant", "far from zero")
    use(f"input: {name}", ALL, refused=refused, exact=exact)(lambda m, draw, make=make: both(m, draw, make))


@use("what a watching subclass sees", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    Watching.calls.clear()
    m(draw.x().detach().as_subclass(Watching))
    return {"calls": [c for c in Watching.calls if c in ("conv2d", "batch_norm", "relu", "relu_")]}


@use("the class of the output of a subclass", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    return {c.__name__: type(m(draw.x().as_subclass(c))).__name__ for c in (Plain, Watching, Halving)}


@use("a parameter as input", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    step(m, draw, results, "step", x=nn.Parameter(draw.x().detach()))
    return results


class Wrapped(Tensor):
    """A parameter of a class of its own, as those of sharded and quantised weights."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Any:
        return Tensor._make_subclass(cls, data, data.requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.conv2d:
                return func(args[0], args[1] * 2, *args[2:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))


@use("weights of a subclass that alters", (*BLOCKS, SKIP, RESIDUAL, PREACTIVATION, DIRECT_BASIC, SHORTCUT))
def _(m: nn.Module, draw: Draw) -> Results:
    for c in m.modules():
        if isinstance(c, nn.Conv2d):
            weight = c.weight.detach()
            del c.weight
            c.register_parameter("weight", None)
            c._parameters["weight"] = Wrapped(weight.requires_grad_())
    results: Results = {}
    x = draw.x()
    y = m(x)
    backward(y, draw)
    record(results, "step", y=y, x=x.grad)
    with torch.no_grad():
        record(results, "evaluation", y=m.eval()(x))
    return results


class BufferSubclass(Tensor):
    pass


@use("statistics and norm weights of a subclass", SUBJECTS)
def _(m: nn.Module, draw: Draw) -> Results:
    for c in m.modules():
        if isinstance(c, nn.BatchNorm2d):
            c.running_mean = c.running_mean.as_subclass(BufferSubclass)
            c.running_var = c.running_var.as_subclass(BufferSubclass)
    return both(m, draw, lambda x: x)


@use("layout of outputs", MAPS)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for mode in (m.train(), m.eval()):
        for layout in ("nchw", "channels_last"):
            x = draw.x(layout=layout)
            y = mode(x)
            backward(y, draw)
            results[f"{layout}, training {m.training}"] = (y.stride(), x.grad.stride())
            with torch.no_grad():
                results[f"{layout}, training {m.training}, no gradient"] = mode(x).stride()
    return results


@use("an empty batch", ALL, refused=(ValueError, RuntimeError))
def _(m: nn.Module, draw: Draw) -> Results:
    x = draw.x(shape=(0, *draw.subject.shape()[1:]), layout="nchw")
    y = m(x)
    backward(y, draw)
    results: Results = {"shape": tuple(y.shape)}
    state(results, "step", m)
    return results


@use("an empty batch in evaluation", ALL, refused=(ValueError, RuntimeError))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    x = draw.x(shape=(0, *draw.subject.shape()[1:]), layout="nchw")
    step(m.eval(), draw, results, "evaluation", x=x)
    return results


BAD: dict[str, Callable[[Tensor], Any]] = {
    "one value a channel": lambda x: x[:1, :, :1, :1],
    "three dimensions": lambda x: x[0],
    "five dimensions": lambda x: x[None],
    "two dimensions": lambda x: x[0, 0],
    "other channels": lambda x: torch.cat([x, x], 1),
    "no channels": lambda x: x[:, :0],
    "no pixels": lambda x: x[..., :0],
    "float64": lambda x: x.double() if x.dtype is torch.float32 else x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "whole numbers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x > 0,
    "numpy": lambda x: x.detach().numpy(),
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.detach().to_sparse(),
    "a string": lambda x: "image",
}
for name, make in BAD.items():
    for training in (True, False):

        @use(f"bad input in {'training' if training else 'evaluation'}: {name}", ALL, refused=(Exception,), exact=False)
        def _(m: nn.Module, draw: Draw, make: Any = make, training: bool = training) -> Results:
            y = m.train(training)(make(draw.x()))
            return {"shape": tuple(y.shape), "dtype": str(y.dtype), "device": y.device.type, "layout": str(y.layout)}


@use("no input", ALL, refused=(TypeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    return {"y": m()}


# FusedBatchNormAct2d takes a residual, and so is no case.
@use("two inputs", (STEM, *BLOCKS, SKIP, RESIDUAL, PREACTIVATION), refused=(TypeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    return {"y": m(draw.x(), draw.x())}


@use("a keyword that nobody knows", ALL, refused=(TypeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    return {"y": m(draw.x(), training=True)}


@use("input by its name", (*BLOCKS, STEM, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    return {"y": m(x=draw.x()).detach()}


@use("after a refusal, all goes on", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    with pytest.raises(Exception):  # noqa: B017
        m(draw.x()[:, :1])
    return observe(m, draw)


# ----------------------------------------------------------------------------------------------------- Winograd's range

WINOGRAD = (BASIC, PROJECTED, BOTTLENECK, RESIDUAL, PREACTIVATION, DIRECT_BASIC)


def spoilt(x: Tensor, value: float) -> Tensor:
    x = x.detach().clone()
    x[0, 1, 2, 3] = value
    return x


for value in (float("inf"), -float("inf"), float("nan"), 1.5e38, 3e38):

    @use(f"a pixel of {value} in evaluation", WINOGRAD, exact=False)
    def _(m: nn.Module, draw: Draw, value: float = value) -> Results:
        x = spoilt(draw.x(), value)
        with torch.no_grad():
            return {"y": m.eval()(x)}

    @use(f"a pixel of {value} in training", WINOGRAD, exact=False)
    def _(m: nn.Module, draw: Draw, value: float = value) -> Results:
        x = spoilt(draw.x(), value).requires_grad_()
        y = m(x)
        return {"y": y.detach()}


for value in (float("inf"), -float("inf"), float("nan"), 1e37):

    @use(f"a gradient of {value}", (*WINOGRAD, NORM_ACT, SKIP), exact=False)
    def _(m: nn.Module, draw: Draw, value: float = value) -> Results:
        x = draw.x()
        y = m.eval()(x)
        dy = draw.dy(y)
        dy[0, 1, 2, 1] = value
        y.backward(dy)
        results: Results = {}
        record(results, "evaluation", x=x.grad)
        state(results, "evaluation", m)
        return results


@use("1.5e38 with weights of 1e-3", WINOGRAD, exact=False)
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.no_grad():
        for c in m.modules():
            if isinstance(c, nn.Conv2d):
                c.weight.fill_(1e-3)
        return {"y": m.eval()(draw.x().sign() * 1.5e38)}


@use("weights of 1e30", WINOGRAD, exact=False)
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.no_grad():
        m.conv2.weight[0, 0, 1, 1] = 1e30
        return {"y": m.eval()(draw.x())}


@pytest.mark.parametrize("subject", WINOGRAD, ids=str)
@pytest.mark.parametrize("value", [1e6, -1e6, 1e8])
@pytest.mark.parametrize("which", ["x", "dy"])
def test_a_large_pixel_leaves_its_neighbours_alone(subject, value, which):
    """What the pixel does not reach, and what it reaches a little, is as exact as where it is an ordinary one."""
    draw, found = Draw(subject, ("large", value, which)), []
    models = subject.make_fused(), subject.make_plain(), subject.make_plain().double()
    for model in models:
        dtype = next(model.parameters()).dtype
        x = draw.x().detach().to(dtype)
        if which == "x":
            x = spoilt(x, value)
        x.requires_grad_()
        y = model.eval()(x)
        dy = draw.dy(y).to(dtype)
        if which == "dy":
            dy[0, 1, 2, 1] = value
        y.backward(dy)
        found.append({"y": y.detach(), "x": x.grad})
    key = "y" if which == "x" else "x"
    # Pixel by pixel: the error may grow with what the pixel adds up, not with the largest one. A channel that is small
    # where others are not is a difference of large terms.
    small = found[-1][key].abs().amax(1, keepdim=True) < 100
    assert small.any()
    problem = differs(*(torch.where(small, result[key], 0) for result in found), subject, False)
    assert problem is None, problem


@TABLE.every()
def test_an_input_gives_what_the_plain_module_gives(row, subject):
    check(row, subject)
