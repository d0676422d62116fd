"""Faults planted into the shortcut's kernels: no barrier, wait or predicate can be taken out without a test failing."""

from __future__ import annotations

import pytest

from tests.emulator.cases import Case
from tests.emulator.machine import STEPS
from tests.oracle import LAYOUTS, SEED

SHAPE = "ragged everywhere, deep"


def caught(machine, case: Case, step: str, site: tuple[str, str], *, seed: int, detect_races: bool = True) -> bool:
    try:
        case.check(machine, step, seed=seed, detect_races=detect_races, take_out=[site])
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_can_be_taken_out(machine, layout, arithmetic, step):
    case = Case(arithmetic, layout, SHAPE, step)
    case.check(machine, step)
    sites = machine.sites()
    kinds = {kind for kind, _ in sites}
    # Two-byte elements are copied one by one, and waited for where they are loaded.
    asynchronous = layout == "channels_last" or arithmetic != "bfloat16"
    assert kinds == {"barrier", "predicate"} | ({"wait", "wait by one group"} if asynchronous else set())
    missed = [site for site in sites if not caught(machine, case, step, site, seed=SEED)]
    assert not missed, f"taken out without a failure: {missed}"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_alone_show_a_missing_barrier_wait_or_predicate(machine, layout, step):
    """Without the race detector, by NaN in shared memory, copies that arrive late and the order of warps."""
    case = Case("float32", layout, SHAPE, step)
    case.check(machine, step, detect_races=False)
    passes = machine.sites()
    # The barrier of the main loop and whatever stands beside it in the kernel.
    for kind in ("barrier", "wait", "predicate"):
        site = max((site for site in passes if site[0] == kind), key=lambda site: passes[site])
        orders = [caught(machine, case, step, site, seed=SEED + i, detect_races=False) for i in range(8)]
        assert any(orders), f"{site} taken out, and no order of eight gave a wrong result"
