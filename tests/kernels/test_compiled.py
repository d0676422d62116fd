"""What the compilers make of every kernel that a ResNet-18 launches, for GPUs that are not here."""

from __future__ import annotations

import os

import pytest
import torch
import triton

from benchmarks.compiled.launches import model_launches
from benchmarks.compiled.triton_table import is_good, label
from fastres.contract import Act, Norm, NormParams, Residual
from fastres.kernels import batch_norm_act
from fastres.kernels.compiled import ARCHITECTURES, Architecture, compile_launch, distinct, signature
from fastres.kernels.launch import Launch, recording

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")

H100 = ARCHITECTURES[3]
# A third of a minute each, so only those that differ most are compiled without -m slow.
OFTEN = ("sm_80", H100.name, "gfx942")
CASES = [
    *(
        pytest.param(a, torch.bfloat16, torch.channels_last, marks=() if a.name in OFTEN else pytest.mark.slow)
        for a in ARCHITECTURES
    ),
    *(pytest.param(H100, d, torch.channels_last, marks=pytest.mark.slow) for d in (torch.float16, torch.float32)),
    (H100, torch.bfloat16, torch.contiguous_format),
]


def width(launch: Launch, architecture: Architecture) -> int:
    """Bytes that a thread holds of a tile, of which an access has 16 at most; 0 where no activation is touched."""
    if "x_ptr" not in launch.arguments:
        return 0
    a = launch.arguments
    elements = a["BLOCK_S"] * a["BLOCK_C"] // (launch.num_warps * architecture.warp)
    return min(16, elements * a["x_ptr"].element_size())


@pytest.mark.parametrize(
    ("architecture", "dtype", "memory_format"), CASES, ids=lambda v: getattr(v, "name", str(v).removeprefix("torch."))
)
def test_every_kernel_of_a_model_compiles_into_registers(architecture, dtype, memory_format):
    launches = distinct(model_launches(dtype, memory_format, architecture.device))
    assert {launch.name for launch in launches} == {
        "statistics_kernel", "finalise_kernel", "apply_kernel", "backward_reduce_kernel", "backward_apply_kernel"
    }  # fmt: skip
    for launch in launches:
        check(launch, architecture)


def check(launch: Launch, architecture: Architecture) -> None:
    c, name, wide = compile_launch(launch, architecture), label(launch), width(launch, architecture)
    assert is_good(c), f"{name}: {c}"
    assert c.load_bytes >= wide, f"{name}: loads of {c.load_bytes} bytes at most"
    if launch.arguments.get("dz_ptr") is not None or launch.name.endswith("apply_kernel"):
        assert c.store_bytes == wide, f"{name}: stores of {c.store_bytes} bytes at most"


def test_a_thread_holds_16_bytes_of_a_tensor_and_8_where_there_are_many():
    launches = distinct(model_launches(torch.bfloat16, torch.channels_last, H100.device))
    widths = {(label(launch), width(launch, H100)) for launch in launches}
    narrow = {name for name, wide in widths if wide == 8}
    assert {wide for _, wide in widths} == {0, 8, 16}
    assert all("dy in two parts" in n or n == "backward apply, residual with its own norm, no bits" for n in narrow)


# activation, residual, dropout, order, dy in two parts, architecture
PASSES = [
    ("silu", "plain", 0.1, "add_act", False, "sm_90"),
    ("silu", "normalised", 0.0, "add_act", False, "sm_90"),
    ("gelu", "normalised", 0.1, "add_act", True, "sm_86"),
    ("gelu_tanh", "normalised", 0.1, "act_add", True, "sm_90"),
    ("elu", "none", 0.0, "add_act", False, "sm_100"),
    ("hardswish", "plain", 0.0, "add_act", True, "sm_80"),
    ("leaky_relu", "plain", 0.0, "add_act", True, "sm_90"),
    ("leaky_relu", "none", 0.1, "add_act", False, "sm_90"),
    ("relu6", "none", 0.0, "add_act", False, "sm_100"),
]


@pytest.mark.parametrize(("kind", "residual", "dropout_p", "order", "two_gradients", "name"), PASSES)
def test_every_activation_compiles_into_registers(kind, residual, dropout_p, order, two_gradients, name):
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    x = torch.empty(512, 64, 32, 32, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    v = torch.empty(64, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    act, norm = Act(kind, 0.1, dropout_p, order), NormParams(v, v, v, v)
    added = None if residual == "none" else x
    with recording(architecture.device) as launches:
        *_, bits = batch_norm_act.training(
            x, norm, None, added, norm if residual == "normalised" else None, None, seed, act
        )  # fmt: skip
        r = Residual(x) if added is not None and act.reads_residual() else None
        r = Residual(x, v, v, v, v) if residual == "normalised" else r
        needs = [True, added is not None, True]
        batch_norm_act.backward(x, x if two_gradients else None, x, Norm(v, v, v, v), r, bits, act, True, needs)
    assert len(launches) == 4
    for launch in launches[1:]:
        check(launch, architecture)


class NoGPU:
    """What Triton's runtime asks a driver for before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return H100.target


def test_the_runtime_keeps_a_kernel_of_its_own_for_every_activation(monkeypatch):
    """Functions are arguments of the compiler's: the runtime's cache has to tell them apart, and to know them again."""
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGPU())
    x, v = torch.empty(4, 64, 8, 8), torch.empty(64)
    with recording() as launches:
        for kind in ("silu", "gelu", "relu", "silu"):
            batch_norm_act.apply(x, Norm(v, v, v, v), None, None, Act(kind, 0.0, 0.0, "add_act"), False)
    compiled = [
        launch.kernel.warmup(**launch.arguments, grid=launch.grid, num_warps=launch.num_warps) for launch in launches
    ]
    assert compiled[0] is compiled[3]
    assert len({kernel.asm["ptx"] for kernel in compiled}) == 3


def test_activations_are_never_loaded_in_pieces():
    """In channels_last with channels in eights every access to an activation is as wide as what a thread holds of it:
    what is narrower are the bytes of the bit mask and the seed."""
    import re

    for launch in distinct(model_launches(torch.bfloat16, torch.channels_last, H100.device)):
        if launch.name not in ("apply_kernel", "backward_apply_kernel"):
            continue
        sass = compile_launch(launch, H100).assembly
        accesses = re.findall(r"\b(?:LDG|STG)\.E((?:\.\w+)*)", sass)
        assert accesses
        narrow = [a for a in accesses if not any(size in a for size in ("128", "64")[: 16 // width(launch, H100)])]
        bits = launch.arguments["bits_ptr"] is not None
        seed = launch.arguments.get("seed_ptr") is not None
        assert len(narrow) <= bits + seed, f"{label(launch)}: {narrow}"


def test_the_register_limit_is_what_keeps_half_of_the_threads_resident():
    """The check can fail: without the limit the widest kernel takes more registers than that."""
    import dataclasses

    architecture = H100
    launches = distinct(model_launches(torch.bfloat16, torch.channels_last, architecture.device))
    free = [compile_launch(dataclasses.replace(launch, registers=255), architecture) for launch in launches]
    assert any(c.occupancy < 0.5 for c in free)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_tensors_beyond_32_bit_offsets_compile_with_wide_accesses(memory_format):
    architecture = H100
    launches = distinct(model_launches(torch.bfloat16, memory_format, architecture.device, batch=2**15))
    wide = [launch for launch in launches if launch.arguments.get("INDEX_64")]
    assert {launch.name for launch in wide} >= {"statistics_kernel", "apply_kernel", "backward_reduce_kernel"}
    for launch in wide[:: 1 if memory_format == torch.channels_last else 4]:
        # Where a pass holds more vectors, as over two parts of a gradient, a thread may have half as much of each
        # (kernels/plan.py).
        least = 8 if launch.arguments.get("dy2_ptr") is not None else 16
        assert compile_launch(launch, architecture).load_bytes >= least, label(launch)


def test_launches_differ_where_their_machine_code_does():
    launches = model_launches(torch.bfloat16, torch.channels_last, H100.device)
    kinds = {signature(launch) for launch in launches}
    assert len(kinds) < len(launches) and len(kinds) == len(distinct(launches)) <= 32
