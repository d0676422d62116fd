"""What --amp auto chooses: bfloat16 autocast where that is the fastest setting of a run, float32 elsewhere."""

from typing import Literal

import torch

from fastres import _extension

WINOGRAD_NETWORKS = ("resnet18", "resnet34", "article")
"""Networks of basic blocks, which spend nearly all their time in 3x3 convolutions. Those of bottlenecks spend about
half of it in 1x1 convolutions, where Winograd's algorithm has nothing to give."""


def fastest_on_cpu(*, amx: bool, avx512_bf16: bool, winograd: bool) -> Literal["none", "bf16"]:
    """The faster of float32 and bfloat16 autocast on a CPU. The rule for the CPU, all of it.

    AMX multiplies bfloat16 matrices many times as fast as the CPU multiplies float32 vectors, more than any
    convolution algorithm makes up for. AVX512_BF16 only doubles the multiplications an instruction: it is faster than
    PyTorch's float32 convolution, and slower than Winograd's, which needs a quarter of the multiplications. A CPU with
    neither computes bfloat16 in float32 and converts on the way.

    Args:
        amx: the CPU has AMX for bfloat16.
        avx512_bf16: the CPU has bfloat16 dot products on vectors.
        winograd: the network's convolutions in float32 are Winograd's, for the larger part.
    """
    return "bf16" if amx or (avx512_bf16 and not winograd) else "none"


def choose_amp(
    device: torch.device, *, model: str, fused: bool, conv_algorithm: str | None, channels_last: bool
) -> Literal["none", "bf16"]:
    """The fastest setting of a run: on a GPU bfloat16 where its hardware has it, on a CPU as `fastest_on_cpu` says.

    Loads the CPU kernels where the choice hangs on them. Processors other than x86 get float32: nothing was measured
    there.

    Args:
        device: a CPU or a CUDA device that is present.
        model, fused, conv_algorithm, channels_last: as in a resolved TrainConfig. Asking for "winograd" is asking for
            float32, which alone it serves.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            # Where bfloat16 is emulated it is slower than float32.
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    if conv_algorithm == "winograd":
        return "none"
    amx, avx512_bf16 = _cpu_has_bf16()
    winograd = (
        fused and conv_algorithm == "auto" and channels_last and model in WINOGRAD_NETWORKS and has_winograd_kernels()
    )
    return fastest_on_cpu(amx=amx, avx512_bf16=avx512_bf16, winograd=winograd)


def _cpu_has_bf16() -> tuple[bool, bool]:
    """Whether oneDNN, whose convolutions run under autocast, can use AMX and AVX512_BF16."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False, False
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16", False)), bool(found.get("avx512_bf16", False))


def has_winograd_kernels() -> bool:
    """Whether the compiled CPU kernels are there, and for a processor that Winograd's algorithm is written for."""
    return _extension.load_cpu() is not None and _extension.cpu_capability() != "default"
