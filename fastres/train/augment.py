"""What is done to a batch of training images, and the normalisation of every image.

All random draws come from one explicit CPU generator, so a seed gives the same batches on every device, for every
model, and after a resume.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

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
        InputError: more padding than the images have to reflect, or so much that a crop may be nothing else.
    """
    padding = usual.padding if config.crop_padding is None else config.crop_padding
    if config.crop_border == "reflect" and padding >= image_size:
        raise InputError(f"crop_padding: expected below the image_size of {image_size} with reflect, got {padding}")
    if padding > image_size:
        raise InputError(f"crop_padding: expected at most the image_size of {image_size}, got {padding}")
    return Augmentation(padding, usual.flip if config.flip == "auto" else config.flip == "random", config.crop_border)


def augment(
    images: Tensor,
    how: Augmentation,
    generator: torch.Generator,
    share: slice | Tensor = slice(None),
    *,
    flipped: Tensor | None = None,
) -> Tensor:
    """Crop each image at random out of its padded self, and flip it with probability one half.

    Args:
        images: uint8 [B, 3, H, W].
        generator: CPU generator; draws are the same whatever the images' device.
        share: the part of the batch to augment, or int64 indices into it, on the CPU; draws are made for all of it, so
            that a process gets what it would have got of the whole.
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


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Let torch's global generator of the CPU, from which torchvision draws, give what one draw of `generator` decides.

    It goes on afterwards as if nothing had been drawn: it belongs to the dropout.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of the GPUs as well
        yield


class RandAugment(v2.RandAugment):  # type: ignore[misc]
    """torchvision's RandAugment with operations of its own for each image of a batch.

    torchvision applies what it draws to all the images it is given. Here each image draws its operations and their
    signs, and those that drew the same are computed together: the result of one by one, in a fraction of the time.

    Args:
        num_ops: operations an image, one after the other.
        magnitude: 0 to 30.

    Source: Cubuk et al. 2019, "RandAugment: practical automated data augmentation with a reduced search space".
    """

    def forward(
        self, images: Tensor, generator: torch.Generator, count: int, share: slice | Tensor = slice(None)
    ) -> Tensor:
        """
        Args:
            images: uint8 [share of B, 3, H, W].
            generator: CPU generator; draws are the same whatever the images' device.
            count: B, the images of the whole batch.
            share: as in `augment`.

        Returns:
            uint8 [share of B, 3, H, W].
        """
        space = list(self._AUGMENTATION_SPACE.items())
        operations = torch.randint(len(space), (self.num_ops, count), generator=generator)
        negative = torch.rand(self.num_ops, count, generator=generator) < 0.5
        images = images.clone()
        for drawn in (2 * operations + negative)[:, share]:
            for each in drawn.unique().tolist():
                name, (magnitudes_of, signed) = space[each // 2]
                magnitudes = magnitudes_of(self.num_magnitude_bins, *images.shape[-2:])
                magnitude = 0.0 if magnitudes is None else float(magnitudes[self.magnitude])
                if signed and each % 2:
                    magnitude = -magnitude
                alike = (drawn == each).nonzero().flatten().to(images.device)
                images[alike] = self._apply_image_or_video_transform(
                    images[alike], name, magnitude, interpolation=self.interpolation, fill=self._fill
                )
        return images


def erase(
    images: Tensor, probability: float, generator: torch.Generator, count: int, share: slice | Tensor = slice(None)
) -> Tensor:
    """Set a rectangle of each image to zero, with this probability: torchvision's RandomErasing, image by image.

    A rectangle has 2 to 33 % of the image, and an aspect ratio of 0.3 to 3.3.

    Args:
        images: float [share of B, 3, H, W], normalised, so that zero is the mean colour. Changed in place.
        generator, count, share: as in `RandAugment`.

    Source: Zhong et al. 2017, "Random erasing data augmentation".
    """
    erasing = v2.RandomErasing(inplace=True)
    chosen = torch.rand(count, generator=generator) < probability
    with drawn_from(generator):
        boxes = {index: erasing.make_params([images[0]]) for index in chosen.nonzero().flatten().tolist()}
    for image, index in zip(images, torch.arange(count)[share].tolist(), strict=True):
        if index in boxes:
            erasing.transform(image, boxes[index])
    return images


class Mixing:
    """Mixes each image of a batch, and its label, with the image before it; the first one with the last.

    Mixup: x = lambda x_i + (1 - lambda) x_(i-1), lambda from Beta(alpha, alpha), one for a batch. CutMix: a box of
    x_(i-1) in x_i; centre at random, area 1 - lambda before the part outside the image is cut off, and lambda is what
    is left of x_i. Labels become probabilities of the classes, mixed by lambda. With both, one of the two for a batch,
    either with probability one half.

    Args:
        mixup, cutmix: alpha of each; 0 leaves it out.

    Source: Zhang et al. 2017, "mixup: beyond empirical risk minimization"; Yun et al. 2019, "CutMix: regularization
    strategy to train strong classifiers with localizable features"; both as torchvision has them.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.mix = v2.RandomChoice([kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0])

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: float [B, 3, H, W].
            labels: int64 [B].
            generator: CPU generator; draws are the same whatever the images' device, and however many they are.

        Returns:
            Mixed images, and float32 [B, classes], the targets.
        """
        with drawn_from(generator):
            mixed: tuple[Tensor, Tensor] = self.mix(images, labels)
        return mixed

    @staticmethod
    def needed(share: slice, count: int) -> Tensor:
        """int64 indices of the images to mix for a share of a batch of `count`: the one before its first, and its own.

        The first result is then to be dropped.
        """
        return torch.arange(share.start - 1, share.stop) % count


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
