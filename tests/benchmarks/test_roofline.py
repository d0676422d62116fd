"""The roofline model: its FLOPs and bytes against independent counts, its arithmetic against limits."""

import functools
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

# The command draws; `pip install -e ".[test]"` alone does not bring what it draws with.
pytest.importorskip("matplotlib")

from benchmarks.roofline import kernels as rules
from benchmarks.roofline.__main__ import main
from benchmarks.roofline.model import GPUS, Config, Gpu, dram_bytes, find_gpu, predict
from benchmarks.roofline.report import PREDICTION
from benchmarks.roofline.trace import Kernel, Step
from benchmarks.workloads import COMPILE, EAGER, FUSED, SIDES
from fastres import models

MODELS = ("resnet18", "resnet50")
SMALL = Step(batch=2, image=16)

# A step is traced once for all tests that look at it.
kernels_of = functools.cache(rules.kernels_of)


def matrix_flops(kernels, *phases):
    """FLOPs of convolutions and matrix products, which are what PyTorch's counter counts."""
    return sum(k.flops for k in kernels if k.phase in phases and (k.part == "conv" or k.name in ("mm", "addmm")))


def passes(kernels, row, phase, size):
    """Bytes that the normalisation `row` moves in a phase, in units of one pass."""
    return sum(k.bytes for k in kernels if (k.row, k.phase, k.part) == (row, phase, "norm")) / size


def counted(model, step, training):
    """What PyTorch's counter says; it asks for shapes alone, so nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training), torch.device("meta"):
        logits = model(torch.randn(step.batch, 3, step.image, step.image))
        if training:
            F.cross_entropy(logits, torch.randint(10, (step.batch,))).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_pytorchs_counter(name, side):
    step = Step(model=name, batch=random.randint(1, 3), image=16)
    with torch.device("meta"):
        plain = models.create(name, num_classes=10, fused=False)
    kernels = kernels_of(side, step)
    assert matrix_flops(kernels, "forward") == counted(plain.eval(), step, False)
    assert matrix_flops(kernels, "forward", "backward") == counted(plain.train(), step, True)


def test_a_batch_has_as_many_flops_and_activation_bytes_as_its_images():
    one, three = (kernels_of(FUSED, Step(batch=batch, image=16)) for batch in (1, 3))
    assert matrix_flops(three, "forward") == 3 * matrix_flops(one, "forward")
    for a, b in zip(one, three, strict=True):
        assert (a.name, a.row) == (b.name, b.row)
        if a.part == "norm":
            assert b.bytes == 3 * a.bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_of_a_normalisation_are_the_closed_forms(dtype):
    step = Step(batch=2, dtype=dtype)
    size = 2 * 64 * 32 * 32 * dtype.itemsize
    bit = 1 / (8 * dtype.itemsize)
    traced = {side: kernels_of(side, step) for side in SIDES}
    # bn1 of a block: normalise and ReLU. bn2: normalise, add, ReLU; its gradient is the sum of two where y forks. Ours
    # adds them as it reads them and writes the residual's gradient there and then: 4, and 3 more.
    expected = {
        EAGER: ((3 + 2, 3 + 5), (3 + 3 + 2, 3 + 3 + 5)),
        COMPILE: ((3, 7), (4, 7 + 1)),
        FUSED: ((3, 5), (4 + bit, 7 + bit)),
    }
    for side, (plain, residual) in expected.items():
        found = [
            tuple(passes(traced[side], row, phase, size) for phase in ("forward", "backward"))
            for row in ("layer1.0.bn1", "layer1.0.bn2")
        ]
        assert found == [pytest.approx(plain), pytest.approx(residual)], side


def test_bytes_under_dropout_are_the_closed_forms():
    size, byte, bit = 2 * 64 * 32 * 32 * 2, 1 / 2, 1 / 16
    expected = {
        EAGER: (3 + 2 + 2 + byte, 2 + byte + 3 + 5),
        COMPILE: (3 + byte, 5 + 2 * byte),
        FUSED: (3 + bit, 5 + 2 * bit),
    }
    for side, moved in expected.items():
        kernels = kernels_of(side, Step(batch=2, dropout=0.1))
        found = tuple(passes(kernels, "layer1.1.bn1", phase, size) for phase in ("forward", "backward"))
        assert found == pytest.approx(moved), side


def test_bytes_of_a_projection_are_the_closed_forms():
    size, bit = 2 * 128 * 16 * 16 * 2, 1 / 16
    # Both normalisations of the block's end. The fork behind the block adds a gradient in backward.
    expected = {EAGER: (3 + 3 + 3 + 2, 3 + 3 + 5 + 5), COMPILE: (5, 10 + 1), FUSED: (4 + bit, 10 + bit)}
    for side, moved in expected.items():
        kernels = kernels_of(side, Step(batch=2))
        found = tuple(passes(kernels, "layer2.0.bn2", phase, size) for phase in ("forward", "backward"))
        assert found == pytest.approx(moved), side


def test_bytes_in_evaluation_are_the_closed_forms():
    size = 2 * 64 * 32 * 32 * 2
    for side, plain, residual in ((EAGER, 2 + 2, 2 + 3 + 2), (COMPILE, 2, 3), (FUSED, 2, 3)):
        kernels = kernels_of(side, Step(batch=2, training=False))
        assert {k.phase for k in kernels} == {"forward"}
        assert passes(kernels, "layer1.0.bn1", "forward", size) == plain
        assert passes(kernels, "layer1.0.bn2", "forward", size) == residual


def test_bytes_of_a_convolution_are_its_tensors_once():
    kernels = kernels_of(EAGER, Step(batch=2))
    x, product, weight = 2 * 64 * 32 * 32 * 2, 2 * 128 * 16 * 16 * 2, 128 * 64 * 2
    found = {k.name: k.bytes for k in kernels if k.row == "layer2.0.downsample.0" and k.part == "conv"}
    # A 1x1 convolution with stride 2 reads every fourth position, and writes the gradient of all.
    assert found == {
        "convolution": x // 4 + weight + product,
        "convolution, input gradient": product + weight + x,
        "convolution, weight gradient": product + x // 4 + weight,
    }


def test_launches_of_the_operators_are_those_of_the_design():
    def launches(side, row, phase, **options):
        kernels = kernels_of(side, Step(batch=2, image=16, **options))
        return sum(k.launches for k in kernels if (k.row, k.phase, k.part) == (row, phase, "norm"))

    assert launches(FUSED, "layer2.1.bn1", "forward") == launches(FUSED, "layer2.1.bn1", "backward") == 2
    assert launches(FUSED, "layer2.1.bn1", "forward", training=False) == 1
    # Statistics, running statistics, normalise, ReLU; ReLU backward, sums, apply.
    assert launches(EAGER, "layer2.1.bn1", "forward") == 4
    assert launches(EAGER, "layer2.1.bn1", "backward") == 3


def test_every_kernel_belongs_to_a_layer():
    for side in SIDES:
        names = {name for name, _ in models.create("resnet18", num_classes=10).named_modules()}
        assert {k.row for k in kernels_of(side, SMALL)} - names == {"loss", "optimizer"}


def test_with_infinite_bandwidth_the_flops_take_all_the_time():
    kernels, config = kernels_of(EAGER, SMALL), Config(flops_share=0.5, gap_us=0)
    gpu = Gpu("limit", math.inf, GPUS["a100"].peaks, 1, 0)
    expected = sum(k.flops / (0.5 * gpu.peaks[k.unit]) for k in kernels)
    assert sum(predict(kernels, gpu, config)) == pytest.approx(expected)


def test_with_infinite_peaks_the_bytes_take_all_the_time():
    kernels, config = kernels_of(FUSED, SMALL), Config(bandwidth_share=0.5, gap_us=2)
    gpu = Gpu("limit", 1e12, dict.fromkeys(GPUS["a100"].peaks, math.inf), 1, 0)
    launches = sum(k.launches for k in kernels)
    expected = sum(k.bytes for k in kernels) / 0.5e12 + 2e-6 * launches
    assert sum(predict(kernels, gpu, config)) == pytest.approx(expected)


def test_the_cache_serves_only_what_it_can_still_hold():
    def kernel(reads, writes):
        return Kernel("k", "row", "forward", "norm", tuple(reads.items()), tuple(writes.items()), 0, "fp32")

    kernels = [kernel({"a": 60}, {"b": 40}), kernel({"b": 40}, {"c": 30}), kernel({"a": 60}, {}), kernel({"c": 30}, {})]
    assert dram_bytes(kernels, 0) == [100, 70, 60, 30]
    # b is a hit; it and c drive a out; c is still there when a has come back.
    assert dram_bytes(kernels, 100) == [100, 30, 60, 0]
    assert dram_bytes(kernels, 50) == [100, 30, 60, 30]
    assert dram_bytes(kernels, 1000) == [100, 30, 0, 0]


@pytest.mark.parametrize("gpu", GPUS)
def test_the_cache_never_makes_a_step_slower(gpu):
    kernels = kernels_of(FUSED, SMALL)
    without, with_l2 = (predict(kernels, GPUS[gpu], Config(), l2=l2) for l2 in (False, True))
    assert all(a >= b for a, b in zip(without, with_l2, strict=True))
    assert sum(without) > sum(with_l2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpu": "h200"}, "gpu: expected one of .*'h200'"),
        ({"bandwidth_share": 0.0}, "bandwidth_share: expected 0 < .* got 0.0"),
        ({"flops_share": 1.5}, "flops_share: .* got 1.5"),
        ({"gap_us": -1.0}, "gap_us: expected at least 0, got -1.0"),
        ({"gap_us": math.nan}, "gap_us: expected at least 0, got nan"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        main(Config(**options, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="gpu: expected one of"):
        find_gpu("H100")
    with pytest.raises(ValueError, match="side: expected one of"):
        kernels_of("jit", SMALL)
    with pytest.raises(SystemExit):
        tyro.cli(Config, args=["--gpu", "v100"])


def test_the_command_writes_what_it_prints(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    config = tyro.cli(
        Config, args=["--gpu", "rtx4090", "--batch", "2", "--output-dir", str(tmp_path / "out"), "--page", str(page)]
    )
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        main(config, Console(file=log, width=220))
    printed = (tmp_path / "log").read_text(encoding="utf-8")
    assert printed.count("PREDICTION") == 2 and "layer3.0.downsample.0" in printed

    data = json.loads((tmp_path / "out" / "roofline.json").read_text(encoding="utf-8"))
    assert "PREDICTION" in data["note"] and list(data["gpus"]) == list(GPUS)
    for of_side in data["summary"].values():
        for entry in of_side.values():
            assert entry["predicted_ms"] == pytest.approx(sum(entry["predicted_ms_by_part"].values()))
    on_the_gpu = data["summary"]["rtx4090"]
    for side in SIDES:
        of_layers = sum(entry[side]["predicted_us"] for entry in data["layers"].values())
        assert of_layers == pytest.approx(1e3 * on_the_gpu[side]["predicted_ms"])
        assert sum(entry[side]["launches"] for entry in data["layers"].values()) == data["sides"][side]["launches"]
    assert (tmp_path / "out" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["roofline.json", "roofline.png"]

    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results -->\n**PREDICTION") and text.endswith("<!-- /results -->\nafter\n")
    assert "old" not in text and text.count("| fastres |") == len(GPUS)


def test_tracing_leaves_no_hooks_behind():
    before = len(torch.nn.modules.module._global_forward_pre_hooks), len(torch.nn.modules.module._global_forward_hooks)
    rules.kernels_of(FUSED, SMALL)
    after = len(torch.nn.modules.module._global_forward_pre_hooks), len(torch.nn.modules.module._global_forward_hooks)
    assert before == after
    assert PREDICTION.startswith("PREDICTION")
