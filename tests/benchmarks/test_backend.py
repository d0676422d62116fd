"""The benchmark of the compiler backend, on a network that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from benchmarks import backend
from benchmarks.backend import (
    EAGER,
    EAGER_NCHW,
    INDUCTOR,
    NCHW,
    NETWORKS,
    OURS,
    Config,
    Measured,
    main,
    measure,
    measure_alone,
    table,
)
from benchmarks.networks import Unet


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def broken(module: object, inputs: object) -> None:
        raise NotImplementedError("no compiler")

    monkeypatch.setitem(NETWORKS, "tiny", (make, 2, 8))
    sides = backend._sides

    def without_inductor(inner: tuple[str, ...]) -> dict[str, dict[str, object]]:
        return sides(inner) | {INDUCTOR: {"backend": broken}}

    monkeypatch.setattr(backend, "_sides", without_inductor)
    monkeypatch.setattr(backend, "measure_alone", measure)  # another process has neither of these
    return "tiny"


def test_every_side_is_measured_and_a_missing_one_is_named(tiny: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    main(Config(networks=(tiny,), inner=("aot_eager",), rounds=3, output_dir=tmp_path, page=page))
    (file,) = tmp_path.glob("backend-*.json")
    (network,) = json.loads(file.read_text())["networks"]
    sides = (EAGER, EAGER_NCHW, OURS, NCHW, "fastres, inner aot_eager")
    assert {side: len(times) for side, times in network["seconds"].items()} == dict.fromkeys(sides, 3)
    # The output of the convolution and its gradient at least.
    assert set(network["peak_bytes"]) == set(sides)
    assert all(peak >= 2 * 4 * 2 * 8 * 8 * 8 for peak in network["peak_bytes"].values())
    assert "no compiler" in network["missing"][INDUCTOR]
    text = page.read_text()
    assert "| tiny | 2 at 8 |" in text and "old" not in text and text.endswith("after\n")


def test_what_was_measured_the_same_day_stays_until_it_is_measured_again(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "other", NETWORKS[tiny])
    for rounds, networks in ((1, (tiny, "other")), (2, ("other",))):
        main(Config(networks=networks, rounds=rounds, output_dir=tmp_path, page=None))
    (file,) = tmp_path.glob("backend-*.json")
    found = {m["name"]: len(m["seconds"][OURS]) for m in json.loads(file.read_text())["networks"]}
    assert found == {tiny: 1, "other": 2}


def test_the_gain_is_over_the_best_peer() -> None:
    seconds = {EAGER: [3.0, 1.0, 2.0], INDUCTOR: [1.5], OURS: [0.5], NCHW: [0.6]}
    found = Measured("a", 1, 8, seconds, {INDUCTOR: 9.0, OURS: 1.0}, peak_bytes={EAGER: 3 << 20, OURS: 1 << 20})
    assert found.gain == 3.0
    seconds[EAGER_NCHW] = [0.75]
    assert found.gain == 1.5
    expected = "| a | 1 at 8 | 2000 | 750 | 1500 | 500 | 600 | 1.50x | 9.00 | 1.00 | 3.00 | 1.00 |  |  |"
    assert expected in table([found])


def test_each_instruction_set_has_a_table_of_its_newest_figures(tmp_path: Path) -> None:
    for capability, settings, date, ms in (
        ("AVX2", "ATEN_CPU_CAPABILITY=avx2", "2026-01-02", 2.0),
        ("AVX512", "", "2026-01-03", 1.0),
        ("AVX512", "", "2026-01-01", 9.0),
    ):
        machine = {"processor": "A", "capability": capability, "threads": 2, "torch": "2", "date": date}
        found = Measured("a", 1, 8, {s: [ms, ms] for s in (EAGER, INDUCTOR, OURS, NCHW)}, {INDUCTOR: 9.0, OURS: 1.0})
        data = {"machine": {**machine, "isa_settings": settings}, "networks": [vars(found)]}
        (tmp_path / f"backend-a-{capability}-{date}.json").write_text(json.dumps(data))
    first, second = backend.tables(tmp_path).split("A, AVX512")
    assert "A, AVX2 (held to it by `ATEN_CPU_CAPABILITY=avx2`), 2 threads" in first and "| 2000 |" in first
    assert ", 2 threads" in second and "| 1000 |" in second and "| 9000 |" not in second


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"networks: expected names among WRN-16-4, .*, got 'vgg'"):
        measure("vgg", 1)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure("WRN-16-4", 0)


def test_a_process_of_its_own_refuses_the_same() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure_alone("WRN-16-4", 0)


def test_the_unet_gives_each_pixel_its_logits() -> None:
    assert Unet((4, 8, 16))(torch.randn(2, 3, 8, 12)).shape == (2, 10, 8, 12)
