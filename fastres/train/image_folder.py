"""Folders of images: what is in them, and which ones stay on disk."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastres.train.augment import Augmentation
from fastres.train.config import Dataset
from fastres.train.decoding import ImageFile, ImageFiles, Workers, image_shape
from fastres.train.errors import InputError, reading
from fastres.train.image_data import ImageData, Split, measured

MEMORY_LIMIT = 2 * 2**30
"""Bytes of decoded images (training and test together) up to which an image folder is held in memory."""

TEST_FOLDERS = ("test", "val", "valid")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""For image folders too large to measure: the values that torchvision's models use."""


def load_image_folder(root: Path, *, image_size: int | None, notify: Callable[[str], None] = print) -> ImageData:
    """Images in root/train/<class>/ and root/test/<class>/ (or val/, valid/): torchvision's ImageFolder layout.

    Classes are numbered by their sorted names; images may lie in folders further down, also behind links; files with
    other endings than those of images are passed over. Each image becomes RGB, its shorter side is resized to
    `image_size` and its middle is cut out. Up to MEMORY_LIMIT all images are decoded here; beyond, when a batch asks
    for them.

    Raises:
        InputError: a folder is missing or cannot be read, or a class of it is empty, there are fewer than two classes,
            training and test differ in classes, or an image is broken.
    """
    if not root.is_dir():
        raise InputError(f"data_dir: no such folder: {root}")
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        raise InputError(f"data_dir: {root} must hold a folder train and one of {', '.join(TEST_FOLDERS)}")
    return image_data("imagefolder", _list_images(root / "train"), _list_images(test_root), image_size, notify)


class Listing(NamedTuple):
    """The training or the test images of a data set, not decoded yet."""

    place: Path  # what holds them, for messages
    root: Path  # the folder below which their names count
    files: list[ImageFile]
    labels: Tensor  # int64 [N]
    classes: tuple[str, ...]


def image_data(
    name: Dataset, train: Listing, test: Listing, image_size: int | None, notify: Callable[[str], None]
) -> ImageData:
    """The data set of these images: decoded here where they take at most MEMORY_LIMIT.

    Raises:
        InputError: as `load_image_folder`.
    """
    classes = train.classes
    if classes != test.classes:
        odd = sorted(set(classes) ^ set(test.classes))
        raise InputError(f"data_dir: {train.place} and {test.place} differ in classes: {', '.join(odd[:5])}")
    if len(classes) < 2:
        raise InputError(f"data_dir: expected two classes or more in {train.place}, got only {classes[0]}")
    count, size = len(train.files) + len(test.files), image_size or min(224, *image_shape(train.files[0]))
    augmentation = Augmentation(padding=max(1, size // 8), flip=True)
    workers = Workers()
    stored = [(ImageFiles(part.root, part.files, size, workers), part) for part in (train, test)]
    bytes_needed = count * 3 * size * size
    if bytes_needed > MEMORY_LIMIT:
        notify(f"{bytes_needed / 2**30:.1f} GiB of images stay on disk and are decoded batch by batch.")
        parts = [Split(images, part.labels) for images, part in stored]
        return ImageData(name, parts[0], parts[1], classes, size, IMAGENET_MEAN, IMAGENET_STD, augmentation)
    notify(f"Decoding {count:,} images from {train.place.parent} ...")
    held = [Split(images.decode_all(), part.labels) for images, part in stored]
    return measured(name, held[0], held[1], classes, augmentation, None)


def _list_images(folder: Path) -> Listing:
    """The images of each class, in torchvision's order."""
    with reading("data_dir", folder):
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        found = [list(images_below(os.path.join(folder, name))) for name in classes]
    for name in classes:
        if not name.isprintable():  # such as bytes that are no UTF-8, which no report could show
            raise InputError(f"data_dir: {folder} has a class folder whose name cannot be printed: {name!a}")
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty or not classes:
        lack = f"no {', '.join(IMG_EXTENSIONS)} in {', '.join(empty[:5])}" if empty else "no folder"
        raise InputError(f"data_dir: {folder} must hold a folder a class with images in each, it has {lack}")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in found]))
    return Listing(folder, folder, [ImageFile(path) for files in found for path in files], labels, tuple(classes))


def images_below(folder: str) -> Iterator[str]:
    """The paths of the images in a folder and those below it, through links too.

    A link to a folder that holds it is passed over: below it the same images would come again without an end.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    above = {folder: {os.path.realpath(folder)}}  # the folders in which each is, without links
    inside = []
    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        inside.append((path, sorted(names)))
        real = {name: os.path.realpath(os.path.join(path, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in above[path]]
        above.update({os.path.join(path, name): above[path] | {real[name]} for name in folders})
    for path, names in sorted(inside):
        yield from (os.path.join(path, name) for name in names if name.lower().endswith(IMG_EXTENSIONS))
