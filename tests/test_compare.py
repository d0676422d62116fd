"""`python -m fastres.compare`."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from fastres import compare
from fastres.train import pictures
from fastres.train.history import read_history
from tests.train.test_page import write_run


@pytest.fixture
def three(tmp_path):
    """A finished run, a run at work with another rate, and one that has done no epoch yet and ends in half a line."""
    done = write_run(tmp_path / "a" / "run", epochs=4)
    summary = {"finished": True, "epoch": 4, "seconds": 130.0, "images_per_second": 250.0}
    (done / "summary.json").write_text(json.dumps(summary))
    write_run(tmp_path / "b" / "run", epochs=2, optimizer="adam")
    fresh = write_run(tmp_path / "fresh", epochs=1)
    (fresh / "metrics.jsonl").write_text('[2]\n{"epoch": 1, "st')
    return [done, tmp_path / "b" / "run", fresh]


def run(*args, width: int = 200) -> tuple[int, str]:
    out = io.StringIO()
    options = compare.tyro.cli(compare.Options, args=list(map(str, args)))
    compare.run(options, Console(file=out, width=width))
    return 0, out.getvalue()


def cells(table: list[tuple[str, list[str]]]) -> dict[str, list[str]]:
    return dict(table)


def test_the_table_says_what_differs_and_what_came_out(three):
    table = cells(compare.rows([read_history(directory) for directory in three]))
    assert table["optimizer"] == ["nesterov", "adam", "nesterov"] and table["epochs"] == ["4", "2", "1"]
    assert not {"lr", "seed", "output_dir", "resume"} & set(table)
    assert table["state"] == ["finished", "at work, or killed", "at work, or killed"]
    assert table["epochs done"] == ["4 of 4", "2 of 2", "0 of 1"]
    assert table["best test accuracy"] == ["83.33% in epoch 4", "75.00% in epoch 2", "-"]
    assert table["last test accuracy"] == ["83.33%", "75.00%", "-"]
    assert table["last test loss"] == ["0.6250", "1.2500", "-"]
    assert table["time"] == ["2:00 min", "1:00 min", "-"]
    assert table["images a second"] == ["250", "100", "-"]
    assert table["lines that are broken"] == ["0", "0", "1"]


def test_best_and_last_differ_where_accuracy_fell(tmp_path):
    directory = write_run(tmp_path / "run", epochs=2)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3, "step": 12, "test_accuracy": 0.125, "test_loss": float("nan")}) + "\n")
    table = cells(compare.rows([read_history(directory)]))
    assert (table["best test accuracy"], table["last test accuracy"]) == (["75.00% in epoch 2"], ["12.50%"])
    assert table["last test loss"] == ["-"] and "lines that are broken" not in table


def test_folders_of_one_name_are_told_apart(three):
    assert compare.labels(three) == ["a/run", "b/run", "fresh"]
    assert compare.labels([three[0], three[0]])[0].endswith("a/run")


def test_the_command_prints_the_table_and_draws(three, tmp_path, capsys):
    picture = tmp_path / "pictures" / "all.png"
    assert compare.main([*map(str, three), "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "a/run" in printed and "83.33%" in printed and "all.png" in "".join(printed.split())
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 500


def test_runs_of_different_lengths_are_drawn_on_one_axis(three, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    run(*three, "--output", tmp_path / "c.png")
    accuracy, over_time, train_loss, test_loss = drawn[0].axes
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[1, 2, 3, 4], [1, 2]]
    assert [list(line.get_xdata()) for line in over_time.lines] == [[0.5, 1, 1.5, 2], [0.5, 1]]
    assert list(train_loss.lines[1].get_ydata()) == [2, 1] and list(test_loss.lines[1].get_ydata()) == [2.5, 1.25]
    assert accuracy.lines[0].get_color() != accuracy.lines[1].get_color()
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["a/run", "b/run", "fresh"]


def test_many_runs_get_a_row_each(tmp_path):
    runs = [write_run(tmp_path / f"run[{i}]", epochs=i + 1) for i in range(9)]
    _, printed = run(*runs, "--output", tmp_path / "c.png", width=250)
    lines = [line for line in printed.splitlines() if "run[" in line]
    assert len(lines) == 9 and "run[8]" in lines[8] and "90.91%" in lines[8]


def test_json_holds_the_same(three, tmp_path, capsys):
    assert compare.main([*map(str, three), "--json", "--output", str(tmp_path / "c.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["a/run", "b/run", "fresh"]
    assert found["b/run"]["config"] == {"epochs": 2, "optimizer": "adam"}
    assert found["a/run"]["best_accuracy"] == pytest.approx(5 / 6) and found["fresh"]["best_accuracy"] is None


def test_runs_without_an_epoch_have_no_picture(three, tmp_path):
    _, printed = run(three[2], "--output", tmp_path / "c.png")
    assert "no curves" in printed and not (tmp_path / "c.png").exists()


def test_a_run_without_its_configuration_is_compared(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="adam")]
    (runs[1] / "config.json").write_text("{")
    table = cells(compare.rows([read_history(directory) for directory in runs]))
    assert table["optimizer"] == ["nesterov", "?"] and table["epochs done"] == ["3 of 3", "3 of ?"]


def test_wrong_arguments_are_told_in_one_line(tmp_path, capsys):
    good, empty = write_run(tmp_path / "good"), tmp_path / "empty"
    empty.mkdir()
    blocked = tmp_path / "file"
    blocked.write_text("")
    for args, words in (
        ([good, tmp_path / "gone"], "no such folder"),
        (["x" * 300], "run: cannot read xxx"),
        ([good, "--output", tmp_path / "c.pdf"], "output: expected"),
        ([empty], "holds neither config.json nor metrics.jsonl"),
        ([], "expected at least one"),
        ([good, "--output", blocked / "c.png"], "cannot write"),
        ([good, "--output", tmp_path], "cannot write"),
    ):
        assert compare.main(list(map(str, args))) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert sorted(Path(tmp_path).glob("*.tmp")) == []
