"""The layers and blocks of a frozen network: for inference only, without parameters.

`fastres.freeze` makes them. Normalisations are folded into their convolutions, whose weights are packed in the order in
which the CPU's kernels read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres import functional, ordinary
from fastres.activations import KINDS, Activation
from fastres.contract import ConvShape, statistics_dtype
from fastres.functional.phases import join, split
from fastres.nn.plan import NotPlannedError, Value, plan_for
from fastres.ops import grouped_conv
from fastres.ops.algorithms import choose_algorithm, choose_packed, is_served, problem_of, requested_algorithm
from fastres.ops.packed import pack, packed_shape, turn, turn_back, unpack
from fastres.ops.packed_convolution import packed_convolution


class Frozen(nn.Module):
    """A module for inference only: without parameters, always in evaluation mode, and not differentiable."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def train(self, mode: bool = True) -> Any:
        """Leaves the module as it is, in evaluation mode.

        Raises:
            RuntimeError: mode is on.
        """
        if mode:
            raise RuntimeError(
                "train: the model was frozen for inference by fastres.freeze, expected mode=False; train its source, "
                "and freeze that again"
            )
        return self


class FrozenModel(Frozen):
    """A model that computes in a dtype of its own, by autocast, whatever its inputs are; not one that is `Planned`."""

    computes_in: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        devices = (t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        with torch.autocast(next(devices, "cpu"), self.computes_in):
            return super().forward(*args, **kwargs)


class _Inference(torch.autograd.Function):
    """A frozen module on an input that asks for a gradient."""

    @staticmethod
    def forward(ctx: Any, infer: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        return infer(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "backward: the model was frozen for inference by fastres.freeze, expected no gradient to be asked for; "
            "differentiate its source"
        )


class FrozenLayer(Frozen):
    """A layer whose result is that of `_infer`, and no gradient's."""

    is_recordable = True
    inputs: int  # channels

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.training = False
        self.activation = activation

    def forward(self, x: Any, residual: Any = None) -> Any:
        """[N, C, H, W] to [N, K, H', W'], of which the residual has the shape.

        Raises:
            TypeError: x is not a tensor of floating-point numbers.
            ValueError: it has another number of dimensions or channels.
        """
        if isinstance(x, Value):
            if x.flat or x.channels != self.inputs:
                raise NotPlannedError(f"a layer of {self.inputs} input channels gets {x.channels}")
            return self._record(x, residual)
        self._check(x)
        asks = x.requires_grad or (residual is not None and residual.requires_grad)
        if asks and torch.is_grad_enabled():
            return _Inference.apply(self._infer, x, residual)
        return self._infer(x, residual)

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a tensor of floating-point numbers, got {found}")
        if x.dim() != 4 or x.shape[1] != self.inputs:
            raise ValueError(f"x: expected shape [N, {self.inputs}, H, W], got {list(x.shape)}")

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _record(self, x: Any, residual: Any) -> Any:
        """The same as a step of a plan."""
        raise NotPlannedError(f"there is no step for a {type(self).__name__}")


class FrozenNormAct(FrozenLayer):
    """f(weight * x + bias [+ residual]): a normalisation that no convolution comes before.

    Buffers: weight and bias [C], float32 (float64 for a float64 network).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.BatchNorm2d, activation: Activation) -> None:
        super().__init__(activation)
        scale, shift = scale_and_shift(norm)
        assert norm.running_mean is not None
        self.inputs = len(scale)
        dtype = statistics_dtype(norm.running_mean.dtype)
        self.register_buffer("weight", scale.to(dtype))
        self.register_buffer("bias", shift.to(dtype))

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if _takes_operators(x) and _has_shape_of(residual, x):
            return _scale_add_act(x, self.weight, self.bias, residual, self.activation)
        weight, bias = (t.to(x.dtype)[:, None, None] for t in (self.weight, self.bias))
        y = x * weight + bias
        return self.activation.forward(y if residual is None else y + residual)

    def _record(self, x: Any, residual: Any) -> Any:
        return x.recorder.norm_act(x, self.weight, self.bias, residual, self.activation)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, steps=norm > [add] > {self.activation.kind}"


class FrozenConvolution(FrozenLayer):
    """f(conv(x) + bias + residual), in channels_last on the CPU."""

    bias: Tensor

    def __init__(self, conv: nn.Conv2d, activation: Activation) -> None:
        super().__init__(activation)
        self.outputs, self.inputs = conv.out_channels, conv.in_channels
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The same by PyTorch's operators."""
        y = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        y = y if residual is None else y + residual
        return self.activation.forward(y)

    def extra_repr(self) -> str:
        shown = f"{self.inputs}, {self.outputs}, kernel_size={self.kernel_size}, stride={self.stride}"
        kind = self.activation.kind
        return f"{shown}, steps=conv > bias > [add]{f' > {kind}' * (kind != 'identity')}"


class FrozenConv2d(FrozenConvolution):
    """A convolution, the normalisation behind it, an addition and ReLU: PyTorch's convolution and at most one pass.

    Buffers: weight, as the convolution's, and bias [K], in the weight's dtype.
    """

    weight: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation, why: str) -> None:
        """
        Args:
            why: its weight is not packed, for the report.
        """
        super().__init__(conv, activation)
        self.why = why
        weight, bias = folded(conv, norm)
        dtype = conv.weight.dtype
        self.register_buffer("weight", weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not _takes_operators(x):
            return self._convolve(x, self.weight, self.bias, residual)
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is None:
            return self._convolve(x, self.weight, self.bias, None)
        y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        if not _has_shape_of(residual, y):
            return self.activation.forward(y + self.bias[:, None, None] + residual)
        return _scale_add_act(y, None, self.bias, residual.to(y.dtype), self.activation)


class FrozenPackedConvolution(FrozenConvolution):
    """A convolution whose weight lies as the CPU's kernels read it, the normalisation behind it, an addition and ReLU.

    The algorithm is chosen at each call. Away from the kernels (another device or dtype, an exported program) the
    weight is PyTorch's again at each call, for PyTorch's convolution.

    Buffers: packed and bias [K], float32.
    """

    packed: Tensor

    def __init__(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation, algorithm: str | None
    ) -> None:
        super().__init__(conv, activation)
        self.algorithm = algorithm
        self.shape = shape_of(conv)
        weight, bias = folded(conv, norm)
        self.register_buffer("packed", self._pack(weight))
        self.register_buffer("bias", bias.float())

    def described(self) -> str:
        """In words, for the report."""
        kernel, stride = self.shape.kernel, self.shape.stride
        shown = f"{self.inputs} to {self.outputs}, {kernel}x{kernel}" + (f", stride {stride}" if stride > 1 else "")
        shown += f", dilation {self.dilation[0]}" if self.dilation[0] > 1 else ""
        return shown + (f", {self.groups} groups" if self.groups > 1 else "")

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if _takes_operators(x) and self.packed.dtype == self.bias.dtype == torch.float32:
            if torch.is_autocast_enabled("cpu"):
                x = x.to(torch.get_autocast_dtype("cpu"))
            x = x.contiguous(memory_format=torch.channels_last)
            algorithm = self._choose(x) if KINDS[self.activation.kind].compiled else "torch"
            if algorithm != "torch" and (residual is None or residual.shape == self._output_shape(x)):
                if residual is not None:
                    residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
                return self._compute(x, residual, algorithm)
        return self._convolve(x, self._unpack(self.packed).to(x.dtype), self.bias.to(x.dtype), residual)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        return len(x), self.outputs, *map(self.shape.output_size, x.shape[2:])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A network that was frozen when weights like this one were not packed.
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            state_dict[f"{prefix}packed"] = self._pack(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _pack(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpack(self, packed: Tensor) -> Tensor:
        raise NotImplementedError

    def _choose(self, x: Tensor) -> str:
        raise NotImplementedError

    def _compute(self, x: Tensor, residual: Tensor | None, algorithm: str) -> Tensor:
        raise NotImplementedError


class FrozenPackedConv2d(FrozenPackedConvolution):
    """A convolution with a square kernel in one group, and what is behind it, in one step; a dilated one by the phases
    of its images (`fastres.functional.phases`), which no plan has a step for.

    Buffers: packed, see `fastres.ops.packed.pack`.
    """

    @property
    def _padded(self) -> bool:
        # As Winograd's algorithm reads them, but where the zeros would be more than the weights.
        return self.shape.kernel == 3 and self.inputs >= 16

    @property
    def _requested(self) -> str | None:
        return self.algorithm if self.shape.kernel == 3 else "auto"

    def _pack(self, weight: Tensor) -> Tensor:
        return pack(weight, padded=self._padded)

    def _unpack(self, packed: Tensor) -> Tensor:
        return unpack(packed, self.outputs, self.inputs, self.shape.kernel)

    def _choose(self, x: Tensor) -> str:
        problem = problem_of(
            x, self.outputs, self.shape.kernel, self.shape.stride, dilation=self.dilation[0], needs_grad=False,
            followed=True,
        )  # fmt: skip
        return choose_packed(problem.phases(), self._padded, requested_algorithm(self._requested)).algorithm

    def _compute(self, x: Tensor, residual: Tensor | None, algorithm: str) -> Tensor:
        dilation = self.dilation[0]
        if dilation > 1:
            phases = None if residual is None else split(residual, dilation)
            y = packed_convolution(
                split(x, dilation), self.packed, self.bias, phases, self.activation, self.shape, algorithm
            )
            return join(y, dilation, x)
        return packed_convolution(  # type: ignore[no-any-return]
            x, self.packed, self.bias, residual, self.activation, self.shape, algorithm
        )

    def _record(self, x: Any, residual: Any) -> Any:
        if self.dilation[0] > 1:
            raise NotPlannedError("a convolution is dilated")
        return x.recorder.convolution(x, self, residual, self._requested, self._padded)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Packed when all weights were padded.
        key = f"{prefix}packed"
        packed = state_dict.get(key)
        shapes = [
            packed_shape(self.outputs, self.inputs, self.shape.kernel, padded=padded) for padded in (self._padded, True)
        ]
        if packed is not None and packed.shape != shapes[0] and packed.shape == shapes[1]:
            state_dict[key] = self._pack(self._unpack(packed))
        super()._load_from_state_dict(state_dict, prefix, *args)


class FrozenGroupedConv2d(FrozenPackedConvolution):
    """A convolution in groups and what is behind it; in one step of a plan, where nothing is added.

    Buffers: packed, see `fastres.ops.packed.turn`.
    """

    def _pack(self, weight: Tensor) -> Tensor:
        return turn(weight)

    def _unpack(self, packed: Tensor) -> Tensor:
        return turn_back(packed)

    def _choose(self, x: Tensor) -> str:
        shape = self.shape
        problem = problem_of(
            x, self.outputs, shape.kernel, shape.stride, needs_grad=False, followed=True, groups=self.groups
        )
        return choose_algorithm(problem, requested_algorithm(self.algorithm)).algorithm

    def _compute(self, x: Tensor, residual: Tensor | None, algorithm: str) -> Tensor:
        weight, stride = turn_back(self.packed), self.shape.stride
        if algorithm == "grouped":
            y = grouped_conv.forward(x, weight, False, stride)[0]
        else:
            y = functional.grouped_conv2d(x, weight.to(x.dtype), stride=stride, algorithm=algorithm)
        return _scale_add_act(y, None, self.bias, residual, self.activation)

    def _record(self, x: Any, residual: Any) -> Any:
        if residual is not None:
            raise NotPlannedError("something is added behind a convolution in groups")
        return x.recorder.grouped(x, self, self.algorithm)


def _scale_add_act(
    x: Tensor, weight: Tensor | None, bias: Tensor, residual: Tensor | None, activation: Activation
) -> Tensor:
    """f(weight * x + bias + residual): a normalisation whose mean is 0 and whose variance is 1."""
    zero, one = torch.zeros_like(bias), torch.ones_like(bias)
    return functional.batch_norm_act(x, zero, one, weight, bias, eps=0.0, residual=residual, activation=activation)


def _has_shape_of(residual: Tensor | None, x: Tensor) -> bool:
    """Whether a residual, where there is one, is added element by element; PyTorch's addition broadcasts others."""
    return residual is None or residual.shape == x.shape


def _takes_operators(x: Tensor) -> bool:
    """Whether this call may be made of our operators."""
    return (
        not ordinary.is_exporting()
        and ordinary.why_not_ordinary() is None
        and is_served(problem_of(x, 1, needs_grad=False))
    )


def shape_of(conv: nn.Conv2d) -> ConvShape:
    """Of a convolution, or of that of its phases, that `freeze` packs the weight of."""
    return ConvShape(conv.out_channels, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]) // conv.dilation[0])


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """norm(x) as scale * x + shift, in float64 and new memory."""
    params = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (None if t is None else t.detach().double() for t in params)
    assert mean is not None and var is not None
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that is norm(conv(x)), in float64 and new memory."""
    kernel = conv.weight.detach().double()
    own = kernel.new_zeros(len(kernel)) if conv.bias is None else conv.bias.detach().double()
    if norm is None:
        return kernel.clone(), own.clone()
    scale, shift = scale_and_shift(norm)
    return kernel * scale[:, None, None, None], own * scale + shift


# --------------------------------------------------------------------------------------------------------------- blocks


class Planned(Frozen):
    """A module that is one operator call where its forward can be recorded as a plan.

    Attributes:
        computes_in: dtype, by autocast, whatever its input's is; None for the input's own, or the caller's.
    """

    is_recordable = True
    computes_in: torch.dtype | None = None

    def forward(self, x: Any) -> Any:
        if self.computes_in is None or not isinstance(x, Tensor):
            return self._in_one_call(x)
        with torch.autocast(x.device.type, self.computes_in):
            return self._in_one_call(x)

    def _in_one_call(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            plan = plan_for(self, x, self._layer_by_layer)
            if plan is not None:
                asks = x.requires_grad and torch.is_grad_enabled()
                return _Inference.apply(plan.run, x) if asks else plan.run(x)
        return self._layer_by_layer(x)

    def _layer_by_layer(self, x: Any) -> Any:
        """Child by child, of a tensor or of a `Value`."""
        raise NotImplementedError


class FrozenNetwork(Planned):
    """A network of blocks; the class behind it in the order of bases says how it goes through them."""

    def _layer_by_layer(self, x: Any) -> Any:
        return super(Planned, self).forward(x)


class FrozenBlock(Planned):
    """A block of a network."""


class FrozenBasicBlock(FrozenBlock):
    """relu(conv2(relu(conv1 x)) + shortcut(x)), with normalisations folded into the convolutions."""

    def _layer_by_layer(self, x: Any) -> Any:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        out = self.conv1(x)
        # Behind the convolution that reads x: it may begin in place.
        return self.conv2(out, x if self.downsample is None else self.downsample(x))


class FrozenBottleneck(FrozenBlock):
    """relu(conv3(relu(conv2(relu(conv1 x)))) + shortcut(x)), with normalisations folded into the convolutions."""

    def _layer_by_layer(self, x: Any) -> Any:
        """[N, C, H, W] to [N, 4 * K, ceil(H / stride), ceil(W / stride)]."""
        out = self.conv2(self.conv1(x))
        return self.conv3(out, x if self.downsample is None else self.downsample(x))


class FrozenResidualBlock(FrozenBlock):
    """conv2(relu(conv1 x) + shortcut(x)), with normalisations folded into the convolutions."""

    def _layer_by_layer(self, x: Any) -> Any:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        return self.conv2(self.conv1(x) + self.shortcut(x))


class FrozenPreactivationBlock(FrozenBlock):
    """conv2(relu(conv1 a)) + shortcut, a = relu(bn1 x); only the second normalisation is folded into a convolution."""

    def _layer_by_layer(self, x: Any) -> Any:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        a = self.bn1(x)
        return self.conv2(self.conv1(a), x if self.shortcut is None else self.shortcut(a))


class FrozenSkipConnection(FrozenBlock):
    """relu(conv(x)), with the normalisation folded into the 1x1 convolution."""

    def _layer_by_layer(self, x: Any) -> Any:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        return self.conv(x)
