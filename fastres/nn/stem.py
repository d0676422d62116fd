"""Networks whose stem is fused: torchvision's ResNet, and the trunk that IntermediateLayerGetter cuts out of one.

The children are torchvision's. The normalisation and the ReLU of the stem are one step where both are what their
classes say and no more, and the network takes its input to channels_last where the convolutions of its blocks gain by
it and nobody sees how an activation inside lies in memory.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import ResNet

from fastres.nn.blocks import FusedBlock
from fastres.nn.norm import AbsorbedReLU, take_over_norm
from fastres.nn.steps import gives_channels_last, is_channels_last, norm_act, norm_act_pool
from fastres.nn.trust import AnyActivation, Fused, activation_of, has_hooks, is_exactly, renamed
from fastres.ops.algorithms import is_served, problem_of, requested_algorithm

# Layers, beside blocks, whose results do not depend on the memory format of their input.
_FORMAT_FREE = (
    nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.MaxPool2d, nn.Identity, nn.AdaptiveAvgPool2d, nn.Linear,
)  # fmt: skip


def through_stages(x: Tensor, stages: Iterable[nn.Module]) -> Tensor:
    """x through stages of blocks, one after the other.

    Between two fused blocks of a stage, or of two, nobody else reads what one hands to the next. It is handed over
    twice, for the next block's convolutions and for its shortcut, so that the two gradients meet where the backward of
    the last normalisation reads them, and not in an addition of their own.
    """
    row: list[nn.Module] = []
    for stage in stages:
        row += [*stage] if is_exactly(stage, nn.Sequential) and stage._compiled_call_impl is None else [stage]
    shortcut = x
    for block, following in itertools.zip_longest(row, row[1:]):
        if _hands_over(block):
            readers = 2 if torch.is_grad_enabled() and following is not None and _hands_over(following) else 1
            x, shortcut = cast(FusedBlock, block)._next(x, shortcut, readers)
        else:
            x = shortcut = block(x)
    return x


def _hands_over(block: nn.Module) -> bool:
    """Whether calling the block is its fused steps and no more: a subclass may have a forward or a call of its own."""
    own = (FusedBlock.forward, nn.Module.__call__, None)
    return is_exactly(block, type(block)) and own == (
        type(block).forward, type(block).__call__, block._compiled_call_impl
    )  # fmt: skip


class FusedTrunk(Fused):
    """A network of stages of blocks, with a normalisation bn1 and an activation relu outside of them.

    Attributes:
        norm_after_conv1: whether they belong to the stem; otherwise they follow the last stage.
    """

    norm_after_conv1 = True

    exactly = {"bn1": nn.BatchNorm2d, "relu": AnyActivation}  # noqa: RUF012

    def _gains_by_channels_last(self, x: Tensor) -> bool:
        """Whether the network computes in channels_last though x lies otherwise."""
        if is_channels_last(x) or not is_served(problem_of(x, 1, needs_grad=True)):
            return False
        blocks: list[Any] = []
        for name, child in self._modules.items():
            if name == "fc":  # behind flatten, which gives the order of the dimensions
                continue
            if child is None or has_hooks(child):
                return False
            if type(child) is nn.Sequential:
                blocks += child._modules.values()
            elif type(child) not in _FORMAT_FREE:
                return False
        chosen = {None if not isinstance(b, FusedBlock) else requested_algorithm(b.conv_algorithm) for b in blocks}
        if not blocks or not chosen.isdisjoint((None, "torch")):
            return False
        return all(not has_hooks(b) and b.why_not_fusable() is None for b in blocks)

    def _fits(self, x: Tensor) -> bool:
        own = self.bn1.running_mean if self.bn1.weight is None else self.bn1.weight
        return own is None or x.device == own.device

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if type(self._modules.get("relu")) is AbsorbedReLU:  # pickled whole when the normalisation held the ReLU
            self._modules["relu"] = nn.ReLU(inplace=True)
            take_over_norm(self, "bn1")


class FusedNetwork(FusedTrunk):
    """A network of ours over its plain twin: `_fused`, or the twin's forward where somebody would see the difference.

    Subclasses give both, the latter as `_plain`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, num_classes]."""
        if torch.jit.is_scripting() or self._leaves(x):  # type: ignore[attr-defined]
            return self._plain(x)  # type: ignore[no-any-return]
        return self._in_memory_format(x)

    @torch.jit.unused
    def _in_memory_format(self, x: Tensor) -> Tensor:
        """The fused steps, in channels_last where that pays."""
        if self._gains_by_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        return self._fused(x)

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__}: expected a subclass that says how it is fused")


class FusedStemResNet(FusedTrunk, ResNet):  # type: ignore[misc]
    """torchvision's ResNet with a faster way through its stem, and its input taken to channels_last where that pays.

    What `fastres.fuse` makes of a ResNet. Children, parameters and state_dict are torchvision's.
    """

    plain_class = stands_for = ResNet
    _plain = renamed(ResNet._forward_impl, "_plain")

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._plain(x)  # type: ignore[no-any-return]
        return self._by_fused_stem(x)

    @torch.jit.unused
    def _by_fused_stem(self, x: Tensor) -> Tensor:
        if self._leaves(x):
            return ResNet._forward_impl(self, x)  # type: ignore[no-any-return]
        if self._gains_by_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        x = norm_act_pool(self.bn1, self.maxpool, self.conv1(x), activation=activation_of(self.relu))
        x = through_stages(x, (self.layer1, self.layer2, self.layer3, self.layer4))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


class FusedLayerGetter(FusedTrunk, IntermediateLayerGetter):  # type: ignore[misc]
    """torchvision's IntermediateLayerGetter over a ResNet's layers, with a faster way through the stem.

    The features that it returns lie in memory as torchvision's would.
    """

    plain_class = stands_for = IntermediateLayerGetter
    _plain = renamed(IntermediateLayerGetter.forward, "_plain")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[N, 3, H, W] to the outputs of the layers that `return_layers` names."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._plain(x)  # type: ignore[no-any-return]
        return self._fused(x)

    @torch.jit.unused
    def _fused(self, x: Tensor) -> dict[str, Tensor]:
        if self._leaves(x):
            return IntermediateLayerGetter.forward(self, x)  # type: ignore[no-any-return]
        expected = torch.channels_last
        if self._gains_by_channels_last(x):
            convs = (m for m in self.modules() if isinstance(m, nn.Conv2d))
            expected = torch.channels_last if gives_channels_last(x, convs) else torch.contiguous_format
            x = x.contiguous(memory_format=torch.channels_last)
        found: OrderedDict[str, Tensor] = OrderedDict()
        for name, module in self.items():
            if name == "bn1":
                x = norm_act(module, x, activation=activation_of(self.relu))
            elif name != "relu":
                x = module(x)
            if name in self.return_layers:
                y = x if expected == torch.channels_last else x.contiguous()
                found[self.return_layers[name]] = y
        return found

    def why_not_fusable(self) -> str | None:
        """Why the stem goes child by child; None where it is one step."""
        names = list(self._modules)
        together = "bn1" in names and names.index("bn1") + 1 < len(names) and names[names.index("bn1") + 1] == "relu"
        if not together or "bn1" in self.return_layers:
            return "the output of its bn1 is used by more than the relu"
        return super().why_not_fusable()


def fused_trunk_class(plain: type[nn.Module]) -> type[FusedTrunk] | None:
    """The class with a fused stem that stands for this one; None where its forward is not torchvision's.

    A subclass of ResNet that only adds to it gets a class of its own, made here.
    """
    if issubclass(plain, FusedTrunk):
        return None
    named: type[FusedTrunk] | None = vars(plain).get("fused_class")
    if named is not None:
        return named
    if plain is IntermediateLayerGetter:
        return FusedLayerGetter
    if plain is ResNet:
        return FusedStemResNet
    own: Any = plain
    if issubclass(plain, ResNet) and own._forward_impl is ResNet._forward_impl and own.forward is ResNet.forward:
        return made_class("Fused", FusedStemResNet, own)  # type: ignore[no-any-return]
    return None


def plain_trunk_class(fused: type[nn.Module]) -> type[nn.Module] | None:
    """The way back from `fused_trunk_class`, and from a constructor's class; None where there is none."""
    plain: type[nn.Module] | None = vars(fused).get("plain_class")
    return plain


@functools.cache
def made_class(prefix: str, ours: Any, plain: Any) -> Any:
    """A subclass of `ours` and then `plain`, named after the latter, whose modules can be pickled and copied."""
    names = {"plain_class": plain, "made_of": (prefix, ours, plain), "__module__": plain.__module__,
             "__doc__": plain.__doc__, "__reduce_ex__": _reduce}  # fmt: skip
    return type(f"{prefix}{plain.__name__}", (ours, plain), names)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # Pickle finds a class by its name, and this one has none in any module.
    return _new_of_made_class, type(self).made_of, self.__dict__


def _new_of_made_class(prefix: str, ours: Any, plain: Any) -> Any:
    made = made_class(prefix, ours, plain)
    return made.__new__(made)
