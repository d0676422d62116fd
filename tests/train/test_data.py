import dataclasses
import json
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from fastres.train import data as module
from fastres.train.augment import Augmentation, augment, flip_bits, normalise
from fastres.train.config import TrainConfig
from fastres.train.data import (
    batches,
    fingerprint,
    fingerprint_differences,
    load_data,
    train_order,
)
from fastres.train.errors import InputError, RunError
from fastres.train.image_data import ImageData, Split


def crop_one_by_one(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """The oracle: each pixel by itself, from the same draws."""
    count, _, height, width = images.shape
    top = torch.randint(0, 2 * how.padding + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * how.padding + 1, (count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5 if how.flip else torch.zeros(count, 1)
    out = torch.zeros_like(images)
    pad = how.padding
    reflected = F.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8) if how.border == "reflect" else None
    for n in range(count):
        for i in range(height):
            for j in range(width):
                y = i + int(top[n]) - how.padding
                x = (width - 1 - j if flip[n] else j) + int(left[n]) - how.padding
                if reflected is not None:
                    out[n, :, i, j] = reflected[n, :, y + pad, x + pad]
                elif 0 <= y < height and 0 <= x < width:
                    out[n, :, i, j] = images[n, :, y, x]
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_augmentation_equals_an_image_at_a_time(flip: bool, padding: int, border: Any, size: tuple[int, int]) -> None:
    images = torch.randint(1, 256, (16, 3, *size), dtype=torch.uint8)
    how = Augmentation(padding, flip, border)
    ours = augment(images, how, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, crop_one_by_one(images, how, torch.Generator().manual_seed(3)), rtol=0, atol=0)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_reaches_every_crop_and_both_sides() -> None:
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(2000, 3, 3, 3)
    seen = {tuple(image.flatten().tolist()) for image in augment(images, Augmentation(1, True), torch.Generator())}
    assert len(seen) == 3 * 3 * 2


def test_alternating_flips_show_every_image_both_ways() -> None:
    images = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    bits = flip_bits(64, seed=3)
    assert 16 < int(bits.sum()) < 48
    even, odd = (
        augment(images, Augmentation(0, False), torch.Generator(), flipped=bits ^ epoch) for epoch in (False, True)
    )
    assert torch.equal(odd, even.flip(-1))
    assert torch.equal(even[~bits], images[~bits])


def test_augmentation_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    augment(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), Augmentation(2, True), torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalisation_is_the_formula(channels_last: bool) -> None:
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.5)
    ours = normalise(images, mean, std, channels_last=channels_last)
    oracle = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(ours.double(), oracle, rtol=1e-6, atol=1e-6)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(("count", "batch", "kept"), [(9, 4, 8), (8, 4, 8), (10, 4, 10), (3, 2, 2), (5, 8, 5)])
def test_order_is_a_permutation_without_a_lone_last_image(count: int, batch: int, kept: int) -> None:
    order = train_order(count, batch, torch.Generator().manual_seed(0))
    assert len(order) == kept == len(set(order.tolist()))
    assert set(order.tolist()) <= set(range(count))


def test_batches_can_start_in_the_middle() -> None:
    split = Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2), torch.arange(10))
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6])
    whole = list(batches(split, order, 3))
    assert [labels.tolist() for _, labels in whole] == [[3, 1, 4], [0, 5, 9], [2, 6]]
    for (images, labels), (later_images, later_labels) in zip(
        whole[1:], batches(split, order, 3, start=1), strict=True
    ):
        assert torch.equal(images, later_images)
        assert torch.equal(labels, later_labels)
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_only_image_folders_are_resized() -> None:
    with pytest.raises(InputError, match=r"^image_size: "):
        load_data(TrainConfig(dataset="digits", image_size=64))


def test_digits_are_split_for_good_and_evenly() -> None:
    first, second = (load_data(TrainConfig(dataset="digits")) for _ in range(2))
    assert len(first.train) == 1437
    assert len(first.test) == 360
    assert isinstance(first.train.images, Tensor)
    assert isinstance(first.test.images, Tensor)
    assert first.train.images.shape[1:] == (3, 32, 32)
    assert first.train.images.dtype == torch.uint8
    assert torch.equal(first.train.labels, second.train.labels)
    assert torch.bincount(first.test.labels).min() >= 34
    known = {bytes(image.numpy().tobytes()) for image in first.train.images}
    assert not any(bytes(image.numpy().tobytes()) in known for image in first.test.images)
    assert not first.augmentation.flip


def test_statistics_are_those_of_the_training_pixels() -> None:
    data = load_data(TrainConfig(dataset="digits"))
    assert isinstance(data.train.images, Tensor)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


# --- Fingerprints ---


def some_data() -> ImageData:
    def split(count: int) -> Split:
        return Split(torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8), torch.arange(count) % 2)

    return ImageData(
        "cifar10", split(9), split(4), ("a", "b"), 4, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), Augmentation(1, False)
    )


def test_fingerprint_is_json_and_that_of_equal_images() -> None:
    data = some_data()
    now = fingerprint(data)
    assert json.loads(json.dumps(now)) == now
    assert isinstance(data.train.images, Tensor)
    copied = Split(data.train.images.clone(memory_format=torch.channels_last), data.train.labels.int())
    assert fingerprint(dataclasses.replace(data, train=copied)) == now
    assert fingerprint_differences(now, now) == []


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("change", ["pixel", "label", "order"])
def test_one_pixel_or_label_makes_another_fingerprint(part: str, change: str) -> None:
    data = some_data()
    split: Split = getattr(data, part)
    assert isinstance(split.images, Tensor)
    images, labels = split.images.clone(), split.labels.clone()
    if change == "pixel":
        images[1, 2, 3, 0] ^= 1
    elif change == "label":
        labels[1] = 0
    else:
        images = images.flip(0)
    other = dataclasses.replace(data, **{part: Split(images, labels)})
    title = "training" if part == "train" else "test"
    assert fingerprint_differences(fingerprint(data), fingerprint(other)) == [
        f"the {title} images or their labels are not the same as then"
    ]


def test_each_difference_of_fingerprints_is_a_sentence() -> None:
    data = some_data()
    assert isinstance(data.test.images, Tensor)
    shorter = Split(data.test.images[:3], data.test.labels[:3])
    other = dataclasses.replace(
        data, name="digits", test=shorter, classes=("a", "c"), image_size=5, mean=(0.1, 0.2, 0.4), std=(0.5, 0.5, 0.6)
    )
    assert fingerprint_differences(fingerprint(data), fingerprint(other)) == [
        "the data set was cifar10, is digits",
        "the classes were 2 (a, b), are 2 (a, c)",
        "the images were 4 pixels wide, are 5",
        "the test images were 4, are 3",
        "the pixels' mean was [0.1, 0.2, 0.3], is [0.1, 0.2, 0.4]",
        "the pixels' std was [0.5, 0.5, 0.5], is [0.5, 0.5, 0.6]",
    ]


# --- CIFAR ---


def write_cifar(root: Path) -> Path:
    """The files of CIFAR-10 with ten images each."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {"data": random.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    return folder


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_cifar_under_the_data_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
    folder = write_cifar(tmp_path)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    data = load_data(TrainConfig(dataset=dataset, data_dir=tmp_path))
    assert data.name == "cifar10"
    assert data.instead_of is None
    assert len(data.train) == 50
    assert isinstance(data.test.images, Tensor)
    pixels = pickle.loads((folder / "test_batch").read_bytes())["data"].reshape(10, 3, 32, 32)
    assert np.array_equal(data.test.images.numpy(), pixels)
    assert data.augmentation == Augmentation(padding=4, flip=True)


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_damaged_cifar_is_an_error_and_stays_as_it_is(tmp_path: Path, dataset: Any) -> None:
    folder = write_cifar(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"^data_dir: .*damaged") as caught:
        load_data(TrainConfig(dataset=dataset, data_dir=tmp_path))
    assert str(folder) in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_auto_takes_the_digits_where_cifar_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_unreachable", lambda url: "no network")
    data = load_data(TrainConfig(dataset="auto", data_dir=tmp_path / "data"))
    assert data.name == "digits"
    assert "CIFAR-10" in str(data.instead_of)
    assert "no network" in str(data.instead_of)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dataset", "title"), [("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100")])
def test_cifar_out_of_reach_is_an_error_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any, title: str
) -> None:
    monkeypatch.setattr(module, "_unreachable", lambda url: "no network")
    with pytest.raises(RunError, match=rf"{title} is not in .*no network"):
        load_data(TrainConfig(dataset=dataset, data_dir=tmp_path / "data"))
    assert not list(tmp_path.iterdir())


def test_failed_download_leads_auto_to_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"cut off")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    data = load_data(TrainConfig(dataset="auto", data_dir=tmp_path), notify=lambda text: None)
    assert data.name == "digits"
    assert "could not be downloaded" in str(data.instead_of)


def test_site_that_never_answers_counts_as_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert module._unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}/file") is not None


def test_file_in_place_of_the_data_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("not a folder")
    with pytest.raises(InputError, match=r"^data_dir: expected a folder"):
        load_data(TrainConfig(dataset="cifar10", data_dir=path))
