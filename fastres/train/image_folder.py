"""Folders of images: what is in them, and which ones stay on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from fastres.train.augment import Augmentation
from fastres.train.config import Dataset
from fastres.train.data import ImageData, Split, measured
from fastres.train.decoding import ImageFile, ImageFiles, Workers, image_shape
from fastres.train.errors import InputError

MEMORY_LIMIT = 2 * 2**30
"""Bytes of decoded images (training and test together) up to which an image folder is held in memory."""

TEST_FOLDERS = ("test", "val", "valid")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""For image folders too large to measure: the values that torchvision's models use."""


def load_image_folder(root: Path, *, image_size: int | None, notify: Callable[[str], None] = print) -> ImageData:
    """Images in root/train/<class>/ and root/test/<class>/ (or val/, valid/): torchvision's ImageFolder layout.

    Classes are numbered by their sorted names; images may lie in folders further down; files with other endings than
    those of images are passed over. Each image becomes RGB, its shorter side is resized to `image_size` and its middle
    is cut out. Up to MEMORY_LIMIT all images are decoded here; beyond, when a batch asks for them.

    Raises:
        InputError: a folder is missing or a class of it empty, there are fewer than two classes, training and test
            differ in classes, or an image is broken.
    """
    if not root.is_dir():
        raise InputError(f"data_dir: no such folder: {root}")
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        raise InputError(f"data_dir: {root} must hold a folder train and one of {', '.join(TEST_FOLDERS)}")
    train_files, train_labels, classes = _list_images(root / "train")
    test_files, test_labels, test_classes = _list_images(test_root)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise InputError(f"data_dir: {root / 'train'} and {test_root} differ in classes: {', '.join(odd[:5])}")
    if len(classes) < 2:
        raise InputError(f"data_dir: expected two classes or more in {root / 'train'}, got only {classes[0]}")
    size, workers = image_size or min(224, *image_shape(train_files[0])), Workers()
    train = ImageFiles(root / "train", train_files, size, workers), train_labels
    test = ImageFiles(test_root, test_files, size, workers), test_labels
    return held_or_on_disk("imagefolder", train, test, classes, notify)


def held_or_on_disk(
    name: Dataset,
    train: tuple[ImageFiles, Tensor],
    test: tuple[ImageFiles, Tensor],
    classes: tuple[str, ...],
    notify: Callable[[str], None],
) -> ImageData:
    """The data set of these files and labels; the images are decoded here where they take at most MEMORY_LIMIT."""
    count, size = len(train[0]) + len(test[0]), train[0].size
    augmentation = Augmentation(padding=max(1, size // 8), flip=True)
    bytes_needed = count * 3 * size * size
    if bytes_needed > MEMORY_LIMIT:
        notify(f"{bytes_needed / 2**30:.1f} GiB of images stay on disk and are decoded batch by batch.")
        return ImageData(name, Split(*train), Split(*test), classes, size, IMAGENET_MEAN, IMAGENET_STD, augmentation)
    notify(f"Decoding {count:,} images from {train[0].root.parent} ...")
    held = [Split(files.decode_all(), labels) for files, labels in (train, test)]
    return measured(name, held[0], held[1], classes, augmentation, None)


def _list_images(folder: Path) -> tuple[list[ImageFile], Tensor, tuple[str, ...]]:
    try:
        found = datasets.ImageFolder(str(folder))
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"data_dir: {folder} must hold a folder a class with images in each ({error})") from error
    for name in found.classes:
        if not name.isprintable():  # such as bytes that are no UTF-8, which no report could show
            raise InputError(f"data_dir: {folder} has a class folder whose name cannot be printed: {name!a}")
    return [ImageFile(path) for path, _ in found.samples], torch.tensor(found.targets), tuple(found.classes)
