"""Data sets by name, and batches of their images.

Images stay uint8 [N, 3, H, W] until they are in a batch. The order is drawn from an explicit CPU generator, so a seed
gives the same batches on every device, for every model, and after a resume.
"""

import hashlib
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from fastres.train.augment import Augmentation
from fastres.train.config import Dataset, TrainConfig
from fastres.train.distributed import SINGLE, Group
from fastres.train.errors import InputError, RunError, reading
from fastres.train.image_data import ImageData, Split, measured
from fastres.train.image_folder import load_image_folder
from fastres.train.shards import load_shards

PROBE_SECONDS = 8.0
"""How long the site of a data set may take to answer before it counts as out of reach."""


def load_data(config: TrainConfig, *, notify: Callable[[str], None] = print) -> ImageData:
    """Load the data set that a checked configuration names. Writes nothing but a download into config.data_dir.

    Args:
        config: uses dataset, data_dir, image_size.
        notify: receives a line before something slow starts.

    Raises:
        InputError: the folder is missing, empty, damaged, or holds a broken image.
        RunError: the data set is not there and cannot be downloaded.
    """
    if config.dataset not in ("imagefolder", "webdataset") and config.image_size not in (None, 32):
        raise InputError(
            f"image_size: only imagefolder and webdataset are resized, {config.dataset} has 32, got {config.image_size}"
        )
    if config.dataset == "digits":
        return load_handwritten_digits()
    with reading("data_dir", config.data_dir):
        return _load_from_disk(config, notify)


def _load_from_disk(config: TrainConfig, notify: Callable[[str], None]) -> ImageData:
    if config.dataset == "imagefolder":
        return load_image_folder(config.data_dir, image_size=config.image_size, notify=notify)
    if config.dataset == "webdataset":
        return load_shards(config.data_dir, image_size=config.image_size, notify=notify)
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
    # Over a second's import, for which a run of other images, and each of its processes, need not wait.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = pixels.round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    train, test = (Split(images[part].contiguous(), labels[part]) for part in map(torch.from_numpy, parts))
    return measured("digits", train, test, tuple("0123456789"), Augmentation(padding=3, flip=False), instead_of)


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
    return measured(name, train, test, tuple(parts[0].classes), Augmentation(padding=4, flip=True), None)


def batches(
    split: Split, order: Tensor, batch_size: int, *, start: int = 0, workers: int | None = 0, group: Group = SINGLE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8 images [B, 3, H, W] and labels [B] in a given order.

    Args:
        order: int64 [N], indices into the split.
        start: number of the first batch to give.
        workers: processes that decode, for a split that is not in memory; they live as long as its images.
            None is 0.
        group: of images that are not in memory only this process's share is decoded; the others are undefined.

    Raises:
        InputError: an image that is not in memory cannot be decoded; the message names the file.
        RunError: a process that decodes cannot be started, or has died.
    """
    parts = list(torch.split(order, batch_size))[start:] if len(order) else []
    if isinstance(split.images, Tensor):
        for part in parts:
            part = part.to(split.images.device)
            yield split.images[part], split.labels[part]
        return
    shares = (part[group.share(len(part))] for part in parts)
    for part, decoded in zip(parts, split.images.batches(shares, workers=workers or 0), strict=True):
        images = decoded
        if group.size > 1:
            images = decoded.new_empty(len(part), *decoded.shape[1:])
            images[group.share(len(part))] = decoded
        yield images, split.labels[part]


def fingerprint(data: ImageData) -> dict[str, Any]:
    """What tells a data set from another, in plain JSON types; the same whatever device holds the images.

    A part's sha256 is over its labels and, of images in memory, their shape and bytes; of files, their names below the
    part's folder and their sizes.

    Raises:
        InputError: an image file is gone.
    """
    return {
        "name": data.name,
        "classes": list(data.classes),
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "train": {"images": len(data.train), "sha256": _sha256(data.train)},
        "test": {"images": len(data.test), "sha256": _sha256(data.test)},
    }


def fingerprint_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, a sentence each without a full stop; empty where nothing does."""
    differences = []
    if then["name"] != now["name"]:
        differences.append(f"the data set was {then['name']}, is {now['name']}")
    if then["classes"] != now["classes"]:
        differences.append(f"the classes were {_few(then['classes'])}, are {_few(now['classes'])}")
    if then["image_size"] != now["image_size"]:
        differences.append(f"the images were {then['image_size']} pixels wide, are {now['image_size']}")
    for part, title in (("train", "training"), ("test", "test")):
        if then[part]["images"] != now[part]["images"]:
            differences.append(f"the {title} images were {then[part]['images']:,}, are {now[part]['images']:,}")
        elif then[part]["sha256"] != now[part]["sha256"]:
            differences.append(f"the {title} images or their labels are not the same as then")
    for what in ("mean", "std"):
        # Another machine may add up in another order.
        if not np.allclose(then[what], now[what], rtol=1e-9, atol=0):
            differences.append(f"the pixels' {what} was {then[what]}, is {now[what]}")
    return differences


def _few(classes: list[str]) -> str:
    return f"{len(classes)} ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"


def _sha256(part: Split) -> str:
    digest = hashlib.sha256(part.labels.cpu().numpy().astype("<i8").tobytes())
    images = part.images
    if isinstance(images, Tensor):
        digest.update(repr(tuple(images.shape)).encode())
        for some in torch.split(images, 4096):  # a copy of a few only, where the images are on a GPU or not contiguous
            digest.update(some.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
    for name, size in images.identities():
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def left_out(count: int, batch_size: int, smallest: int = 2) -> int:
    """How many of `count` images an epoch leaves out: those of a last batch below `smallest`, which has no batch
    statistics."""
    last = count % batch_size
    return last if last < smallest else 0


def train_order(count: int, batch_size: int, generator: torch.Generator, smallest: int = 2) -> Tensor:
    """A random order of `count` images, without those that an epoch leaves out."""
    order = torch.randperm(count, generator=generator)
    return order[: count - left_out(count, batch_size, smallest)]


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
