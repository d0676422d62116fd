"""WebDataset shards: the same data set as the folder that they were made of."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastres.train import InputError, TrainConfig, image_folder, load_data
from fastres.train.data import batches, fingerprint, fingerprint_differences
from fastres.train.shards import load_shards

WriteFolder = Callable[..., Path]


def write_shard(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def pair(write_folder: WriteFolder, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of images, and shards of them: two for training, with members that are no samples between them."""
    folder, root = write_folder(tmp_path / "folder"), tmp_path / "shards"
    root.mkdir()
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            members = {}
            for file in sorted((folder / part / name).iterdir()):
                members[f"sub.1/{name}{file.stem}.cls"] = f"{name}\n".encode()
                members[f"sub.1/{name}{file.stem}.json"] = b"{}"
                members[f"sub.1/{name}{file.stem}.png"] = file.read_bytes()
            write_shard(root / f"{part}-{number:04}.tar", members)
    return folder, root


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_what_their_folder_gives(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, limit: int, workers: int
) -> None:
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", limit)
    expected = load_data(TrainConfig(dataset="imagefolder", data_dir=pair[0], image_size=6))
    found = load_data(TrainConfig(dataset="webdataset", data_dir=pair[1], image_size=6))
    assert found.name == "webdataset" and found.classes == expected.classes
    assert (found.mean, found.std, found.augmentation) == (expected.mean, expected.std, expected.augmentation)
    assert isinstance(found.train.images, Tensor) == (limit > 0)
    for a, b in ((expected.train, found.train), (expected.test, found.test)):
        order = torch.randperm(len(a))
        for (images, labels), (others, same) in zip(
            batches(a, order, 3), batches(b, order, 3, workers=workers), strict=True
        ):
            assert torch.equal(images, others) and torch.equal(labels, same)


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "JPEG")
    for part in ("train", "val"):
        members = {}
        for label in (10, 2, 0, 9):
            members |= {f"{label}.JPG": picture.getvalue(), f"{label}.cls": str(label).encode()}
        write_shard(tmp_path / f"{part}-a.tar", members)
    data = load_shards(tmp_path, image_size=None)
    assert data.classes == ("0", "2", "9", "10")
    assert data.train.labels.tolist() == [3, 1, 0, 2]


def test_fingerprint_is_of_members_and_their_sizes(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 0)
    first = fingerprint(load_shards(pair[1], image_size=8))
    moved = pair[1].rename(pair[1].with_name("moved"))
    assert fingerprint(load_shards(moved, image_size=8)) == first
    (moved / "train-0001.tar").rename(moved / "train-0002.tar")
    assert fingerprint_differences(first, fingerprint(load_shards(moved, image_size=8))) == [
        "the training images or their labels are not the same as then"
    ]


def change(shard: Path, damage: str) -> str:
    """Damage a shard, and give what the message says."""
    with tarfile.open(shard) as archive:
        members = {m.name: file.read() for m in archive if (file := archive.extractfile(m)) is not None}
    image, label = "sub.1/dog1.png", "sub.1/dog1.cls"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:2000])
        return rf"cannot read the shard {shard}: "
    if damage == "compressed":
        write_shard(shard, members, "w:gz")
        return rf"cannot read the shard {shard}: "
    if damage == "gone":
        shard.unlink()
        return r".* must hold shards train-\*\.tar and one of test-\*\.tar, val-\*\.tar, valid-\*\.tar$"
    if damage == "empty":
        write_shard(shard, {"notes.txt": b"none"})
        return r".*test-\*\.tar hold no images$"
    if damage == "class":
        del members[label]
    elif damage == "image":
        del members[image]
    elif damage == "word":
        members[label] = b"\x07"
    elif damage == "other":
        members[label] = b"wolf"
    else:
        members[image] = members[image][:60]
    write_shard(shard, members)
    return {
        "class": rf"{shard} has a sample without its class, NAME\.cls: sub\.1/dog1$",
        "image": rf"{shard} has a sample without its image, NAME\.jpg: sub\.1/dog1$",
        "word": rf"{shard} has a class that is no number or word: '\\x07'$",
        "other": r".*train-\*\.tar and .*test-\*\.tar differ in classes: wolf$",
        "broken": rf"broken image {shard}/{image}: ",
    }[damage]


@pytest.mark.parametrize("damage", ["cut", "compressed", "gone", "empty", "class", "image", "word", "other", "broken"])
def test_damaged_shard_is_one_line_that_names_it(pair: tuple[Path, Path], damage: str) -> None:
    shard = pair[1] / "test-0001.tar"
    if damage in ("gone", "empty"):
        (pair[1] / "test-0000.tar").unlink()
    expected = change(shard, damage)
    with pytest.raises(InputError, match=rf"^data_dir: {expected}") as caught:
        load_shards(pair[1], image_size=8)
    assert "\n" not in str(caught.value)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data_dir: no such folder: "):
        load_shards(tmp_path / "nowhere", image_size=8)
