"""Worker processes: that they make no difference to a run, stay as long as it, and never longer."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.train import ImageData, InputError, RunError, Split, Summary, decoding
from fastres.train.data import batches
from fastres.train.decoding import ImageFile, ImageFiles, Workers
from fastres.train.folder import claim
from tests.train import kills
from tests.train.conftest import CLASSES, make_data, signal_in_call
from tests.train.test_loop import assert_same_run

Run = Callable[..., Summary]


@pytest.fixture
def on_disk(tmp_path: Path) -> ImageData:
    """`make_data`, with the images in files."""
    data, workers = make_data(), Workers()

    def stored(split: Split, name: str) -> Split:
        (tmp_path / name).mkdir()
        files = [ImageFile(str(tmp_path / name / f"{index}.png")) for index in range(len(split))]
        assert isinstance(split.images, torch.Tensor)
        for image, file in zip(split.images, files, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file.path)
        return Split(ImageFiles(tmp_path / name, files, data.image_size, workers), split.labels)

    return ImageData(
        data.name, stored(data.train, "train"), stored(data.test, "test"), CLASSES, data.image_size, data.mean,
        data.std, data.augmentation,
    )  # fmt: skip


def processes(data: ImageData) -> list[int]:
    """The process ids of the workers."""
    assert isinstance(data.train.images, ImageFiles)
    pool = data.train.images.workers._pool
    return [] if pool is None else sorted(pool._processes)


def ended(process: int) -> bool:
    """Whether there is no such process, or one that only waits to be asked how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def claimed(folder: Path) -> bool:
    try:
        claim(folder).release()
    except InputError:
        return True
    return False


@pytest.mark.parametrize("chunk", [1, 2, 16])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_in_order_whoever_decodes_them(
    on_disk: ImageData, monkeypatch: pytest.MonkeyPatch, workers: int, chunk: int
) -> None:
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    held = make_data().train
    order = torch.randperm(45)
    before = torch.get_rng_state()
    for start in (0, 4):
        pairs = zip(
            batches(held, order, 7, start=start),
            batches(on_disk.train, order, 7, start=start, workers=workers),
            strict=True,
        )
        for (images, labels), (decoded, same_labels) in pairs:
            assert torch.equal(images, decoded) and torch.equal(labels, same_labels)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_stay_over_iterations_and_may_serve_two_at_once(on_disk: ImageData) -> None:
    order = torch.arange(45)
    first, second = (batches(split, order[: len(split)], 4, workers=2) for split in (on_disk.train, on_disk.test))
    made = set()
    held = make_data()
    for index, ((a, _), (b, _)) in enumerate(zip(first, second, strict=False)):
        assert isinstance(held.train.images, torch.Tensor) and isinstance(held.test.images, torch.Tensor)
        assert torch.equal(a, held.train.images[4 * index : 4 * index + 4])
        assert torch.equal(b, held.test.images[4 * index : 4 * index + 4])
        made |= set(processes(on_disk))
    list(batches(on_disk.train, order, 8, workers=2))
    assert set(processes(on_disk)) == made and len(made) == 2
    list(batches(on_disk.train, order, 8, workers=1))
    assert len(processes(on_disk)) == 1
    wait_for(lambda: all(map(ended, made)))


@pytest.mark.parametrize("calls", [2, 9])
def test_run_with_workers_is_the_same_as_without_also_when_resumed(
    run: Run, data: ImageData, on_disk: ImageData, tmp_path: Path, calls: int
) -> None:
    fields = {"dropout": 0.3, "optimizer": "adam"}
    run(to="held", **fields)
    run(to="disk", on=on_disk, workers=2, **fields)
    assert_same_run(tmp_path / "held", tmp_path / "disk")
    with signal_in_call(calls, signal.SIGTERM):
        assert run(to="parts", on=on_disk, workers=2, **fields).stopped_by == "SIGTERM"
    run(to="parts", on=on_disk, workers=1, resume=tmp_path / "parts", **fields)
    assert_same_run(tmp_path / "disk", tmp_path / "parts")


def test_killed_run_with_workers_ends_with_the_same_weights(on_disk: ImageData, tmp_path: Path) -> None:
    process = kills.attempt(tmp_path / "parts", on_disk)
    steps = tmp_path / "parts" / "steps.jsonl"
    wait_for(lambda: steps.exists() and len(steps.read_text().splitlines()) >= 8)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    wait_for(lambda: not claimed(tmp_path / "parts"))  # until its workers have noticed
    kills.run(tmp_path / "parts", on_disk)
    assert processes(on_disk)
    kills.run(tmp_path / "whole", on_disk)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_signal_to_all_processes_of_a_terminal_leaves_the_workers_alone(on_disk: ImageData) -> None:
    rounds = batches(on_disk.train, torch.arange(45), 4, workers=2)
    next(rounds)
    workers = processes(on_disk)
    assert len(workers) == 2
    wait_for(lambda: [os.getpgid(process) for process in workers] == workers)


def test_dead_worker_is_one_line(on_disk: ImageData) -> None:
    rounds = batches(on_disk.train, torch.arange(45), 4, workers=2)
    next(rounds)
    os.kill(processes(on_disk)[0], signal.SIGKILL)
    with pytest.raises(RunError, match=r"^workers: a process that decodes images was ended from outside") as caught:
        # Small images may all be decoded before the pool knows.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            list(rounds)
            rounds = batches(on_disk.train, torch.arange(45), 4, workers=2)
    assert "\n" not in str(caught.value)
    assert len(list(batches(on_disk.train, torch.arange(45), 4, workers=2))) == 12


def test_process_that_cannot_be_made_is_one_line(on_disk: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(RunError, match=r"^workers: cannot start 2 processes: Resource temporarily unavailable$"):
        next(batches(on_disk.train, torch.arange(45), 4, workers=2))


KILLED = """
import sys, torch
from pathlib import Path
from fastres.train import image_folder
from fastres.train.data import batches
image_folder.MEMORY_LIMIT = 0
data = image_folder.load_image_folder(Path(sys.argv[1]), image_size=8, notify=lambda text: None)
rounds = batches(data.train, torch.arange(8), 2, workers=3)
next(rounds)
print(*data.train.images.workers._pool._processes, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_no_worker_outlives_the_training_process(
    write_folder: Callable[..., Path], tmp_path: Path, number: signal.Signals | None
) -> None:
    command = [sys.executable, "-c", KILLED, str(write_folder(tmp_path))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 3 and not any(map(ended, workers))
        if number is not None:
            process.send_signal(number)
        process.stdin.close()
        assert process.wait(60) == (0 if number is None else -number)
    wait_for(lambda: all(map(ended, workers)))


def odd_image(path: Path, kind: str) -> None:
    pixels = np.random.default_rng(7).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if kind == "sixteen":
        Image.fromarray(pixels[..., 0].astype("<u2") * 257).save(path, "PNG")
    elif kind == "cmyk":
        image.convert("CMYK").save(path, "JPEG")
    elif kind == "palette":
        image.quantize(16).save(path, "PNG")
    else:
        image.save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["truncated", "sixteen", "cmyk", "palette"])
def test_odd_images_are_read_and_truncated_ones_named_by_workers_too(
    on_disk: ImageData, kind: str, workers: int
) -> None:
    assert isinstance(on_disk.train.images, ImageFiles)
    file = on_disk.train.images.files[11]
    odd_image(Path(file.path), kind)
    rounds = batches(on_disk.train, torch.arange(45), 8, workers=workers)
    next(rounds)
    if kind == "truncated":
        with pytest.raises(InputError, match=r"^data_dir: broken image .*/11\.png: image file is truncated") as caught:
            next(rounds)
        assert "\n" not in str(caught.value)
    else:
        assert torch.equal(next(rounds)[0][3], decoding.decode_image(file, 8))
