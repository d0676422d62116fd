"""The benchmark of peak memory, on steps whose peaks are known, and on a network that takes no time."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import EAGER, FUSED, MIB, Config, Measured, Network, main, resident_peak, table, tensors_peak

TINY = Network("resnet20", "cifar", 2, 8)


def test_the_tensors_peak_is_what_lives_at_a_time() -> None:
    def step() -> None:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(1 << 21, dtype=torch.uint8)
        del a
        c = torch.empty(1 << 19, dtype=torch.uint8)
        del b, c

    assert tensors_peak(step) == (1 << 20) + (1 << 21)


def test_what_was_held_before_a_step_counts_neither_held_nor_freed() -> None:
    held = [torch.empty(1 << 20, dtype=torch.uint8)]

    def step() -> None:
        held.clear()
        torch.empty(1 << 19, dtype=torch.uint8)

    assert tensors_peak(step) == 1 << 19


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's /proc")
def test_the_resident_peak_is_what_was_written_and_freed_again() -> None:
    size = 256 << 20

    def step() -> None:
        # Not the allocator's: after other tests it may have as much in hand.
        with mmap.mmap(-1, size) as memory:
            memory[:: mmap.PAGESIZE] = b"1" * (size // mmap.PAGESIZE)

    assert 0.9 * size < resident_peak(step, 1) < 1.2 * size
    assert resident_peak(lambda: None, 1) < 0.1 * size  # an earlier peak does not count


def test_shares_are_of_eager_s_and_an_unknown_network_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {
        (EAGER, False): (800, 1000), (FUSED, False): (400, 900), (EAGER, True): (800, 2000), (FUSED, True): (400, 500),
    }  # fmt: skip

    def measured(network: Network, side: str, kept: bool) -> tuple[int, int]:
        assert network == TINY
        tensors, resident = sizes[side, kept]
        return round(tensors * MIB), round(resident * MIB)

    monkeypatch.setattr(memory, "measure_alone", measured)
    monkeypatch.setattr(memory, "NETWORKS", (TINY,))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- memory -->\nold\n<!-- /memory -->\nafter\n")
    main(Config(networks=(TINY.words,), output_dir=tmp_path, page=page))
    cells = ("800", "400", "0.50x", "1000", "900", "0.90x", "2000", "500", "0.25x")
    assert f"| resnet20 at 8, batch 2 | {' | '.join(cells)} |" in page.read_text()
    (file,) = tmp_path.glob("memory-*.json")
    (network,) = json.loads(file.read_text())["networks"]
    assert network["resident_kept"] == {EAGER: 2000 * MIB, FUSED: 500 * MIB}
    with pytest.raises(ValueError, match=r"networks: expected some of resnet20 at 8, batch 2, got another"):
        main(Config(networks=("another",), output_dir=tmp_path, page=None))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's /proc")
def test_a_step_is_measured_in_a_process_of_its_own() -> None:
    tensors, resident = memory.measure_alone(TINY, FUSED, False)
    parameters = 4 * sum(p.numel() for p in memory.training_step(TINY, FUSED)[1].parameters())
    assert tensors > parameters  # the gradients, and what backward needs
    assert resident > 0
    entry = Measured(TINY, *({EAGER: 2 * tensors, FUSED: tensors} for _ in range(3)))
    assert "0.50x" in table([entry])
