"""Plans: a frozen network, or a block of one, as a table of steps that one operator call goes through.

A plan is recorded by running the module's own forward on a `Value`, which stands for an activation of given sizes and
notes what is done to it. The plan holds for inputs of one size and dtype, and as long as nobody changes the module:
`plan_for` looks at that in each call. What cannot be part of a plan (a hook, a module of another kind, a convolution
without packed weights) leaves the module to its own forward, and the modules inside to plans of their own.
"""

from __future__ import annotations

import itertools
import operator
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres.activations import IDENTITY, KINDS, Activation
from fastres.contract import ConvProblem, ConvShape, Pool
from fastres.nn.trust import why_not_ordinary
from fastres.ops import max_pool
from fastres.ops.algorithms import choose_algorithm, choose_packed, is_served, problem_of, requested_algorithm
from fastres.ops.frozen_network import INPUT, NONE, OUTPUT, Kind, Step, activation_numbers, frozen_network
from fastres.ops.packed import pack

# Plans of one module, for inputs of different sizes.
_MOST_PLANS = 32
# Elements to which places in scratch are rounded up: a cache line of the smallest dtype.
_ALIGNMENT = 32
# Attributes of an instance that take the place of a method.
_METHODS = ("forward", "_forward_impl", "_conv_forward", "_check_input_dim")


class NotPlannedError(Exception):
    """Why a module has no plan."""


class Value:
    """An activation while a plan is recorded.

    Attributes:
        number: of the value in its recorder.
        channels, height, width: sizes of one image.
        flat: whether it is [N, C] rather than [N, C, H, W].
    """

    requires_grad = False

    def __init__(self, recorder: Recorder, number: int, sizes: tuple[int, int, int], flat: bool = False) -> None:
        self.recorder, self.number, self.flat = recorder, number, flat
        self.channels, self.height, self.width = sizes

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Value:
        recorded = _RECORDED.get(function)
        if recorded is None:
            raise NotPlannedError(f"it calls {getattr(function, '__name__', function)}")
        return recorded(*args, **(kwargs or {}))

    def __add__(self, other: Any) -> Value:
        return self.recorder.add(self, other)

    def __getattr__(self, name: str) -> Any:
        raise NotPlannedError(f"it asks an activation for its {name}")


@dataclass
class _Recorded:
    """A step before its values have places."""

    kind: Kind
    input: Value
    residual: Value | None
    output: Value
    tensors: tuple[Tensor, Tensor] | None
    fields: dict[str, int]


class Recorder:
    """Records a plan for inputs of one size and dtype."""

    def __init__(self, x: Tensor, dtype: torch.dtype, packed: dict[Any, tuple[Tensor, Tensor]]) -> None:
        """
        Args:
            packed: tensors that plans make of a module's own, by what they are made of.
        """
        self.images, channels, height, width = x.shape
        self.x, self.dtype, self.packed = x, dtype, packed
        self.steps: list[_Recorded] = []
        self.input = Value(self, 0, (channels, height, width))

    def _step(
        self,
        kind: Kind,
        x: Value,
        sizes: tuple[int, int, int],
        tensors: tuple[Tensor, Tensor] | None = None,
        residual: Value | None = None,
        **fields: int,
    ) -> Value:
        if residual is not None and residual.sizes != sizes:
            raise NotPlannedError(f"a residual of {residual.sizes} is added to an output of {sizes}")
        y = Value(self, len(self.steps) + 1, sizes)
        self.steps.append(_Recorded(kind, x, residual, y, tensors, fields))
        return y

    def convolution(
        self, x: Value, layer: Any, residual: Value | None, algorithm: str | None = None, padded: bool = False
    ) -> Value:
        """A layer with the attributes `shape`, `packed`, `bias` and `activation`."""
        shape: ConvShape = layer.shape
        choice = choose_packed(self._problem(x, layer), padded, requested_algorithm(algorithm))
        if choice.algorithm == "torch":
            raise NotPlannedError(f"a convolution is PyTorch's: {choice.reason}")
        sizes = (shape.outputs, shape.output_size(x.height), shape.output_size(x.width))
        depth = layer.packed.shape[1] // shape.kernel**2
        return self._step(
            Kind.CONVOLUTION, x, sizes, (layer.packed, layer.bias), residual,
            kernel=shape.kernel, stride=shape.stride, padding=shape.padding, depth=depth,
            winograd=int(choice.algorithm == "winograd"), **_activation(layer.activation),
        )  # fmt: skip

    def grouped(self, x: Value, layer: Any, algorithm: str | None) -> Value:
        """A layer with the attributes `shape`, `groups`, `packed`, `bias` and `activation`."""
        shape: ConvShape = layer.shape
        choice = choose_algorithm(self._problem(x, layer, groups=layer.groups), requested_algorithm(algorithm))
        if choice.algorithm == "winograd":
            raise NotPlannedError("a convolution goes group by group")
        if choice.algorithm != "grouped":
            raise NotPlannedError(f"a convolution in groups is PyTorch's: {choice.reason}")
        sizes = (shape.outputs, shape.output_size(x.height), shape.output_size(x.width))
        return self._step(
            Kind.GROUPED, x, sizes, (layer.packed, layer.bias), None, kernel=shape.kernel, stride=shape.stride,
            padding=shape.padding, depth=layer.packed.shape[2], **_activation(layer.activation),
        )  # fmt: skip

    def _problem(self, x: Value, layer: Any, groups: int = 1) -> ConvProblem:
        shape: ConvShape = layer.shape
        if layer.packed.dtype != torch.float32 or layer.bias.dtype != torch.float32:
            raise NotPlannedError(f"packed weights are {layer.packed.dtype}")
        problem = problem_of(
            self.x, shape.outputs, shape.kernel, shape.stride, needs_grad=False, followed=True, groups=groups
        )
        return problem._replace(dtype=self.dtype, shape=(self.images, *x.sizes), channels_last=True)

    def norm_act(self, x: Value, weight: Tensor, bias: Tensor, residual: Value | None, activation: Activation) -> Value:
        if weight.dtype != torch.float32 or bias.dtype != torch.float32:
            raise NotPlannedError(f"a normalisation's weights are {weight.dtype}")
        return self._step(Kind.NORM_ACT, x, x.sizes, (weight, bias), residual, **_activation(activation))

    def add(self, x: Value, other: Any) -> Value:
        if not isinstance(other, Value) or other.flat != x.flat:
            raise NotPlannedError(f"it adds a {type(other).__name__}")
        made = self.packed.get(x.channels)
        if made is None:
            one, zero = torch.ones(x.channels, device="cpu"), torch.zeros(x.channels, device="cpu")
            made = self.packed[x.channels] = one, zero
        y = self.norm_act(x, *made, other, IDENTITY)
        y.flat = x.flat
        return y

    def finish(self, result: Any) -> Plan:
        if not isinstance(result, Value) or not self.steps:
            raise NotPlannedError(f"its result is a {type(result).__name__}")
        tensors: list[Tensor] = []
        numbers: dict[int, int] = {}
        places, scratch = _places(self.steps, self.input, result)
        rows = []
        for step in self.steps:
            for t in step.tensors or ():
                if id(t) not in numbers:
                    numbers[id(t)] = len(tensors)
                    tensors.append(t)
            weight, bias = (numbers[id(t)] for t in step.tensors) if step.tensors else (-1, -1)
            rows.append(
                Step(
                    step.kind, places[step.input.number],
                    NONE if step.residual is None else places[step.residual.number], places[step.output.number],
                    weight, bias, *step.input.sizes, *step.output.sizes, **step.fields,
                )
            )  # fmt: skip
        output = (self.images, result.channels) if result.flat else (self.images, *result.sizes)
        return Plan(self.dtype, tensors, torch.tensor(rows, dtype=torch.int64, device="cpu"), scratch, output)


def _activation(activation: Activation) -> dict[str, int]:
    if not KINDS[activation.kind].compiled:
        raise NotPlannedError(f"no kernel knows the activation {activation.kind}")
    return dict(zip(("activation", "alpha"), activation_numbers(activation), strict=True))


def _places(steps: Sequence[_Recorded], x: Value, result: Value) -> tuple[dict[int, int], int]:
    """(place of each value, elements of scratch): each in the first gap that it fits in while it has readers.

    A step whose residual nobody reads later writes over it.
    """
    last = {step.output.number: i for i, step in enumerate(steps)}
    for i, step in enumerate(steps):
        for value in (step.input, step.residual):
            if value is not None:
                last[value.number] = i
    places, scratch = {x.number: INPUT}, 0
    live: list[tuple[int, int, int]] = []  # (begin, end, number)
    for i, step in enumerate(steps):
        number = step.output.number
        residual = step.residual
        if number == result.number:
            places[number] = OUTPUT
        elif residual is not None and last[residual.number] == i and places[residual.number] >= 0:
            places[number] = places[residual.number]
            live = [(b, e, number if n == residual.number else n) for b, e, n in live]
        else:
            channels, height, width = step.output.sizes
            size = -(-channels * height * width // _ALIGNMENT) * _ALIGNMENT
            begin = 0
            for b, e, _ in sorted(live):
                if begin + size <= b:
                    break
                begin = max(begin, e)
            places[number] = begin
            live.append((begin, begin + size, number))
            scratch = max(scratch, begin + size)
        live = [entry for entry in live if last[entry[2]] > i]
    return places, scratch


# --------------------------------------------------------------------------------------------- functions of PyTorch's


def _max_pool2d(
    x: Value, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:  # fmt: skip
    pool = Pool.of(kernel_size, stride, padding, dilation)
    if pool is None or ceil_mode or return_indices or x.flat:
        raise NotPlannedError("it pools by windows that are not square, or with dilation, a ceiling or indices")
    if pool.kernel > max_pool.MOST:
        raise NotPlannedError(f"it pools by a window of {pool.kernel}")
    if not pool.fits(x.height, x.width):
        raise NotPlannedError("it pools by a window larger than its input")
    sizes = (x.channels, pool.output_size(x.height), pool.output_size(x.width))
    return x.recorder._step(Kind.MAX_POOL, x, sizes, **pool._asdict())


def _adaptive_avg_pool2d(x: Value, output_size: Any) -> Value:
    if output_size not in (1, (1, 1), [1, 1]) or x.flat:
        raise NotPlannedError(f"it takes means of {output_size}")
    return x.recorder._step(Kind.MEAN, x, (x.channels, 1, 1))


def _flatten(x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    if (start_dim, end_dim) != (1, -1) or x.height * x.width != 1:
        raise NotPlannedError("it flattens more than one pixel")
    return Value(x.recorder, x.number, x.sizes, flat=True)


class _Linear(NamedTuple):
    shape: ConvShape
    packed: Tensor
    bias: Tensor
    activation: Activation = IDENTITY


def _linear(x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    recorder = x.recorder
    if not x.flat or weight.dtype != recorder.x.dtype or weight.shape[1] != x.channels:
        raise NotPlannedError(f"its linear layer has weights of {weight.dtype} and shape {tuple(weight.shape)}")
    if any(t is not None and (type(t) is not Tensor or t.is_inference()) for t in (weight, bias)):
        raise NotPlannedError("its linear layer has weights of another class, or that no one counts the changes of")
    key = (id(weight), id(bias))
    if key not in recorder.packed:
        own = torch.zeros(len(weight), device="cpu") if bias is None else bias.detach().float().contiguous()
        recorder.packed[key] = pack(weight.detach()[:, :, None, None], padded=False), own
    layer = _Linear(ConvShape(len(weight), 1, 1, 0), *recorder.packed[key])
    y = recorder.convolution(x, layer, None)
    y.flat = True
    return y


def _dropout(x: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training:
        raise NotPlannedError("it drops activations")
    return x


_RECORDED: dict[Any, Callable[..., Value]] = {
    F.max_pool2d: _max_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.linear: _linear,
    F.dropout: _dropout,
    torch.flatten: _flatten,
}


# -------------------------------------------------------------------------------------------------------------- plans


class Plan(NamedTuple):
    """What the operator frozen_network takes, beside x.

    Attributes:
        dtype: that x is cast to.
    """

    dtype: torch.dtype
    tensors: list[Tensor]
    steps: Tensor
    scratch: int
    output: tuple[int, ...]

    def run(self, x: Tensor) -> Tensor:
        return frozen_network(x.to(self.dtype), self.tensors, self.steps, self.scratch, self.output)  # type: ignore[no-any-return]


class _Plans:
    """The plans of a module as it was when they were recorded."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._own = [m.__dict__ for m in modules]
        self._held_own = _values(self._own)
        self._children = [m._modules for m in modules]
        self._tensors = [d for m in modules for d in (m._buffers, m._parameters)]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._held_children, self._held_tensors = _values(self._children), _values(self._tensors)
        self._versions = _versions(self._held_tensors)
        self.packed: dict[Any, tuple[Tensor, Tensor]] = {}
        self.plans: dict[Any, Plan | str] = {}
        self.why = self._why_not(modules)

    def _why_not(self, modules: list[nn.Module]) -> str | None:
        for module in modules:
            name = type(module).__name__
            if not is_recordable(module):
                return f"{name} is no module of PyTorch's or ours"
            if module._forward_hooks or module._forward_pre_hooks or "_compiled_call_impl" in module.__dict__:
                return f"a {name} has hooks"
            if any(method in module.__dict__ for method in _METHODS):
                return f"a {name} has a method of its own, set on the instance"
        return None

    def hold(self) -> bool:
        """Whether the module is as it was."""
        return (
            not any(self._hooks)
            and _same(_values(self._own), self._held_own)
            and _same(_values(self._children), self._held_children)
            and _same(_values(self._tensors), self._held_tensors)
            and _versions(self._held_tensors) == self._versions
        )


_values_of = operator.methodcaller("values")  # of a scripted module's own kind of dict, too


def _values(dicts: list[dict[str, Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(map(_values_of, dicts)))


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _versions(tensors: list[Tensor | None]) -> list[int]:
    return [t._version for t in tensors if t is not None and not t.is_inference()]


_made: weakref.WeakKeyDictionary[nn.Module, _Plans] = weakref.WeakKeyDictionary()


def is_recordable(module: nn.Module) -> bool:
    """Whether the forward of this class may be run on a `Value`: it does the same at every call."""
    return type(module).__module__.startswith("torch.nn.modules.") or getattr(type(module), "is_recordable", False)


def plan_for(module: nn.Module, x: Tensor, forward: Callable[[Any], Any]) -> Plan | None:
    """The plan of a frozen module for an input like x, recorded where there is none yet.

    Args:
        forward: of the module, child by child.
    Returns:
        None where the call is left to the module's own forward.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or why_not_ordinary(x) is not None:
        return None
    plans = _made.get(module)
    if plans is None or not plans.hold():
        plans = _made[module] = _Plans(module)
    if plans.why is not None:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    key = (x.shape, x.dtype, x.device, dtype, torch.get_num_threads(), os.environ.get("FASTRES_CONV"))
    plan = plans.plans.get(key)
    if plan is None:
        if len(plans.plans) >= _MOST_PLANS:
            plans.plans.clear()
        plan = plans.plans[key] = _recorded(x, dtype, plans, forward)
    return None if isinstance(plan, str) else plan


def _recorded(x: Tensor, dtype: torch.dtype, plans: _Plans, forward: Callable[[Any], Any]) -> Plan | str:
    if not is_served(problem_of(x, 1, needs_grad=False)._replace(dtype=dtype)):
        return "there is no kernel of our own for this input"
    recorder = Recorder(x, dtype, plans.packed)
    try:
        return recorder.finish(forward(recorder.input))
    except NotPlannedError as e:
        return str(e)
    except Exception as e:  # of somebody's own function, to which a `Value` is no tensor
        return f"{type(e).__name__} without a tensor: {e}"


def why_not_planned(module: nn.Module) -> str | None:
    """Why calls of a frozen module go layer by layer, in words; None where none did, or none has been made yet."""
    plans = _made.get(module)
    if plans is None or not plans.hold():
        plans = _Plans(module)
    left = (plan for plan in plans.plans.values() if isinstance(plan, str))
    return plans.why or next(left, None)
