"""The workload of the end of a stem: a max pooling behind a normalisation and its activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sides import FUSED, SIDES
from benchmarks.workloads import DTYPE, QUICK, Run, Shape, Workload, compiled_for, leaf, norm_vectors, shape_words
from fastres.contract import NormParams, Pool
from fastres.functional import batch_norm_act_max_pool2d

POOL = Pool(kernel=3, stride=2, padding=1)


def pool_workloads() -> Iterator[Workload]:
    """y = maxpool(relu(bn(x))), forward + backward, in the stem of a ResNet at 224 pixels."""
    shape = (2, 64, 16, 16) if QUICK else (32, 64, 112, 112)
    yield Workload(
        group="op",
        key=f"{'x'.join(map(str, shape))}-pooled",
        name=f"maxpool(relu(bn(x))), {shape_words(shape)}",
        images=shape[0],
        rounds=2 if QUICK else 20,
        set_up=_set_up(shape),
        sides=SIDES,
        shape=shape,
        bytes=least_bytes(shape),
    )


def least_bytes(shape: Shape) -> int:
    """Bytes that forward + backward read and write at least, where the activation is not written.

    Five passes over a tensor of x's size: forward reads x twice, backward twice again, and writes dx. Of y's size: y is
    written once, dy read twice, and a byte an output written once and read twice.
    """
    outputs = math.prod(shape[:2]) * math.prod(map(POOL.output_size, shape[2:]))
    return 5 * math.prod(shape) * DTYPE.itemsize + 3 * outputs * (DTYPE.itemsize + 1)


def _set_up(shape: Shape) -> Callable[[str], Run]:
    def set_up(side: str) -> Run:
        torch.manual_seed(0)
        x, (weight, bias, mean, var) = leaf(shape), norm_vectors(shape[1])

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.max_pool2d(F.relu(F.batch_norm(x, mean, var, weight, bias, training=True)), *POOL)

        def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return batch_norm_act_max_pool2d(x, NormParams(mean, var, weight, bias), *POOL, training=True)

        forward = fused if side == FUSED else compiled_for(plain, side, graphs=False)
        dy = torch.randn_like(plain(x, weight, bias))

        def run() -> None:
            for t in (x, weight, bias):
                t.grad = None
            torch.autograd.backward(forward(x, weight, bias), dy)

        return run

    return set_up
