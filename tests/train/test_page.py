"""What a run leaves for people: pictures, the page, the progress line, TensorBoard's events."""

import base64
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from fastres.train import InputError, TrainConfig, pictures
from fastres.train.boards import FOLDER, Board
from fastres.train.config import to_dict
from fastres.train.decoding import ImageFile, ImageFiles
from fastres.train.errors import RunError
from fastres.train.history import read_history
from fastres.train.image_data import Split
from fastres.train.page import PAGE, class_rows, confused_pairs, write_report
from fastres.train.progress import Progress, duration
from tests.train.conftest import make_data

VOID = {"meta", "img", "br", "hr", "link", "input"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Checks that tags are closed in the order in which they were opened, and gathers what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"])
        self.sources += [given[name] for name in ("src", "href", "srcset", "data", "action") if name in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words += data


def write_run(directory: Path, *, epochs: int = 3, steps: int = 4, **fields) -> Path:
    """The files of a run of made-up figures."""
    directory.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(TrainConfig(), epochs=epochs, batch_size=12, lr=0.1, output_dir=directory, **fields)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    metrics, losses = [], []
    for epoch in range(1, epochs + 1):
        numbers = range((epoch - 1) * steps + 1, epoch * steps + 1)
        losses += [{"step": step, "epoch": epoch, "loss": 3 / step} for step in numbers]
        metrics.append(
            {"epoch": epoch, "step": epoch * steps, "complete": True, "train_loss": 2 / epoch,
             "train_accuracy": 1 - 1 / (epoch + 1), "test_loss": 2.5 / epoch, "test_accuracy": 1 - 1 / (epoch + 2),
             "lr": 0.1 / epoch, "images_per_second": None if epoch == 1 else 100.0, "seconds": 30.0 * epoch}
        )  # fmt: skip
    for name, rows in (("metrics.jsonl", metrics), ("steps.jsonl", losses)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def made_logits(labels: torch.Tensor, classes: int, *, wrong: int) -> torch.Tensor:
    """Right for all but `wrong` images."""
    logits = 0.1 * torch.randn(len(labels), classes) + 5 * F.one_hot(labels, classes)
    logits[:wrong] = logits[:wrong].roll(1, dims=1)
    return logits


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture
def report(tmp_path):
    """The page of a run, with names in it that are HTML if they are not escaped."""
    directory = write_run(tmp_path / "run & <b>co")
    data = dataclasses.replace(make_data(test=30), classes=("<script>", "cat & dog", "$x_1$"), instead_of="No <net>")
    problems = write_report(directory, data, SimpleNamespace(logits=made_logits(data.test.labels, 3, wrong=7)))
    assert problems == []
    return directory


def test_the_page_is_well_formed_and_refers_to_nothing_outside(report):
    text = (report / PAGE).read_text(encoding="utf-8")
    page = Page(text)
    expected = "facts curves confusion classes mistakes pairs configuration machine instead-of"
    assert set(expected.split()) <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags and "b" not in page.tags
    assert len(page.sources) == 3 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[\w+/=]+", "", text))
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    for word in ("<script>", "cat & dog", "No <net>", "76.67%", "batch_size", torch.__version__, "nesterov", "80.00%"):
        assert word in page.words, word


def test_the_pictures_in_the_page_are_those_in_the_folder(report):
    page = Page((report / PAGE).read_text(encoding="utf-8"))
    for source, name in zip(page.sources, ("curves", "confusion", "mistakes"), strict=True):
        raw = base64.b64decode(source.partition(",")[2])
        assert raw == (report / f"{name}.png").read_bytes()
        assert min(picture_size(report / f"{name}.png")) > 200
    assert not [file.name for file in report.iterdir() if file.name.endswith(".tmp")]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_whole_page(report, tmp_path, width):
    """A second page measures the first one in a frame, since a page of ours runs no script."""
    measure = """<iframe id=f style="width:%dpx;height:900px;border:0" src="page.html"></iframe><pre id=out></pre>
    <script>
    f.onload = () => { const d = f.contentDocument, e = d.documentElement;
      out.textContent = JSON.stringify({scroll: e.scrollWidth, client: e.clientWidth, quirks: d.compatMode,
        images: [...d.images].map(i => i.naturalWidth), sections: d.querySelectorAll("section").length}); };</script>"""
    (tmp_path / "page.html").write_bytes((report / PAGE).read_bytes())
    (tmp_path / "measure.html").write_text(measure % width)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
               (tmp_path / "measure.html").as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', dom)[1])
    assert found["scroll"] <= found["client"], "the page is wider than its window"
    assert found["quirks"] == "CSS1Compat"
    assert len(found["images"]) == 3 and min(found["images"]) > 200
    assert found["sections"] == len(re.findall("<section", (report / PAGE).read_text(encoding="utf-8")))


def test_a_run_without_files_but_its_configuration_has_a_page(tmp_path):
    directory = write_run(tmp_path / "run", epochs=1)
    for name in ("metrics.jsonl", "steps.jsonl"):
        (directory / name).unlink()
    data = make_data()
    assert write_report(directory, data, SimpleNamespace(logits=made_logits(data.test.labels, 3, wrong=0))) == []
    page = Page((directory / PAGE).read_text(encoding="utf-8"))
    assert "Every test image is classified correctly." in page.words and "pairs" not in page.ids


def test_broken_lines_are_told_and_odd_figures_drawn(tmp_path):
    directory = write_run(tmp_path / "run", epochs=2)
    with (directory / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "epoch": 3, "loss": NaN}\n\xff\xfe\n[2]\n{"step": 10, "epo')
    data = make_data()
    logits = made_logits(data.test.labels, 3, wrong=1).to(torch.bfloat16)
    assert write_report(directory, data, SimpleNamespace(logits=logits)) == []
    page = Page((directory / PAGE).read_text(encoding="utf-8"))
    assert "broken-lines" in page.ids and "2 lines of" in page.words


def test_a_picture_that_fails_is_told_and_the_page_has_the_others(tmp_path, monkeypatch):
    directory, data = write_run(tmp_path / "run"), make_data()

    def fail(*args):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(pictures, "draw_confusion", fail)
    problems = write_report(directory, data, SimpleNamespace(logits=made_logits(data.test.labels, 3, wrong=2)))
    assert problems == ["confusion.png could not be written: RuntimeError: no fonts"]
    page = Page((directory / PAGE).read_text(encoding="utf-8"))
    assert len(page.sources) == 2 and "This picture could not be drawn." in page.words
    assert not (directory / "confusion.png").exists()


@pytest.mark.parametrize("fault", ["folder", "logits", "disk"])
def test_a_report_that_fails_raises_nothing(tmp_path, monkeypatch, fault):
    data = make_data()
    directory = tmp_path / "none" if fault == "folder" else write_run(tmp_path / "run")
    logits = torch.zeros(4, 3) if fault == "logits" else made_logits(data.test.labels, 3, wrong=0)
    if fault == "disk":
        (directory / PAGE).mkdir()
    problems = write_report(directory, data, SimpleNamespace(logits=logits))
    assert len(problems) == 1 and problems[0].startswith(f"{PAGE} could not be written: ")
    if fault == "logits":
        assert "expected [12, 3], got [4, 3]" in problems[0]


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_confusion_matrix_and_the_classes_are_those_of_scikit_learn():
    labels = torch.randint(0, 6, (300,))  # of class 6 there is no image
    logits = torch.randn(300, 7)
    logits[:, 5] = -9  # and class 5 is never predicted
    counts, predicted = pictures.confusion(logits, labels), logits.argmax(1)
    assert np.array_equal(counts, confusion_matrix(labels, predicted, labels=range(7)))
    rows = class_rows(counts, "abcdefg")
    # scikit-learn's NaN is our None: no image of the class, or none taken for it.
    recall = recall_score(labels, predicted, labels=range(7), average=None, zero_division=np.nan)
    precision = precision_score(labels, predicted, labels=range(7), average=None, zero_division=np.nan)
    assert [np.nan if row.recall is None else row.recall for row in rows] == pytest.approx(recall.tolist(), nan_ok=True)
    assert [np.nan if row.precision is None else row.precision for row in rows] == pytest.approx(
        precision.tolist(), nan_ok=True
    )
    assert [row.images for row in rows] == torch.bincount(labels, minlength=7).tolist()
    pairs = confused_pairs(counts, "abcdefg")
    assert len(pairs) == 10
    wrong = sorted((counts - torch.diag(counts.diagonal())).flatten().tolist(), reverse=True)
    assert [count for *_, count in pairs] == wrong[:10]
    assert all(counts["abcdefg".index(i), "abcdefg".index(j)] == n and i != j for i, j, n in pairs)
    assert rows[0].taken_for.startswith(max("bcdefg", key=lambda c: int(counts[0, "abcdefg".index(c)])))


def test_the_worst_mistakes_are_the_wrong_images_of_largest_loss():
    labels, logits = torch.randint(0, 4, (200,)), 3 * torch.randn(200, 4)
    found = pictures.worst_mistakes(logits, labels, 9)
    losses = -logits.double().log_softmax(1)[torch.arange(200), labels]
    wrong = [i for i in range(200) if logits[i].argmax() != labels[i]]
    expected = sorted(wrong, key=lambda i: -losses[i])[:9]
    assert [mistake.position for mistake in found] == expected
    for mistake in found:
        chances = logits[mistake.position].double().softmax(0)
        assert mistake.label == labels[mistake.position] and mistake.predicted == chances.argmax()
        assert mistake.loss == pytest.approx(losses[mistake.position].item())
        assert mistake.label_probability == pytest.approx(chances[mistake.label].item())
        assert mistake.predicted_probability == pytest.approx(chances.max().item())


@pytest.mark.parametrize("classes", [2, 15, 40, 100, 130])
def test_no_class_names_overlap_in_the_confusion_matrix(tmp_path, monkeypatch, classes):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    counts = torch.randint(0, 30, (classes, classes))
    pictures.draw_confusion(counts, [f"a class by name {i}" for i in range(classes)], tmp_path / "c.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
    boxes.sort(key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 0.5 for low, high in itertools.pairwise(boxes))
    sides = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    sides.sort(key=lambda box: box.x0)
    assert all(left.x1 <= right.x0 + 0.5 for left, right in itertools.pairwise(sides))
    assert all(box.x0 >= 0 for box in boxes) and all(box.y0 >= 0 for box in sides)
    assert (len(boxes) == classes) == (classes <= 100)
    assert bool(axes.texts) == (classes <= 20)


@pytest.mark.parametrize("epochs", [1, 200])
def test_curves_are_drawn_of_few_and_of_many_epochs(tmp_path, monkeypatch, epochs):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    pictures.draw_curves(read_history(write_run(tmp_path / "run", epochs=epochs, steps=11)), tmp_path / "c.png")
    loss, accuracy, rate, speed = drawn[0].axes
    by_step, train, test = loss.lines
    assert len(by_step.get_xdata()) <= pictures.POINTS and len(train.get_xdata()) == epochs
    assert list(train.get_ydata()) == [2 / e for e in range(1, epochs + 1)]
    assert list(test.get_xdata()) == list(range(1, epochs + 1))
    assert (train.get_marker() == "o") == (epochs == 1)
    assert loss.get_yscale() == ("linear" if epochs == 1 else "log")
    assert len(accuracy.lines) == 3
    assert f"best {1 - 1 / (epochs + 2):.2%}" in [text.get_text() for text in accuracy.get_legend().texts]
    assert len(speed.lines) == (epochs > 1)  # the first epoch has no speed
    assert rate.get_ylim()[0] == 0


def test_an_epoch_cut_short_lies_where_it_was_cut(tmp_path):
    directory = write_run(tmp_path / "run", epochs=2, steps=10)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3, "step": 25, "complete": False, "test_accuracy": 0.5}) + "\n")
    history = read_history(directory)
    assert history.epochs() == [1, 2, 2.5]
    assert math.isnan(history.series("train_loss")[2])


def test_the_mean_of_thinned_steps_is_that_of_all():
    x, y = list(range(6000)), torch.randn(6000, dtype=torch.float64).tolist()
    thin_x, thin_y = pictures.thinned(x, y)
    assert len(thin_x) == len(thin_y) == 1000
    assert np.mean(thin_y) == pytest.approx(np.mean(y)) and thin_x[0] == 2.5


def test_mistakes_are_drawn_from_files_as_well(tmp_path, write_folder):
    root = write_folder(tmp_path / "images")
    files = ImageFiles(root / "test", [ImageFile(str(path)) for path in sorted((root / "test").rglob("*.png"))], 8)
    data = dataclasses.replace(make_data(), test=Split(files, torch.tensor([0, 0, 1, 1])), classes=("cat", "dog"))
    found = pictures.worst_mistakes(torch.tensor([[0.0, 1], [1, 0], [1, 0], [0, 1]]), data.test.labels, 5)
    pictures.draw_mistakes(found, data, tmp_path / "m.png")
    assert [mistake.position for mistake in found] == [0, 2] and min(picture_size(tmp_path / "m.png")) > 200


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    path.write_text("before")
    figure = pictures.new_figure(2, 2)

    def fail(file, **kwargs):
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RunError, match="No space"):
        pictures.save(figure, path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.png"] and path.read_text() == "before"


def test_the_library_imports_without_matplotlib_and_drawing_keeps_the_backend():
    """torchmetrics, which the trainer needs, imports matplotlib itself."""
    code = """
import sys, fastres
print("matplotlib" in sys.modules)
import matplotlib; matplotlib.use("svg", force=True)
from fastres.train import pictures
import torch, tempfile, pathlib, matplotlib.pyplot
before = dict(matplotlib.rcParams)
pictures.draw_confusion(torch.eye(2).long(), "ab", pathlib.Path(tempfile.mkdtemp()) / "c.png")
print(matplotlib.get_backend().lower(), matplotlib.pyplot.get_fignums(), dict(matplotlib.rcParams) == before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["False", "svg", "[]", "True"]


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no such folder: .*gone"):
        read_history(tmp_path / "gone")
    with pytest.raises(InputError, match=r"holds neither config\.json nor metrics\.jsonl"):
        read_history(tmp_path)


def test_a_step_that_was_written_twice_counts_once(tmp_path):
    directory = write_run(tmp_path / "run", epochs=1)
    with (directory / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "epoch": 1, "loss": 7.0}) + "\n")
    rows = read_history(directory).steps
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[1]["loss"] == 7.0


# ----------------------------------------------------------------------------------------------------- while it trains


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_loss_accuracy_speed_and_the_time_left():
    now = [0.0]
    out = Terminal()
    with Progress(1000, 200, file=out, clock=lambda: now[0]) as progress:
        assert progress.shown and progress.seconds_left() is None
        progress.epoch(3, 7)
        now[0] = 50.0  # the first report, in which things are built, says nothing about the others
        progress.update(100, loss=1.25, accuracy=0.5, rate=1234.4)
        assert progress.seconds_left() is None
        now[0] = 60.0
        progress.update(200, loss=0.5, accuracy=0.625, rate=20.0)
        assert progress.seconds_left() == pytest.approx(25.0)  # 500 images at 20 a second
        progress.clear()
    line = out.getvalue()
    assert "epoch 3/7" in line and "loss 0.5000  accuracy 62.50%  20 images/s  25 s left" in line and "50%" in line


def test_a_log_file_gets_no_progress_line():
    out = io.StringIO()
    with Progress(100, file=out) as progress:
        progress.epoch(1, 1)
        progress.update(60, loss=1.0, accuracy=0.5, rate=10.0)
        progress.update(40, loss=1.0, accuracy=0.5, rate=10.0)
        progress.clear()
        assert not progress.shown and progress.seconds_left() == 0
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (187, "3:07 min"), (18130, "5:02 h")]
)
def test_durations_read_as_people_write_them(seconds, words):
    assert duration(seconds) == words


def test_a_board_goes_on_after_a_resume_without_double_points(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = Board(tmp_path)
    assert board.live
    for step in (1, 2, 3, 4):
        board.add({"step": step, "epoch": 1, "loss": 10.0 + step})
    board.add({"step": 4, "epoch": 1, "test_loss": 1.0, "test_accuracy": 0.5, "lr": 0.1, "images_per_second": None})
    board.close()
    board = Board(tmp_path, 2)  # the checkpoint was of step 2
    for step in (3, 4):
        board.add({"step": step, "epoch": 1, "loss": 20.0 + step})
    board.close()
    board.add({"step": 5, "loss": 0.0})  # closed: nothing happens
    events = accumulator.EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/step")] == [(1, 11), (2, 12), (3, 23), (4, 24)]
    assert events.Scalars("loss/test") == []  # of step 4, which is still to come
    assert "images_per_second" not in events.Tags()["scalars"]


def test_without_tensorboard_a_board_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = Board(tmp_path)
    board.add({"step": 1, "loss": 1.0})
    board.close()
    assert not board.live and list(tmp_path.iterdir()) == []


def test_a_board_that_cannot_be_written_says_so_once(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            assert purge_step == 8

        def add_scalar(self, tag, value, step):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    told: list[str] = []
    board = Board(tmp_path, 7, notify=told.append)
    for _ in range(2):
        board.add({"step": 8, "loss": 1.0})
    board.close()
    assert len(told) == 1 and "No space left on device" in told[0]
