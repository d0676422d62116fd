"""freeze(model): a copy for inference only, with normalisations folded into convolutions and their weights packed.

    relu(bn(conv(x)) + residual) = relu(conv'(x) + bias + residual)
    conv'.weight = conv.weight * scale        scale = bn.weight / sqrt(running_var + eps)
    bias = bn.bias + (conv.bias - running_mean) * scale

What is folded and packed is what a fused module leaves out of its faster way, so `fastres.nn.trust` says which modules
are: fused blocks, whose children are exactly what their classes say, and the stem of a network. Everything else is
copied as it is. A normalisation with no convolution before it (of a pre-activation block) becomes scale and shift.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models._utils import IntermediateLayerGetter

from fastres import functional, ordinary
from fastres.activations import IDENTITY, KINDS, Activation
from fastres.contract import ConvProblem, statistics_dtype
from fastres.fuse import check_model, fuse
from fastres.nn.blocks import FusedBasicBlock, FusedBlock, FusedBottleneck, ResidualBlock
from fastres.nn.preactivation import FusedPreactivationBlock
from fastres.nn.shortcut import SkipConnection
from fastres.nn.stem import FusedTrunk, made_class, plain_trunk_class
from fastres.nn.steps import is_conv3x3, uses_batch_statistics, why_not_downsample
from fastres.nn.trust import activation_of, is_batch_norm, is_exactly
from fastres.ops import conv3x3 as ops
from fastres.ops.algorithms import choose_algorithm, is_served, problem_of, requested_algorithm
from fastres.ops.packed import pack, unpack

__all__ = ["freeze"]

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


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


class _Inference(torch.autograd.Function):
    """A frozen layer on an input that asks for a gradient."""

    @staticmethod
    def forward(ctx: Any, layer: _FrozenLayer, x: Tensor, residual: Tensor | None) -> Tensor:
        return layer._infer(x, residual)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "backward: the model was frozen for inference by fastres.freeze, expected no gradient to be asked for; "
            "differentiate its source"
        )


class _FrozenLayer(Frozen):
    """A layer whose result is that of `_infer`, and no gradient's."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.training = False
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] to [N, K, H', W'], of which the residual has the shape."""
        asks = x.requires_grad or (residual is not None and residual.requires_grad)
        if asks and torch.is_grad_enabled():
            return _Inference.apply(self, x, residual)  # type: ignore[no-any-return]
        return self._infer(x, residual)

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        raise NotImplementedError


class FrozenNormAct(_FrozenLayer):
    """f(weight * x + bias [+ residual]): a normalisation that no convolution comes before.

    Buffers: weight and bias [C], float32 (float64 for a float64 network); zero and one [C], not in the state_dict.
    """

    weight: Tensor
    bias: Tensor
    zero: Tensor
    one: Tensor

    def __init__(self, norm: nn.BatchNorm2d, activation: Activation) -> None:
        super().__init__(activation)
        scale, shift = _scale_and_shift(norm)
        assert norm.running_mean is not None
        dtype = statistics_dtype(norm.running_mean.dtype)
        self.register_buffer("weight", scale.to(dtype))
        self.register_buffer("bias", shift.to(dtype))
        self.register_buffer("zero", torch.zeros_like(self.bias), persistent=False)
        self.register_buffer("one", torch.ones_like(self.bias), persistent=False)

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if _takes_operators(x):
            return functional.batch_norm_act(
                x, self.zero, self.one, self.weight, self.bias, eps=0.0, residual=residual, activation=self.activation
            )
        weight, bias = (t.to(x.dtype)[:, None, None] for t in (self.weight, self.bias))
        y = x * weight + bias
        return self.activation.forward(y if residual is None else y + residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, steps=norm > [add] > {self.activation.kind}"


class _FrozenConvolution(_FrozenLayer):
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


class FrozenConv2d(_FrozenConvolution):
    """A convolution, the normalisation behind it, an addition and ReLU: PyTorch's convolution and at most one pass.

    Buffers: weight, as the convolution's, and bias [K], in the weight's dtype; zero and one [K], not in the state_dict.
    """

    weight: Tensor
    zero: Tensor
    one: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation) -> None:
        super().__init__(conv, activation)
        weight, bias = _folded(conv, norm)
        self.register_buffer("weight", _stored(weight, conv))
        self.register_buffer("bias", bias.to(conv.weight.dtype))
        self.register_buffer("zero", torch.zeros_like(self.bias), persistent=False)
        self.register_buffer("one", torch.ones_like(self.bias), persistent=False)

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not _takes_operators(x):
            return self._convolve(x, self.weight, self.bias, residual)
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is None:
            return self._convolve(x, self.weight, self.bias, None)
        y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return functional.batch_norm_act(
            y,
            self.zero,
            self.one,
            None,
            self.bias,
            eps=0.0,
            residual=residual.to(y.dtype),
            activation=self.activation,
        )


class FrozenConv3x3(_FrozenConvolution):
    """A 3x3 convolution with padding 1, the normalisation behind it, an addition and ReLU in one step.

    The algorithm is chosen at each call, as `fastres.functional.conv3x3` does it. Away from the kernels (another device
    or dtype, an exported program) the weight is unpacked at each call, for PyTorch's convolution.

    Buffers: packed and bias [K], float32, see `fastres.ops.packed.pack`; weight, as the convolution's, where it has a
    stride, for PyTorch's convolution to take where output positions are many, and else None.
    """

    packed: Tensor
    weight: Tensor | None

    def __init__(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation, algorithm: str | None
    ) -> None:
        super().__init__(conv, activation)
        self.algorithm = algorithm
        weight, bias = _folded(conv, norm)
        self.register_buffer("packed", pack(weight))
        self.register_buffer("bias", bias.float())
        self.register_buffer("weight", None if conv.stride == (1, 1) else _stored(weight, conv))

    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if _takes_operators(x) and self.packed.dtype == self.bias.dtype == torch.float32:
            if torch.is_autocast_enabled("cpu"):
                x = x.to(torch.get_autocast_dtype("cpu"))
            x = x.contiguous(memory_format=torch.channels_last)
            stride = self.stride[0]
            problem = problem_of(x, self.outputs, 3, stride, needs_grad=False, followed=True)
            algorithm = choose_algorithm(problem, requested_algorithm(self.algorithm)).algorithm
            if algorithm != "torch" and KINDS[self.activation.kind].compiled:
                if residual is not None:
                    residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
                return ops.packed_inference(  # type: ignore[no-any-return]
                    x, self.packed, self.outputs, self.bias, residual, self.activation, stride, algorithm
                )
        weight = self.weight if self.weight is not None else unpack(self.packed, self.outputs, self.inputs)
        return self._convolve(x, weight.to(x.dtype), self.bias.to(x.dtype), residual)


def _takes_operators(x: Tensor) -> bool:
    """Whether this call may be made of our operators."""
    return (
        not ordinary.is_exporting()
        and ordinary.why_not_ordinary() is None
        and is_served(problem_of(x, 1, needs_grad=False))
    )


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """norm(x) as scale * x + shift, in float64 and new memory."""
    params = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (None if t is None else t.detach().double() for t in params)
    assert mean is not None and var is not None
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that is norm(conv(x)), in float64 and new memory."""
    kernel = conv.weight.detach().double()
    own = kernel.new_zeros(len(kernel)) if conv.bias is None else conv.bias.detach().double()
    if norm is None:
        return kernel.clone(), own.clone()
    scale, shift = _scale_and_shift(norm)
    return kernel * scale[:, None, None, None], own * scale + shift


def _stored(weight: Tensor, conv: nn.Conv2d) -> Tensor:
    return weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)


def _freeze_convolution(conv: Any, norm: Any, activation: Activation, algorithm: str | None = None) -> _FrozenLayer:
    if is_conv3x3(conv, ((1, 1), (2, 2))) and _packs(conv, algorithm):
        return FrozenConv3x3(conv, norm, activation, algorithm)
    return FrozenConv2d(conv, norm, activation)


def _packs(conv: nn.Conv2d, algorithm: str | None) -> bool:
    """Whether packed weights serve this convolution at any size that a network has."""
    if conv.weight.dtype not in _PACKED_DTYPES:
        return False
    # Not this machine's capability: what is frozen here may be loaded elsewhere.
    large = ConvProblem(
        torch.float32, (64, conv.in_channels, 32, 32), conv.out_channels, 3, 1, True, False, 1, "avx512", False, True
    )
    return choose_algorithm(large, algorithm or "auto").algorithm == "winograd"


# --------------------------------------------------------------------------------------------------------------- blocks


class FrozenBasicBlock(Frozen):
    """relu(conv2(relu(conv1 x)) + shortcut(x)), with normalisations folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv2(self.conv1(x), shortcut)  # type: ignore[no-any-return]


class FrozenBottleneck(Frozen):
    """relu(conv3(relu(conv2(relu(conv1 x)))) + shortcut(x)), with normalisations folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, 4 * K, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x)), shortcut)  # type: ignore[no-any-return]


class FrozenResidualBlock(Frozen):
    """conv2(relu(conv1 x) + shortcut(x)), with normalisations folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        return self.conv2(self.conv1(x) + self.shortcut(x))  # type: ignore[no-any-return]


class FrozenPreactivationBlock(Frozen):
    """conv2(relu(conv1 a)) + shortcut, a = relu(bn1 x); only the second normalisation is folded into a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        a = self.bn1(x)
        return self.conv2(self.conv1(a), x if self.shortcut is None else self.shortcut(a))  # type: ignore[no-any-return]


class FrozenSkipConnection(Frozen):
    """relu(conv(x)), with the normalisation folded into the 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        return self.conv(x)  # type: ignore[no-any-return]


_FROZEN: dict[type[nn.Module], type[Frozen]] = {
    FusedBasicBlock: FrozenBasicBlock,
    FusedBottleneck: FrozenBottleneck,
    ResidualBlock: FrozenResidualBlock,
    SkipConnection: FrozenSkipConnection,
    FusedPreactivationBlock: FrozenPreactivationBlock,
}


def _folds(module: nn.Module, pairs: list[tuple[str, str]]) -> bool:
    """Whether each normalisation can be folded into its convolution, both exactly what their classes say."""
    children = module._modules
    return all(_is_foldable(children.get(conv)) and _is_fixed(children.get(norm)) for conv, norm in pairs)


def _is_foldable(conv: nn.Module | None) -> bool:
    return is_exactly(conv, nn.Conv2d) and conv.padding_mode == "zeros" and conv.weight.is_floating_point()


def _is_fixed(norm: nn.Module | None) -> bool:
    return norm is not None and is_batch_norm(norm) and not uses_batch_statistics(cast(nn.BatchNorm2d, norm))


def _freeze_block(block: Any) -> None:
    """Change a fused block, or skip connection, into its frozen form; its own hooks stay."""
    children = block._modules
    if type(block) is SkipConnection:
        if _folds(block, [("0", "1")]):
            _become(block, {"conv": _freeze_convolution(children["0"], children["1"], activation_of(block[2]))})
        return
    if type(block) is FusedPreactivationBlock:
        _freeze_preactivation(block)
        return
    count = 3 if type(block) is FusedBottleneck else 2
    pairs = [(f"conv{i}", f"bn{i}") for i in range(1, count + 1)]
    if not _folds(block, pairs):
        return
    frozen: dict[str, nn.Module | None] = {}
    for conv, norm in pairs:
        last = type(block) is ResidualBlock and conv == "conv2"
        activation = IDENTITY if last else activation_of(block.relu)
        frozen[conv] = _freeze_convolution(children[conv], children[norm], activation, block.conv_algorithm)
    if type(block) is ResidualBlock:
        frozen["shortcut"] = children["shortcut"]
    else:
        downsample = children.get("downsample")
        if downsample is not None and why_not_downsample(downsample) is None and _folds(downsample, [("0", "1")]):
            downsample = _freeze_convolution(downsample._modules["0"], downsample._modules["1"], IDENTITY)
        frozen["downsample"] = downsample
    _become(block, frozen)


def _freeze_preactivation(block: Any) -> None:
    children, algorithm, f = block._modules, block.conv_algorithm, activation_of(block.relu)
    if not _folds(block, [("conv1", "bn2")]) or not _is_fixed(block.bn1) or not _is_foldable(block.conv2):
        return
    shortcut = children.get("shortcut")
    if _is_foldable(shortcut):
        shortcut = _freeze_convolution(shortcut, None, IDENTITY)
    _become(block, {
        "bn1": FrozenNormAct(block.bn1, f),
        "conv1": _freeze_convolution(block.conv1, block.bn2, f, algorithm),
        "conv2": _freeze_convolution(block.conv2, None, IDENTITY, algorithm),
        "shortcut": shortcut,
    })  # fmt: skip


def _become(block: nn.Module, children: dict[str, nn.Module | None]) -> None:
    block.__class__, block._modules = _FROZEN[type(block)], children
    for name in ("dropout", "conv_algorithm", "_was_fused"):
        block.__dict__.pop(name, None)


def _freeze_stem(trunk: Any) -> None:
    """Freeze the normalisation outside of a network's blocks, and leave the way through it to its plain class."""
    plain = plain_trunk_class(type(trunk))
    if plain is None:  # a subclass, of whose forward nothing is known
        return
    children = trunk._modules
    seen = isinstance(trunk, IntermediateLayerGetter) and "conv1" in trunk.return_layers
    if not seen and trunk.why_not_fusable() is None:
        f = activation_of(children["relu"])
        if not trunk.norm_after_conv1 and _is_fixed(children["bn1"]):
            children["bn1"], children["relu"] = FrozenNormAct(children["bn1"], f), nn.Identity().eval()
        elif trunk.norm_after_conv1 and _folds(trunk, [("conv1", "bn1")]):
            children["conv1"] = _freeze_convolution(children["conv1"], children["bn1"], f)
            children["bn1"], children["relu"] = nn.Identity().eval(), nn.Identity().eval()
    trunk.__class__ = plain
    trunk.__dict__.pop("_was_fused", None)


def _hold_as_buffers(module: nn.Module) -> None:
    for name, parameter in list(module._parameters.items()):
        del module._parameters[name]
        module.register_buffer(name, None if parameter is None else parameter.detach())


# ---------------------------------------------------------------------------------------------------------- the network


def freeze(model: nn.Module) -> nn.Module:
    """A copy of the model for inference only: normalisations folded into convolutions, weights packed for the kernels.

    The copy shares no memory with the model: whatever is written to the model later does not reach it. It has no
    parameters, only buffers, which belong to its modules: it moves to devices and dtypes, saves and loads (state_dict,
    torch.save of the whole, into another frozen copy of the same network), copies, compiles and exports. Packed weights
    are the same on every processor; away from the CPU's kernels they are unpacked at each call. It computes in
    channels_last on the CPU, whatever its input is, and what lies in memory behind a block is channels_last, too.

    A fused or torchvision block, and a network's stem, is folded where each of its children is what its class says and
    has no hooks; hooks on a whole block are copied, and see what they saw. Where a child is hooked, replaced or
    parametrised, or normalises by the batch's statistics, the block is copied as it is, in evaluation mode. Exported
    programs consist of PyTorch's operators.

    Args:
        model: a network that `fastres.fuse` takes, fused or not; any other module is copied as it is.
    Returns:
        A module whose class is made of the model's (for a fused network: of torchvision's). Outputs are those of the
        model in evaluation, up to rounding. train() and backward raise a RuntimeError; eval() changes nothing.
    Raises:
        TypeError: as `fastres.fuse`.
    """
    check_model(model, "freeze")
    frozen = fuse(copy.deepcopy(model).eval(), inplace=True)
    for module in list(frozen.modules()):
        if isinstance(module, FusedTrunk):
            _freeze_stem(module)
        elif type(module) in _FROZEN and cast("FusedBlock | SkipConnection", module).why_not_fusable() is None:
            _freeze_block(module)
    for module in frozen.modules():
        _hold_as_buffers(module)
    if not isinstance(frozen, Frozen):
        frozen.__class__ = made_class("Frozen", cast(Any, Frozen), cast(Any, type(frozen)))
    return frozen
