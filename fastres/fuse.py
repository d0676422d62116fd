"""fuse(model): give the blocks of an existing ResNet a faster way through them, parameters shared; unfuse(model): back.

Both change the class of blocks and of the network and nothing else: every object stays, with its children, parameters,
buffers, hooks and mode. What gets another class:

- torchvision's BasicBlock and Bottleneck, wherever they are found (ResNet, ResNeXt, wide ResNet, detection and
  segmentation backbones);
- torchvision's ResNet, and the trunk that IntermediateLayerGetter cuts out of one, for the stem;
- the plain twins of our own layers, which unfuse leaves behind.

A fused module asks at each call whether its faster way is exact for it as it stands (`fastres.nn.trust`), so what is
done to the model before or after fusing it means what it means in torchvision's. `fuse_report` asks the same.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn as nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastres.nn.blocks import (
    DropoutBasicBlock,
    DropoutBottleneck,
    FusedBasicBlock,
    FusedBlock,
    FusedBottleneck,
    PlainResidualBlock,
    ResidualBlock,
)
from fastres.nn.norm import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    FusedBatchNormAct1d,
    FusedBatchNormAct2d,
    FusedBatchNormAct3d,
)
from fastres.nn.pooled import PlainPooledBlock, PooledBlock
from fastres.nn.preactivation import FusedPreactivationBlock, PreactivationBlock
from fastres.nn.shortcut import PadShortcut, PlainSkipConnection, SkipConnection
from fastres.nn.stem import FusedTrunk, fused_trunk_class, plain_trunk_class
from fastres.nn.steps import check_conv_algorithm, why_not_downsample
from fastres.nn.trust import Fused, class_name, why_replaced

__all__ = ["FuseReport", "fuse", "fuse_report", "unfuse"]

_log = logging.getLogger(__name__)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    DropoutBasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    DropoutBottleneck: FusedBottleneck,
    PlainResidualBlock: ResidualBlock,
    PlainPooledBlock: PooledBlock,
    PlainSkipConnection: SkipConnection,
    PreactivationBlock: FusedPreactivationBlock,
    BatchNormAct1d: FusedBatchNormAct1d,
    BatchNormAct2d: FusedBatchNormAct2d,
    BatchNormAct3d: FusedBatchNormAct3d,
}
# (without dropout, with dropout)
_PLAIN: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    FusedBasicBlock: (BasicBlock, DropoutBasicBlock),
    FusedBottleneck: (Bottleneck, DropoutBottleneck),
    ResidualBlock: (PlainResidualBlock, PlainResidualBlock),
    PooledBlock: (PlainPooledBlock, PlainPooledBlock),
    FusedBatchNormAct1d: (BatchNormAct1d, BatchNormAct1d),
    FusedBatchNormAct2d: (BatchNormAct2d, BatchNormAct2d),
    FusedBatchNormAct3d: (BatchNormAct3d, BatchNormAct3d),
    SkipConnection: (PlainSkipConnection, PlainSkipConnection),
    FusedPreactivationBlock: (PreactivationBlock, PreactivationBlock),
}


@dataclass(frozen=True)
class FuseReport:
    """What of a model is fused, and what could be but is not.

    Attributes:
        swapped: module name -> what computes it.
        left: module name -> why it is computed child by child.
    """

    swapped: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused: {len(self.swapped)}, left: {len(self.left)}"]
        lines += [f"  {name or '(model)'}: fused, {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- the report


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class with a faster way that this module may take; None where it has one, or nothing is known of it."""
    if "forward" in module.__dict__ or "_forward_impl" in module.__dict__ or why_replaced(type(module)) is not None:
        return None
    trunk = "bn1" in module._modules and "relu" in module._modules
    return _FUSED.get(type(module)) or (fused_trunk_class(type(module)) if trunk else None)


def _why_left(module: nn.Module) -> str | None:
    """Why a module that is not fused could have been, by its family; None where it is of none."""
    if _fused_class(module) is not None:
        return "not fused yet: fuse(model) does it"
    known = isinstance(module, (BasicBlock, Bottleneck, ResNet)) or type(module) in _FUSED
    if not known or isinstance(module, torch.jit.ScriptModule):
        return None
    if "forward" in module.__dict__ or "_forward_impl" in module.__dict__:
        return "it has a forward of its own, set on the instance"
    return why_replaced(type(module)) or f"is {class_name(type(module))}, whose forward may differ from torchvision's"


def _found(model: nn.Module) -> list[tuple[str, str | None, str]]:
    """(name, what computes it or None, why not) of everything that is fused or could be."""
    found: list[tuple[str, str | None, str]] = []
    for name, module in model.named_modules():
        trunk = isinstance(module, (ResNet, FusedTrunk)) or fused_trunk_class(type(module)) is not None
        where = _join(name, "bn1") if trunk else name
        if not isinstance(module, Fused):
            why = _why_left(module)
            if why is not None:
                found.append((where, None, why))
            continue
        problem = module.why_not_fusable()
        found.append((where, None if problem else type(module).__name__, problem or ""))
        downsample = module._modules.get("downsample")
        if problem is None and downsample is not None and type(downsample) is not PadShortcut:  # with nothing to fuse
            problem = why_not_downsample(downsample)
            found.append((_join(name, "downsample"), None if problem else "projection_shortcut", problem or ""))
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# --------------------------------------------------------------------------------------------------------------- checks


def check_model(model: nn.Module, function: str) -> None:
    """Check the argument of `fuse`, `unfuse` and `freeze`.

    Raises:
        TypeError: not a module, or one that is scripted, compiled or wrapped in DistributedDataParallel already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: expected a Python module, got {type(model).__name__}; {function} before scripting")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(f"model: expected a module, got DistributedDataParallel; call {function} before wrapping it")
    for name, module in model.named_modules():
        compiled = isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
        if compiled or module.__dict__.get("_compiled_call_impl") is not None:
            where = f"its module {name!r}" if name else "it"
            raise TypeError(f"model: {where} is compiled already; call {function} before torch.compile")


def _share(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """A copy of the modules that holds the same parameters and buffers: changing a class leaves the original alone."""
    if id(module) in seen:
        return seen[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    clone = module.__class__.__new__(module.__class__)
    seen[id(module)] = clone
    for key, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, clone)
        clone.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = _share(child, seen)
    return clone


# ---------------------------------------------------------------------------------------------------- public functions


def fuse_report(model: nn.Module) -> FuseReport:
    """What of the model takes its faster way, and what could but does not and why.

    It asks the model as it is now, whether `fuse` made it or a constructor did, what every call asks. It prints a line
    a module.

    Args:
        model: any module.
    Returns:
        The report; a module that `fuse` would change, and has not, is among those left.
    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = _found(model)
    return FuseReport(
        swapped={name: what for name, what, _ in found if what is not None},
        left={name: why for name, what, why in found if what is None},
    )


def fuse(model: nn.Module, *, inplace: bool = False, conv_algorithm: str | None = None) -> nn.Module:
    """Give what can be fused in a model its faster way, and leave the rest as it is.

    Outputs, gradients, running statistics, state_dict, children, hooks and the mode of every module stay, and so does
    what later changes to the model mean: a fused block whose child is hooked, or replaced by what it does not know,
    computes child by child as torchvision's does. Tracing and exporting give the plain network. The report goes to the
    log "fastres.fuse" at level INFO, and `fuse_report(model)` gives it at any time. A model in which there is nothing
    to fuse gets a warning that names torch.compile's backend, which finds its patterns in any network.

    Args:
        model: a torchvision ResNet, or any module that has one, or its blocks, inside. A fused one is left as it is.
        inplace: change the model itself. Otherwise a copy is changed that shares every parameter and buffer with it: a
            training step on one is seen by the other, until one of them is moved or cast. Modules that the model
            refers to other than as children are not copied.
        conv_algorithm: what the blocks' convolutions compute with, as `algorithm` of `fastres.functional.conv3x3`,
            `conv1x1_with_statistics` and `grouped_conv2d`; it holds for blocks that were fused before as well. None
            leaves those as they are, and the others to the environment variable FASTRES_CONV.
    Returns:
        The model, or the copy.
    Raises:
        TypeError: not a module, or one that is scripted, compiled or wrapped in DistributedDataParallel already;
            conv_algorithm is not a string or None.
        ValueError: conv_algorithm is unknown.
    """
    check_model(model, "fuse")
    conv_algorithm = check_conv_algorithm(conv_algorithm)
    fused = model if inplace else _share(model, {})
    for module in fused.modules():
        fused_class = _fused_class(module)
        if fused_class is not None:
            module.__class__ = fused_class
        if conv_algorithm is not None and isinstance(module, FusedBlock):
            module.dropout, module.conv_algorithm = module.dropout, conv_algorithm
    report = fuse_report(fused)
    if not report.swapped and not report.left:
        warnings.warn(
            f"fuse: found nothing to fuse in {class_name(type(model))}, which has no block of torchvision's or ours; "
            'torch.compile(model, backend="fastres") finds what there is in any network',
            stacklevel=2,
        )
    _log.info("%s", report)
    return fused


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The way back: plain PyTorch, same parameters, same results.

    What came from torchvision gets torchvision's classes back, with dropout those of `fastres.nn.DropoutBasicBlock` and
    `DropoutBottleneck`; our own layers become their twins in plain PyTorch.

    Args:
        model: a model with fused modules; one without is left as it is.
        inplace: as in `fuse`.
    Returns:
        The model, or a copy that shares every parameter and buffer with it.
    Raises:
        TypeError: as `fuse`.
    """
    check_model(model, "unfuse")
    plain = model if inplace else _share(model, {})
    for module in plain.modules():
        if "forward" in module.__dict__ or "_forward_impl" in module.__dict__:
            continue  # it may well call what the class says now
        if type(module) in _PLAIN:
            without_dropout, with_dropout = _PLAIN[type(module)]
            drops = isinstance(module, FusedBlock) and module.dropout > 0
            if isinstance(module, FusedBlock):
                module.__dict__.pop("conv_algorithm", None)
                if with_dropout is not without_dropout and not drops:
                    module.__dict__.pop("dropout", None)
            module.__class__ = with_dropout if drops else without_dropout
        else:
            module.__class__ = plain_trunk_class(type(module)) or type(module)
        module.__dict__.pop("_was_fused", None)
    return plain
