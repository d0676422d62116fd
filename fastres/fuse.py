"""fuse(model): swap the blocks of an existing ResNet for fused ones, parameters shared; unfuse(model): back.

A swap changes the class of a module and nothing else: the object, its parameters, buffers, hooks and mode stay. What is
swapped:

- torchvision's BasicBlock and Bottleneck, wherever they are found (ResNet, ResNeXt, wide ResNet, detection and
  segmentation backbones), with their normalisations;
- their downsample of a 1x1 convolution and BatchNorm2d;
- bn1 and relu of a torchvision ResNet's stem, or of the backbone that IntermediateLayerGetter cuts out of one;
- `fastres.nn.BatchNormAct2d`, which unfuse leaves behind.

Nothing is swapped whose results or hooks would change; `fuse_report` says what, and why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastres.nn.blocks import DropoutBasicBlock, DropoutBottleneck, FusedBasicBlock, FusedBottleneck
from fastres.nn.conv import ConvAlgorithm, check_conv_algorithm
from fastres.nn.norm import AbsorbedReLU, BatchNormAct2d, FusedBatchNormAct2d
from fastres.nn.obstacles import class_name, obstacle
from fastres.nn.shortcut import ProjectionShortcut, projection_obstacle

__all__ = ["FuseReport", "fuse", "fuse_report", "unfuse"]

_log = logging.getLogger(__name__)

# torchvision's block (or its plain twin with dropout) -> the fused one, and back: (without dropout, with dropout).
_FUSED: dict[type[nn.Module], type[FusedBasicBlock] | type[FusedBottleneck]] = {
    BasicBlock: FusedBasicBlock,
    DropoutBasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    DropoutBottleneck: FusedBottleneck,
}
_PLAIN: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    FusedBasicBlock: (BasicBlock, DropoutBasicBlock),
    FusedBottleneck: (Bottleneck, DropoutBottleneck),
}


@dataclass(frozen=True)
class FuseReport:
    """What of a model is fused, and what could be but is not.

    Attributes:
        swapped: module name -> the class that it has now.
        left: module name -> why it was left as it was.
    """

    swapped: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused: {len(self.swapped)}, left: {len(self.left)}"]
        lines += [f"  {name or '(model)'}: fused, {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


class _Candidate(NamedTuple):
    """One thing that may be swapped. `fused` where it is already; otherwise `obstacle`, or None and `swap` does it."""

    name: str
    fused: str | None
    obstacle: str | None
    swap: Callable[[], object]


# ---------------------------------------------------------------------------------------------------------- candidates


def _candidates(model: nn.Module) -> list[_Candidate]:
    uses = _Uses(model)
    found: list[_Candidate] = []
    inside: set[int] = set()  # normalisations that are spoken for by the block or stem that they belong to
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if isinstance(module, (BasicBlock, Bottleneck)):
            found += _block(name, module, uses)
            inside.update(id(child) for child in module.children())
        elif module._modules.get("bn1") is not None and "relu" in module._modules:
            found.append(_stem(name, module, uses))
            if isinstance(module._modules["relu"], AbsorbedReLU):
                inside.add(id(module._modules["bn1"]))
        elif type(module) is FusedBatchNormAct2d and id(module) not in inside:
            found.append(_Candidate(name, "FusedBatchNormAct2d", None, _nothing))
        elif type(module) is BatchNormAct2d and id(module) not in inside:
            found.append(_Candidate(name, None, None, lambda m=module: _adopt_norm(m)))  # type: ignore[misc]
    return found


def _nothing() -> None:
    return None


class _Uses:
    """How often each module is somebody's child: one that is used twice may not change what it computes."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, set[str]] = {}
        for prefix, parent in model.named_modules():
            for name, child in parent.named_children():
                self.names.setdefault(id(child), set()).add(f"{prefix}.{name}" if prefix else name)
            # named_children passes over the second name that one parent has for a child.
            for name, child in parent._modules.items():
                if child is not None:
                    self.names[id(child)].add(f"{prefix}.{name}" if prefix else name)

    def obstacle(self, module: nn.Module | None, expected: type[nn.Module]) -> str | None:
        names = self.names.get(id(module), set())
        if len(names) > 1:
            return f"is used more than once ({', '.join(sorted(names))})"
        return obstacle(module, expected)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _block(name: str, block: nn.Module, uses: _Uses) -> Iterator[_Candidate]:
    if isinstance(block, (FusedBasicBlock, FusedBottleneck)):
        yield _Candidate(name, type(block).__name__, None, _nothing)
    else:
        problem = _block_obstacle(block, uses)
        yield _Candidate(name, None, problem, lambda: _swap_block(block))
        if problem is not None:
            return
    downsample = block._modules.get("downsample")
    if downsample is not None:
        where = _join(name, "downsample")
        if isinstance(downsample, ProjectionShortcut):
            yield _Candidate(where, "ProjectionShortcut", None, _nothing)
        else:
            problem = uses.obstacle(downsample, nn.Sequential) or projection_obstacle(downsample)
            yield _Candidate(where, None, problem, lambda: ProjectionShortcut.adopt(downsample))  # type: ignore[arg-type]


def _block_obstacle(block: nn.Module, uses: _Uses) -> str | None:
    fused = _FUSED.get(type(block))
    if fused is None:
        return f"is {class_name(type(block))}, whose forward may differ from torchvision's"
    if "forward" in block.__dict__:
        return "has a forward of its own, set on the instance"
    for child in fused.norms:
        problem = uses.obstacle(block._modules.get(child), nn.BatchNorm2d)
        if problem is not None:
            return f"its {child} {problem}"
    # The ReLU may serve several blocks: a fused one leaves it out.
    problem = obstacle(block._modules.get("relu"), nn.ReLU)
    return None if problem is None else f"its relu {problem}"


def _swap_block(block: nn.Module) -> None:
    fused = _FUSED[type(block)]
    dropout = block.__dict__.pop("dropout") if isinstance(block, (DropoutBasicBlock, DropoutBottleneck)) else 0.0
    block.__class__ = fused
    assert isinstance(block, fused)
    block.conv_algorithm = None
    for name in fused.norms:
        FusedBatchNormAct2d.adopt(getattr(block, name), dropout=dropout if name == fused.dropout_norm else 0.0)


def _adopt_norm(norm: BatchNormAct2d) -> None:
    FusedBatchNormAct2d.adopt(norm, relu=norm.relu, dropout=norm.dropout, order=norm.order)


def _stem(name: str, module: nn.Module, uses: _Uses) -> _Candidate:
    norm, relu = module._modules["bn1"], module._modules["relu"]
    where = _join(name, "bn1")
    if type(norm) is FusedBatchNormAct2d and type(relu) is AbsorbedReLU:
        return _Candidate(where, "FusedBatchNormAct2d", None, _nothing)

    def swap() -> None:
        FusedBatchNormAct2d.adopt(norm)  # type: ignore[arg-type]
        relu.__class__ = AbsorbedReLU

    return _Candidate(where, None, _stem_obstacle(module, norm, relu, uses), swap)


def _stem_obstacle(module: nn.Module, norm: nn.Module | None, relu: nn.Module | None, uses: _Uses) -> str | None:
    if isinstance(module, IntermediateLayerGetter):
        names = list(module._modules)
        if names.index("relu") != names.index("bn1") + 1 or "bn1" in module.return_layers:
            return "its output is used by more than the relu"
    elif not isinstance(module, ResNet):
        return f"belongs to {class_name(type(module))}, whose forward is unknown"
    elif type(module)._forward_impl is not ResNet._forward_impl or type(module).forward is not ResNet.forward:
        return f"belongs to {class_name(type(module))}, which has a forward of its own"
    elif "forward" in module.__dict__ or "_forward_impl" in module.__dict__:
        return "belongs to a model with a forward of its own, set on the instance"
    problem = uses.obstacle(norm, nn.BatchNorm2d)
    if problem is not None:
        return problem
    problem = uses.obstacle(relu, nn.ReLU)
    return None if problem is None else f"the relu after it {problem}"


# --------------------------------------------------------------------------------------------------------------- checks


def _check_model(model: nn.Module, function: str) -> None:
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
        clone.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = _share(child, seen)
    return clone


# ---------------------------------------------------------------------------------------------------- public functions


def fuse_report(model: nn.Module) -> FuseReport:
    """What of the model is fused, and what could be but is not and why.

    It looks at the model as it is now, whether `fuse` made it or a constructor did. It prints a line a module.

    Args:
        model: any module.
    Returns:
        The report; a module that `fuse` would swap, and has not, is among those left.
    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = _candidates(model)
    return FuseReport(
        swapped={c.name: c.fused for c in found if c.fused is not None},
        left={c.name: c.obstacle or "not fused yet: fuse(model) swaps it" for c in found if c.fused is None},
    )


def fuse(model: nn.Module, *, inplace: bool = False, conv_algorithm: str | None = None) -> nn.Module:
    """Swap what can be fused in a model, and leave the rest as it is.

    Outputs, gradients, running statistics, state_dict, hooks and the mode of every module stay. Modules keep their
    names; those whose output takes on another meaning (a normalisation now ends after the ReLU) and those that are no
    longer called (a block's relu) are left alone where somebody has hooked them. The report goes to the log
    "fastres.fuse" at level INFO, and `fuse_report(model)` gives it at any time.

    torch.fx, and with it torchvision's create_feature_extractor, cannot trace through fused modules: pass it
    `tracer_kwargs={"leaf_modules": [FusedBasicBlock, FusedBottleneck, FusedBatchNormAct2d]}`.

    Args:
        model: a torchvision ResNet, or any module that has one, or its blocks, inside. A fused one is left as it is.
        inplace: change the model itself. Otherwise a copy is changed that shares every parameter and buffer with it: a
            training step on one is seen by the other, until one of them is moved or cast. Modules that the model
            refers to other than as children are not copied.
        conv_algorithm: what the blocks' 3x3 convolutions with stride 1 compute with, as `algorithm` of
            `fastres.functional.conv3x3`; it holds for blocks that were fused before as well. None leaves those as they
            are, and the others to the environment variable FASTRES_CONV.
    Returns:
        The model, or the copy.
    Raises:
        TypeError: not a module, or one that is scripted, compiled or wrapped in DistributedDataParallel already;
            conv_algorithm is not a string or None.
        ValueError: conv_algorithm is unknown.
    """
    _check_model(model, "fuse")
    check_conv_algorithm(conv_algorithm)
    fused = model if inplace else _share(model, {})
    for candidate in _candidates(fused):
        if candidate.fused is None and candidate.obstacle is None:
            candidate.swap()
    if conv_algorithm is not None:
        for module in fused.modules():
            if isinstance(module, ConvAlgorithm):
                module.conv_algorithm = conv_algorithm
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", fuse_report(fused))
    return fused


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The way back: plain PyTorch, same parameters, same results.

    What came from torchvision gets torchvision's classes back, with dropout those of `fastres.nn.DropoutBasicBlock` and
    `DropoutBottleneck`; a FusedBatchNormAct2d elsewhere becomes a `fastres.nn.BatchNormAct2d`, its plain twin.

    Args:
        model: a model with fused modules; one without is left as it is.
        inplace: as in `fuse`.
    Returns:
        The model, or a copy that shares every parameter and buffer with it.
    Raises:
        TypeError: as `fuse`.
    """
    _check_model(model, "unfuse")
    plain = model if inplace else _share(model, {})
    modules = [m for m in plain.modules() if not isinstance(m, torch.jit.ScriptModule)]
    for module in modules:
        if type(module) in _PLAIN:
            _release_block(module)  # type: ignore[arg-type]
        elif isinstance(module._modules.get("relu"), AbsorbedReLU):
            _release_stem(module)
        plain_class = vars(type(module)).get("plain_class")
        if plain_class is not None:
            module.__class__ = plain_class
    for module in modules:
        if type(module) is FusedBatchNormAct2d:
            BatchNormAct2d.adopt(module, relu=module.relu, dropout=module.dropout, order=module.order)
    return plain


def _release_stem(module: nn.Module) -> None:
    norm = module._modules["bn1"]
    if type(norm) is FusedBatchNormAct2d and norm.relu and norm.dropout == 0:
        norm.release()
        module._modules["relu"].__class__ = nn.ReLU


def _release_block(block: FusedBasicBlock | FusedBottleneck) -> None:
    norms = {name: block._modules.get(name) for name in block.norms}
    dropout = getattr(norms[block.dropout_norm], "dropout", 0.0)
    for name, norm in norms.items():
        as_made = type(norm) is FusedBatchNormAct2d and norm.relu and norm.order == "add_act"
        if not as_made or (norm.dropout > 0 and name != block.dropout_norm):
            return  # somebody changed it since: the class stays, which is exact with plain normalisations as well
    for norm in norms.values():
        norm.release()
    del block.conv_algorithm
    if type(block.downsample) is ProjectionShortcut:
        block.downsample.release()
    plain, with_dropout = _PLAIN[type(block)]
    block.__class__ = with_dropout if dropout > 0 else plain  # type: ignore[assignment]
    if dropout > 0:
        block.__dict__["dropout"] = dropout
