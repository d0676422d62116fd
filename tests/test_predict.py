"""`python -m fastres.predict`: the classes that the trainer's own evaluation finds."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from fastres import predict
from fastres.train import InputError, RunError, load_data, load_model
from fastres.train.augment import normalise
from fastres.train.config import TrainConfig
from tests.oracle import assert_close
from tests.train.conftest import run, tiny_models, write_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("tiny_models")


@pytest.fixture
def images(tmp_path, write_folder):  # noqa: F811
    """An image folder whose images are neither square nor of the size that the network takes."""
    return write_folder(tmp_path / "images", size=(12, 9))


@pytest.fixture
def data(images):
    return load_data(TrainConfig(dataset="imagefolder", data_dir=images, image_size=8), notify=lambda text: None)


@pytest.fixture
def trained(run, data, tmp_path):  # noqa: F811
    run(dataset="imagefolder", batch_size=4)
    return tmp_path / "run"


def evaluated(folder, data):
    """Probabilities of the test images as an evaluation computes them, in float64."""
    model = load_model(folder / "best.pt").double()
    with torch.no_grad():
        return model(normalise(data.test.images, data.mean, data.std).double()).softmax(1)


def ask(*args) -> str:
    out = io.StringIO()
    predict.run(predict.tyro.cli(predict.Options, args=list(map(str, args))), Console(file=out, width=160))
    return out.getvalue()


@pytest.mark.parametrize("frozen", ["--freeze", "--no-freeze"])
def test_the_probabilities_are_those_of_the_evaluation(trained, images, data, capsys, frozen):
    assert predict.main([str(trained), str(images / "test"), "--json", "--top", "2", "--batch-size", "3", frozen]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths = sorted((images / "test").rglob("*.png"))
    assert [row["image"] for row in rows] == list(map(str, paths))
    for row, expected in zip(rows, evaluated(trained, data), strict=True):
        given = {guess["class"]: guess["probability"] for guess in row["top"]}
        assert set(given) == {"cat", "dog"} and row["class"] == row["top"][0]["class"]
        assert row["probability"] == row["top"][0]["probability"] >= row["top"][1]["probability"]
        found = torch.tensor([given["cat"], given["dog"]], dtype=torch.float64)
        assert_close(found.float(), expected, "probabilities", length=27 + 32)


def test_bfloat16_is_used_where_the_evaluation_used_it(run, data, tmp_path):  # noqa: F811
    run(dataset="imagefolder", batch_size=4, amp="bf16")
    predictor = predict.Predictor(tmp_path / "run", frozen=False)
    seen = []
    predictor.model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    chances = predictor(data.test.images)
    assert seen == [torch.bfloat16] and chances.dtype == torch.float32
    torch.testing.assert_close(chances.sum(1), torch.ones(4))


def test_a_table_names_the_class_and_the_next_ones(trained, images):
    printed = ask(trained / "best.pt", images / "test" / "cat" / "0.png", "--top", 5)
    line = next(line for line in printed.splitlines() if "0.png" in line)
    assert "cat" in line and "dog" in line and line.count("%") == 2


def test_files_folders_and_patterns_are_found(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    (images / "test" / "notes.txt").write_text("not an image")
    shutil.copy(images / "test" / "cat" / "0.png", tmp_path / "photo.dat")
    photo = str(tmp_path / "photo.dat")
    names = list(map(str, predict.image_files(["test/*/1.png", "test/cat", photo, "**/3.png"])))
    assert names == ["test/cat/1.png", "test/dog/1.png", "test/cat/0.png", "test/cat/1.png", photo,
                     "train/cat/3.png", "train/dog/3.png"]  # fmt: skip
    for name, words in (("gone.png", "no such file"), ("*.gif", "no such file"), ("test/*.txt", "holds no images"),
                        ("x" * 300, r"^image: cannot read x{200}\.\.\.: File name too long$")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            predict.image_files([name])
    with pytest.raises(InputError, match=r"^checkpoint: cannot read x{200}\.\.\.: File name too long$"):
        predict.checkpoint_file(Path("x" * 300))
    (images / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no images"):
        predict.image_files(["empty"])


def test_a_folder_is_searched_as_the_trainer_does(images, monkeypatch):
    (images / "test" / "more").symlink_to(images / "train" / "cat")
    (images / "test" / "cat" / "again").symlink_to(images / "test")
    found = [str(path.relative_to(images)) for path in predict.image_files([str(images / "test")])]
    linked = [f"test/more/{index}.png" for index in range(4)]
    assert found == ["test/cat/0.png", "test/cat/1.png", "test/dog/0.png", "test/dog/1.png", *linked]

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # root, as which tests may run, may read all
    with pytest.raises(InputError, match=r"^image: cannot read .*test: Permission denied$"):
        predict.image_files([str(images / "test")])


def test_a_broken_image_is_named_and_the_others_are_told(trained, images, capsys):
    broken = images / "test" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert predict.main([str(trained), str(images / "test"), "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("error" in row) for row in rows] == [True, False, False, False]
    assert rows[0]["image"] == str(broken) and rows[0]["error"].startswith(f"broken image {broken}")
    printed = ask(trained, broken)  # nothing but broken ones
    assert "unreadable" in printed


def test_one_picture_of_any_mode_is_taken(trained, tmp_path):
    for mode in ("L", "RGBA", "P"):
        # What is transparent would show white.
        Image.new(mode, (30, 20), (0, 0, 0, 255) if mode == "RGBA" else 0).save(tmp_path / f"{mode}.png")
    found = list(predict.Predictor(trained).predict([tmp_path / f"{mode}.png" for mode in ("L", "RGBA", "P")]))
    assert all(one.error is None for one in found)
    for one in found[1:]:  # all are black
        assert one.guesses[0].name == found[0].guesses[0].name
        assert one.guesses[0].probability == pytest.approx(found[0].guesses[0].probability)


def test_the_best_checkpoint_of_a_folder_is_taken_or_else_the_last(trained):
    assert predict.checkpoint_file(trained).name == "best.pt"
    (trained / "best.pt").unlink()
    assert predict.checkpoint_file(trained).name == "last.pt"
    assert predict.Predictor(trained).file.name == "last.pt"
    (trained / "last.pt").rename(trained / "previous.pt")  # as a kill may leave them
    assert predict.checkpoint_file(trained).name == "previous.pt"


def test_an_older_checkpoint_says_what_it_lacks(trained, tmp_path):
    state = torch.load(trained / "best.pt", weights_only=True)
    del state["mean"], state["image_size"]
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(InputError, match=r"old\.pt does not hold mean, image_size"):
        predict.Predictor(tmp_path / "old.pt")


def test_wrong_arguments_are_told_in_one_line(trained, images, tmp_path, capsys):
    image = images / "test" / "cat" / "0.png"
    (tmp_path / "no.pt").write_text("no checkpoint")
    for args, words in (
        ([tmp_path / "gone.pt", image], "checkpoint: no checkpoint at"),
        ([tmp_path / "no.pt", image], "checkpoint: "),
        ([trained], "expected at least one"),
        ([trained, image, "--top", 0], "top: expected at least 1, got 0"),
        ([trained, image, "--batch-size", 0], "batch_size: expected at least 1"),
        ([trained, image, "--device", "tpu"], "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ([trained, tmp_path / "gone.png"], "no such file"),
    ):
        assert predict.main(list(map(str, args))) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_a_gpu_that_is_not_there_is_told(trained, images):
    with pytest.raises(RunError, match="cuda:99 is not there"):
        ask(trained, images / "test", "--device", "cuda:99")


def test_images_of_another_size_or_type_are_refused(trained):
    predictor = predict.Predictor(trained)
    for wrong in (torch.zeros(1, 3, 9, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError, match="images: expected uint8"):
            predictor(wrong)
