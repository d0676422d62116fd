"""The choice of a convolution's algorithm, from its problem alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastres import _extension, functional, fuse
from fastres.contract import ConvProblem
from fastres.nn import FusedBasicBlock
from fastres.ops.algorithms import (
    ALGORITHMS,
    choose_algorithm,
    choose_packed,
    is_served,
    problem_of,
    requested_algorithm,
)
from fastres.ops.products import multiplies_pairs

LARGE = ConvProblem(torch.float32, (128, 64, 32, 32), 64, 3, 1, True, True, 2, "avx512", False)
FEW = LARGE._replace(shape=(1, 64, 8, 8), needs_grad=False)
GROUPED = LARGE._replace(groups=8)
WIDE_GROUPS = LARGE._replace(groups=2, shape=(128, 128, 32, 32), outputs=128)
PAIRS = LARGE._replace(dtype=torch.bfloat16, pairs=True)
DEPTHWISE = LARGE._replace(kernel=5, groups=64)


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
@pytest.mark.parametrize(
    ("problem", "algorithm", "reason"),
    [
        (LARGE, "winograd", "saves more multiplications"),
        (LARGE._replace(needs_grad=False), "winograd", "saves more multiplications"),
        (LARGE._replace(dtype=torch.bfloat16), "winograd", "saves more multiplications"),
        (LARGE._replace(dtype=torch.bfloat16, matrix_units=True), "torch", "bfloat16 matrices"),
        (LARGE._replace(dtype=torch.float64), "torch", "this dtype"),
        (LARGE._replace(dtype=torch.float16), "torch", "this dtype"),
        (LARGE._replace(kernel=1), "gemm", "spares the passes"),
        (LARGE._replace(kernel=1, dtype=torch.bfloat16), "gemm", "spares the passes"),
        (LARGE._replace(kernel=1, dtype=torch.bfloat16, matrix_units=True), "torch", "bfloat16 matrices"),
        (LARGE._replace(kernel=1, needs_grad=False), "torch", "for training with stride 1"),
        (LARGE._replace(kernel=1, stride=2), "torch", "for training with stride 1"),
        (LARGE._replace(kernel=1, channels_last=False), "torch", "not in channels_last"),
        (LARGE._replace(kernel=1, shape=(1, 512, 4, 4), outputs=512), "torch", "pixels are few"),
        (LARGE._replace(kernel=1, shape=(2, 512, 8, 8), outputs=2048), "gemm", "spares the passes"),
        (LARGE._replace(kernel=1, shape=(1, 64, 4, 4)), "gemm", "spares the passes"),
        (LARGE._replace(kernel=1, shape=(16, 512, 1, 1), outputs=512), "gemm", "spares the passes"),
        (LARGE._replace(kernel=7), "torch", "this size"),
        (LARGE._replace(outputs=128, stride=2), "winograd", "saves more multiplications"),
        (LARGE._replace(shape=(32, 512, 5, 5), outputs=512), "winograd", "saves more multiplications"),
        (LARGE._replace(shape=(32, 512, 2, 2), outputs=512), "winograd", "images are small"),
        (LARGE._replace(shape=(1, 512, 2, 2), outputs=512), "torch", "too few"),
        (LARGE._replace(shape=(32, 256, 6, 4), outputs=512, stride=2), "winograd", "images are small"),
        (LARGE._replace(shape=(32, 256, 7, 4), outputs=512, stride=2), "torch", "too few"),
        (FEW._replace(shape=(1, 512, 2, 2), outputs=512), "gemm", "positions are few"),
        (FEW._replace(shape=(16, 512, 2, 2), outputs=512), "winograd", "images are small"),
        (LARGE._replace(channels_last=False), "torch", "not in channels_last"),
        (LARGE._replace(shape=(0, 64, 32, 32)), "torch", "empty"),
        (FEW._replace(shape=(64, 256, 8, 8), outputs=512, stride=2, needs_grad=True), "winograd", "saves more"),
        (FEW._replace(shape=(128, 3, 32, 32), followed=True), "winograd", "saves more multiplications"),
        (FEW._replace(shape=(128, 3, 32, 32)), "torch", "too few"),
        (LARGE._replace(shape=(128, 3, 32, 32)), "torch", "too few"),
        (FEW._replace(channels_last=False), "torch", "not in channels_last"),
        (GROUPED, "grouped", "too narrow"),
        (GROUPED._replace(needs_grad=False, shape=(1, 64, 5, 5)), "grouped", "too narrow"),
        (GROUPED._replace(groups=16, stride=2, kernel=7), "grouped", "too narrow"),
        (WIDE_GROUPS, "winograd", "copies of the groups"),
        (WIDE_GROUPS._replace(kernel=5), "torch", "is as fast"),
        (DEPTHWISE, "grouped", "too narrow"),
        (DEPTHWISE._replace(needs_grad=False, stride=2), "grouped", "too narrow"),
        (DEPTHWISE._replace(kernel=3), "grouped", "too narrow"),
        (DEPTHWISE._replace(kernel=3, stride=2), "torch", "is as fast"),
        (DEPTHWISE._replace(kernel=3, needs_grad=False), "torch", "is as fast"),
        (GROUPED._replace(kernel=9), "torch", "this size in groups"),
        (GROUPED._replace(kernel=1), "torch", "this size in groups"),
        (GROUPED._replace(stride=3), "torch", "strides 1 and 2"),
        (GROUPED._replace(groups=32), "torch", "groups of 2 inputs and 2 outputs"),
        (DEPTHWISE._replace(outputs=128), "torch", "groups of 1 inputs and 2 outputs"),
        (GROUPED._replace(groups=16, outputs=128), "torch", "groups of 4 inputs and 8 outputs"),
        (GROUPED._replace(dtype=torch.float64), "torch", "this dtype"),
        (GROUPED._replace(dtype=torch.bfloat16), "grouped", "too narrow"),
        (GROUPED._replace(dtype=torch.bfloat16, matrix_units=True), "torch", "bfloat16 matrices"),
        (GROUPED._replace(channels_last=False), "torch", "not in channels_last"),
    ],
)
def test_the_choice_and_its_reason(problem, algorithm, reason, capability):
    choice = choose_algorithm(problem._replace(capability=capability))
    assert choice.algorithm == algorithm
    assert reason in choice.reason


STRIDED = FEW._replace(shape=(32, 256, 8, 8), outputs=512, stride=2)


@pytest.mark.parametrize(
    ("problem", "avx2", "avx512"),
    [
        (LARGE._replace(stride=2), "winograd", "torch"),
        (LARGE._replace(shape=(128, 16, 32, 32), outputs=16), "winograd", "winograd"),
        (LARGE._replace(shape=(128, 8, 32, 32), outputs=8), "torch", "torch"),
        (LARGE._replace(shape=(2, 8, 32, 32), outputs=8), "winograd", "torch"),
        (FEW, "gemm", "gemm"),
        (FEW._replace(shape=(1, 256, 8, 8), outputs=256), "winograd", "winograd"),
        (FEW._replace(shape=(1, 512, 4, 4), outputs=512), "gemm", "gemm"),
        (FEW._replace(stride=2), "gemm", "gemm"),
        (STRIDED, "winograd", "winograd"),
        (STRIDED._replace(shape=(16, 256, 8, 8)), "gemm", "winograd"),
        (STRIDED._replace(needs_grad=True), "winograd", "winograd"),
        (STRIDED._replace(shape=(2, 256, 8, 8), needs_grad=True), "torch", "winograd"),
        (FEW._replace(shape=(128, 64, 8, 8), stride=2), "winograd", "torch"),
        (FEW._replace(needs_grad=True), "winograd", "winograd"),
        (FEW._replace(shape=(1, 512, 4, 4), outputs=512, needs_grad=True), "torch", "winograd"),
        (FEW._replace(shape=(2, 512, 2, 2), outputs=512, needs_grad=True), "winograd", "winograd"),
        (GROUPED._replace(groups=2), "winograd", "winograd"),
        (GROUPED._replace(groups=2, shape=(1, 64, 7, 7)), "grouped", "torch"),
        (WIDE_GROUPS._replace(stride=2), "grouped", "torch"),
        (WIDE_GROUPS._replace(stride=2, needs_grad=False), "torch", "torch"),
        (WIDE_GROUPS._replace(shape=(1, 128, 7, 7)), "grouped", "torch"),
    ],
)
def test_processors_differ_in_what_is_faster(problem, avx2, avx512):
    assert choose_algorithm(problem._replace(capability="avx2")).algorithm == avx2
    assert choose_algorithm(problem._replace(capability="avx512")).algorithm == avx512


@pytest.mark.parametrize(
    ("problem", "padded", "requested", "algorithm", "reason"),
    [
        (LARGE, True, "auto", "winograd", "saves more multiplications"),
        (LARGE, False, "auto", "gemm", "packed"),
        (LARGE, True, "torch", "torch", "requested"),
        (LARGE, True, "winograd", "winograd", "requested"),
        (LARGE, True, "gemm", "gemm", "requested"),
        (FEW, True, "auto", "gemm", "packed"),
        (FEW, True, "winograd", "winograd", "requested"),
        (FEW, False, "winograd", "gemm", "packed"),
        (LARGE._replace(kernel=1), False, "auto", "gemm", "packed"),
        (LARGE._replace(kernel=7, stride=2), False, "auto", "gemm", "packed"),
        (LARGE._replace(stride=2), True, "torch", "gemm", "packed"),
        (LARGE._replace(stride=2, outputs=128), True, "auto", "winograd", "saves more multiplications"),
        (LARGE._replace(stride=2), True, "gemm", "gemm", "requested"),
        (LARGE._replace(stride=2, shape=(1, 64, 32, 32)), True, "auto", "gemm", "packed"),
        (LARGE._replace(dtype=torch.bfloat16), True, "auto", "winograd", "saves more multiplications"),
        (LARGE._replace(dtype=torch.bfloat16, matrix_units=True), True, "auto", "torch", "bfloat16 matrices"),
        (LARGE._replace(dtype=torch.float64), True, "auto", "torch", "this dtype"),
        (LARGE._replace(shape=(8, 512, 2, 2), outputs=512), True, "auto", "winograd", "images are small"),
        (LARGE._replace(shape=(4, 512, 2, 2), outputs=512), True, "auto", "gemm", "packed"),
        (LARGE._replace(shape=(8, 256, 4, 4), stride=2), True, "auto", "winograd", "images are small"),
        (PAIRS._replace(shape=(8, 256, 4, 4), stride=2), True, "auto", "gemm", "packed"),
        (LARGE._replace(kernel=1, capability="default"), False, "auto", "torch", "for default"),
        (LARGE._replace(kernel=1, shape=(0, 64, 8, 8)), False, "auto", "torch", "empty"),
    ],
)
def test_the_choice_for_packed_weights_and_its_reason(problem, padded, requested, algorithm, reason):
    choice = choose_packed(problem, padded, requested)
    assert choice.algorithm == algorithm and reason in choice.reason


@pytest.mark.parametrize(
    ("problem", "algorithm"),
    [
        (PAIRS, "winograd"),
        (PAIRS._replace(dtype=torch.float32, stride=2, outputs=128), "winograd"),
        (PAIRS._replace(needs_grad=False), "winograd"),
        (PAIRS._replace(shape=(128, 32, 16, 16), outputs=32), "winograd"),
        (PAIRS._replace(shape=(128, 16, 32, 32), outputs=16), "torch"),
        (PAIRS._replace(shape=(128, 512, 4, 4), outputs=512), "winograd"),
        (PAIRS._replace(outputs=128, stride=2), "torch"),
        (PAIRS._replace(shape=(32, 256, 4, 4), outputs=512, stride=2), "winograd"),
        (PAIRS._replace(shape=(32, 256, 6, 6), outputs=512, stride=2), "torch"),
        (PAIRS._replace(shape=(32, 512, 2, 2), outputs=512), "winograd"),
        (PAIRS._replace(kernel=1), "gemm"),
    ],
)
def test_where_pytorch_multiplies_in_pairs_winograds_has_to_save_more(problem, algorithm):
    assert choose_algorithm(problem).algorithm == algorithm


def test_a_problem_has_pairs_where_kernels_for_bfloat16_do():
    x = torch.randn(2, 5, 7, 9)
    assert problem_of(x, 11, needs_grad=True).pairs == multiplies_pairs()
    assert not problem_of(x.to("meta"), 11, needs_grad=True).pairs


def process(value: str, code: str = "print(multiplies_pairs())") -> subprocess.CompletedProcess[str]:
    """What a fresh process says that has the variable: the processor's choice is a process's."""
    code = f"from fastres.ops.products import multiplies_pairs; {code}"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"FASTRES_BF16_PRODUCTS": value}
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("value", ["", "auto", "float32", "pairs"])
def test_the_environment_says_how_bfloat16_numbers_are_multiplied(value):
    done = process(value)
    compiled = _extension.load_cpu() is not None and _extension.cpu_capability() == "avx512"
    if value == "pairs" and not (compiled and torch.cpu.get_capabilities()["avx512_bf16"]):
        assert "FASTRES_BF16_PRODUCTS=pairs: this processor, or the kernels in use, have no" in done.stderr
    elif value in ("float32", "pairs"):
        assert done.stdout.strip() == str(value == "pairs")
    else:
        assert done.returncode == 0, done.stderr


def test_another_word_for_products_is_refused():
    expected = "ValueError: FASTRES_BF16_PRODUCTS: expected one of ('auto', 'pairs', 'float32'), got 'half'"
    assert expected in process("half").stderr


@pytest.mark.skipif(not multiplies_pairs(), reason="this processor's kernels have one way")
@pytest.mark.parametrize("value", ["pairs", "float32"])
def test_pairs_round_the_weight_and_float32_products_do_not(value):
    # 1 + 2^-10 is no bfloat16 number.
    code = """
import torch, fastres
x = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16)
weight = torch.tensor([1 + 2**-10, -1.0]).reshape(1, 2, 1, 1).repeat(2, 1, 1, 1)
print(torch.ops.fastres.conv3x3_forward(x, weight, False)[0].unique().tolist())
"""
    assert process(value, code).stdout.strip() == ("[0.0]" if value == "pairs" else "[0.0009765625]")


@pytest.mark.parametrize("capability", ["default", "cuda", "meta", "xpu"])
def test_where_no_kernel_of_ours_serves_it_is_pytorchs(capability):
    problem = LARGE._replace(capability=capability)
    assert not is_served(problem)
    for requested in ALGORITHMS:
        assert choose_algorithm(problem, requested).algorithm == "torch"


@pytest.mark.parametrize(
    ("problem", "requested", "algorithm"),
    [
        (LARGE, "torch", "torch"),
        (FEW, "torch", "torch"),
        (FEW, "winograd", "winograd"),
        (FEW._replace(stride=2), "winograd", "winograd"),
        (FEW._replace(stride=3), "winograd", "torch"),
        (LARGE._replace(channels_last=False), "winograd", "winograd"),
        (LARGE._replace(dtype=torch.bfloat16, matrix_units=True), "winograd", "winograd"),
        (LARGE._replace(dtype=torch.float64), "winograd", "torch"),
        (LARGE._replace(kernel=1), "winograd", "torch"),
        (LARGE._replace(kernel=1), "gemm", "gemm"),
        (LARGE._replace(kernel=1, channels_last=False), "gemm", "gemm"),
        (LARGE._replace(kernel=1, stride=2), "gemm", "torch"),
        (LARGE, "gemm", "torch"),
        (LARGE, "grouped", "torch"),
        (FEW, "gemm", "gemm"),
        (GROUPED, "grouped", "grouped"),
        (GROUPED._replace(channels_last=False), "grouped", "grouped"),
        (GROUPED._replace(dtype=torch.bfloat16, matrix_units=True), "grouped", "grouped"),
        (GROUPED, "torch", "torch"),
        (GROUPED, "winograd", "winograd"),
        (DEPTHWISE._replace(kernel=3), "winograd", "torch"),
        (GROUPED._replace(kernel=5), "winograd", "torch"),
        (GROUPED, "gemm", "torch"),
        (GROUPED._replace(kernel=1), "gemm", "torch"),
        (DEPTHWISE, "grouped", "grouped"),
    ],
)
def test_what_is_requested_is_chosen_wherever_it_serves(problem, requested, algorithm):
    assert choose_algorithm(problem, requested).algorithm == algorithm


def test_the_problem_of_a_tensor():
    x = torch.randn(2, 5, 7, 9).contiguous(memory_format=torch.channels_last)
    problem = problem_of(x, 11, 3, 2, needs_grad=True)
    assert problem[:7] == (torch.float32, (2, 5, 7, 9), 11, 3, 2, True, True)
    assert problem.threads == torch.get_num_threads()
    assert problem.capability == torch.backends.cpu.get_cpu_capability().lower()
    assert problem_of(x.contiguous(), 11, needs_grad=False)[3:7] == (3, 1, False, False)
    assert problem_of(x.to("meta"), 11, needs_grad=False).capability == "meta"


def test_the_environment_decides_where_nobody_else_does(monkeypatch):
    monkeypatch.delenv("FASTRES_CONV", raising=False)
    assert requested_algorithm(None) == "auto"
    for value in ALGORITHMS:
        monkeypatch.setenv("FASTRES_CONV", value)
        assert requested_algorithm(None) == value
        assert requested_algorithm("auto") == "auto"
    monkeypatch.setenv("FASTRES_CONV", "fft")
    with pytest.raises(
        ValueError, match=r"FASTRES_CONV: expected one of \('auto', 'torch', 'winograd', 'gemm', 'grouped'\), got 'fft'"
    ):
        requested_algorithm(None)


def test_the_old_name_of_pytorchs_algorithm_works_and_says_so(monkeypatch):
    with pytest.warns(DeprecationWarning, match='algorithm: "direct" is called "torch" now'):
        assert requested_algorithm("direct") == "torch"
    monkeypatch.setenv("FASTRES_CONV", "direct")
    with pytest.warns(DeprecationWarning, match='FASTRES_CONV: "direct" is called "torch" now'):
        assert requested_algorithm(None) == "torch"
    with pytest.warns(DeprecationWarning, match="conv_algorithm"):
        block = FusedBasicBlock(8, 8, conv_algorithm="direct")
    assert block.conv_algorithm == "torch"
    with pytest.warns(DeprecationWarning, match="conv_algorithm"):
        assert fuse(FusedBasicBlock(8, 8), conv_algorithm="direct").conv_algorithm == "torch"
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with pytest.warns(DeprecationWarning, match="conv3x3_with_statistics"):
        convolved = functional.measured_conv3x3(x, w)
    with pytest.warns(DeprecationWarning, match=r"Convolved\.input"):
        assert convolved.x is x
    with pytest.warns(DeprecationWarning, match="algorithm"):
        assert torch.equal(functional.conv3x3(x, w, algorithm="direct"), functional.conv3x3(x, w, algorithm="torch"))
