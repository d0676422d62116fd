"""Data sets as uint8 images, and batches of them.

Images stay uint8 [N, 3, H, W] until they are in a batch. The order is drawn from an explicit CPU generator, so a seed
gives the same batches on every device, for every model, and after a resume.
"""

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

from fastres.train.augment import Augmentation
from fastres.train.config import Dataset, TrainConfig
from fastres.train.distributed import SINGLE, Group
from fastres.train.errors import InputError, RunError

MEMORY_LIMIT = 2 * 2**30
"""Bytes of decoded images (training and test together) up to which an image folder is held in memory."""

TEST_FOLDERS = ("test", "val", "valid")
PROBE_SECONDS = 8.0
"""How long the site of a data set may take to answer before it counts as out of reach."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""For image folders too large to measure: the values that torchvision's models use."""


class ImageFiles(torch.utils.data.Dataset[Tensor]):
    """Images decoded when asked for: item i is a uint8 [3, size, size] tensor."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = list(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode_image(self.paths[index], self.size)


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


def load_data(config: TrainConfig, *, notify: Callable[[str], None] = print) -> ImageData:
    """Load the data set that a checked configuration names. Writes nothing but a download into config.data_dir.

    Args:
        config: uses dataset, data_dir, image_size.
        notify: receives a line before something slow starts.

    Raises:
        InputError: the folder is missing, empty, damaged, or holds a broken image.
        RunError: the data set is not there and cannot be downloaded.
    """
    if config.dataset != "imagefolder" and config.image_size not in (None, 32):
        raise InputError(f"image_size: only imagefolder is resized, {config.dataset} has 32, got {config.image_size}")
    if config.dataset == "digits":
        return load_handwritten_digits()
    if config.dataset == "imagefolder":
        return load_image_folder(config.data_dir, image_size=config.image_size, notify=notify)
    if config.dataset == "cifar100":
        return load_cifar("cifar100", config.data_dir, notify=notify)
    try:
        return load_cifar("cifar10", config.data_dir, notify=notify)
    except RunError as error:
        if config.dataset != "auto":
            raise
        return load_handwritten_digits(instead_of=str(error))


def load_handwritten_digits(*, instead_of: str | None = None) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8 resized to 3x32x32; a fixed, stratified fifth (360) is for test.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    digits: Any = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = pixels.round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    train, test = (Split(images[part].contiguous(), labels[part]) for part in map(torch.from_numpy, parts))
    return _measured("digits", train, test, tuple("0123456789"), Augmentation(padding=3, flip=False), instead_of)


def load_cifar(name: Dataset, root: Path, *, notify: Callable[[str], None] = print) -> ImageData:
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded into `root` where it is not there yet."""
    kind = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
    title = "CIFAR-100" if name == "cifar100" else "CIFAR-10"
    if root.exists() and not root.is_dir():
        raise InputError(f"data_dir: expected a folder, got the file {root}")
    folder = root / kind.base_folder
    if not folder.is_dir():
        _download_cifar(kind, title, root, notify)
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"data_dir: the {title} files in {folder} are incomplete or damaged; delete the folder to download it again"
        ) from error
    train, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return _measured(name, train, test, tuple(parts[0].classes), Augmentation(padding=4, flip=True), None)


def load_image_folder(root: Path, *, image_size: int | None, notify: Callable[[str], None] = print) -> ImageData:
    """Images in root/train/<class>/ and root/test/<class>/ (or val/, valid/): torchvision's ImageFolder layout.

    Each image becomes RGB, its shorter side is resized to `image_size` and its middle is cut out. Up to MEMORY_LIMIT
    all images are decoded here; beyond, when a batch asks for them.
    """
    if not root.is_dir():
        raise InputError(f"data_dir: no such folder: {root}")
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        raise InputError(f"data_dir: {root} must hold a folder train and one of {', '.join(TEST_FOLDERS)}")
    train_paths, train_labels, classes = _list_images(root / "train")
    test_paths, test_labels, test_classes = _list_images(test_root)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise InputError(f"data_dir: {root / 'train'} and {test_root} differ in classes: {', '.join(odd[:5])}")
    size = image_size or min(224, *_read_rgb(train_paths[0]).size)
    files = ImageFiles(train_paths, size), ImageFiles(test_paths, size)
    augmentation = Augmentation(padding=max(1, size // 8), flip=True)
    bytes_needed = (len(train_paths) + len(test_paths)) * 3 * size * size
    if bytes_needed > MEMORY_LIMIT:
        notify(f"{bytes_needed / 2**30:.1f} GiB of images stay on disk and are decoded batch by batch.")
        train, test = Split(files[0], train_labels), Split(files[1], test_labels)
        return ImageData("imagefolder", train, test, classes, size, IMAGENET_MEAN, IMAGENET_STD, augmentation)
    notify(f"Decoding {len(train_paths) + len(test_paths):,} images from {root} ...")
    train, test = Split(_decode_all(files[0]), train_labels), Split(_decode_all(files[1]), test_labels)
    return _measured("imagefolder", train, test, classes, augmentation, None)


def decode_image(path: Path, size: int) -> Tensor:
    """Read an image file as uint8 [3, size, size]: shorter side resized to `size`, middle cut out.

    Raises:
        InputError: the file cannot be decoded; the message names it.
    """
    image = _read_rgb(path)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def batches(
    split: Split, order: Tensor, batch_size: int, *, start: int = 0, workers: int = 0, group: Group = SINGLE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8 images [B, 3, H, W] and labels [B] in a given order.

    Args:
        order: int64 [N], indices into the split.
        start: number of the first batch to give.
        workers: processes that decode, for a split that is not in memory.
        group: of images that are not in memory only this process's share is decoded; the others are undefined.
    """
    parts = list(torch.split(order, batch_size))[start:] if len(order) else []
    if isinstance(split.images, Tensor):
        for part in parts:
            part = part.to(split.images.device)
            yield split.images[part], split.labels[part]
        return
    loader = torch.utils.data.DataLoader(
        split.images,
        batch_sampler=[part[group.share(len(part))].tolist() for part in parts],
        num_workers=workers,
        # Without a generator of its own the loader would draw from the global one, which belongs to the dropout.
        generator=torch.Generator(),
    )
    for part, decoded in zip(parts, loader, strict=True):
        images = decoded
        if group.size > 1:
            images = decoded.new_empty(len(part), *decoded.shape[1:])
            images[group.share(len(part))] = decoded
        yield images, split.labels[part]


def left_out(count: int, batch_size: int, smallest: int = 2) -> int:
    """How many of `count` images an epoch leaves out: those of a last batch below `smallest`, which has no batch
    statistics."""
    last = count % batch_size
    return last if last < smallest else 0


def train_order(count: int, batch_size: int, generator: torch.Generator, smallest: int = 2) -> Tensor:
    """A random order of `count` images, without those that an epoch leaves out."""
    order = torch.randperm(count, generator=generator)
    return order[: count - left_out(count, batch_size, smallest)]


def _measured(
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


def _list_images(folder: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    try:
        found = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"data_dir: {folder} must hold a folder a class with images in each ({error})") from error
    return [Path(path) for path, _ in found.samples], torch.tensor(found.targets), tuple(found.classes)


def _read_rgb(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"data_dir: broken image {path}: {error}") from error


def _decode_all(files: ImageFiles) -> Tensor:
    images = torch.empty(len(files), 3, files.size, files.size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(files.__getitem__, range(len(files)))):
            images[index] = image
    return images


def _download_cifar(kind: type[datasets.CIFAR10], title: str, root: Path, notify: Callable[[str], None]) -> None:
    """Fetch and unpack; an archive that is already there is not fetched again."""
    archive = root / kind.filename
    if not archive.is_file():
        problem = _unreachable(kind.url)
        if problem is not None:
            raise RunError(f"{title} is not in {root} and cannot be downloaded ({problem})")
        notify(f"Downloading {title} from {kind.url} to {root} ...")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30.0)
    try:
        kind(str(root), train=True, download=True)
    except Exception as error:  # network, disk, a cut-off archive
        raise RunError(f"{title} could not be downloaded to {root} ({error})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _unreachable(url: str) -> str | None:
    """Why the site does not answer within PROBE_SECONDS, or None if it does."""
    outcome: list[str | None] = [f"no answer from {url} within {PROBE_SECONDS:.0f} s"]

    def probe() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            outcome[0] = None
        except Exception as error:
            outcome[0] = f"{url}: {error}"

    # A thread, since a name server that does not answer is beyond the reach of any socket timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return outcome[0]
