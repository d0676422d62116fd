"""WebDataset shards: tar files of images and their classes, of which an index is read and the images stay in place.

With the place of each member's bytes an image is read as one of a file of its own is, in any order.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastres.train.decoding import ImageFile
from fastres.train.errors import InputError
from fastres.train.image_data import ImageData
from fastres.train.image_folder import TEST_FOLDERS, Listing, image_data


def load_shards(root: Path, *, image_size: int | None, notify: Callable[[str], None] = print) -> ImageData:
    """Images in root/train-*.tar and root/test-*.tar (or val-, valid-), not compressed: each NAME.jpg (or another
    ending of images) has its class in NAME.cls, a number or a word. Members with other endings are passed over.

    Classes are in the order of their numbers, words in the order of the alphabet; the rest is as of image folders.

    Raises:
        InputError: no such shards, one that is damaged or lacks an image or a class; else as `load_image_folder`.
    """
    if not root.is_dir():
        raise InputError(f"data_dir: no such folder: {root}")
    found = {name: sorted(root.glob(f"{name}-*.tar")) for name in ("train", *TEST_FOLDERS)}
    test = next((name for name in TEST_FOLDERS if found[name]), None)
    if not found["train"] or test is None:
        wanted = ", ".join(f"{name}-*.tar" for name in TEST_FOLDERS)
        raise InputError(f"data_dir: {root} must hold shards train-*.tar and one of {wanted}")
    notify(f"Reading the index of {len(found['train']) + len(found[test])} shards in {root} ...")
    return image_data("webdataset", _listing(root, "train", found), _listing(root, test, found), image_size, notify)


def _listing(root: Path, name: str, found: dict[str, list[Path]]) -> Listing:
    samples = [sample for shard in found[name] for sample in _samples(shard)]
    place = root / f"{name}-*.tar"
    if not samples:
        raise InputError(f"data_dir: {place} hold no images")
    classes = sorted({label for _, label in samples}, key=_rank)
    number = {label: index for index, label in enumerate(classes)}
    labels = torch.tensor([number[label] for _, label in samples])
    return Listing(place, root, [file for file, _ in samples], labels, tuple(classes))


def _rank(label: str) -> tuple[bool, int, str]:
    """Numbers by their value, before words."""
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)


def _samples(shard: Path) -> list[tuple[ImageFile, str]]:
    """Each image of a shard, in its order, with its class."""
    images: dict[str, ImageFile] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                # As WebDataset has it, an ending starts at the first full stop.
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile():
                    continue
                if f".{ending.lower()}" in IMG_EXTENSIONS:
                    images[key] = ImageFile(str(shard), member.name, member.offset_data, member.size)
                elif ending == "cls" and (content := archive.extractfile(member)) is not None:
                    labels[key] = content.read().decode().strip()
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise InputError(f"data_dir: cannot read the shard {shard}: {' '.join(str(error).split())}") from error
    for key in images.keys() ^ labels.keys():
        lacks = "class, NAME.cls" if key in images else "image, NAME.jpg"
        raise InputError(f"data_dir: {shard} has a sample without its {lacks}: {key.lstrip('/')}")
    for label in labels.values():
        if not label or not label.isprintable():
            raise InputError(f"data_dir: {shard} has a class that is no number or word: {label!a}")
    return [(image, labels[key]) for key, image in images.items()]
