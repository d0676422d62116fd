import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastres import _extension, models
from fastres.train import precision
from fastres.train.precision import choose_amp, fastest_on_cpu

CPU = torch.device("cpu")
DEFAULTS: dict[str, Any] = {"model": "resnet18", "fused": True, "conv_algorithm": "auto", "channels_last": True}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The CPU that torch reports; starts as one with AVX512_BF16, and kernels of ours that are compiled for AVX-512."""
    found: dict[str, Any] = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(_extension, "load_cpu", lambda: object())
    monkeypatch.setattr(_extension, "cpu_capability", lambda: "avx512")
    return found


@pytest.mark.parametrize(("amx", "avx512_bf16", "winograd"), list(itertools.product([False, True], repeat=3)))
def test_rule_for_the_cpu(amx: bool, avx512_bf16: bool, winograd: bool) -> None:
    """Relative speeds stand for the CPU: float32 1, Winograd in float32 2.3, bfloat16 0.6, 1.8, or with AMX 4."""
    float32 = 2.3 if winograd else 1.0
    bfloat16 = 4.0 if amx else 1.8 if avx512_bf16 else 0.6
    chosen = fastest_on_cpu(amx=amx, avx512_bf16=avx512_bf16, winograd=winograd)
    assert chosen == ("bf16" if bfloat16 > float32 else "none")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "none"),
        ({"fused": False, "conv_algorithm": None}, "bf16"),
        ({"conv_algorithm": "direct"}, "bf16"),
        ({"conv_algorithm": "winograd"}, "none"),
        ({"model": "resnet34"}, "none"),
        ({"model": "article"}, "none"),
        ({"model": "resnet50"}, "bf16"),
        ({"model": "resnet50", "conv_algorithm": "winograd"}, "none"),
        ({"channels_last": False}, "bf16"),
        ({"channels_last": False, "conv_algorithm": "winograd"}, "none"),
    ],
)
def test_cpu_with_bf16_vectors_takes_bf16_where_winograd_does_not_run(
    processor: dict[str, Any], change: dict[str, Any], expected: str
) -> None:
    assert choose_amp(CPU, **{**DEFAULTS, **change}) == expected


@pytest.mark.parametrize("kernels", ["missing", "default"])
def test_winograd_needs_compiled_kernels(
    processor: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    if kernels == "missing":
        monkeypatch.setattr(_extension, "load_cpu", lambda: None)
    else:
        monkeypatch.setattr(_extension, "cpu_capability", lambda: "default")
    assert choose_amp(CPU, **DEFAULTS) == "bf16"


def test_amx_takes_bf16_unless_winograd_is_asked_for(processor: dict[str, Any]) -> None:
    processor["amx_bf16"] = True
    assert choose_amp(CPU, **DEFAULTS) == "bf16"
    assert choose_amp(CPU, **{**DEFAULTS, "conv_algorithm": "winograd"}) == "none"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("other", ["avx2", "aarch64", "no onednn"])
def test_other_cpus_take_float32(
    processor: dict[str, Any], monkeypatch: pytest.MonkeyPatch, other: str, fused: bool
) -> None:
    if other == "no onednn":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        processor.clear()
        processor.update({"architecture": "aarch64", "bf16": True} if other == "aarch64" else {"avx2": True})
    fields = {**DEFAULTS, "fused": fused, "conv_algorithm": "auto" if fused else None}
    assert choose_amp(CPU, **fields) == "none"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "none")])
def test_gpu_takes_bf16_where_its_hardware_has_it(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    device = torch.device("cuda", 1)
    assert choose_amp(device, **DEFAULTS) == expected
    assert asked == [device]


def test_this_cpu_is_asked_by_names_that_torch_knows() -> None:
    if torch.cpu.get_capabilities().get("architecture") != "x86_64":
        pytest.skip("AMX and AVX512_BF16 are x86's")
    assert {"amx_bf16", "avx512_bf16"} <= set(torch.cpu.get_capabilities())


def test_named_networks_exist() -> None:
    assert set(precision.WINOGRAD_NETWORKS) < set(models.NAMES)
