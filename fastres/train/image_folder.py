"""Folders of images: what is in them, how a file becomes an RGB image of 8 bits, and which ones stay on disk."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets

from fastres.train.augment import Augmentation
from fastres.train.data import ImageData, Split, measured
from fastres.train.errors import InputError

MEMORY_LIMIT = 2 * 2**30
"""Bytes of decoded images (training and test together) up to which an image folder is held in memory."""

TEST_FOLDERS = ("test", "val", "valid")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""For image folders too large to measure: the values that torchvision's models use."""


class ImageFiles(torch.utils.data.Dataset[Tensor]):
    """Images decoded when asked for: item i is a uint8 [3, size, size] tensor."""

    def __init__(self, root: Path, paths: Sequence[Path], size: int) -> None:
        self.root = root  # the folder that holds the folders of the classes
        self.paths = list(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode_image(self.paths[index], self.size)


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
    train_paths, train_labels, classes = _list_images(root / "train")
    test_paths, test_labels, test_classes = _list_images(test_root)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise InputError(f"data_dir: {root / 'train'} and {test_root} differ in classes: {', '.join(odd[:5])}")
    if len(classes) < 2:
        raise InputError(f"data_dir: expected two classes or more in {root / 'train'}, got only {classes[0]}")
    size = image_size or min(224, *_read_rgb(train_paths[0]).size)
    files = ImageFiles(root / "train", train_paths, size), ImageFiles(test_root, test_paths, size)
    augmentation = Augmentation(padding=max(1, size // 8), flip=True)
    bytes_needed = (len(train_paths) + len(test_paths)) * 3 * size * size
    if bytes_needed > MEMORY_LIMIT:
        notify(f"{bytes_needed / 2**30:.1f} GiB of images stay on disk and are decoded batch by batch.")
        train, test = Split(files[0], train_labels), Split(files[1], test_labels)
        return ImageData("imagefolder", train, test, classes, size, IMAGENET_MEAN, IMAGENET_STD, augmentation)
    notify(f"Decoding {len(train_paths) + len(test_paths):,} images from {root} ...")
    train, test = Split(_decode_all(files[0]), train_labels), Split(_decode_all(files[1]), test_labels)
    return measured("imagefolder", train, test, classes, augmentation, None)


def decode_image(path: Path, size: int) -> Tensor:
    """Read an image file as uint8 [3, size, size]: shorter side resized to `size`, middle cut out.

    - Grayscale of 16 bits is scaled to 8 by (v + 128) // 257. Pillow reads some files of 16 bits as 32-bit integers, so
      these are taken for such; floats are of 0..1. Values beyond these ranges are refused.
    - What is transparent shows white; opaque pixels keep their colour.
    - A JPEG at least four times as wide and high as needed is decoded at a reduced size, no less than twice `size`.
    - An orientation in the file's EXIF data is ignored, as torchvision does.

    Raises:
        InputError: the file cannot be decoded; the message names it.
    """
    image = _read_rgb(path, size)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _list_images(folder: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    try:
        found = datasets.ImageFolder(str(folder))
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"data_dir: {folder} must hold a folder a class with images in each ({error})") from error
    for name in found.classes:
        if not name.isprintable():  # such as bytes that are no UTF-8, which no report could show
            raise InputError(f"data_dir: {folder} has a class folder whose name cannot be printed: {name!a}")
    return [Path(path) for path, _ in found.samples], torch.tensor(found.targets), tuple(found.classes)


def _read_rgb(path: Path, size: int | None = None) -> Image.Image:
    """The image in RGB; at a reduced size where the file allows it and `size` is all that is needed."""
    try:
        with Image.open(path) as image:
            if size is not None:
                image.draft(None, (2 * size, 2 * size))
            if image.mode.startswith("I") or image.mode == "F":
                return Image.fromarray(_eight_bits(image)).convert("RGB")
            if image.has_transparency_data:
                colours = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"data_dir: broken image {path}: {' '.join(str(error).split())}") from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of an image of one channel with more levels."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN included
        raise ValueError(f"values from {values.min()} to {values.max()}, expected 0 to {top} of mode {image.mode}")
    levels: np.ndarray = np.rint(values * 255) if image.mode == "F" else (values.astype(np.int32) + 128) // 257
    return levels.astype(np.uint8)


def _decode_all(files: ImageFiles) -> Tensor:
    images = torch.empty(len(files), 3, files.size, files.size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(files.__getitem__, range(len(files)))):
            images[index] = image
    return images
