"""The gate: every group beside its committed figures, what passes it and what does not, and what counts the figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gate import __main__ as command
from benchmarks.gate import groups, networks, replayed
from benchmarks.gate.__main__ import Config, main
from benchmarks.gate.calls import Call, record
from benchmarks.gate.figures import RENEW, Change, Counted, Unavailable, changes, check, read, table, write
from benchmarks.memory import saved_for_backward
from benchmarks.operators import operator_calls
from fastres.nn import FusedBatchNormAct2d

SLOW = ("kernels for sm_80",)
"""Groups that say little which another does not say."""


def counted(group: str) -> Counted:
    try:
        return groups.GROUPS[group]()
    except Unavailable as error:
        pytest.skip(str(error))


def passes(group: str, now: Counted) -> None:
    """Check the figures of a group that were counted here, or skip where others were committed."""
    try:
        check(group, read()[group], now)
    except Unavailable as error:
        pytest.skip(str(error))


def twice(call: Call) -> Call:
    """The call with every image given twice, so that each of its passes is made twice."""
    doubled = tuple(torch.cat([a, a]) if isinstance(a, Tensor) and a.dim() == 4 else a for a in call.arguments)
    return call._replace(arguments=doubled)


# --------------------------------------------------------------------------------------------- the committed figures


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in groups.GROUPS
        if name not in ("instructions", "scratch bytes")
    ],
)
def test_a_group_is_no_more_than_was_committed(group: str) -> None:
    passes(group, counted(group))


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("instructions", "batch_norm_act_training: residual"),
        ("scratch bytes", "batch_norm_act_backward: SiLU"),
    ],
)
def test_operators_do_no_more_than_was_committed_and_a_planted_pass_shows(
    group: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        calls = groups.calls()
    except Unavailable as error:
        pytest.skip(str(error))
    planted = twice(next(call for call in calls if call.name == name))._replace(name="planted")
    monkeypatch.setattr(groups, "calls", lambda: [*calls, planted])
    now = counted(group)
    more = now.figures.pop("planted")
    with pytest.raises(AssertionError, match=rf"{group}, {name}: was {now.figures[name]}, is {more} \(\+\d+\.\d %\)"):
        check(group, now, Counted(now.versions, now.figures | {name: more}))
    # What a call does once, however many images it is given, is not doubled.
    assert 1.5 * now.figures[name] < more <= 2 * now.figures[name]
    passes(group, now)


def test_the_file_has_every_group_and_no_other() -> None:
    assert list(read()) == list(groups.GROUPS)
    assert all(found.figures for found in read().values())


def test_every_operator_is_among_the_calls() -> None:
    names = {name.removeprefix("fastres::") for name in torch._C._dispatch_get_all_op_names() if "fastres::" in name}
    figures = read()["instructions"].figures
    assert {figure.partition(":")[0] for figure in figures} == names
    assert figures.keys() == read()["scratch bytes"].figures.keys()


# ------------------------------------------------------------------------------------------------- what the gate says


def test_a_rise_of_two_per_cent_passes_and_more_fails() -> None:
    was = Counted({}, {"a": 1000, "b": 0})
    check("group", was, Counted({}, {"a": 1020, "b": 0}))
    check("group", was, Counted({}, {"a": 1, "b": 0}))
    with pytest.raises(AssertionError) as failed:
        check("group", was, Counted({}, {"a": 1021, "b": 1}))
    text = str(failed.value)
    assert "group, a: was 1000, is 1021 (+2.1 %)" in text
    assert "group, b: was 0, is 1" in text
    assert RENEW in text


def test_missing_and_new_figures_fail() -> None:
    with pytest.raises(AssertionError) as failed:
        check("group", Counted({}, {"gone": 3}), Counted({}, {"new": 4}))
    assert "group, gone: was 3, is missing" in str(failed.value)
    assert "group, new: was missing, is 4" in str(failed.value)


def test_figures_of_other_versions_are_not_compared() -> None:
    with pytest.raises(Unavailable, match=r"compiler: counted with GCC 12, here is GCC 13; torch: counted with none"):
        check("group", Counted({"compiler": "GCC 12"}, {}), Counted({"compiler": "GCC 13", "torch": "2.14"}, {"a": 1}))


def test_the_table_has_what_differs_and_marks_what_fails() -> None:
    found = changes("group", {"a": 100, "b": 100, "c": 5, "d": 0, "e": 7}, {"a": 101, "b": 103, "d": 2, "e": 7, "f": 1})
    assert [str(change) for change in found if change.fails and change.name == "b"] == [
        "group, b: was 100, is 103 (+3.0 %)"
    ]
    assert table(found).splitlines()[2:] == [
        "| group | a | 100 | 101 | +1.0 % |",
        "| group | b | 100 | 103 | **+3.0 %** |",
        "| group | d | 0 | 2 | **from 0** |",
        "| group | f | missing | 1 | **new** |",
        "| group | c | 5 | missing | **gone** |",
    ]
    assert not Change("group", "a", 100, 50).fails


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Config]:
    """A command over two groups of which the second cannot be counted here, and the figures of a file."""

    def unavailable() -> Counted:
        raise Unavailable("no GPU")

    def config(now: dict[str, int], **options: Any) -> Config:
        known = {"first": lambda: Counted({"torch": "2"}, now), "second": unavailable}
        monkeypatch.setattr(command, "GROUPS", known)
        return Config(**({"groups": tuple(known), "file": tmp_path / "gate.json"} | options))

    write({"first": Counted({"torch": "2"}, {"a": 100}), "second": Counted({}, {"b": 5})}, tmp_path / "gate.json")
    return config


@pytest.mark.parametrize(
    ("now", "status", "line"),
    [
        ({"a": 100}, 0, "no figure differs"),
        ({"a": 50}, 0, "| first | a | 100 | 50 | -50.0 % |"),
        ({"a": 102}, 0, "| first | a | 100 | 102 | +2.0 % |"),
        ({"a": 103}, 1, "| first | a | 100 | 103 | **+3.0 %** |"),
        ({"a": 100, "c": 1}, 1, "| first | c | missing | 1 | **new** |"),
        ({}, 1, "| first | a | 100 | missing | **gone** |"),
    ],
)
def test_the_command_shows_what_differs_and_fails_on_a_rise(
    given: Callable[..., Config], capsys: pytest.CaptureFixture[str], now: dict[str, int], status: int, line: str
) -> None:
    config = given(now)
    before = config.file.read_bytes()
    assert main(config) == status
    out = capsys.readouterr().out
    assert line in out
    assert "second: not counted: no GPU" in out
    assert config.file.read_bytes() == before


def test_renewing_writes_what_was_counted_and_keeps_what_cannot_be(
    given: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = given({"a": 300}, renew=True)
    assert main(config) == 0
    assert "| first | a | 100 | 300 | **+200.0 %** |" in capsys.readouterr().out
    assert read(config.file) == {"first": Counted({"torch": "2"}, {"a": 300}), "second": Counted({}, {"b": 5})}
    assert [file.name for file in config.file.parent.iterdir()] == ["gate.json"]


def test_an_interrupted_renewal_leaves_the_file_as_it_was(
    given: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = given({"a": 300}, renew=True)
    before = config.file.read_bytes()

    def fail(*files: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        main(config)
    assert [(file.name, file.read_bytes()) for file in config.file.parent.iterdir()] == [("gate.json", before)]


def test_figures_of_other_versions_fail_nothing(
    given: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = given({"a": 300})
    write({"first": Counted({"torch": "1"}, {"a": 100})}, config.file)
    assert main(config) == 0
    assert "first: not compared: torch: counted with 1, here is 2" in capsys.readouterr().out


def test_an_unknown_group_and_a_file_of_another_kind_are_refused(given: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"groups: expected some of first, second, got third"):
        main(given({}, groups=("first", "third")))
    config = given({})
    config.file.write_text('{"first": [1]}', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"gate.json: expected the gate's figures, as `{RENEW}` writes them"):
        main(config)


# --------------------------------------------------------------------------------------------------------- counting

DUMP = """# callgrind format
version: 1
desc: Trigger: Client Request: 7
positions: line
events: Ir

ob=(1) /lib/module.so
fl=(1) kernel.cpp
fn=(1) kernel
12 100
+3 20
* 1
cfi=(2) ???
cob=(2) /lib/libc.so.6
cfn=(2) memcpy
calls=4 0
-2 5000
cfn=(3) inlined
calls=1 0
12 40

ob=(2)
fn=(2)
0 5000

fl=(1)
ob=(1)
fn=(3) inlined
30 40
totals: 5161
"""


def test_of_a_dump_the_instructions_of_one_library_count_without_those_of_what_it_calls() -> None:
    assert replayed.cost_of_module(DUMP, "/lib/module.so") == ("7", 100 + 20 + 1 + 40)
    assert replayed.cost_of_module(DUMP, "/lib/libc.so.6") == ("7", 5000)
    assert replayed.cost_of_module(DUMP, "/lib/other.so") == ("7", 0)


def test_scratch_is_what_is_held_at_a_time_beyond_the_results(tmp_path: Path) -> None:
    """In a process with the probe preloaded, for which the calls are given as functions."""
    script = """
import ctypes, sys, torch
from benchmarks.gate.replay import scratch
probe = ctypes.CDLL(sys.argv[1])
probe.gate_end.restype = ctypes.c_int64
def step(x):
    a = torch.empty(1 << 20, dtype=torch.uint8)
    del a
    b = torch.empty(1 << 18, dtype=torch.uint8)
    torch.empty(100, dtype=torch.uint8)  # too small to count
    return x, torch.empty(1 << 19, dtype=torch.uint8), torch.empty(8)
x = torch.empty(1 << 16)
print(scratch(probe, lambda: step(x), (x,)))
print(scratch(probe, lambda: (x, torch.empty(1 << 19)), (x,)))
"""
    try:
        replayed.check_cpu()
        probe = replayed.compile_probe(tmp_path)
    except Unavailable as error:
        pytest.skip(str(error))
    lines = replayed.run_preloaded([sys.executable, "-c", script, probe], probe)
    # The first block is freed before the result is made, but is more than what is held then.
    assert lines.split() == [str((1 << 20) - (1 << 19)), "0"]


def test_no_valgrind_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="valgrind is not installed"):
        replayed.instructions([])


@pytest.mark.parametrize(
    ("setting", "reason"), [(("CXX", "no-such-compiler"), "no C[+][+] compiler"), (("FASTRES_EXTENSION", "0"), "=0")]
)
def test_no_compiler_and_no_module_are_reasons(
    monkeypatch: pytest.MonkeyPatch, setting: tuple[str, str], reason: str
) -> None:
    monkeypatch.setenv(*setting)
    with pytest.raises(Unavailable, match=reason):
        replayed.check_cpu()
        replayed.scratch([])


def test_a_scenario_that_calls_an_operator_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gate import calls

    once = calls.SCENARIOS["evaluation"]

    def again() -> None:
        once()
        once()

    monkeypatch.setattr(calls, "SCENARIOS", {"evaluation": once})
    assert [call.name for call in record()] == ["batch_norm_act_inference: evaluation"]
    monkeypatch.setattr(calls, "SCENARIOS", {"again": again})
    with pytest.raises(RuntimeError, match="again: expected one call of each operator, got another of batch_norm_act"):
        record()


# ------------------------------------------------------------------------------------------- planted into a network


class Extra(nn.Module):
    """A network whose activations go through one more module."""

    def __init__(self, extra: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.extra = nn.Conv2d(3, 16, 3, padding=1), FusedBatchNormAct2d(16), extra

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.norm(self.conv(x)))


class Saving(nn.Module):
    """An identity that keeps a copy for backward."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.clone())
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy

    def forward(self, x: Tensor) -> Tensor:
        return self._Function.apply(x)


class Breaking(nn.Module):
    """An addition that Dynamo puts into a graph of its own."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1


def of_plain_and_planted(extra: nn.Module, function: Callable[[nn.Module, Tensor], dict[str, int]]) -> tuple[Any, Any]:
    """What a function finds of a network, and of the same one with a module planted into it."""
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    return function(Extra(nn.Identity()), x), function(Extra(extra), x)


def failure(was: dict[str, int], now: dict[str, int]) -> str:
    check("group", Counted({}, was), Counted({}, was))
    with pytest.raises(AssertionError) as failed:
        check("group", Counted({}, was), Counted({}, now))
    return str(failed.value)


def test_one_operator_call_more_fails() -> None:
    was, now = of_plain_and_planted(FusedBatchNormAct2d(16), lambda network, x: operator_calls(lambda: network(x)))
    assert "group, fastres::batch_norm_act_training: was 1, is 2 (+100.0 %)" in failure(was, now)


def test_one_saved_tensor_more_fails() -> None:
    def saved(network: nn.Module, x: Tensor) -> dict[str, int]:
        return {"bytes": saved_for_backward(network, lambda: network(x).sum().backward())}

    was, now = of_plain_and_planted(Saving(), saved)
    more = was["bytes"] + 4 * 2 * 16 * 16 * 16
    assert f"group, bytes: was {was['bytes']}, is {more} (+" in failure(was, now)


def test_a_graph_break_fails() -> None:
    was, now = of_plain_and_planted(Breaking(), networks.graphs)
    assert "group, breaks: was 0, is 1" in failure(was, now)


def test_a_call_more_in_a_graph_that_the_backend_has_rewritten_fails() -> None:
    was, now = of_plain_and_planted(nn.Softplus(), networks.rewritten)
    assert f"group, calls: was {was['calls']}, is {was['calls'] + 1} (+" in failure(was, now)
    assert (was["graphs"], was["normalisations left"]) == (1, 0)
