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
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
from torchvision.models._utils import IntermediateLayerGetter

from fastres.activations import IDENTITY, Activation
from fastres.fuse import check_model, fuse
from fastres.nn.blocks import FusedBasicBlock, FusedBlock, FusedBottleneck, ResidualBlock
from fastres.nn.frozen import (
    Frozen,
    FrozenBasicBlock,
    FrozenBottleneck,
    FrozenConv2d,
    FrozenGroupedConv2d,
    FrozenLayer,
    FrozenModel,
    FrozenNetwork,
    FrozenNormAct,
    FrozenPackedConv2d,
    FrozenPackedConvolution,
    FrozenPreactivationBlock,
    FrozenResidualBlock,
    FrozenSkipConnection,
    Planned,
)
from fastres.nn.plan import why_not_planned
from fastres.nn.preactivation import FusedPreactivationBlock
from fastres.nn.shortcut import SkipConnection
from fastres.nn.stem import FusedTrunk, made_class, plain_trunk_class
from fastres.nn.steps import is_conv3x3, uses_batch_statistics, why_not_downsample
from fastres.nn.trust import activation_of, class_name, is_batch_norm, is_exactly
from fastres.ops.algorithms import why_not_grouped

__all__ = ["FreezeReport", "freeze", "freeze_report"]

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


def _why_not_packed(conv: nn.Conv2d, algorithm: str | None) -> str | None:
    """Why a convolution's weight stays as PyTorch has it; None where it is packed."""
    if conv.weight.dtype not in _PACKED_DTYPES:
        return f"its weight is {conv.weight.dtype}"
    if conv.dilation != (1, 1) and not is_conv3x3(conv):
        return f"its dilation is {conv.dilation}"
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    if any(isinstance(pair, str) or pair[0] != pair[1] for pair in pairs):
        return "its kernel, stride and padding are not the same both ways"
    if algorithm == "torch" and (is_conv3x3(conv) or conv.groups != 1):
        return "PyTorch's algorithm was requested"
    if conv.groups == 1:
        return None
    kernel, stride, padding = (int(pair[0]) for pair in pairs)
    if padding != kernel // 2:
        return f"it has groups, and its padding is {padding}"
    return why_not_grouped(conv.in_channels // conv.groups, conv.out_channels // conv.groups, kernel, stride)


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
    return (
        is_exactly(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and conv.weight.is_floating_point()
        and conv.weight.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    )


def _write_as_pairs(conv: nn.Conv2d) -> None:
    """A convolution's sizes as its constructor writes them; numbers and lists serve as well, set in place."""
    for name in ("kernel_size", "stride", "padding", "dilation"):
        given = getattr(conv, name)
        if not isinstance(given, str):
            setattr(conv, name, (given, given) if isinstance(given, int) else tuple(given))


def _is_fixed(norm: nn.Module | None) -> bool:
    return norm is not None and is_batch_norm(norm) and not uses_batch_statistics(cast(nn.BatchNorm2d, norm))


def _become(block: nn.Module, children: dict[str, nn.Module | None]) -> None:
    block.__class__, block._modules = _FROZEN[type(block)], children
    for name in ("dropout", "conv_algorithm", "_was_fused"):
        block.__dict__.pop(name, None)


class _Freezer:
    """Freezes blocks and stems in place.

    Args:
        packed: whether weights may be packed.
    """

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def convolution(self, conv: Any, norm: Any, activation: Activation, algorithm: str | None = None) -> FrozenLayer:
        why = _why_not_packed(conv, algorithm) if self.packed else "packed=False was asked for"
        if why is None:
            kind = FrozenPackedConv2d if conv.groups == 1 else FrozenGroupedConv2d
            return kind(conv, norm, activation, algorithm)
        return FrozenConv2d(conv, norm, activation, why)

    def block(self, block: Any) -> None:
        """Change a fused block, or skip connection, into its frozen form; its own hooks stay."""
        children = block._modules
        if type(block) is SkipConnection:
            if _folds(block, [("0", "1")]):
                _become(block, {"conv": self.convolution(children["0"], children["1"], activation_of(block[2]))})
            return
        if type(block) is FusedPreactivationBlock:
            self._preactivation(block)
            return
        count = 3 if type(block) is FusedBottleneck else 2
        pairs = [(f"conv{i}", f"bn{i}") for i in range(1, count + 1)]
        if not _folds(block, pairs):
            return
        frozen: dict[str, nn.Module | None] = {}
        for conv, norm in pairs:
            last = type(block) is ResidualBlock and conv == "conv2"
            activation = IDENTITY if last else activation_of(block.relu)
            frozen[conv] = self.convolution(children[conv], children[norm], activation, block.conv_algorithm)
        if type(block) is ResidualBlock:
            frozen["shortcut"] = children["shortcut"]
        else:
            downsample = children.get("downsample")
            if downsample is not None and why_not_downsample(downsample) is None and _folds(downsample, [("0", "1")]):
                downsample = self.convolution(downsample._modules["0"], downsample._modules["1"], IDENTITY)
            frozen["downsample"] = downsample
        _become(block, frozen)

    def _preactivation(self, block: Any) -> None:
        children, algorithm, f = block._modules, block.conv_algorithm, activation_of(block.relu)
        if not _folds(block, [("conv1", "bn2")]) or not _is_fixed(block.bn1) or not _is_foldable(block.conv2):
            return
        shortcut = children.get("shortcut")
        if _is_foldable(shortcut):
            shortcut = self.convolution(shortcut, None, IDENTITY)
        _become(block, {
            "bn1": FrozenNormAct(block.bn1, f),
            "conv1": self.convolution(block.conv1, block.bn2, f, algorithm),
            "conv2": self.convolution(block.conv2, None, IDENTITY, algorithm),
            "shortcut": shortcut,
        })  # fmt: skip

    def stem(self, trunk: Any) -> None:
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
                if _is_foldable(children["conv1"]):
                    children["conv1"] = self.convolution(children["conv1"], None, IDENTITY)
            elif trunk.norm_after_conv1 and _folds(trunk, [("conv1", "bn1")]):
                children["conv1"] = self.convolution(children["conv1"], children["bn1"], f)
                children["bn1"], children["relu"] = nn.Identity().eval(), nn.Identity().eval()
        # Features of a trunk are many results, which no plan has.
        if not isinstance(trunk, IntermediateLayerGetter):
            plain = made_class("Frozen", cast(Any, FrozenNetwork), cast(Any, plain))
        trunk.__class__ = plain
        trunk.__dict__.pop("_was_fused", None)


def _hold_as_buffers(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):  # whose tensors stay what they are
        return
    for name, held in list(module._parameters.items()):
        del module._parameters[name]
        module.register_buffer(name, None if held is None else held.detach())


# ---------------------------------------------------------------------------------------------------------- the network


def freeze(model: nn.Module, *, packed: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model for inference only: normalisations folded into convolutions, weights packed for the kernels.

    The copy shares no memory with the model: whatever is written to the model later does not reach it. It has no
    parameters, only buffers, which belong to its modules: it moves to devices and dtypes, saves and loads (state_dict,
    torch.save of the whole, into another frozen copy of the same network), copies, compiles and exports. Packed weights
    are the same on every processor; away from the CPU's kernels they are unpacked at each call. It computes in
    channels_last on the CPU, whatever its input is, and what lies in memory behind a block is channels_last, too.

    A fused or torchvision block, and a network's stem, is folded where each of its children is what its class says and
    has no hooks; hooks on a whole block are copied, and see what they saw. Where a child is hooked, replaced or
    parametrised, or normalises by the batch's statistics, the block is copied as it is, in evaluation mode, and so is a
    `fastres.nn.PooledBlock`, which has no frozen form. Exported programs consist of PyTorch's operators.

    A frozen network, or a block of one, is one operator call where `freeze_report` has nothing against it.

    Args:
        model: a network that `fastres.fuse` takes, fused or not; any other module is copied as it is.
        packed: False leaves every weight as PyTorch has it, for a program that is exported or runs on a GPU.
        dtype: bfloat16 or float16, to compute in by autocast, whatever the input is but float64; buffers stay as they
            are. None: in the input's, or the caller's autocast's. On a CPU bfloat16 is faster where its kernels
            multiply in pairs (AVX512_BF16 of AMD's processors).
    Returns:
        A module whose class is made of the model's (for a fused network: of torchvision's). Outputs are those of the
        model in evaluation, up to rounding. train() and backward raise a RuntimeError; eval() changes nothing.
    Raises:
        TypeError: as `fastres.fuse`; packed is not a bool; dtype is no torch.dtype.
        ValueError: dtype is another one, or the model has a forward of its own, set on the instance.
    """
    check_model(model, "freeze")
    if not isinstance(packed, bool):
        raise TypeError(f"packed: expected a bool, got {type(packed).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {type(dtype).__name__}")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected torch.bfloat16, torch.float16 or None, got {dtype}")
    if dtype is not None and "forward" in model.__dict__:
        raise ValueError(f"dtype: expected None where the model has a forward of its own, set on it, got {dtype}")
    # Changes of what is made in inference mode are not counted.
    with torch.inference_mode(False):
        frozen = _frozen(model, _Freezer(packed))
    kind = Frozen if dtype is None else FrozenModel
    if not isinstance(frozen, (Planned, kind)):
        frozen.__class__ = made_class("Frozen", cast(Any, kind), cast(Any, type(frozen)))
    if dtype is not None:
        cast(Any, frozen).computes_in = dtype
    return frozen


def _frozen(model: nn.Module, freezer: _Freezer) -> nn.Module:
    frozen = fuse(copy.deepcopy(model).eval(), inplace=True)
    for module in frozen.modules():
        if type(module) is nn.Conv2d:
            _write_as_pairs(module)
    for module in list(frozen.modules()):
        if isinstance(module, FusedTrunk):
            freezer.stem(module)
        elif type(module) in _FROZEN and cast("FusedBlock | SkipConnection", module).why_not_fusable() is None:
            freezer.block(module)
    for module in frozen.modules():
        _hold_as_buffers(module)
    return frozen


@dataclass(frozen=True)
class FreezeReport:
    """What became of a frozen model's layers.

    Attributes:
        packed: module name -> the convolution whose weights are packed for the CPU's kernels.
        left: module name -> why it is PyTorch's, or is computed child by child as before.
        apart: name of a network or block -> why its layers are operator calls of their own. What depends on the input
            is known after the first call.
    """

    packed: dict[str, str]
    left: dict[str, str]
    apart: dict[str, str]

    def __str__(self) -> str:
        lines = [f"packed: {len(self.packed)}, left: {len(self.left)}, in layers of their own: {len(self.apart)}"]
        lines += [f"  {name or '(model)'}: packed, {what}" for name, what in self.packed.items()]
        lines += [f"  {name or '(model)'}: left, {why}" for name, why in self.left.items()]
        lines += [f"  {name or '(model)'}: layer by layer, {why}" for name, why in self.apart.items()]
        return "\n".join(lines)


def freeze_report(model: nn.Module) -> FreezeReport:
    """What `freeze` packed of a model, what it left to PyTorch and why, and which parts are no single operator call.

    Args:
        model: what `freeze` returned.
    Returns:
        The report; it prints a line a module.
    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: nothing in the model was frozen by `freeze`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, Frozen) for module in model.modules()):
        raise ValueError(f"model: expected one that fastres.freeze returned, got {class_name(type(model))}")
    report = FreezeReport({}, {}, {})
    for name, module in model.named_modules():
        if isinstance(module, FrozenPackedConvolution):
            report.packed[name] = module.described()
        elif isinstance(module, FrozenConv2d):
            report.left[name] = f"PyTorch's convolution: {module.why}"
        elif type(module) in _FROZEN:
            why = cast("FusedBlock | SkipConnection", module).why_not_fusable()
            report.left[name] = why or "a normalisation in it is by the batch's statistics, or follows no convolution"
        elif isinstance(module, Planned) and (problem := why_not_planned(module)) is not None:
            report.apart[name] = problem
    return report
