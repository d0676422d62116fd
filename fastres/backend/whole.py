"""A convolution whose kernel covers the image: one matrix product, of images and weights as they lie in memory.

Squeeze-and-excitation's 1x1 convolutions of means are such ones, and the first layer of a VGG's classifier. oneDNN's
convolution reorders all weights, forward and backward; the product reads them where they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fastres.backend.calls import CONV, is_conv, pair
from fastres.backend.values import bind, is_transformed, same_sizes, value


def covers_image(node: Node) -> bool:
    """Whether a call is a convolution of images on the CPU, in one group, with one output position and no padding."""
    if not is_conv(node) or is_transformed(node):
        return False
    given = bind(node, CONV)
    x, weight, y = value(given["input"]), value(given["weight"]), value(node)
    if x is None or weight is None or y is None or x.dim() != 4 or y.dim() != 4 or not y.is_floating_point():
        return False
    dense = all(n == 1 for n in pair(given["dilation"])) or same_sizes(weight.shape[2:], (1, 1))
    unpadded = pair(given["padding"]) in ((0, 0), ("valid", "valid"))
    if given["groups"] != 1 or not dense or not unpadded or x.device.type != "cpu":
        return False
    return same_sizes(x.shape[2:], tuple(weight.shape[2:])) and 0 not in weight.shape


def linear_of_image(x: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """[N, K, 1, 1], the convolution of x [N, C, H, W] by weight [K, C, H, W] without padding, with a bias [K].

    Its strides are those of channels_last or of NCHW: one pixel lies alike in both, but what interpolates or pads it
    goes by them. The sum runs in the order in which the weight's elements lie; x, which has far fewer, is copied to
    that order where it lies in another.
    """
    if not weight.is_contiguous():  # in channels_last
        x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
    y = F.linear(x.flatten(1), weight.flatten(1), bias)
    # A copy, for a convolution's result is nobody's view, which not all may write to.
    return (y[:, None, None].permute(0, 3, 1, 2) if channels_last else y[:, :, None, None]).clone()
