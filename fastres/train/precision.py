"""What --amp auto chooses: bfloat16 autocast where that is the fastest setting of a run, float32 elsewhere."""

from typing import Literal

import torch

AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype that autocast computes in; with none there is no autocast."""


def fastest_on_cpu(*, amx: bool, avx512_bf16: bool) -> Literal["none", "bf16"]:
    """The faster of float32 and bfloat16 autocast on a CPU. The rule for the CPU, all of it.

    Winograd's convolutions read and write bfloat16 as well as float32, and gain by the bytes that they save. What is
    left to PyTorch's own (and with AMX that is all) gains where the CPU multiplies bfloat16 itself, and loses where it
    does not: there every value is converted on the way.

    Args:
        amx: the CPU has AMX for bfloat16.
        avx512_bf16: the CPU has bfloat16 dot products on vectors.
    """
    return "bf16" if amx or avx512_bf16 else "none"


def choose_amp(device: torch.device) -> Literal["none", "bf16"]:
    """The fastest setting on a device: on a GPU bfloat16 where its hardware has it, on a CPU as `fastest_on_cpu` says.

    Processors other than x86 get float32: nothing was measured there.

    Args:
        device: a CPU or a CUDA device that is present.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            # Where bfloat16 is emulated it is slower than float32.
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "none"
    found = torch.cpu.get_capabilities()
    return fastest_on_cpu(amx=bool(found.get("amx_bf16", False)), avx512_bf16=bool(found.get("avx512_bf16", False)))
