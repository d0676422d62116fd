"""The benchmark of serving: what it measures, what it leaves out, and its table."""

from __future__ import annotations

import json

import pytest

# The machine is described as the other benchmarks do, and those draw.
pytest.importorskip("matplotlib")

from benchmarks import serving
from benchmarks.serving import COMPILE, EAGER, FROZEN, ONNX, Case, Config, Measured, main, measure, table


def test_a_case_is_read_and_a_wrong_one_named():
    assert Case.of("resnet18:32:4") == Case("resnet18", 32, 4)
    for text in ("resnet18", "resnet18:32", "resnet18:32:0", "resnet18:a:1"):
        with pytest.raises(ValueError, match=r"^cases: expected network:image:batch, got"):
            Case.of(text)
    with pytest.raises(ValueError, match=r"^cases: expected a network of torchvision, got 'net'"):
        Case.of("net:32:1")


def test_small_images_have_the_small_stem():
    assert Case("resnet18", 32, 1).model().conv1.kernel_size == (3, 3)
    assert Case("resnet18", 224, 1).model().conv1.kernel_size == (7, 7)


def test_a_missing_library_is_left_out_with_the_reason(monkeypatch):
    def library(name):
        raise serving.MissingError(f"{name} is not installed (pip install {name})")

    monkeypatch.setattr(serving, "_library", library)
    found = measure(Case("resnet18", 16, 1), Config(sides=(EAGER, ONNX, FROZEN), seconds=0))
    assert set(found.seconds) == {EAGER, FROZEN} and all(s > 0 for s in found.seconds.values())
    assert found.missing == {ONNX: "onnxruntime is not installed (pip install onnxruntime)"}
    assert "ONNX Runtime: onnxruntime is not installed" in table([found])


def test_the_table_compares_with_the_best_peer():
    case = Case("resnet18", 32, 1)
    found = [Measured(case, {EAGER: 0.008, COMPILE: 0.006, FROZEN: 0.004}, {}), Measured(case, {EAGER: 0.01}, {})]
    lines = table(found).splitlines()
    assert lines[0] == "| network | eager, ms | compile, freezing, ms | freeze, ms | over the best peer |"
    assert lines[2] == "| resnet18 at 32, batch 1 | 8.00 | 6.00 | 4.00 | 1.50x |"
    assert lines[3] == "| resnet18 at 32, batch 1 | 10.0 |  |  |  |"


def test_figures_are_written(tmp_path, capsys):
    page, raw = tmp_path / "page.md", tmp_path / "raw.json"
    page.write_text("before\n<!-- serving -->\n<!-- /serving -->\nafter\n")
    main(Config(cases=("resnet18:16:1",), sides=(EAGER, FROZEN), seconds=0, json=raw, page=page))
    assert "resnet18 at 16, batch 1" in capsys.readouterr().out
    assert "| resnet18 at 16, batch 1 |" in page.read_text() and "by the clock" in page.read_text()
    assert set(json.loads(raw.read_text())["serving"][0]["seconds"]) == {EAGER, FROZEN}
    with pytest.raises(ValueError, match=r"^sides: expected some of .* got \['fast'\]"):
        main(Config(sides=("fast",)))
