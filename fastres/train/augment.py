"""What is done to a batch of training images, and the normalisation of every image.

All random draws come from one explicit CPU generator, so a seed gives the same batches on every device, for every
model, and after a resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.train.config import TrainConfig
from fastres.train.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image: a random crop out of its padded self, and a flip where mirror images make
    sense."""

    padding: int  # pixels on each side
    flip: bool
    border: Literal["zero", "reflect"] = "zero"  # what the padding holds


def augmentation_of(config: TrainConfig, usual: Augmentation, image_size: int) -> Augmentation:
    """What a configuration asks for, given what is usual for the data set. Alternating flips are not drawn.

    Raises:
        InputError: more padding by reflection than the images have to reflect.
    """
    padding = usual.padding if config.crop_padding is None else config.crop_padding
    if config.crop_border == "reflect" and padding >= image_size:
        raise InputError(f"crop_padding: expected below the image_size of {image_size} with reflect, got {padding}")
    return Augmentation(padding, usual.flip if config.flip == "auto" else config.flip == "random", config.crop_border)


def augment(
    images: Tensor,
    how: Augmentation,
    generator: torch.Generator,
    share: slice = slice(None),
    *,
    flipped: Tensor | None = None,
) -> Tensor:
    """Crop each image at random out of its padded self, and flip it with probability one half.

    Args:
        images: uint8 [B, 3, H, W].
        generator: CPU generator; draws are the same whatever the images' device.
        share: the part of the batch to augment; draws are made for all of it, so that a process gets what it would
            have got of the whole.
        flipped: bool [B], on the CPU: which images to flip, in place of a draw.

    Returns:
        uint8 [share of B, 3, H, W], channels_last.
    """
    count, _, height, width = images.shape
    top = torch.randint(0, 2 * how.padding + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * how.padding + 1, (count, 1), generator=generator)
    rows, columns = torch.arange(height).repeat(count, 1), torch.arange(width).repeat(count, 1)
    if flipped is None and how.flip:
        flipped = torch.rand(count, generator=generator) < 0.5
    if flipped is not None:
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
    images, top, left, rows, columns = (values[share] for values in (images, top, left, rows, columns))
    rows, columns = rows + top - how.padding, columns + left - how.padding
    if how.border == "reflect":
        padded, rows, columns = images, _reflected(rows, height), _reflected(columns, width)
    else:
        padded, rows, columns = F.pad(images, (how.padding,) * 4), rows + how.padding, columns + how.padding
    rows, columns = rows.to(images.device), columns.to(images.device)
    picture = torch.arange(len(images), device=images.device)
    # Indices apart from each other put their dimensions first: the result is [B, H, W, 3] in memory.
    return padded[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip_bits(count: int, seed: int) -> Tensor:
    """bool [count]: which images alternating flips show mirrored in even epochs; in odd ones it is the others."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool = True) -> Tensor:
    """(images / 255 - mean) / std a channel, in float32.

    Args:
        images: uint8 [B, 3, H, W].
        mean, std: 3 values, of pixels in 0..1.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, 3, 1, 1)
    return torch.addcmul(shift, images.to(torch.float32, memory_format=layout), scale).contiguous(memory_format=layout)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices outside 0..size-1 mirrored at the outermost pixels, as F.pad's "reflect"; at most size - 1 outside."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)
