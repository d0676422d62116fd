"""The results of benchmarks.gpu.measure in words: tables in Markdown, and how they stand to the targets.

Standard library only, since benchmarks.gpu writes its summary where nothing of ours may be installed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.records import number, row
from benchmarks.sides import (
    BACKEND,
    COMPILE,
    COMPILE_GRAPH,
    COMPILERS,
    EAGER,
    EAGER_GRAPH,
    FROZEN_GRAPH,
    FUSED,
    FUSED_COMPILE,
    FUSED_GRAPH,
    MAX_AUTOTUNE,
    OURS,
)

NAMES = {
    EAGER: "eager",
    COMPILE: "torch.compile",
    MAX_AUTOTUNE: "torch.compile, max-autotune",
    EAGER_GRAPH: "eager under a CUDA graph",
    COMPILE_GRAPH: "torch.compile under a CUDA graph",
    FUSED: "fastres",
    FUSED_COMPILE: "fastres under torch.compile",
    FUSED_GRAPH: "fastres under a CUDA graph",
    BACKEND: "fastres as the compiler's backend",
    FROZEN_GRAPH: "fastres, frozen, under torch.compile and a CUDA graph",
}
UNKNOWN = math.nan

Entry = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What is to be reached. `worst` finds the weakest measured value and where, or nothing where none was measured."""

    words: str
    least: float
    aim: float
    worst: Callable[[dict[str, Any]], tuple[float, str] | None]
    less_is_better: bool = False

    def verdict(self, value: float) -> str:
        """Whether a value reaches the target."""
        sign = -1 if self.less_is_better else 1
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "reached" if sign * value >= sign * self.least else "missed"


def median(entry: Entry, side: str, kind: str = "seconds") -> float:
    """Seconds; not a number where the side has none."""
    values = entry["sides"].get(side, {}).get(kind)
    return statistics.median(values) if values else UNKNOWN


def best(entry: Entry, sides: Iterable[str]) -> float:
    """Seconds of the fastest of these sides; not a number where none ran."""
    return min((median(entry, side) for side in sides if entry["sides"].get(side, {}).get("seconds")), default=UNKNOWN)


def bandwidth(results: dict[str, Any]) -> float:
    """Bytes a second of the copy, reads and writes."""
    return float(results["copy"]["bytes"] / statistics.median(results["copy"]["seconds"]))


def over_floor(results: dict[str, Any], entry: Entry, side: str = FUSED) -> float:
    """Time over what the byte budget takes at the bandwidth of the copy."""
    return median(entry, side) * bandwidth(results) / entry["bytes"] if entry["bytes"] else UNKNOWN


# -------------------------------------------------------------------------------------------------------------- targets


def _of(results: dict[str, Any], group: str, dropout: bool | None = None) -> list[Entry]:
    return [e for e in results["entries"] if e["group"] == group and (dropout is None or bool(e["dropout"]) == dropout)]


def _least(pairs: Iterable[tuple[float, str]]) -> tuple[float, str] | None:
    return min((pair for pair in pairs if pair[0] == pair[0]), default=None)


def _most(pairs: Iterable[tuple[float, str]]) -> tuple[float, str] | None:
    return max((pair for pair in pairs if pair[0] == pair[0]), default=None)


def _speedup(group: str, peers: tuple[str, ...], dropout: bool | None = None, ours: tuple[str, ...] = (FUSED,)) -> Any:
    """Time of the fastest peer over ours, at its least."""

    def worst(results: dict[str, Any]) -> tuple[float, str] | None:
        entries = _of(results, group, dropout)
        return _least((best(entry, peers) / best(entry, ours), entry["name"]) for entry in entries)

    return worst


def _floor_at_the_largest_shape(results: dict[str, Any]) -> tuple[float, str] | None:
    entries = [entry for entry in _of(results, "op") if median(entry, FUSED) == median(entry, FUSED)]
    largest = max((math.prod(entry["shape"]) for entry in entries), default=0)
    return _most(
        (over_floor(results, entry), entry["name"]) for entry in entries if math.prod(entry["shape"]) == largest
    )


def _memory_against(peer: str, dropout: bool) -> Any:
    def worst(results: dict[str, Any]) -> tuple[float, str] | None:
        ratios = []
        for entry in _of(results, "model-train-step", dropout):
            ours, theirs = (entry["sides"].get(side, {}).get("peak_bytes") for side in (FUSED, peer))
            if ours and theirs:
                ratios.append((ours / theirs, entry["name"]))
        return _most(ratios)

    return worst


TARGETS = (
    Target("operator without dropout, over eager", 2.5, 3.0, _speedup("op", (EAGER,), False)),
    Target("operator without dropout, over torch.compile", 1.15, 1.35, _speedup("op", COMPILERS, False)),
    Target("operator with dropout 0.1, over eager", 4.0, 6.0, _speedup("op", (EAGER,), True)),
    Target("operator with dropout 0.1, over torch.compile", 1.25, 1.5, _speedup("op", COMPILERS, True)),
    Target("operator at the largest shape, time over byte budget", 1.25, 1.1, _floor_at_the_largest_shape, True),
    Target("training step, over torch.compile", 1.0, 1.15, _speedup("model-train-step", COMPILERS, None, OURS)),
    Target("peak memory without dropout, share of eager's", 0.75, 0.75, _memory_against(EAGER, False), True),
    Target("peak memory without dropout, share of torch.compile's", 1.0, 0.9, _memory_against(COMPILE, False), True),
    Target("peak memory with dropout 0.1, share of eager's", 0.75, 0.75, _memory_against(EAGER, True), True),
    Target("peak memory with dropout 0.1, share of torch.compile's", 1.0, 0.9, _memory_against(COMPILE, True), True),
    Target("projection shortcut, over eager", 1.2, 1.2, _speedup("projection", (EAGER,))),
    Target("projection shortcut, over torch.compile", 1.0, 1.0, _speedup("projection", COMPILERS)),
)


# --------------------------------------------------------------------------------------------------------------- tables


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    machine = results["machine"]
    lines = [
        f"{machine['device']}, driver {machine.get('driver')}; torch {machine['torch']}, triton {machine['triton']};"
        f" {machine['dtype']}, {machine['memory_format']}; {machine['date']}, commit {machine['commit'] or 'unknown'}."
        f" Copy: {number(bandwidth(results) / 1e9)} GB/s. Medians of interleaved rounds.",
        "",
    ]
    if machine["rehearsal"] or machine["quick"]:
        lines[:0] = ["**A rehearsal: tiny shapes, figures that say nothing about speed.**", ""]
    lines += _operators(results)
    lines += _steps(results)
    if not machine["rehearsal"] and not results.get("networks"):
        lines += _targets(results)
    lines += [f"Left out, the budget of {results['budget_s']:g} s was over: {key}" for key in results["left_out"]]
    for entry in results["entries"]:
        lines += [f"{entry['name']}, {NAMES[side]}: {why}" for side, why in entry["missing"].items()]
    return "\n".join(lines) + "\n"


def _operators(results: dict[str, Any]) -> Iterator[str]:
    entries = [*_of(results, "op"), *_of(results, "projection")]
    if not entries:
        return
    yield (
        "| forward + backward, ms of the device | eager | torch.compile | max-autotune | fastres | over eager |"
        " over compile | over max-autotune | fastres / byte budget | as called: eager | as called: fastres |"
    )
    yield row("---", *["---:"] * 10)
    for entry in entries:
        ours = median(entry, FUSED)
        peers = (EAGER, COMPILE, MAX_AUTOTUNE)
        yield row(
            entry["name"],
            *(_milliseconds(median(entry, side)) for side in (*peers, FUSED)),
            *(number(median(entry, side) / ours, "x") for side in peers),
            number(over_floor(results, entry)),
            *(_milliseconds(median(entry, side, "called_seconds")) for side in (EAGER, FUSED)),
        )
    gaps = [f"{e['name']}: {NAMES[s]}" for e in entries for s, seen in e["sides"].items() if not seen["kept_busy"]]
    if gaps:
        yield ""
        yield f"The host did not get ahead of the GPU, so these times hold gaps: {'; '.join(gaps)}."
    yield ""


def _steps(results: dict[str, Any]) -> Iterator[str]:
    groups = ("model-train-step", "model-network-step", "model-inference")
    entries = [entry for group in groups for entry in _of(results, group)]
    if not entries:
        return
    yield "| network | side | ms | images a second | over the best of torch.compile | peak memory, MiB |"
    yield row("---", "---", *["---:"] * 4)
    for entry in entries:
        for side in (side for side in NAMES if side in entry["sides"]):
            seconds, peak = median(entry, side), entry["sides"][side].get("peak_bytes")
            yield row(
                entry["name"],
                NAMES[side],
                _milliseconds(seconds),
                number(entry["images"] / seconds),
                number(best(entry, COMPILERS) / seconds, "x"),
                number(peak / 2**20) if peak else "",
            )
    yield ""


def _targets(results: dict[str, Any]) -> Iterator[str]:
    yield "| target | at least | aim | measured, at its worst | where | verdict |"
    yield row("---", *["---:"] * 3, "---", "---")
    for target in TARGETS:
        sign = "at most " if target.less_is_better else ""
        found = target.worst(results)
        limits = (f"{sign}{target.least:g}", f"{sign}{target.aim:g}")
        if found is None:
            yield row(target.words, *limits, "", "", "not measured")
        else:
            yield row(target.words, *limits, number(found[0]), found[1], target.verdict(found[0]))
    yield ""


def _milliseconds(seconds: float) -> str:
    return number(1e3 * seconds) if seconds >= 1e-3 or seconds != seconds else f"{1e3 * seconds:.3f}"
