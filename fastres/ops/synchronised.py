"""What a normalisation over several processes sends: in forward their statistics, in backward their sums.

Forward, in float32 (float64 for float64): each process sends its count in two numbers, and of every normalisation of
the call mean and M2, [C] each. Backward: of every normalisation sum g * xhat and sum g. One message a call, gathered
rather than reduced: each process combines the parts itself, in the order of ranks, so that the result is the same bits
on all of them and in every run. The two normalisations of a projection shortcut are in one message.

The collectives are PyTorch's functional ones, which torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.contract import Group, Statistics

# float32 counts to 2 ** 24; the count travels as its last 20 bits and the rest.
_LOW = 2**20


def _gather(message: Tensor, group: Group) -> Tensor:
    """[size, K]: the messages [K] of all processes, in the order of ranks."""
    collectives = torch.ops._c10d_functional
    gathered: Tensor = collectives.wait_tensor(
        collectives.all_gather_into_tensor(message.contiguous(), group.size, group.name)
    )
    return gathered.view(group.size, -1)


def combine_statistics(own: Sequence[Statistics], count: int, group: Group) -> list[Statistics]:
    """The statistics over all processes, each with the whole count.

    Args:
        own: this process's mean and M2, of tensors with `count` elements a channel. The count may differ from process
            to process; where it is 0 the values say nothing, and have to be finite.
    Raises:
        ValueError: all processes together have one value a channel, or none (on the CPU, where asking costs nothing).
    """
    mean = own[0].mean
    parts = [mean.new_full((1,), part) for part in (count % _LOW, count // _LOW)]
    for mean, m2, _ in own:
        parts += [mean, m2]
    gathered = _gather(torch.cat(parts), group)
    low, high, vectors = gathered[:, 0], gathered[:, 1], gathered[:, 2:].view(group.size, len(own), 2, -1)
    counts = (low.to(torch.int64) + high.to(torch.int64) * _LOW)[:, None]
    found = [Statistics.of_parts(vectors[:, i, 0], vectors[:, i, 1], counts) for i in range(len(own))]
    total = found[0].count
    if not torch.compiler.is_compiling() and type(total) is Tensor and total.device.type == "cpu" and int(total) < 2:
        raise ValueError(
            f"x: expected more than 1 value a channel in training, got {int(total)} in {group.size} processes together"
        )
    return found


def combine_sums(own: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Sums [C] over all processes, in one message."""
    return list(_gather(torch.cat(list(own)), group).sum(0).view(len(own), -1))
