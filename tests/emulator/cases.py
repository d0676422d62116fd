"""Cases of the shortcut's kernels and the float64 results that they are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract
from tests.emulator.machine import ARITHMETIC, Machine, empty_product, tf32
from tests.oracle import LAYOUTS, activation, assert_close, generator, norm

# (N, Cin, H, W), Cout, stride. A tile is 128 positions by 64 channels by 32 (or, float32, 16) of K.
SHAPES = {
    "whole 16-byte rows": ((2, 64, 9, 7), 128, (2, 2)),
    "ragged tiles of 16-byte rows": ((3, 40, 15, 13), 72, (2, 2)),
    "rows of 16 bytes on one side": ((2, 24, 8, 10), 18, (1, 1)),
    "odd channels": ((2, 5, 6, 7), 9, (2, 3)),
    "three channels, several tiles": ((1, 3, 17, 11), 66, (1, 1)),
    "a stride beyond the image": ((1, 16, 5, 5), 16, (7, 7)),
    "one of everything": ((1, 1, 1, 1), 1, (1, 1)),
    "gradients in several parts": ((4, 16, 32, 33), 24, (2, 1)),
    "ragged everywhere, deep": ((3, 120, 15, 13), 72, (2, 2)),
}


class Case:
    def __init__(self, arithmetic: str, layout: str, shape: str, *key: object) -> None:
        gen = generator(arithmetic, layout, shape, *key)
        self.arithmetic, self.dtype = arithmetic, ARITHMETIC[arithmetic]
        sizes, cout, self.stride = SHAPES[shape]
        self.s = activation(sizes, self.dtype, layout, gen)
        self.weight = torch.randn(cout, sizes[1], 1, 1, generator=gen).div(sizes[1] ** 0.5).to(self.dtype)
        product = empty_product(self.s, self.weight, self.stride)
        # A tensor with one channel, or one position, may be taken for either layout: as the product's of the operator.
        self.dproduct = (
            torch.randn(product.shape, generator=gen)
            .to(self.dtype)
            .contiguous(memory_format=contract.memory_format(self.s))
        )
        self.x = activation(tuple(product.shape), self.dtype, "nchw", gen).contiguous(
            memory_format=contract.memory_format(self.s)
        )
        self.norm, self.x_norm = norm(cout, torch.float32, gen), norm(cout, torch.float32, gen)

    def exact(self, t: Tensor) -> Tensor:
        """An operand as the arithmetic sees it, in float64."""
        return (tf32(t) if self.arithmetic == "tf32" else t).double()

    def product(self) -> Tensor:
        return F.conv2d(self.exact(self.s), self.exact(self.weight), stride=self.stride)

    def y(self, x: Tensor | None, x_norm, relu: bool) -> Tensor:
        z = normalised(self.product(), self.norm)
        if x is not None:
            z = z + (x.double() if x_norm is None else normalised(x.double(), x_norm))
        return torch.relu(z) if relu else z

    def ds(self) -> Tensor:
        shape = self.s.shape
        return torch.nn.grad.conv2d_input(shape, self.exact(self.weight), self.exact(self.dproduct), stride=self.stride)

    def dweight(self) -> Tensor:
        return torch.nn.grad.conv2d_weight(
            self.exact(self.s), self.weight.shape, self.exact(self.dproduct), stride=self.stride
        )

    def check(self, machine: Machine, step: str, **options) -> None:
        """Run a step on the emulator and hold its results against float64."""
        a, s, weight, stride = self.arithmetic, self.s, self.weight, self.stride
        if step == "forward":
            self.check_forward(machine.forward(a, s, weight, stride, **options))
        elif step == "inference":
            y = machine.inference(a, s, weight, stride, self.norm, self.x, self.x_norm, **options)
            assert_close(y, self.y(self.x, self.x_norm, True), "y", length=s.shape[1])
        elif step == "input_gradient":
            self.check_ds(machine.input_gradient(a, self.dproduct, s, weight, stride, **options))
        else:
            self.check_dweight(machine.weight_gradient(a, self.dproduct, s, weight, stride, **options))

    def check_forward(self, results: tuple[Tensor, Tensor, Tensor]) -> None:
        product, mean, m2 = results
        assert_close(product, self.product(), "product", length=self.s.shape[1])
        stored = product.double()
        count = stored.numel() // stored.shape[1]
        assert_close(mean, stored.mean((0, 2, 3)), "mean", length=count)
        assert_close(m2, stored.var((0, 2, 3), correction=0) * count, "M2", length=count)

    def check_ds(self, ds: Tensor) -> None:
        assert_close(ds, self.ds(), "ds", length=self.weight.shape[0])
        seen = torch.zeros_like(ds, dtype=torch.bool)
        seen[:, :, :: self.stride[0], :: self.stride[1]] = True
        assert (ds[~seen] == 0).all(), "inputs that no output looks at have a gradient"

    def check_dweight(self, dweight: Tensor) -> None:
        assert_close(dweight, self.dweight(), "dweight", length=self.dproduct.numel() // self.weight.shape[0])


def normalised(t: Tensor, n) -> Tensor:
    return F.batch_norm(t, *(None if v is None else v.detach().double() for v in n[:4]), training=False, eps=n.eps)


__all__ = ["LAYOUTS", "SHAPES", "Case", "normalised"]
