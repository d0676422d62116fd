"""Networks that benchmarks measure and that are not classes of ours, each by a function that makes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import CLASSES, CUDA, DEVICE, Run
from fastres import models
from fastres.nn.preactivation import PreactivationBlock


class Unet(nn.Module):
    """Ronneberger, Fischer, Brox 2015 with padding and normalisation: 32, 64 and 128 channels."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(self._twice, (3, *widths), widths))
        wide, narrow = widths[:0:-1], widths[-2::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in zip(wide, narrow, strict=True))
        self.merge = nn.ModuleList(self._twice(2 * o, o) for o in narrow)
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Sequential:
        def one(channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        return nn.Sequential(*one(inputs), *one(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to logits [N, classes, H, W]; H and W multiples of 4."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


def preactivation_resnet18() -> nn.Module:
    """He et al. 2016b, "Identity mappings in deep residual networks": ResNet-18's stages of pre-activation blocks."""
    blocks, inputs = [], 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [PreactivationBlock(inputs, channels, stride), PreactivationBlock(channels, channels)]
        inputs = channels
    head = [nn.BatchNorm2d(512), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), *blocks, *head)


def plain(name: str, stem: str = "cifar") -> Callable[[], nn.Module]:
    """One of our networks in plain PyTorch."""
    return lambda: models.create(name, num_classes=CLASSES, stem=stem, dropout=0.0, fused=False)


def timm_network(name: str) -> Callable[[], nn.Module]:
    """One of timm's."""

    def make() -> nn.Module:
        import timm  # of the tests' environment

        return timm.create_model(name, num_classes=CLASSES)

    return make


def with_ordinary_weights(model: nn.Module) -> nn.Module:
    """The network with weights of 0.5 to 1.5 in its normalisations.

    Zeros, with which some of timm's begin, keep gradients in one pixel of each strided shortcut's four, sixteen or 64,
    which no longer is so once a network has learnt.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def training_step(
    forward: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, weight_decay: float = 0.0
) -> Run:
    """Forward, a loss, backward and SGD with momentum; on a GPU under bfloat16 autocast.

    Args:
        forward: the model, or what it was compiled to.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=weight_decay)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            output = forward(images)
        torch.autograd.backward(output.float().square().mean())
        optimizer.step()

    return run
