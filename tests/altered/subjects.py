"""The modules that users alter: each fused one, and the plain PyTorch module that it stands for, of the same state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1

from fastres import fuse
from fastres.nn import (
    FusedBatchNormAct2d,
    FusedPreactivationBlock,
    ProjectionShortcut,
    ResidualBlock,
    SkipConnection,
)
from tests.parity import scramble

# With fewer inputs of a strided 1x1 convolution, plain PyTorch's oneDNN writes past its memory in channels_last.
CHANNELS = 16


class PlainNormAct(nn.Module):
    """What FusedBatchNormAct2d computes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class PlainResidual(nn.Module):
    """What ResidualBlock computes, without dropout."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(*plain_shortcut(in_channels, out_channels, stride), nn.ReLU(inplace=True))
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))) + self.shortcut(x)))


class PlainPreactivation(nn.Module):
    """What FusedPreactivationBlock computes, without dropout."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = conv1x1(in_channels, out_channels, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn1(x))
        branch = self.conv2(self.relu(self.bn2(self.conv1(a))))
        return branch + (x if self.shortcut is None else self.shortcut(a))


def plain_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


def small_resnet(*stages: nn.Module, features: int) -> ResNet:
    """Exactly torchvision's class, with few channels."""
    with torch.device("meta"):  # the real one's 11 million parameters are thrown away
        model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.conv1 = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(CHANNELS)
    model.maxpool = nn.MaxPool2d(3, 1, 1)
    for i in range(4):
        setattr(model, f"layer{i + 1}", nn.Sequential(stages[i]) if i < len(stages) else nn.Identity())
    model.fc = nn.Linear(features, 4)
    return model


def small_network() -> ResNet:
    basic = BasicBlock(CHANNELS, 12, 2, plain_shortcut(CHANNELS, 12, 2))
    return small_resnet(BasicBlock(CHANNELS, CHANNELS), basic, Bottleneck(12, 3), features=12)


def stateful(make: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """A fused module of its own class, given the state of the plain one."""

    def fused(plain: nn.Module) -> nn.Module:
        module = make()
        module.load_state_dict({key.removeprefix("norm."): value for key, value in plain.state_dict().items()})
        return module

    return fused


def fuse_by(conv_algorithm: str) -> Callable[[nn.Module], nn.Module]:
    return lambda plain: fuse(plain, inplace=True, conv_algorithm=conv_algorithm)


@dataclass(frozen=True)
class Subject:
    """A module under test.

    Attributes:
        plain: makes the module in plain PyTorch.
        fused: makes the fused one of a plain one, which it may change.
        channels: of its input.
    """

    name: str
    plain: Callable[[], nn.Module]
    fused: Callable[[nn.Module], nn.Module]
    channels: int = CHANNELS

    def make_plain(self) -> nn.Module:
        return copy_of(_original(self))

    def make_fused(self) -> nn.Module:
        return self.fused(self.make_plain())

    def shape(self) -> tuple[int, int, int, int]:
        return 2, self.channels, 6, 8

    def __str__(self) -> str:
        return self.name


def copy_of(module: nn.Module) -> nn.Module:
    """copy.deepcopy of a module that nobody has altered, in a third of its time."""
    clone = module.__class__.__new__(module.__class__)
    for key, value in module.__dict__.items():
        clone.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    for tensors in (clone._parameters, clone._buffers):
        for key, value in tensors.items():
            if value is not None:
                new = value.detach().clone()
                tensors[key] = nn.Parameter(new) if isinstance(value, nn.Parameter) else new
    for key, child in clone._modules.items():
        if child is not None:
            clone._modules[key] = copy_of(child)
    return clone


@functools.cache
def _original(subject: Subject) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scramble(subject.plain())


WINOGRAD, DIRECT = fuse_by("winograd"), fuse_by("torch")
STEM = Subject("stem", lambda: small_resnet(features=CHANNELS), DIRECT, 3)
BASIC = Subject("basic", lambda: BasicBlock(CHANNELS, CHANNELS), WINOGRAD)
DIRECT_BASIC = Subject("basic-direct", lambda: BasicBlock(CHANNELS, CHANNELS), DIRECT)
PROJECTED = Subject("basic-projected", lambda: BasicBlock(CHANNELS, 12, 2, plain_shortcut(CHANNELS, 12, 2)), WINOGRAD)
BOTTLENECK = Subject("bottleneck", lambda: Bottleneck(16, 4), WINOGRAD, 16)
NORM_ACT = Subject("norm-act", lambda: PlainNormAct(CHANNELS), stateful(lambda: FusedBatchNormAct2d(CHANNELS)))
SKIP = Subject(
    "skip",
    lambda: nn.Sequential(*plain_shortcut(CHANNELS, 12, 2), nn.ReLU(inplace=True)),
    stateful(lambda: SkipConnection(CHANNELS, 12, 2)),
)
RESIDUAL = Subject(
    "residual",
    lambda: PlainResidual(CHANNELS, 12, 2),
    stateful(lambda: ResidualBlock(CHANNELS, 12, 2, 0.0, conv_algorithm="winograd")),
)
PREACTIVATION = Subject(
    "preactivation",
    lambda: PlainPreactivation(CHANNELS, CHANNELS, 1),
    stateful(lambda: FusedPreactivationBlock(CHANNELS, CHANNELS, conv_algorithm="winograd")),
)
WIDENED = Subject(
    "preactivation-widened",
    lambda: PlainPreactivation(CHANNELS, 12, 1),
    stateful(lambda: FusedPreactivationBlock(CHANNELS, 12, conv_algorithm="winograd")),
)
SHORTCUT = Subject(
    "shortcut", lambda: plain_shortcut(CHANNELS, 12, 2), stateful(lambda: ProjectionShortcut(CHANNELS, 12, 2))
)
NETWORK = Subject("network", small_network, WINOGRAD, 3)

BLOCKS = (BASIC, PROJECTED, BOTTLENECK)
SUBJECTS = (STEM, *BLOCKS, NORM_ACT, SKIP, RESIDUAL, PREACTIVATION, WIDENED, SHORTCUT)
FUSED_IN_PLACE = (STEM, *BLOCKS, NETWORK)


def has(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Whether a plain module has a child of exactly one of these classes."""
    return lambda plain: any(type(m) in classes for m in plain.modules())


def each(model: nn.Module, *classes: type[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) for every child of exactly one of these classes, as a user's own conversion finds them."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in classes:
                yield parent, name, child


def replace(model: nn.Module, old: type[nn.Module], make: Callable[..., nn.Module], only: int | None = None) -> None:
    """Put make(child) in the place of every child of exactly that class, or of the one of that number."""
    found = list(each(model, old))
    assert found, f"no {old.__name__} in {model}"
    for parent, name, child in found if only is None else [found[only]]:
        new = make(child).train(child.training)
        if isinstance(parent, nn.Sequential):
            parent[int(name)] = new
        else:
            setattr(parent, name, new)
