"""The table of compiled CUDA kernels: what is read from ptxas, what follows from it, and what the table says."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from benchmarks import cuda_table  # noqa: E402
from benchmarks.records import ROOT  # noqa: E402
from fastres.kernels.compiled import ARCHITECTURES  # noqa: E402

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7fastres8shortcut4gemmINS0_8BFloat16ELNS0_4StepE2ELb1EEEvNS0_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN7fastres8shortcut4gemm
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size, 688 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN7fastres8shortcut14combine_weightINS_3f16EEEvNS0_12WeightParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN7fastres8shortcut14combine_weight
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 384 bytes cmem[0]
"""  # noqa: E501


def test_kernels_registers_and_spills_are_read_from_ptxas():
    assert cuda_table.parse(PTXAS) == [
        cuda_table.Compiled("input gradient, bfloat16, 16-byte loads", registers=80, spilled=28, stack=8),
        cuda_table.Compiled("combine weight gradient, float16", registers=24, spilled=0, stack=0),
    ]


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "blocks"),
    [
        ("sm_80", 256, 80, 36 * 1024, 3),  # 80 * 32 = 2560 registers a warp, six in each quarter of 16,384
        ("sm_80", 256, 81, 36 * 1024, 2),  # 88 * 32 = 2816: five
        ("sm_86", 256, 80, 36 * 1024, 2),  # 37 KiB of 100
        ("sm_86", 1024, 26, 2048, 1),  # 1,536 threads
        ("sm_90", 1024, 26, 2048, 2),
        ("sm_90", 64, 16, 0, 32),
    ],
)
def test_resident_blocks_follow_from_the_scarcest_resource(architecture, threads, registers, shared_bytes, blocks):
    (chosen,) = (a for a in ARCHITECTURES if a.name == architecture)
    assert cuda_table.resident_blocks(chosen, threads, registers, shared_bytes) == blocks


def test_the_published_table_has_no_spills_and_two_blocks_of_every_gemm():
    text = (ROOT / "docs" / "cuda-kernels.md").read_text(encoding="utf-8")
    assert "No kernel spills a register or uses a stack." in text and "spilled" not in text
    header = re.search(r"^\| kernel \|(.*)\|$", text, re.MULTILINE)
    assert header is not None
    architectures = [cell.strip() for cell in header[1].split("|")]
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"} <= set(architectures)
    rows = re.findall(r"^\| ((?:forward|inference|input gradient|weight gradient),.*?) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 4 * 4 * 2
    for _, cells in rows:
        blocks = {a: int(cell.split("/")[1]) for a, cell in zip(architectures, cells.split("|"), strict=True)}
        assert blocks["sm_80"] >= 2 and blocks["sm_90"] >= 2
