"""Calls that are repeated without Python, on the CPU: a library that stands in for CUDA's driver writes launches down.

The first half drives csrc/launch by an operator whose kernel is a function of that library. The second half takes the
launchers of batch_norm_act, with kernels as Triton's compiler sees them: what the repeated call gives each kernel is
compared with what Python gives it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres import _build, _library, contract
from fastres.contract import Act, Norm, NormParams, Residual, Statistics
from fastres.kernels import batch_norm_act as launchers
from fastres.kernels import launch as launching
from fastres.kernels import tape
from fastres.kernels.compiled import source
from fastres.kernels.launch import INTERPRETED, Launch, recording
from fastres.ops import batch_norm_act as operators

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ or shutil.which("c++") is None, reason="needs compiled kernels and a C++ compiler"
)

SPACE = "fastres_replayed"


class Kernel(ctypes.Structure):
    _fields_ = (("run", ctypes.c_void_p), ("count", ctypes.c_int32), ("sizes", ctypes.c_int32 * 64))


class Launched(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32), ("count", ctypes.c_int32), ("values", ctypes.c_uint64 * 64),
    )  # fmt: skip


class Driver:
    """The library, and what it saw."""

    def __init__(self, file: Path) -> None:
        self.file, self.library = file, ctypes.CDLL(str(file))

    def __getattr__(self, name: str) -> ctypes.c_int32:
        return ctypes.c_int32.in_dll(self.library, name)

    @property
    def scale(self) -> int:
        return ctypes.addressof(Kernel.in_dll(self.library, "scale_kernel"))

    def taken(self) -> list[Launched]:
        """Launches since the last time this was asked."""
        count = self.launched.value
        found = (Launched * 64).in_dll(self.library, "launches")[:count]
        self.launched.value = 0
        return list(found)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Driver:
    file = tmp_path_factory.mktemp("driver") / "libdriver.so"
    code = Path(__file__).with_name("driver.c")
    subprocess.run(["c++", "-x", "c", "-shared", "-fPIC", "-o", file, code], check=True)
    return Driver(file)


@pytest.fixture(scope="module")
def module(driver, tmp_path_factory) -> Any:
    """A copy of the compiled module, so that the one that a GPU's operators use knows nothing of this driver."""
    _, library = _build.built(_build.launch_module())
    copy = tmp_path_factory.mktemp("launch") / "_C_launch.so"
    shutil.copy(library, copy)
    loaded = _library.import_extension("_C_launch", copy)
    loaded.load(str(driver.file), str(driver.file))
    return loaded


@pytest.fixture(scope="module")
def library() -> Any:
    return torch.library.Library(SPACE, "DEF")


# ------------------------------------------------------------------------------------------- an operator of its own


class Scale:
    """y = factor * x, and a tensor that nobody writes; `calls` counts launches in place, `asked` calls of Python."""

    def __init__(self, module: Any, driver: Driver, library: Any) -> None:
        self.module, self.driver, self.asked = module, driver, 0
        self.recipe = self.recipe_of
        library.define(
            "scale(Tensor x, Tensor(a!) calls, float factor, str mode, bool[2] flags, Tensor? other)"
            " -> (Tensor, Tensor)"
        )
        library.impl("scale", self.python, "CompositeExplicitAutograd")
        module.install(f"{SPACE}::scale", "CPU")
        module.guard(f"{SPACE}::scale", "CPU", "scaled")
        self.operator = torch.ops.fastres_replayed.scale.default

    def recipe_of(self, x: Tensor, factor: float) -> tuple[Any, ...]:
        made = [
            torch.empty_strided(x.shape, x.stride(), device="meta"),
            torch.empty(3, dtype=torch.uint8, device="meta"),
        ]
        arguments = [
            (tape.INPUT, 0, b""), (tape.MADE, 0, b""), (tape.INPUT, 1, b""), (tape.COUNTERS, 0, b""),
            (tape.VALUE, 0, struct.pack("q", x.numel())), (tape.VALUE, 0, struct.pack("f", factor)),
        ]  # fmt: skip
        launches = [(self.driver.scale, (3, 2, 1), 64, 16, arguments)]
        return made, [0, 1], [1], launches, 5, torch.device("cpu")

    def python(
        self, x: Tensor, calls: Tensor, factor: float, mode: str, flags: list[bool], other: Tensor | None
    ) -> Any:
        self.asked += 1
        assert self.module.is_asked()
        self.module.learn(*self.recipe(x, factor))
        return torch.empty_like(x).copy_(factor * x), torch.empty(3, dtype=torch.uint8)

    def __call__(self, x: Tensor, calls: Tensor, factor: float = 2.0, mode: str = "a", flags: Any = (True, False),
                 other: Tensor | None = None) -> Any:  # fmt: skip
        return self.operator(x, calls, factor, mode, flags, other)


@pytest.fixture(scope="module")
def the_scale(module, driver, library) -> Scale:
    return Scale(module, driver, library)


@pytest.fixture
def scale(the_scale, module, driver) -> Scale:
    module.clear()
    driver.taken()
    the_scale.asked, the_scale.recipe = 0, the_scale.recipe_of
    return the_scale


def test_a_second_call_does_not_reach_python(scale, driver):
    calls = torch.zeros(1, dtype=torch.int64)
    results = []
    for _ in range(3):
        x = torch.randn(4, 5)
        version = calls._version
        y, other = scale(x, calls)
        torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)
        assert other.shape == (3,) and other.dtype == torch.uint8
        results.append((y, version, calls._version))
    assert scale.asked == 1 and calls.item() == 2
    assert len({y.data_ptr() for y, *_ in results}) == 3, "every call has results of its own"
    assert [after - before for _, before, after in results] == [0, 1, 1], "autograd knows what a kernel wrote"
    (first, second) = driver.taken()
    assert list(first.grid) == [3, 2, 1] and (first.threads, first.shared_bytes) == (64, 16)
    assert first.values[0] != second.values[0] and first.values[6] == first.values[7] == 0


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.randn(5, 4)},
        {"x": torch.randn(20)},
        {"x": torch.randn(5, 4).t()},
        {"x": torch.randn(4, 5).double()},
        {"x": torch.randn(21)[1:].view(4, 5)},
        {"calls": torch.zeros(2, dtype=torch.int64)},
        {"factor": 2.5},
        {"factor": -0.0},
        {"mode": "b"},
        {"mode": "a "},
        {"mode": "abcdefghi"},
        {"flags": (False, True)},
        {"flags": (True, True)},
        {"other": torch.zeros(3)},
    ],
    ids=lambda changes: ", ".join(
        f"{k} {v if not isinstance(v, Tensor) else tuple(v.shape)}" for k, v in changes.items()
    ),
)
def test_a_call_of_another_kind_reaches_python(scale, other):
    arguments: dict[str, Any] = {"x": torch.randn(4, 5), "calls": torch.zeros(1, dtype=torch.int64), "factor": 0.0}
    scale(**arguments)
    scale(**arguments | other)
    assert scale.asked == 2
    scale(**arguments)
    scale(**arguments | other)
    assert scale.asked == 2


def test_a_call_that_may_be_captured_reaches_python(scale, driver):
    calls = torch.zeros(1, dtype=torch.int64)
    scale(torch.randn(4, 5), calls)
    driver.capturing.value = 1
    try:
        scale(torch.randn(4, 5), calls)
    finally:
        driver.capturing.value = 0
    assert scale.asked == 2 and not driver.taken()


def test_counters_come_from_no_pool_that_the_calling_thread_has_opened(scale):
    def recipe(x: Tensor, factor: float) -> tuple[Any, ...]:
        *rest, _, device = scale.recipe_of(x, factor)
        return *rest, 5000, device  # more than what any other test leaves

    scale.recipe = recipe
    arguments = torch.randn(4, 5), torch.zeros(1, dtype=torch.int64)
    scale(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        y, _ = scale(*arguments)
    torch.testing.assert_close(y, 2 * arguments[0], rtol=0, atol=0)
    here = {event.key for event in seen.key_averages()}
    assert "aten::empty_strided" in here and not here & {"aten::zeros", "aten::zero_", "aten::empty"}


def test_a_launch_that_fails_raises(scale, driver):
    calls = torch.zeros(1, dtype=torch.int64)
    scale(torch.randn(4, 5), calls)
    driver.refusing.value = 1
    try:
        with pytest.raises(RuntimeError, match="a kernel was not launched: CUDA error 700"):
            scale(torch.randn(4, 5), calls)
    finally:
        driver.refusing.value = 0


@pytest.mark.parametrize("broken", ["a number of other bytes", "one more argument", "a pointer for a number"])
def test_a_kernel_of_other_parameters_is_refused(scale, broken):
    def recipe(x: Tensor, factor: float) -> tuple[Any, ...]:
        made, results, updated, [(*launch, arguments)], *rest = scale.recipe_of(x, factor)
        if broken == "a number of other bytes":
            arguments[-1] = (tape.VALUE, 0, struct.pack("d", factor))
        elif broken == "one more argument":
            arguments += 3 * [(tape.VALUE, 0, bytes(8))]
        else:
            arguments[-1] = (tape.INPUT, 0, b"")
        return made, results, updated, [(*launch, arguments)], *rest

    scale.recipe = recipe
    with pytest.raises(RuntimeError, match="takes other parameters than it was launched with"):
        scale(torch.randn(4, 5), torch.zeros(1, dtype=torch.int64))


def test_nobody_learns_where_nobody_asks(scale, module):
    assert not module.is_asked()
    assert not module.learn(*scale.recipe_of(torch.randn(4, 5), 2.0))
    assert module.clear() == 0


def test_gradients_are_refused_in_the_words_of_the_python_operators(scale):
    x, calls = torch.randn(4, 5, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError) as ours:
        scale(x, calls)
    with pytest.raises(RuntimeError) as theirs:
        torch.ops.fastres.batch_norm_act_stats(torch.randn(2, 3, 4, 5, requires_grad=True))
    changes = {"fastres::batch_norm_act_stats": f"{SPACE}::scale", "functional.batch_norm_act": "functional.scaled"}
    expected = str(theirs.value)
    for before, after in changes.items():
        expected = expected.replace(before, after)
    assert str(ours.value) == expected and scale.asked == 0
    with torch.no_grad():
        scale(x, calls)
    scale(x.detach(), calls)
    assert scale.asked == 1


def test_a_missing_library_is_named(driver, tmp_path):
    code = (
        "import sys; from pathlib import Path; import torch; from fastres import _build\n"
        "module = _build.built(_build.launch_module())[0]\n"
        "try: module.load(sys.argv[1], sys.argv[2])\n"
        "except RuntimeError as e: print(e)\n"
        "try: module.install('fastres::batch_norm_act_apply', 'CUDA')\n"
        "except RuntimeError as e: print(e)\n"
    )
    empty = tmp_path / "libempty.so"
    subprocess.run(["c++", "-x", "c", "-shared", "-o", empty, os.devnull], check=True)
    for libraries, words in (
        (("/nowhere/libcuda.so.1", driver.file), "cannot be loaded: /nowhere/libcuda.so.1"),
        ((empty, driver.file), f"{empty} has no cuLaunchKernel"),
        ((driver.file, empty), f"{empty} has no aoti_torch_get_current_cuda_stream"),
    ):
        command = [os.sys.executable, "-c", code, *map(str, libraries)]  # type: ignore[attr-defined]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        first, second = out.splitlines()
        assert words in first and second == "load comes before install"


# ------------------------------------------------------------------------------------- the launchers of batch_norm_act


class StandIn:
    """A kernel of Triton's that is looked at as its compiler looks at it, and not run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.__name__, self.arg_names = kernel, kernel.__name__, kernel.arg_names
        self.params = kernel.params
        self.made: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def run(*values: Any, num_warps: int, maxnreg: int = 255, **options: Any) -> Any:
            named = dict(zip(self.arg_names, values, strict=False)) | options
            compiled = types.SimpleNamespace(
                src=source(Launch(self.kernel, grid, named, num_warps, maxnreg)),
                metadata=types.SimpleNamespace(
                    num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
                    profile_scratch_size=0, num_warps=num_warps, shared=512,
                ),
            )  # fmt: skip
            sizes = [8 if k[0] == "*" else struct.calcsize(tape._NUMBERS[k]) for k in compiled.src.signature.values()
                     if k != "constexpr"]  # fmt: skip
            function = Kernel(None, len(sizes) + 2, (ctypes.c_int32 * 64)(*sizes, 8, 8))
            compiled.kept, compiled.function = function, ctypes.addressof(function)
            self.made.append(compiled)
            return Runnable(compiled)

        return run


class Runnable:
    """What Triton gives back; to run it does nothing."""

    def __init__(self, compiled: Any) -> None:
        self.src, self.metadata, self.function = compiled.src, compiled.metadata, compiled.function

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *values: None


NAMES = ("statistics_kernel", "finalise_kernel", "apply_kernel", "backward_reduce_kernel", "backward_apply_kernel")


@pytest.fixture(scope="module")
def replayed(module, library) -> dict[str, Any]:
    """Operators with the schemas of ours, served by the launchers on the CPU."""
    asked: list[str] = []
    made: dict[str, Any] = {"asked": asked}
    for name in ("training", "inference", "apply", "backward", "backward_reduce", "backward_apply"):
        ours = getattr(operators, name)
        returns = str(ours.overload._schema).split(" -> ")[1]
        library.define(f"{name}({ours.arguments.schema}) -> {returns}")

        def python(*args: Any, name: str = name, ours: Any = ours) -> Any:
            asked.append(name)
            return tape.teach(module, args, lambda: getattr(launchers, name)(**ours.arguments.group(*args)))

        library.impl(name, python, "CompositeExplicitAutograd")
        module.install(f"{SPACE}::{name}", "CPU")
        overload = getattr(torch.ops.fastres_replayed, name).default
        made[name] = ours.arguments.caller(overload)
    return made


def tensors(shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


def norm_params(v: Callable[[], Tensor], **changes: None) -> NormParams:
    return NormParams(v(), v(), v(), v(), 0.1, 1e-5)._replace(**changes)


def training(t: Callable[[], Tensor], v: Callable[[], Tensor], act: Act, **arguments: Any) -> dict[str, Any]:
    names = ("statistics", "residual", "residual_norm", "residual_statistics", "seed")
    return {"x": t(), "norm": norm_params(v), "act": act} | dict.fromkeys(names) | arguments


def backward(t: Callable[[], Tensor], v: Callable[[], Tensor], act: Act, **arguments: Any) -> dict[str, Any]:
    x = t()
    bits = torch.zeros(contract.bits_size(x), dtype=torch.uint8)
    norm = Norm(v(), v(), v(), v())
    plain = {"dy": t(), "dy2": None, "x": x, "norm": norm, "residual": None, "bits": bits, "act": act}
    return plain | {"training": True, "needs": [True, True, True]} | arguments


def relu(order: str = "add_act", dropout_p: float = 0.0) -> Act:
    return Act("relu", 0.0, dropout_p, order)


# Name -> (operator, its grouped arguments of a maker of tensors and one of vectors).
CASES: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "plain": ("training", lambda t, v: training(t, v, relu())),
    "residual and dropout": (
        "training",
        lambda t, v: training(
            t,
            v,
            relu(dropout_p=0.25),
            norm=norm_params(v, weight=None, bias=None),
            residual=t(),
            seed=torch.zeros(1, dtype=torch.int64),
        ),
    ),
    "a residual's norm": (
        "training",
        lambda t, v: training(t, v, Act("silu", 0.0, 0.0, "add_act"), residual=t(), residual_norm=norm_params(v)),
    ),
    "known statistics": (
        "training",
        lambda t, v: training(
            t,
            v,
            relu("act_add"),
            statistics=Statistics(v(), v(), torch.ones(1, dtype=torch.int64)),
            residual=t(),
            residual_norm=norm_params(v),
            residual_statistics=Statistics(v(), v(), None),
        ),
    ),
    "inference": (
        "inference",
        lambda t, v: {
            "x": t(),
            "norm": norm_params(v),
            "residual": t(),
            "residual_norm": norm_params(v),
            "act": Act("leaky_relu", 0.1, 0.0, "add_act"),
            "save_bits": True,
        },
    ),
    "apply": (
        "apply",
        lambda t, v: {
            "x": t(),
            "norm": Norm(v(), v(), v(), v()),
            "residual": Residual(t(), v(), v(), v(), None),
            "seed": None,
            "act": relu(),
            "save_bits": True,
        },
    ),
    "backward": ("backward", lambda t, v: backward(t, v, relu(dropout_p=0.25))),
    "backward of two gradients": (
        "backward",
        lambda t, v: backward(t, v, relu(), dy2=t(), residual=Residual(t(), v(), v(), v(), v())),
    ),
    "backward in evaluation": (
        "backward",
        lambda t, v: backward(t, v, relu(), norm=Norm(v(), v(), None, None), training=False, needs=[True, True, False]),
    ),
}


@pytest.mark.parametrize(
    ("memory_format", "dtype"),
    [(torch.channels_last, torch.bfloat16), (torch.contiguous_format, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_a_repeated_call_gives_kernels_what_python_gives_them(
    name, memory_format, dtype, replayed, module, driver, monkeypatch
):
    module.clear()
    driver.taken()
    for kernel in NAMES:
        monkeypatch.setattr(launchers, kernel, StandIn(getattr(launchers, kernel)))
    monkeypatch.setattr(launching, "_prepared", {})
    operator, make = CASES[name]
    run, (t, v) = replayed[operator], (tensors((4, 32, 6, 6), memory_format, dtype), lambda: torch.randn(32))
    replayed["asked"].clear()
    run(**make(t, v))
    given = make(t, v)
    by_hand = getattr(launchers, operator)
    versions = [p._version for p in (given["norm"][:2] if operator == "training" else ())]
    results = run(**given)
    assert replayed["asked"] == [operator], "the second call was repeated"
    assert [p._version - b for p, b in zip(given["norm"][:2], versions, strict=False)] == [1] * len(versions)
    with recording(INTERPRETED) as expected:
        of_python = by_hand(**given)
    for ours, theirs in zip(results, of_python, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    actual = driver.taken()
    assert len(actual) == len(expected) > 0
    inputs = {p.data_ptr() for g in given.values() for p in (g if isinstance(g, tuple) else (g,)) if is_real(p)}
    known = dict(zip((r.data_ptr() for r in of_python if r.numel()), results, strict=False))
    known = {r.data_ptr(): ours for ours, r in zip(results, of_python, strict=True) if r.numel()}
    for ours, theirs in zip(actual, expected, strict=True):
        kinds = source(theirs).signature
        assert tuple(ours.grid) == theirs.grid and ours.threads == 32 * theirs.num_warps and ours.shared_bytes == 512
        taken = [(parameter, kind) for parameter, kind in kinds.items() if kind != "constexpr"]
        assert ours.count == len(taken) + 2 and list(ours.values[len(taken) : ours.count]) == [0, 0]
        for value, (parameter, kind) in zip(ours.values, taken, strict=False):
            wanted = theirs.arguments[parameter]
            if not isinstance(wanted, Tensor):
                assert value == int.from_bytes(struct.pack(tape._NUMBERS[kind], wanted), "little"), parameter
            elif wanted.data_ptr() in inputs:
                assert value == wanted.data_ptr(), parameter
            elif wanted.data_ptr() in known:
                assert value == known[wanted.data_ptr()].data_ptr(), parameter
            else:
                assert parameter in WORKSPACES and value % 16 == 0 and value not in inputs, parameter


# What a call makes for itself: partial sums, counters, and in a backward what its first kernel leaves to the second.
WORKSPACES = ("partial_ptr", "arrivals_ptr", "dz_ptr", "dy_ptr", "dweight_ptr", "dbias_ptr")


def is_real(p: Any) -> bool:
    return isinstance(p, Tensor) and p.numel() > 0
