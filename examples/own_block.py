"""A residual block put together from functions: `python examples/own_block.py` compares it with plain PyTorch."""

import torch
from torch import Tensor, nn

from fastres.functional import (
    NormParams,
    batch_norm_act,
    conv3x3_norm_act,
    conv3x3_with_statistics,
    norm_act_conv3x3,
)


def params(norm: nn.BatchNorm2d) -> NormParams:
    return NormParams(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.momentum, norm.eps)


class Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        norm1, norm2 = params(self.bn1), params(self.bn2)
        if not self.training:
            y = conv3x3_norm_act(x, self.conv1.weight, norm1)
            return conv3x3_norm_act(y, self.conv2.weight, norm2, residual=x)
        first = conv3x3_with_statistics(x, self.conv1.weight)
        y, statistics = norm_act_conv3x3(first.y, norm1, self.conv2.weight, statistics=first.statistics)
        return batch_norm_act(y, *norm2[:4], training=True, residual=first.input, statistics=statistics)


def plain(block: Block, x: Tensor) -> Tensor:
    y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    return torch.relu(y + x)


torch.manual_seed(0)
block = Block(64)
x = torch.randn(8, 64, 16, 16).contiguous(memory_format=torch.channels_last)
for training in (True, False):
    block.train(training)
    difference = (block(x) - plain(block, x)).abs().max()
    print(f"training={training}: largest difference from plain PyTorch {difference:.1e}")
    assert difference < 1e-4
