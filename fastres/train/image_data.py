"""What a data set is to the trainer: uint8 images, their labels, and what is known of both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.train.augment import Augmentation
from fastres.train.config import Dataset
from fastres.train.decoding import ImageFiles


@dataclass(frozen=True)
class Split:
    """The training or the test images of a data set."""

    images: Tensor | ImageFiles  # uint8 [N, 3, H, W], or files that give uint8 [3, H, W]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training."""

    name: Dataset
    train: Split
    test: Split
    classes: tuple[str, ...]
    image_size: int  # pixels; images are square
    mean: tuple[float, ...]  # [3], of pixels in 0..1
    std: tuple[float, ...]  # [3]
    augmentation: Augmentation
    instead_of: str | None = None  # why it stands in for CIFAR-10, as a sentence; None where it does not


def measured(
    name: Dataset, train: Split, test: Split, classes: tuple[str, ...], how: Augmentation, instead_of: str | None
) -> ImageData:
    """An in-memory data set, with the mean and deviation of its training pixels."""
    images = train.images
    if not isinstance(images, Tensor):
        raise TypeError(f"train.images: expected a tensor, got {type(images).__name__}")
    # A histogram of 256 values is exact in float64 and needs no float copy of the images.
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt().clamp_min(1 / 255)
    return ImageData(
        name, train, test, classes, images.shape[-1], tuple(mean.tolist()), tuple(std.tolist()), how, instead_of
    )
