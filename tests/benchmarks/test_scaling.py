"""The benchmark of scaling: where a curve is flat, what the page says of a record, and short runs of it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")  # the command draws

from PIL import Image

from benchmarks.records import PUBLISHED, ROOT
from benchmarks.scaling import __main__ as command
from benchmarks.scaling import report, sweeps
from benchmarks.scaling.__main__ import Config, main
from benchmarks.scaling.report import PICTURE, digest, flat_from, heading, page, shown, table
from benchmarks.scaling.sweeps import BATCH, INFERENCE, MODES, TRAINING, Measured, Point, Record, Sweep
from benchmarks.workloads import COMPILE, EAGER, FUSED

MACHINE = {
    "processor": "A CPU", "capability": "AVX2", "isa_settings": "", "threads": 2, "torch": "2.14", "dtype": "float32",
    "memory_format": "channels_last", "date": "2026-01-02", "allocator": "default", "quick": False,
}  # fmt: skip


def measured(point: Point, **milliseconds: float) -> Measured:
    """A point where each side took so long an image; the median is neither the mean nor the first round."""
    seconds = {side: 1e-3 * point.batch * ms for side, ms in milliseconds.items()}
    rounds = {side: [9 * s, s, 0.5 * s] for side, s in seconds.items()}
    return Measured(point, rounds, {side: 20 + s for side, s in seconds.items()})


def batches(mode: str, **milliseconds: tuple[float, ...]) -> list[Measured]:
    """Points at batches 1, 2, 4, ... with the milliseconds an image of each side; zero where it did not run."""
    columns = zip(*milliseconds.values(), strict=True)
    return [
        measured(Point(mode, batch=1 << i), **{s: ms for s, ms in zip(milliseconds, column, strict=True) if ms})
        for i, column in enumerate(columns)
    ]


def record(**machine: Any) -> Record:
    """Three batches in both modes, memory at the largest, and one and two threads."""
    inference = batches(INFERENCE, eager=(3.0, 1.5, 1.4), compile=(2.0, 0, 1.0), fused=(4.0, 1.0, 0.5))
    training = batches(TRAINING, eager=(5.0, 5.25, 5.5), fused=(4.0, 3.0, 2.9))
    training[-1].resident.update({EAGER: 40 << 20, FUSED: 24 << 20})
    threads = [
        measured(Point(TRAINING, batch=batch, threads=threads), eager=eager, fused=fused)
        for batch, threads, eager, fused in (
            (1, 1, 6.0, 6.0),
            (1, 2, 5.0, 4.0),
            (128, 1, 4.0, 2.5),
            (128, 2, 2.0, 1.25),
        )
    ]
    conditions = MACHINE | machine
    return {BATCH: Sweep(conditions, inference + training), "threads": Sweep(conditions, threads)}


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What was asked to be measured: (sweep, rounds). A sweep has the figures of `record`, or a point of its own."""
    asked = []

    def measure_sweep(sweep: str, rounds: float) -> list[Measured]:
        asked.append((sweep, rounds))
        ours = record()
        return ours[sweep].points if sweep in ours else [measured(Point(TRAINING), eager=2.0, fused=1.0)]

    monkeypatch.setattr(command, "measure_sweep", measure_sweep)
    monkeypatch.setattr(command, "describe_machine", lambda: dict(MACHINE))
    return asked


# ------------------------------------------------------------------------------------------------------- flat curves


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((10, 5, 2, 1.05, 1.0, 1.02), 8),
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 1),
        ((1.0, 1.1, 1.0, 1.1, 1.0, 1.1), 1),  # the limit itself is flat
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.2), None),  # a rise at the end
        ((6, 5, 4, 3, 2, 1), None),
        ((1, 1, 1, 1.5, 1, 1), 16),  # a peak hides what was flat before it
        ((1.3, 1.24, 1.18, 1.12, 1.06, 1.0), 16),  # each step is small, their sum is not
        ((0.5, 2, 1.0, 1.03, 1.06, 1.09), 4),  # a slow rise counts as a slow fall does
    ],
)
def test_a_curve_is_flat_from_the_least_batch_after_which_all_are_close(times, expected):
    assert flat_from([1, 2, 4, 8, 16, 32], times) == expected
    assert flat_from([1, 2, 4, 8, 16, 32], [1e-3 * t for t in times]) == expected


def test_a_tolerance_is_a_share_of_the_shortest_time():
    assert flat_from([1, 2, 4], [1.4, 1.2, 1.0], 0.2) == 2
    assert flat_from([1, 2, 4], [1.4, 1.2, 1.0], 0.1) is None
    assert flat_from([1, 2, 4], [1.4, 1.2, 1.0], 0.4) == 1


def test_one_batch_is_no_curve():
    assert flat_from([8], [1.0]) is None and flat_from([], []) is None


# ------------------------------------------------------------------------------------------------------------ reporting


def test_the_table_has_a_row_for_each_mode_and_side_that_ran():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(record()).splitlines()]
    assert lines[0][1] == "time an image is flat, within 10 %, from batch"
    assert lines[0][-2:] == ["two threads over one, batch 1", "two threads over one, batch 128"]
    assert lines[2:] == [
        ["inference, PyTorch eager", "2", "1.50", "3.00", "", "", "", ""],
        ["inference, torch.compile, batches 1, 4", "none", "", "2.00", "20.0", "", "", ""],
        ["inference, fastres", "none", "", "4.00", "", "", "", ""],
        ["training, PyTorch eager", "1", "5.00", "5.00", "", "10.0", "1.20x", "2.00x"],
        ["training, fastres", "2", "3.00", "4.00", "", "6.00", "1.50x", "2.00x"],
    ]


def test_a_record_of_other_sweeps_has_no_empty_rows():
    ours = record()
    assert table({"threads": ours["threads"]}).splitlines()[2] == (
        "| training, PyTorch eager |  |  |  |  |  | 1.20x | 2.00x |"
    )
    assert len(table({"width": Sweep(MACHINE, [measured(Point(TRAINING), eager=1.0)])}).splitlines()) == 2


def test_conditions_are_told_once_unless_sweeps_differ():
    ours = record()
    assert heading(ours) == (
        "A CPU, AVX2, 2 threads; torch 2.14; float32, channels_last; 2026-01-02. Allocator, for all sides: default."
    )
    later = MACHINE | {"date": "2026-02-03", "isa_settings": "ATEN_CPU_CAPABILITY=avx2"}
    first, second = heading({**ours, "threads": Sweep(later, [])}).split("\n\n")
    assert first.startswith("By batch: A CPU, AVX2, 2 threads") and "2026-01-02" in first
    assert second.startswith("By threads: A CPU, AVX2 (held to it by `ATEN_CPU_CAPABILITY=avx2`), 2 threads")


def test_each_instruction_set_shows_its_newest_record(tmp_path):
    for capability, processor, date in (
        ("AVX512", "old", "2026-01-01"), ("AVX2", "slow", "2026-02-01"), ("AVX512", "new", "2026-03-01"),
        ("AVX512", "middle", "2026-02-01"),
    ):  # fmt: skip
        ours = record(capability=capability, processor=processor, date=date)
        sweeps.write(ours, tmp_path / sweeps.file_name(ours[BATCH].machine))
    quick = record(capability="AVX2", processor="quick", date="2026-04-01", quick=True)
    sweeps.write(quick, tmp_path / sweeps.file_name(quick[BATCH].machine))
    assert [ours[BATCH].machine["processor"] for ours in shown(tmp_path)] == ["slow", "new"]
    text = page(tmp_path)
    assert text.startswith("![") and text.index("slow, AVX2") < text.index("new, AVX512") and "old" not in text


def test_a_folder_without_a_record_shows_nothing(tmp_path):
    assert page(tmp_path) == ""


def test_what_is_written_is_read(tmp_path):
    sweeps.write(record(), tmp_path / "a.json")
    assert sweeps.read(tmp_path / "a.json") == record()
    for text in ('{"sweeps": {"batch": 1}}', '{"sweeps": {}}', '{"sweeps": []}', "{}", "[]", "no"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=r"^output_dir: .*b.json does not hold a record of this script"):
            sweeps.read(tmp_path / "b.json")


def test_the_committed_page_and_picture_are_what_the_script_writes():
    """Before the first record there is neither; after it, neither may be missing nor of other figures."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    between = text.partition("<!-- scaling -->\n")[2].partition("<!-- /scaling -->")
    again = "run `python -m benchmarks.scaling --no-measure`"
    assert between[1] and between[0] == page(PUBLISHED), again
    found = shown(PUBLISHED)
    assert (PUBLISHED / PICTURE).exists() == bool(found), again
    if found:
        with Image.open(PUBLISHED / PICTURE) as picture:
            assert picture.text["Figures"] == digest(found), again


# ------------------------------------------------------------------------------------------------------------ measuring


def test_a_sweep_varies_one_thing():
    for sweep, values in sweeps.SWEEPS.items():
        groups = list(sweeps.groups(sweep))
        points = [point for group in groups for point in group]
        assert [mode for mode in MODES for point in points if point.mode == mode] == [point.mode for point in points]
        for mode in MODES:
            ours = [point for point in points if point.mode == mode]
            assert list(dict.fromkeys(point.at(sweep) for point in ours)) == list(values)
            for other in sweeps.SWEEPS:
                batches = len(sweeps.BATCHES_OF_THREADS) if (sweep, other) == ("threads", BATCH) else 1
                assert other == sweep or len({point.at(other) for point in ours}) == batches
        assert all(len({(point.mode, point.threads) for point in group}) == 1 for group in groups)


def test_long_runs_have_fewer_rounds():
    rounds = [Point(TRAINING, batch=1 << i).rounds for i in range(11)]
    assert rounds == sorted(rounds, reverse=True) and rounds[0] == 31 and rounds[-1] == 5
    assert all(r % 2 for r in rounds)
    assert Point(TRAINING, width=4).rounds < Point(TRAINING).rounds > Point(TRAINING, model="resnet110").rounds


def test_every_side_runs_and_the_first_run_is_timed(monkeypatch):
    made = []
    point = Point(TRAINING, width=0.5, image=8, batch=2)

    def set_up(side):
        made.append(side)
        return lambda: None

    workload = dataclasses.replace(point.workload(), set_up=set_up)
    monkeypatch.setattr(Point, "workload", lambda self: workload)
    found = sweeps.measure([point, dataclasses.replace(point, batch=4)], 0.1, compiled_batches=(4,))
    assert made == [EAGER, FUSED, EAGER, COMPILE, FUSED]
    for entry in found:
        assert {len(rounds) for rounds in entry.seconds.values()} == {3}
        assert set(entry.first_seconds) == set(entry.seconds)
    workload.make(EAGER)()


def test_the_networks_are_those_that_a_point_names():
    point = Point(INFERENCE, "resnet20", width=2.0, image=8, batch=3)
    for mode in MODES:
        workload = dataclasses.replace(point, mode=mode).workload()
        assert workload.images == 3 and workload.name.startswith("ResNet-20 x 2 at 8 " + mode)
        workload.make(FUSED)()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's /proc")
def test_memory_is_of_a_process_of_its_own_for_each_side(monkeypatch):
    monkeypatch.setitem(sweeps.SWEEPS, BATCH, (1, 64))
    monkeypatch.setattr(sweeps, "MEMORY_BATCHES", (64,))
    monkeypatch.setattr(sweeps, "MODES", (TRAINING,))
    alone = []

    def in_own_process(function, *given):
        if function is sweeps.measure:
            return [measured(point, eager=1.0, fused=1.0) for point in given[0]]
        alone.append(given)
        return own(function, *given)

    own = sweeps.in_own_process
    monkeypatch.setattr(sweeps, "in_own_process", in_own_process)
    small, large = sweeps.measure_sweep(BATCH, 1.0)
    assert alone == [(large.point, EAGER), (large.point, FUSED)] and not small.resident
    # Every convolution's input is kept for its weight's gradient.
    least = 64 * 4 * (7 * 16 * 32**2 + 6 * 32 * 16**2 + 6 * 64 * 8**2)
    assert all(large.resident[side] > least for side in (EAGER, FUSED))


def test_a_partial_run_renews_its_sweeps_only(instant, tmp_path, capsys):
    text = tmp_path / "page.md"
    text.write_text("before\n<!-- scaling -->\nold\n<!-- /scaling -->\nafter\n")
    config = Config(sweeps=("width", BATCH), output_dir=tmp_path, page=text)
    main(config)
    earlier = MACHINE | {"date": "2026-01-01"}
    (file,) = tmp_path.glob("scaling-*.json")
    kept = sweeps.read(file)
    assert list(kept) == [BATCH, "width"] and instant == [("width", 1.0), (BATCH, 1.0)]
    file.unlink()
    sweeps.write(
        {name: Sweep(earlier, sweep.points) for name, sweep in kept.items()}, tmp_path / sweeps.file_name(earlier)
    )
    main(dataclasses.replace(config, sweeps=("threads", "width"), rounds=2.0))
    assert instant[2:] == [("threads", 2.0), ("width", 2.0)]
    renewed = sweeps.read(file)
    assert {name: sweep.machine["date"] for name, sweep in renewed.items()} == {
        BATCH: "2026-01-01", "width": "2026-01-02", "threads": "2026-01-02",
    }  # fmt: skip
    assert text.read_text() == f"before\n<!-- scaling -->\n{page(tmp_path)}<!-- /scaling -->\nafter\n"
    assert table(renewed) in text.read_text() and table(renewed) in capsys.readouterr().out
    with Image.open(tmp_path / PICTURE) as picture:
        assert picture.text["Figures"] == digest([renewed]) != digest([kept])


def test_page_and_picture_are_written_anew_without_measuring(instant, tmp_path):
    main(Config(sweeps=(BATCH,), output_dir=tmp_path, page=None))
    (tmp_path / PICTURE).unlink()
    text = tmp_path / "page.md"
    text.write_text("<!-- scaling -->\n<!-- /scaling -->\n")
    main(Config(output_dir=tmp_path, page=text, measure=False))
    assert len(instant) == 1 and (tmp_path / PICTURE).stat().st_size > 0
    assert page(tmp_path) in text.read_text()


def test_a_picture_has_six_panels_for_each_record(monkeypatch, tmp_path):
    drawn = []
    draw = report._draw
    monkeypatch.setattr(report, "_draw", lambda figure, ours: (draw(figure, ours), drawn.append(figure)))
    report.plot([record(), record(capability="AVX512")], tmp_path / PICTURE)
    assert [len(figure.axes) for figure in drawn] == [6, 6]
    time, memory, threads, *others = ([line.get_xydata() for line in axes.get_lines()] for axes in drawn[0].axes)
    curves = [line.ravel().tolist() for line in time if len(line) > 1]
    assert any(curve == pytest.approx([1, 2.0, 4, 1.0]) for curve in curves)  # torch.compile's, in milliseconds
    assert sorted(line[0].tolist() for line in time if len(line) == 1) == [  # rings, where curves become flat
        pytest.approx(place) for place in ([1, 5.0], [2, 1.5], [2, 3.0])
    ]
    assert [line.tolist() for line in memory if len(line)] == [[[4, 40]], [[4, 24]]]
    assert [line.ravel().tolist() for line in threads if len(line)] == [
        pytest.approx(curve) for curve in ([1, 250, 2, 500], [1, 400, 2, 800])
    ]
    assert others == [[], [], []]


def test_what_cannot_be_measured_is_refused(instant, monkeypatch, tmp_path):
    for wrong, message in (
        ({"sweeps": ("batch", "length", "x")}, r"^sweeps: expected some of batch, .*, threads, got length, x$"),
        ({"sweeps": ()}, r"^sweeps: expected some of batch, .*, threads, got none$"),
        ({"rounds": 0.0}, r"^rounds: expected a positive number, got 0.0$"),
        ({"rounds": float("nan")}, r"^rounds: expected a positive number, got nan$"),
    ):
        with pytest.raises(ValueError, match=message):
            main(Config(output_dir=tmp_path, page=None, **wrong))
    monkeypatch.setattr(command.workloads, "CUDA", True)
    with pytest.raises(RuntimeError, match=r"^device: expected a machine without a GPU, .*, got a GPU$"):
        main(Config(output_dir=tmp_path, page=None))
    assert not instant and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_quick_run_measures_for_real_and_leaves_the_page(tmp_path):
    text = tmp_path / "page.md"
    text.write_text("<!-- scaling -->\n<!-- /scaling -->\n")
    options = ["--sweeps", "width", "--rounds", "0.01", "--output-dir", str(tmp_path), "--page", str(text)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *options],
        cwd=ROOT, env=os.environ | {"FASTRES_BENCH_QUICK": "1", "CUDA_VISIBLE_DEVICES": ""}, check=True,
    )  # fmt: skip
    (file,) = tmp_path.glob("scaling-*-quick.json")
    (sweep,) = sweeps.read(file).values()
    assert sweep.machine["quick"] and sweep.machine["device"] == "cpu"
    assert [(entry.point.mode, entry.point.width) for entry in sweep.points] == [
        (INFERENCE, 0.5), (INFERENCE, 1), (TRAINING, 0.5), (TRAINING, 1),
    ]  # fmt: skip
    assert all(entry.an_image(side) > 0 for entry in sweep.points for side in (EAGER, FUSED))
    assert (tmp_path / "scaling-quick.png").stat().st_size > 0
    assert text.read_text() == "<!-- scaling -->\n<!-- /scaling -->\n"
