"""Image files: how one becomes an RGB image of 8 bits, and the processes that decode while others train."""

import io
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastres.train.errors import InputError, RunError

AHEAD = 2
"""Batches that worker processes decode while one is trained on."""

CHUNK = 16
"""Images that a worker process decodes at a time: few enough that all have a part in a batch."""


class ImageFile(NamedTuple):
    """Where the bytes of an encoded image lie: a file, or a member of an archive that is not compressed."""

    path: str
    member: str | None = None  # its name in the archive
    start: int = 0  # of its bytes in the archive
    size: int = -1  # -1: all that the file has

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class Workers:
    """Processes that decode: made at the first use, kept over epochs and evaluations until this object goes.

    They draw no random numbers and know no order, so what comes out does not depend on their number.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._count = 0

    def decode(self, batches: Iterable[Sequence[ImageFile]], size: int, count: int) -> Iterator[Tensor]:
        """Decode batch after batch in `count` processes, `AHEAD` of who takes them; in this process where it is 0.

        Yields:
            uint8 [B, 3, size, size], channels_last.

        Raises:
            InputError: the first image of a batch that cannot be decoded.
            RunError: a process cannot be started, or has died.
        """
        if count == 0:
            for batch in batches:
                yield _joined([_decode(batch, size)])
            return
        coming = iter(batches)
        waiting: deque[list[Future[np.ndarray]]] = deque()
        try:
            while True:
                for batch in itertools.islice(coming, AHEAD + 1 - len(waiting)):
                    parts = [batch[first : first + CHUNK] for first in range(0, len(batch), CHUNK)]
                    waiting.append([self._running(count).submit(_decode, part, size) for part in parts])
                if not waiting:
                    return
                yield _joined([part.result() for part in waiting.popleft()])
        except BrokenProcessPool as error:
            self._pool = None
            raise RunError(
                "workers: a process that decodes images was ended from outside, perhaps for lack of memory; "
                "--workers 0 needs none"
            ) from error
        except OSError as error:
            raise RunError(f"workers: cannot start {count} processes: {error.strerror}") from error
        finally:
            for part in itertools.chain.from_iterable(waiting):
                part.cancel()

    def _running(self, count: int) -> ProcessPoolExecutor:
        if self._pool is None or self._count != count:
            # Forked, a process has the program at once. They are all made before the pool starts threads.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
            self._count = count
        return self._pool


class ImageFiles:
    """Images decoded when asked for."""

    def __init__(self, root: Path, files: Sequence[ImageFile], size: int, workers: Workers | None = None) -> None:
        self.root = root  # the folder below which the files have their names
        self.files = list(files)
        self.size = size
        self.workers = workers or Workers()  # training and test images may share them

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [3, size, size]; raises as `decode_image`."""
        return decode_image(self.files[index], self.size)

    def batches(self, parts: Iterable[Tensor], *, workers: int) -> Iterator[Tensor]:
        """Batches of the images of these indices; yields and raises as `Workers.decode`."""
        chosen = ([self.files[index] for index in part.tolist()] for part in parts)
        return self.workers.decode(chosen, self.size, workers)

    def decode_all(self) -> Tensor:
        """uint8 [N, 3, size, size] of all images."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for index, image in enumerate(pool.map(self.__getitem__, range(len(self)))):
                images[index] = image
        return images

    def identities(self) -> Iterator[tuple[str, int]]:
        """The name below `root` and the size in bytes of each image's file.

        Raises:
            InputError: a file is gone.
        """
        for file in self.files:
            try:
                size = os.stat(file.path).st_size if file.size < 0 else file.size
            except OSError as error:
                raise InputError(f"data_dir: cannot read {file}: {error.strerror}") from error
            yield Path(str(file)).relative_to(self.root).as_posix(), size


def decode_image(file: ImageFile, size: int) -> Tensor:
    """Read an image file as uint8 [3, size, size]: shorter side resized to `size`, middle cut out.

    - Grayscale of 16 bits is scaled to 8 by (v + 128) // 257. Pillow reads some files of 16 bits as 32-bit integers, so
      these are taken for such; floats are of 0..1. Values beyond these ranges are refused.
    - What is transparent shows white; opaque pixels keep their colour.
    - A JPEG at least four times as wide and high as needed is decoded at a reduced size, no less than twice `size`.
    - An orientation in the file's EXIF data is ignored, as torchvision does.

    Raises:
        InputError: the file cannot be decoded; the message names it.
    """
    return torch.from_numpy(_pixels(file, size)).permute(2, 0, 1).contiguous()


def image_shape(file: ImageFile) -> tuple[int, int]:
    """Width and height, of an image that is decoded to see that it can be."""
    return _read_rgb(file).size


def _pixels(file: ImageFile, size: int) -> np.ndarray:
    """uint8 [size, size, 3]."""
    image = _read_rgb(file, size)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _read_rgb(file: ImageFile, size: int | None = None) -> Image.Image:
    """The image in RGB; at a reduced size where the file allows it and `size` is all that is needed."""
    try:
        with Image.open(io.BytesIO(file.read())) as image:
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
        raise InputError(f"data_dir: broken image {file}: {' '.join(str(error).split())}") from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of an image of one channel with more levels."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN included
        raise ValueError(f"values from {values.min()} to {values.max()}, expected 0 to {top} of mode {image.mode}")
    levels: np.ndarray = np.rint(values * 255) if image.mode == "F" else (values.astype(np.int32) + 128) // 257
    return levels.astype(np.uint8)


def _decode(files: Sequence[ImageFile], size: int) -> np.ndarray:
    """uint8 [B, size, size, 3]; what a worker process does."""
    images = np.empty((len(files), size, size, 3), np.uint8)
    for index, file in enumerate(files):
        images[index] = _pixels(file, size)
    return images


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)


def _begin() -> None:
    """The first thing that a worker process does."""
    # A Ctrl-C, or a SIGTERM of torchrun, is sent to a group of processes: it is the training process that decides.
    if sys.platform != "win32":
        os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
