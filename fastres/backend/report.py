"""What the backend has found in each graph, what it left to PyTorch, and why."""

from __future__ import annotations

import re
from collections import Counter, deque
from dataclasses import dataclass, field

from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+), in .*')
_MOST_GRAPHS = 256
# As many places are printed for each reason.
_PLACES = 4


@dataclass(frozen=True)
class Left:
    """A call that stayed PyTorch's.

    Attributes:
        call: "normalisation" or "convolution".
        reason: why.
        place: file, line and text of the user's source.
    """

    call: str
    reason: str
    place: str

    def __str__(self) -> str:
        return f"{self.call} left: {self.reason} ({self.place})"


@dataclass
class GraphReport:
    """One graph of Dynamo's.

    Attributes:
        norms, convolutions: how many calls of batch normalisation and of two-dimensional convolution there were.
        fused_norms, fused_convolutions: how many of them calls of ours compute.
        pointwise: how many activations, additions, dropouts and max poolings are part of these calls.
        channels_last: calls of a network in NCHW that are computed in channels_last.
        operators: function of fastres.functional -> number of its calls.
        left: the others, each with its reason.
        inner: the backend that compiled the changed graph.
    """

    norms: int = 0
    convolutions: int = 0
    fused_norms: int = 0
    fused_convolutions: int = 0
    pointwise: int = 0
    channels_last: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    left: list[Left] = field(default_factory=list)
    inner: str = ""

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {name}" for name, count in sorted(self.operators.items())) or "nothing"
        lines = [
            f"{self.fused_norms} of {self.norms} normalisations and {self.fused_convolutions} of {self.convolutions}"
            f" convolutions fused, with {self.pointwise} pointwise calls: {calls}; inner backend {self.inner}"
        ]
        if self.channels_last > 0:
            lines.append(f"  {self.channels_last} calls computed in channels_last, between copies")
        for (call, reason), count in Counter((line.call, line.reason) for line in self.left).items():
            places = [line.place for line in self.left if (line.call, line.reason) == (call, reason)]
            lines.append(f"  {call} left: {reason}" + (f", {count} times" if count > 1 else ""))
            lines += [f"    {place}" for place in places[:_PLACES]]
            lines += [f"    and {count - _PLACES} more, which `left` has"] * (count > _PLACES)
        return "\n".join(lines)

    def add(self, other: GraphReport) -> None:
        """Count a part of the graph, a checkpointed one say, as well."""
        self.norms += other.norms
        self.convolutions += other.convolutions
        self.fused_norms += other.fused_norms
        self.fused_convolutions += other.fused_convolutions
        self.pointwise += other.pointwise
        self.channels_last += other.channels_last
        self.operators += other.operators
        self.left += other.left


class CompileReport(list[GraphReport]):
    """The graphs that the backend has compiled, in order; it prints a graph a paragraph."""

    def __str__(self) -> str:
        return "\n".join(f"graph {i}: {graph}" for i, graph in enumerate(self)) or "no graph was compiled"


_reports: deque[GraphReport] = deque(maxlen=_MOST_GRAPHS)


def note(report: GraphReport) -> None:
    _reports.append(report)


def compile_report(*, clear: bool = False) -> CompileReport:
    """What `torch.compile(model, backend="fastres")` made of each graph that it has compiled in this process.

    Args:
        clear: forget these graphs afterwards.
    Returns:
        A list of the last 256 `GraphReport`, oldest first. A graph break gives two graphs, and so does a recompilation.
    Raises:
        TypeError: clear is not a bool.
    """
    if not isinstance(clear, bool):
        raise TypeError(f"clear: expected a bool, got {type(clear).__name__}")
    found = CompileReport(_reports)
    if clear:
        _reports.clear()
    return found


def place_of(node: Node) -> str:
    """The innermost line of the user's source that Dynamo kept for the call, and the module that made it."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(modules[-1][0]) if modules else ""
    for prefix in ("L['self'].", "L['fn'].", "L['self']", "L['fn']"):
        path = path.removeprefix(prefix)
    path = re.sub(r"_modules\['([^']*)'\]", r"\1", path)
    module = f"module {path}" if path else f"call {node.name}"
    lines = (node.stack_trace or "").splitlines()
    for i in reversed(range(len(lines))):
        frame = _FRAME.match(lines[i].strip())
        if frame is not None:
            text = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return f"{module}, {frame['file']}:{frame['line']}" + (f": {text}" if text else "")
    return module
