"""What the compilers make of every kernel that a ResNet-18 launches, for GPUs that are not here."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.compiled.launches import model_launches
from benchmarks.compiled.triton_table import is_good, label
from fastres.kernels.compiled import ARCHITECTURES, Compiled, compile_launch, distinct, signature

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")

CASES = [
    *((a, torch.bfloat16, torch.channels_last) for a in ARCHITECTURES),
    *((a, d, torch.channels_last) for a in ARCHITECTURES[3:4] for d in (torch.float16, torch.float32)),
    (ARCHITECTURES[3], torch.bfloat16, torch.contiguous_format),
]


def compiled_kernels(architecture, dtype, memory_format) -> dict[str, Compiled]:
    launches = distinct(model_launches(dtype, memory_format, architecture.device))
    return {f"{label(launch)} {i}": compile_launch(launch, architecture) for i, launch in enumerate(launches)}


@pytest.mark.parametrize(
    ("architecture", "dtype", "memory_format"), CASES, ids=lambda v: getattr(v, "name", str(v).removeprefix("torch."))
)
def test_every_kernel_of_a_model_compiles_into_registers(architecture, dtype, memory_format):
    found = compiled_kernels(architecture, dtype, memory_format)
    kinds = {c.kernel for c in found.values()}
    assert kinds == {
        "statistics_kernel", "finalise_kernel", "apply_kernel", "backward_reduce_kernel", "backward_apply_kernel"
    }  # fmt: skip
    assert not {name: c for name, c in found.items() if not is_good(c)}
    for name, c in found.items():
        if c.kernel == "finalise_kernel":
            continue  # touches no activation
        assert c.load_bytes == 16, f"{name}: loads of {c.load_bytes} bytes at most"
        if "reduce" not in name and "statistics" not in name:
            assert c.store_bytes == 16, f"{name}: stores of {c.store_bytes} bytes at most"


def test_activations_are_never_loaded_in_pieces():
    """In channels_last with channels in eights every access to an activation is of 16 bytes: what is narrower are the
    bytes of the bit mask and the seed."""
    import re

    for launch in distinct(model_launches(torch.bfloat16, torch.channels_last, ARCHITECTURES[3].device)):
        if launch.name not in ("apply_kernel", "backward_apply_kernel"):
            continue
        sass = compile_launch(launch, ARCHITECTURES[3]).assembly
        accesses = re.findall(r"\b(?:LDG|STG)\.E((?:\.\w+)*)", sass)
        assert accesses
        narrow = [a for a in accesses if ".128" not in a]
        bits = launch.arguments["bits_ptr"] is not None
        seed = launch.arguments.get("seed_ptr") is not None
        assert len(narrow) <= bits + seed, f"{label(launch)}: {narrow}"


def test_the_register_limit_is_what_keeps_half_of_the_threads_resident():
    """The check can fail: without the limit the widest kernel takes more registers than that."""
    import dataclasses

    architecture = ARCHITECTURES[3]
    launches = distinct(model_launches(torch.bfloat16, torch.channels_last, architecture.device))
    free = [compile_launch(dataclasses.replace(launch, registers=255), architecture) for launch in launches]
    assert any(c.occupancy < 0.5 for c in free)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_tensors_beyond_32_bit_offsets_compile_with_wide_accesses(memory_format):
    architecture = ARCHITECTURES[3]
    launches = distinct(model_launches(torch.bfloat16, memory_format, architecture.device, batch=2**15))
    wide = [launch for launch in launches if launch.arguments.get("INDEX_64")]
    assert {launch.name for launch in wide} >= {"statistics_kernel", "apply_kernel", "backward_reduce_kernel"}
    for launch in wide[:: 1 if memory_format == torch.channels_last else 4]:
        assert compile_launch(launch, architecture).load_bytes == 16, label(launch)


def test_launches_differ_where_their_machine_code_does():
    launches = model_launches(torch.bfloat16, torch.channels_last, ARCHITECTURES[3].device)
    kinds = {signature(launch) for launch in launches}
    assert len(kinds) < len(launches) and len(kinds) == len(distinct(launches)) <= 22
