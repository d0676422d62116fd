"""The benchmark of the operator by instruction set: what it writes, from figures that are given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")  # benchmarks.results draws with it

from benchmarks import pointwise
from benchmarks.pointwise import Config, Measured, main, parts_of_a_call, table
from benchmarks.results import COPY, Measurement
from benchmarks.workloads import EAGER, FUSED


def stage(eager: float, fused: float) -> Measurement:
    seconds = {EAGER: [eager, 9.0, 0.0], FUSED: [fused, 9.0, 0.0], COPY: [0.001] * 3}
    return Measurement("op", "a stage", 2, [2, 8, 4, 4], 4000, 1000, 0.0, seconds)


def test_a_row_has_the_medians_their_ratio_and_the_distance_from_the_floor() -> None:
    found = [
        Measured("AVX512", 1, [stage(0.012, 0.006)], {"eager, forward": 17.0}),
        Measured("AVX2", 2, [stage(0.02, 0.008)], {"eager, forward": 99.0}),
    ]
    text = table(found)
    assert "| a stage | AVX512 | 1 | 12.0 | 6.00 | 2.00x | 1.50 |" in text
    assert "| a stage | AVX2 | 2 | 20.0 | 8.00 | 2.50x | 2.00 |" in text
    assert "| eager, forward | 17.0 |" in text and "99.0" not in text  # calls are of one thread


def test_every_way_is_measured_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def measured(capability: str, threads: int, rounds: int) -> Measured:
        asked.append((capability, threads, rounds))
        return Measured(capability, threads, [stage(0.012, 0.006)], {"part": 1.0})

    monkeypatch.setattr(pointwise, "measure_alone", measured)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- pointwise -->\nold\n<!-- /pointwise -->\nafter\n")
    config = Config(capabilities=("default", "amx"), threads=(1, 3), rounds=5, output_dir=tmp_path, page=page)
    main(config)
    assert asked == [("default", 1, 5), ("default", 3, 5)]
    assert "| a stage | default | 3 |" in page.read_text()
    (file,) = tmp_path.glob("pointwise-*.json")
    data = json.loads(file.read_text())["measured"]
    assert data == [dataclasses.asdict(measured("default", threads, 5)) for threads in (1, 3)]


def test_the_parts_of_a_call_are_there() -> None:
    parts = parts_of_a_call(repeats=1, calls=1)
    assert {"fastres, forward", "the operator, forward", "the operator, backward"} < set(parts)
    assert all(0 < microseconds < float("inf") for microseconds in parts.values())
