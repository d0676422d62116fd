"""The table of compiled CUDA kernels: what ptxas says, what follows from it, and what the program finds wrong."""

from __future__ import annotations

import dataclasses

import pytest

triton = pytest.importorskip("triton")

from benchmarks.compiled import cuda_table  # noqa: E402
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


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ({}, []),
        ({"registers": 128}, []),  # two of 256 threads
        ({"registers": 129}, ["1 blocks a multiprocessor, expected at least 2"]),
        ({"spilled": 4}, ["4 bytes spilled"]),
        ({"stack": 8}, ["stack 8"]),
    ],
)
def test_the_table_says_what_is_wrong_with_a_kernel(kernel, wrong):
    chosen = [a for a in ARCHITECTURES if a.name in ("sm_80", "sm_90")]
    name = "forward, bfloat16, 16-byte loads"
    good = cuda_table.Compiled(name, registers=80, spilled=0, stack=0)
    compiled = {"sm_80": {name: dataclasses.replace(good, **kernel)}, "sm_90": {name: good}}
    rows, found = cuda_table.table(compiled, {"gemm": [256, 36 * 1024]}, chosen)
    assert len(found) == len(wrong) and all(
        f"{name} on sm_80" in f and w in f for f, w in zip(found, wrong, strict=True)
    )
    assert len(rows) == 3 and rows[2].count("80 / 3") == 2 - bool(kernel.get("registers"))
    assert ("4 spilled" in rows[2]) == ("spilled" in kernel)
