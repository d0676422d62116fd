"""How benchmarks.results writes its figures down: the page with all of them, and the README's selection."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

# The command draws; `pip install -e ".[test]"` alone does not bring what it draws with.
pytest.importorskip("matplotlib")

from benchmarks import serving
from benchmarks.records import PUBLISHED, ROOT
from benchmarks.results import (
    COPY,
    Config,
    Measurement,
    Results,
    from_json,
    main,
    newest,
    page,
    selection,
    table,
    to_json,
)
from benchmarks.workloads import COMPILE, EAGER, FUSED
from tests.oracle import generator

SAVED = "ResNet-18 training step, saved for backward, dropout 0.1"
PAGES = {"README.md": selection, "docs/benchmarks.md": page}
MARKERS = "<!-- results -->\n", "<!-- /results -->"


def between_markers(text):
    return text.partition(MARKERS[0])[2].partition(MARKERS[1])[0]


def rows(text):
    """Name -> the other cells, of every row of every table but the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {above for above, below in itertools.pairwise(lines) if below.startswith("| ---")}
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line not in heads]
    return {name: rest for name, *rest in cells if name != "---"}


def seconds(name, sides):
    """Three rounds a side, whose median is neither the first, the last nor the mean."""
    times = torch.empty(len(sides), dtype=torch.float64).uniform_(0.01, 1.0, generator=generator(name)).tolist()
    medians = dict(zip(sides, times, strict=True))
    return medians, {side: [0.5 * m, m, 9 * m] for side, m in medians.items()}


@pytest.fixture
def results():
    """Two op shapes with both dropouts, convolutions at two batches, two blocks, and the networks."""
    entries, medians = [], {}

    def add(group, name, images, sides=(EAGER, COMPILE, FUSED), shape=None, dropout=0.0):
        medians[name], rounds = seconds(name, [*sides, *([COPY] if shape else [])])
        entries.append(Measurement(group, name, images, shape, 40 if shape else None, 8, dropout, rounds))

    for size in (32, 16):
        for dropout in (0.0, 0.1):
            add("op", f"op {size} {dropout}", 128, shape=[128, 64, size, size], dropout=dropout)
    for batch in (64, 128):
        for step in ("forward", "weight gradient"):
            add("conv", f"3x3 convolution, {step}, {batch} images", batch, sides=(EAGER, FUSED))
    add("block", "block identity", 128)
    add("block", "block projection", 128)
    for images in (128, 1):
        add("model-inference", f"inference {images}", images)
    for kind in ("", ", dropout", ", bfloat16", " at 224", " of another"):
        add("model-train-step", f"training{kind}", 128)
    machine = {
        "processor": "A CPU", "capability": "AVX2", "threads": 2, "torch": "2.14", "dtype": "float32", "device": "cpu",
        "memory_format": "channels_last", "date": "2026-01-02", "allocator": "default", "quick": False,
    }  # fmt: skip
    saved = {"dropout 0": {EAGER: 4 * 2**20, FUSED: 2**20}, "dropout 0.1": {EAGER: 6 * 2**20, FUSED: 2**21}}
    return Results(machine, entries, {**saved, "dropout 0, bfloat16 autocast": saved["dropout 0"]}), medians


def test_the_selection_has_what_a_reader_asks_about_first_in_ten_rows(results):
    found, medians = results
    picked = rows(selection([found]))
    assert list(picked) == [
        "training", "training, dropout", "training at 224", "training of another", "inference 128", "inference 1",
        SAVED, "op 32 0.0", "op 32 0.1",
    ]  # fmt: skip
    assert picked[SAVED] == ["MiB/image", "6.00 (eager)", "2.00", "3.00x"]
    for name, unit in (("training", "images/s"), ("inference 1", "images/s"), ("op 32 0.1", "ms")):
        times = {side: medians[name][side] for side in (EAGER, COMPILE, FUSED)}
        peer = min((EAGER, COMPILE), key=lambda side: times[side])
        images = 1 if name == "inference 1" else 128
        shown = [1e3 * times[s] if unit == "ms" else images / times[s] for s in (peer, FUSED)]
        theirs, _, named = picked[name][1].partition(" ")
        assert (picked[name][0], named) == (unit, f"({peer})")
        assert [float(theirs), float(picked[name][2])] == pytest.approx(shown, rel=0.01)
        ratio = times[peer] / times[FUSED]
        assert float(picked[name][3].rstrip("x")) == pytest.approx(ratio, rel=0.01, abs=0.005)


def test_what_is_served_is_compared_with_the_best_of_all_peers(results):
    found, _ = results
    seconds = {serving.EAGER: 0.4, serving.ONNX: 0.2, serving.OPENVINO: 0.25, serving.FROZEN: 0.1}
    cases = ("resnet18:32:128", "resnet50:224:1", "resnet18:224:1")
    served = [serving.Measured(serving.Case.of(case), seconds, {}) for case in cases]
    shown = dataclasses.replace(found, served=served)
    picked = rows(selection([shown]))
    assert picked["ResNet-18 inference, batch 128"] == ["images/s", "640 (ONNX Runtime)", "1280", "2.00x"]
    assert picked["ResNet-50 at 224 inference, batch 1"] == ["images/s", "5.00 (ONNX Runtime)", "10.0", "2.00x"]
    assert "ResNet-18 at 224 inference, batch 1" not in picked and "inference 128" not in picked
    everything = page([shown])
    assert all(measured.case.name in everything for measured in served)


def test_each_instruction_set_has_three_columns_and_its_newest_run(results, tmp_path):
    found, _ = results
    for index, (capability, date, processor) in enumerate(
        [("AVX512", "2026-01-01", "old"), ("AVX512", "2026-02-01", "new"), ("AVX2", "2026-03-01", "another's")]
    ):
        machine = found.machine | {"capability": capability, "date": date, "processor": processor}
        (tmp_path / f"{index}.json").write_text(to_json(dataclasses.replace(found, machine=machine)))
    (tmp_path / "9.json").write_text('{"rows": []}')
    runs = newest(found, tmp_path)
    assert [run.machine["processor"] for run in runs] == ["A CPU", "new"]
    cells = rows(selection(runs))["training"]
    assert len(cells) == 7 and cells[1:4] == cells[4:7]
    fewer = dataclasses.replace(runs[1], measurements=[m for m in found.measurements if m.name != "training at 224"])
    assert rows(selection([found, fewer]))["training at 224"][4:] == ["", "", ""]
    assert page(runs).count("### AVX") == 2


def test_the_page_has_a_row_for_every_measurement(results):
    found, medians = results
    shown = rows(table(found))
    assert set(shown) == {m.name for m in found.measurements} | set(found.saved_bytes_per_image)
    floor = 40 / 8 * medians["op 16 0.1"][COPY]  # five times what the copy moves
    assert float(shown["op 16 0.1"][-1]) == pytest.approx(medians["op 16 0.1"][FUSED] / floor, rel=0.01, abs=0.005)


@pytest.mark.parametrize("quick", [False, True])
def test_pages_are_renewed_from_a_file_unless_the_run_was_quick(results, tmp_path, quick):
    found, _ = results
    found.machine["quick"] = quick
    raw = tmp_path / "raw.json"
    raw.write_text(to_json(found))
    files = [tmp_path / "README.md", tmp_path / "all.md"]
    for file in files:
        file.write_text(f"before\n{MARKERS[0]}old\n{MARKERS[1]}\nafter\n")
    main(Config(output_dir=tmp_path, readme=files[0], page=files[1], from_json=raw))
    expected = ["old\n"] * 2 if quick else [selection([found]), page([found])]
    assert [between_markers(file.read_text()) for file in files] == expected
    assert all(file.read_text().startswith("before\n") and file.read_text().endswith("after\n") for file in files)
    assert (tmp_path / ("results-quick.png" if quick else "results.png")).stat().st_size > 0


def test_another_file_of_json_is_refused(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"measurements": [1]}')
    with pytest.raises(ValueError, match=r"from_json: .*other.json does not hold results of this script"):
        from_json(other)


def test_the_committed_pages_show_committed_runs():
    """Nobody edits a figure by hand, and the README's are those of the page."""
    shown = {name: between_markers((ROOT / name).read_text()) for name in PAGES}
    readable = []
    for file in sorted(Path(PUBLISHED).glob("*.json")):
        try:
            readable.append(from_json(file))
        except ValueError:  # results of another script
            continue
    runs = [newest(r, PUBLISHED) for r in readable if r.machine["device"] == "cpu"]
    assert any(all(write(r) == shown[name] for name, write in PAGES.items()) for r in runs)
    assert len(rows(shown["README.md"])) <= 10
