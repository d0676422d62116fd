from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastres.train.precision import choose_amp, fastest_on_cpu

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The CPU that torch reports; starts as one with AVX512_BF16."""
    found: dict[str, Any] = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return found


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"),
    [(False, False, "none"), (False, True, "bf16"), (True, False, "bf16"), (True, True, "bf16")],
)
def test_a_cpu_with_bfloat16_arithmetic_takes_bf16(
    processor: dict[str, Any], amx: bool, avx512_bf16: bool, expected: str
) -> None:
    assert fastest_on_cpu(amx=amx, avx512_bf16=avx512_bf16) == expected
    processor.update(amx_bf16=amx, avx512_bf16=avx512_bf16)
    assert choose_amp(CPU) == expected


@pytest.mark.parametrize("other", ["avx2", "aarch64", "no onednn"])
def test_other_cpus_take_float32(processor: dict[str, Any], monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    if other == "no onednn":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        processor.clear()
        processor.update({"architecture": "aarch64", "bf16": True} if other == "aarch64" else {"avx2": True})
    assert choose_amp(CPU) == "none"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "none")])
def test_gpu_takes_bf16_where_its_hardware_has_it(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    device = torch.device("cuda", 1)
    assert choose_amp(device) == expected
    assert asked == [device]


def test_this_cpu_is_asked_by_names_that_torch_knows() -> None:
    if torch.cpu.get_capabilities().get("architecture") != "x86_64":
        pytest.skip("AMX and AVX512_BF16 are x86's")
    assert {"amx_bf16", "avx512_bf16"} <= set(torch.cpu.get_capabilities())
