import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from fastres.train import decoding
from fastres.train import image_folder as module
from fastres.train.config import TrainConfig
from fastres.train.data import batches, fingerprint, fingerprint_differences, load_data
from fastres.train.decoding import ImageFile, decode_image
from fastres.train.errors import InputError
from fastres.train.image_folder import load_image_folder

WriteFolder = Callable[..., Path]


@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_image_folder_gives_images_and_labels(write_folder: WriteFolder, tmp_path: Path, test: str) -> None:
    data = load_image_folder(write_folder(tmp_path, size=(8, 8), test=test), image_size=None)
    assert data.classes == ("cat", "dog")
    assert data.image_size == 8
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert isinstance(data.test.images, Tensor)
    oracle = np.array(Image.open(tmp_path / test / "dog" / "1.png"))
    assert np.array_equal(data.test.images[3].permute(1, 2, 0).numpy(), oracle)


def test_image_folder_is_resized_and_cut_to_squares(write_folder: WriteFolder, tmp_path: Path) -> None:
    data = load_image_folder(write_folder(tmp_path, size=(12, 6)), image_size=4)
    assert isinstance(data.train.images, Tensor)
    assert data.train.images.shape == (8, 3, 4, 4)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_of_other_modes_become_rgb(write_folder: WriteFolder, tmp_path: Path, mode: str) -> None:
    write_folder(tmp_path)
    path = tmp_path / "train" / "cat" / "0.png"
    Image.open(path).convert(mode).save(path)
    assert decode_image(ImageFile(str(path)), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_left_on_disk_equal_those_in_memory(
    write_folder: WriteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    write_folder(tmp_path)
    held = load_image_folder(tmp_path, image_size=6)
    monkeypatch.setattr(module, "MEMORY_LIMIT", 0)
    on_disk = load_image_folder(tmp_path, image_size=6)
    assert not isinstance(on_disk.train.images, Tensor)
    order = torch.tensor([5, 0, 7, 2, 1])
    before = torch.get_rng_state()
    pairs = zip(batches(held.train, order, 2), batches(on_disk.train, order, 2, workers=workers), strict=True)
    for (images, labels), (disk_images, disk_labels) in pairs:
        assert torch.equal(images, disk_images)
        assert torch.equal(labels, disk_labels)
    assert torch.equal(torch.get_rng_state(), before)


def remove_folder(root: Path) -> Path:
    return root / "nowhere"


def empty_folder(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def no_test_folder(root: Path) -> Path:
    (root / "test").rename(root / "exam")
    return root


def empty_class(root: Path) -> Path:
    for path in (root / "train" / "dog").iterdir():
        path.unlink()
    return root / "train"


def other_classes(root: Path) -> Path:
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return root / "train"


def broken_image(root: Path) -> Path:
    path = root / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


def not_an_image(root: Path) -> Path:
    path = root / "train" / "cat" / "0.png"
    path.write_text("hello")
    return path


@pytest.mark.parametrize(
    "damage", [remove_folder, empty_folder, no_test_folder, empty_class, other_classes, broken_image, not_an_image]
)
def test_damaged_image_folder_is_named(write_folder: WriteFolder, tmp_path: Path, damage: Any) -> None:
    root = write_folder(tmp_path / "images")
    culprit = damage(root)
    start = culprit if damage in (remove_folder, empty_folder) else root
    with pytest.raises(InputError, match=r"^data_dir: ") as caught:
        load_image_folder(start, image_size=None)
    assert str(culprit) in str(caught.value)


def test_images_come_in_the_order_of_torchvision(write_folder: WriteFolder, tmp_path: Path) -> None:
    """On which the order of the batches, and the resuming of older runs, depend."""
    write_folder(tmp_path)
    for name in ("deep/er", "deep.er", "B", ".hidden"):
        (tmp_path / "train" / "dog" / name).mkdir(parents=True)
        shutil.copyfile(tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "dog" / name / "Z.PNG")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "train" / "cat" / "1.png", tmp_path / "elsewhere" / "1.png")
    (tmp_path / "train" / "cat" / "link").symlink_to("../../elsewhere")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("hello")
    oracle = datasets.ImageFolder(str(tmp_path / "train"))
    found = module._list_images(tmp_path / "train")
    assert [
        (file.path, label) for file, label in zip(found.files, found.labels.tolist(), strict=True)
    ] == oracle.samples
    assert list(found.classes) == oracle.classes and len(oracle) == 12


def test_links_in_a_circle_add_no_image(write_folder: WriteFolder, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "self").symlink_to(".")
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "next").symlink_to(tmp_path / other)
        shutil.copyfile(tmp_path / "test" / "dog" / "0.png", tmp_path / name / f"{name}.png")
    (tmp_path / "train" / "dog" / "round").symlink_to(tmp_path / "a")
    data = load_image_folder(tmp_path, image_size=None)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 6


def test_folder_that_may_not_be_read_is_named(
    write_folder: WriteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a class as well, where its images would else be missing without a word."""
    closed = tmp_path / "train" / "cat" / "more"
    write_folder(tmp_path)
    closed.mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root, as which tests may run, may read all
    with pytest.raises(InputError, match=rf"^data_dir: cannot read {closed}: Permission denied$"):
        load_image_folder(tmp_path, image_size=None)


@pytest.mark.parametrize("dataset", ["imagefolder", "webdataset", "cifar10", "auto"])
def test_impossible_name_is_one_sentence(dataset: str) -> None:
    config = TrainConfig(dataset=dataset, data_dir=Path("x" * 300))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^data_dir: cannot read x{200}\.\.\.: File name too long$"):
        load_data(config)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "text", "gone"])
def test_broken_image_on_disk_is_one_line_that_names_it(
    write_folder: WriteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, damage: str
) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr(module, "MEMORY_LIMIT", 0)
    data = load_image_folder(tmp_path, image_size=6)
    path = tmp_path / "train" / "dog" / "2.png"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:60] if damage == "cut" else b"hello")
    with pytest.raises(InputError, match=r"^data_dir: broken image ") as caught:
        list(batches(data.train, torch.arange(8), 3, workers=workers))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_first_image_of_a_set_on_disk_is_named(
    write_folder: WriteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr(module, "MEMORY_LIMIT", 0)
    path = tmp_path / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"^data_dir: broken image .*cat/0\.png") as caught:
        load_image_folder(tmp_path, image_size=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "ending"), [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), ("<i4", "tif")])
def test_grayscale_of_16_bits_keeps_its_levels(tmp_path: Path, dtype: str, ending: str) -> None:
    values = np.linspace(0, 65535, 20 * 20).reshape(20, 20).round()
    path = tmp_path / f"image.{ending}"
    Image.fromarray(values.astype(dtype)).save(path)
    assert Image.open(path).mode.startswith("I")
    oracle = torch.from_numpy(np.rint(values / 257)).to(torch.uint8)
    assert torch.equal(decode_image(ImageFile(str(path)), 20), oracle.expand(3, -1, -1))
    assert len(oracle.unique()) == 256


def test_floats_are_of_zero_to_one(tmp_path: Path) -> None:
    values = torch.rand(8, 8)
    Image.fromarray(values.numpy()).save(tmp_path / "image.tif")
    oracle = (values.double() * 255).round().to(torch.uint8)
    assert torch.equal(decode_image(ImageFile(str(tmp_path / "image.tif")), 8), oracle.expand(3, -1, -1))


@pytest.mark.parametrize(("dtype", "value"), [("<i4", 70000), ("<i4", -1), ("<f4", 1.5), ("<f4", float("nan"))])
def test_levels_beyond_the_range_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    values = np.zeros((8, 8), dtype)
    values[3, 4] = value
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(InputError, match=r"^data_dir: broken image .*image\.tif: values from .* expected 0 to"):
        decode_image(ImageFile(str(tmp_path / "image.tif")), 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "quantized", "P"])
def test_transparent_shows_white_and_opaque_its_colour(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([90, 90, 90, 40, 40, 40])
        image.putpixel((1, 0), 1)
        image.save(path, transparency=1)
    else:
        image = Image.new("LA", (2, 1), (90, 255))
        image.putpixel((1, 0), (40, 0))
        image.convert("LA" if mode == "LA" else "RGBA").save(path)
        if mode == "quantized":
            Image.open(path).quantize(4).save(path)
    pixels = np.array(decoding._read_rgb(ImageFile(str(path))))
    assert pixels.tolist() == [[[90] * 3, [255] * 3]]


def test_opaque_alpha_and_palette_are_as_pillow_converts_them(tmp_path: Path) -> None:
    colours = Image.fromarray(np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for image in (colours.convert("RGBA"), colours.quantize(16), colours.convert("L"), colours.convert("CMYK")):
        path = tmp_path / ("image.tif" if image.mode == "CMYK" else "image.png")
        image.save(path)
        assert np.array_equal(decoding._read_rgb(ImageFile(str(path))), image.convert("RGB"))


def test_orientation_is_ignored(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").getexif()[0x0112] == 6
    assert np.array_equal(decode_image(ImageFile(str(tmp_path / "turned.png")), 8).permute(1, 2, 0), np.array(image))


def test_large_jpeg_is_decoded_at_a_reduced_size(tmp_path: Path) -> None:
    slope = np.add.outer(np.arange(240), np.arange(320)) * 255 // 558
    path = tmp_path / "large.jpg"
    Image.fromarray(slope.astype(np.uint8)).convert("RGB").save(path, quality=95)
    assert decoding._read_rgb(ImageFile(str(path))).size == (320, 240)
    assert decoding._read_rgb(ImageFile(str(path)), 16).size == (80, 60)
    assert decoding._read_rgb(ImageFile(str(path)), 60).size == (160, 120)
    assert decoding._read_rgb(ImageFile(str(path)), 61).size == (320, 240)
    whole = Image.open(path).resize((64, 48), Image.Resampling.BILINEAR).crop((8, 0, 56, 48))
    difference = decode_image(ImageFile(str(path)), 48).permute(1, 2, 0).numpy().astype(int) - np.array(whole).astype(
        int
    )
    assert abs(difference).max() <= 4


def test_one_class_only_is_refused(write_folder: WriteFolder, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "dog").rename(tmp_path / f"{part}-dog")
    with pytest.raises(InputError, match=r"^data_dir: expected two classes or more in .*train, got only cat$"):
        load_image_folder(tmp_path, image_size=None)


def test_nested_folders_other_files_and_odd_names_are_taken_in_order(write_folder: WriteFolder, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "cat").rename(tmp_path / part / "zebra")
        (tmp_path / part / "dog").rename(tmp_path / part / "h\u00f6hle \u6f22")
        (tmp_path / part / "zebra" / "Thumbs.db").write_bytes(b"no image")
        (tmp_path / part / "notes.txt").write_text("no class")
    deep = tmp_path / "train" / "zebra" / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "train" / "zebra" / "3.png").rename(deep / "3.png")
    data = load_image_folder(tmp_path, image_size=None)
    assert data.classes == ("h\u00f6hle \u6f22", "zebra")
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_class_that_cannot_be_printed_is_refused(write_folder: WriteFolder, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "dog").rename(tmp_path / part / "dog\udcff")
    with pytest.raises(InputError, match=r"^data_dir: .* cannot be printed: 'dog\\udcff'$"):
        load_image_folder(tmp_path, image_size=None)


def test_fingerprint_of_files_is_of_names_and_sizes(
    write_folder: WriteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEMORY_LIMIT", 0)
    first = fingerprint(load_image_folder(write_folder(tmp_path / "one"), image_size=None))
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    data = load_data(TrainConfig(dataset="imagefolder", data_dir=tmp_path / "elsewhere"))
    assert fingerprint(data) == first
    path = tmp_path / "elsewhere" / "test" / "cat" / "0.png"
    path.write_bytes(path.read_bytes() + b" ")
    assert fingerprint_differences(first, fingerprint(data)) == [
        "the test images or their labels are not the same as then"
    ]
    path.unlink()
    with pytest.raises(InputError, match=r"^data_dir: cannot read .*cat/0\.png"):
        fingerprint(data)
