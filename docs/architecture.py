"""`python docs/architecture.py` draws docs/architecture.svg: the rooms, their files, and the way of a training step.

FLOORS, FORWARD and BACKWARD are all that it knows of the code; tests/test_docs.py holds them against the files, the
imports and the call stack of a real step.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).with_suffix(".svg")


class Room(NamedTuple):
    """A folder.

    Attributes:
        folder: from the repository's root.
        purpose: one line.
        rows: its files as they are drawn, a row in a string.
    """

    folder: str
    purpose: str
    rows: tuple[str, ...]


FLOORS = (
    Room("fastres", "networks, fuse, freeze, the trainer", ("models/resnet.py fuse.py freeze.py train/loop.py",)),
    Room("fastres/nn", "modules with parameters", ("blocks.py steps.py trust.py norm.py shortcut.py stem.py",)),
    Room("fastres/functional", "check, autocast, draw the seed", ("conv.py norm.py shortcut.py checks.py prepare.py",)),
    Room(
        "fastres/ops",
        "schema, fake kernel, autograd",
        (
            "conv3x3.py batch_norm_act.py norm_act_conv3x3.py projection_shortcut.py",
            "arguments.py library.py algorithms.py costs.py fallback.py formulas.py packed.py",
        ),
    ),
    Room(
        "csrc/cpu",
        "C++ for the CPU",
        (
            "conv3x3.cpp batch_norm_act.cpp batch_norm_act_backward.cpp norm_act_conv3x3.cpp",
            "winograd.h gathered_gemm.cpp projection_shortcut.cpp activations.h epilogues.h",
        ),
    ),
    Room(
        "kernels",
        "Triton, for CUDA tensors",
        ("batch_norm_act.py statistics.py forward.py backward.py activations.py launch.py plan.py",),
    ),
    Room(
        "csrc/cuda",
        "CUDA C++, the projection shortcut",
        ("projection_shortcut.cpp projection_shortcut.cuh primitives.cuh",),
    ),
    Room("fastres", "the contract and the oracle", ("contract.py activations.py reference.py ordinary.py",)),
    Room("csrc/common", "the contract in C++", ("arguments.h bitmask.h philox.h",)),
)

FORWARD = (
    "fastres/nn/blocks.py",
    "fastres/nn/steps.py",
    "fastres/functional/norm.py",
    "fastres/ops/batch_norm_act.py",
    "csrc/cpu/batch_norm_act.cpp",
)
"""The end of a block, f(bn2(x) + shortcut), on the CPU: the files from FusedBasicBlock.forward to the kernel."""

BACKWARD = ("fastres/ops/batch_norm_act.py", "csrc/cpu/batch_norm_act_backward.cpp")
"""Its backward, which autograd calls in the operator's file."""

WIDTH, MARGIN, TEXT, CHIP, GAP, LINE = 1180, 16, 250, 28, 14, 22
INK, GREY, FRAME, PAPER, BLUE, ORANGE = "#1d2733", "#66727f", "#cfd6dd", "#f6f8fa", "#1f6f8b", "#c4651b"


class Box(NamedTuple):
    name: str
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def files() -> list[str]:
    """Every file that is drawn."""
    return [f"{room.folder}/{name}" for room in FLOORS for row in room.rows for name in row.split()]


def _text(x: float, y: float, text: str, size: float, colour: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{extra}>{escape(text)}</text>'


def _arrow(start: Box, end: Box, shift: float, colour: str) -> str:
    """From one file to another: down to the one below, or across to its neighbour."""
    if start.y == end.y:
        y = start.y + start.height / 2
        path = f"M {start.x + start.width:g} {y:g} L {end.x - 4:g} {y:g}"
    else:
        top, bottom, x, to = start.y + start.height, end.y - 4, start.middle + shift, end.middle + shift
        bend = (top + bottom) / 2
        path = f"M {x:g} {top:g} C {x:g} {bend:g} {to:g} {bend:g} {to:g} {bottom:g}"
    name = "forward" if colour == BLUE else "backward"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.2" marker-end="url(#{name})"/>'


def draw() -> str:
    """The picture."""
    boxes: dict[str, Box] = {}
    rooms: list[str] = []
    y = float(MARGIN)
    for room in FLOORS:
        height = len(room.rows) * (CHIP + LINE) - LINE + 2 * GAP
        rooms.append(
            f'<rect x="{MARGIN}" y="{y:g}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="8" fill="{PAPER}"'
            f' stroke="{FRAME}"/>'
        )
        rooms.append(_text(MARGIN + 14, y + 21, f"{room.folder}/", 14, INK, ' font-weight="bold"'))
        rooms.append(_text(MARGIN + 14, y + 38, room.purpose, 12, GREY))
        for i, row in enumerate(room.rows):
            x = float(MARGIN + TEXT)
            for name in row.split():
                box = Box(name, x, y + GAP + i * (CHIP + LINE), 7.3 * len(name) + 20, CHIP)
                boxes[f"{room.folder}/{name}"] = box
                x += box.width + GAP
        y += height + LINE
    # A file has one number, in the order in which the step comes there first.
    way = dict.fromkeys(FORWARD + BACKWARD)
    stops = {file: (i, BLUE if file in FORWARD else ORANGE) for i, file in enumerate(way, 1)}
    arrows = [
        _arrow(boxes[a], boxes[b], shift, colour)
        for files_of_way, shift, colour in ((FORWARD, -12, BLUE), (BACKWARD, 12, ORANGE))
        for a, b in pairwise(files_of_way)
    ]
    chips = []
    for file, box in boxes.items():
        number, colour = stops.get(file, (0, FRAME))
        chips.append(
            f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{CHIP}" rx="5" fill="white"'
            f' stroke="{colour}" stroke-width="{2 if number else 1}"/>'
        )
        chips.append(_text(box.middle, box.y + 18, box.name, 12, INK, ' text-anchor="middle" font-family="monospace"'))
        if number:
            chips.append(f'<circle cx="{box.x + 2:g}" cy="{box.y:g}" r="9" fill="{colour}"/>')
            centred = ' text-anchor="middle" font-weight="bold"'
            chips.append(_text(box.x + 2, box.y + 4, str(number), 11, "white", centred))
    legend = []
    for i, (colour, text) in enumerate((
        (BLUE, "forward: 1 to 5, from FusedBasicBlock.forward to the CPU's kernel"),
        (ORANGE, "backward: autograd calls it in 4, and it ends in 6"),
    )):  # fmt: skip
        x = MARGIN + 14.0 + 520 * i
        legend.append(f'<circle cx="{x + 6:g}" cy="{y:g}" r="7" fill="{colour}"/>')
        legend.append(_text(x + 20, y + 4, text, 12, INK))
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="4.5" markerHeight="4.5"'
        f' orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="{colour}"/></marker>'
        for name, colour in (("forward", BLUE), ("backward", ORANGE))
    )
    total = y + 22
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{total:g}"'
        f' viewBox="0 0 {WIDTH} {total:g}" font-family="sans-serif">',
        f"<defs>{markers}</defs>",
        f'<rect width="{WIDTH}" height="{total:g}" fill="white"/>',
        *rooms, *arrows, *chips, *legend, "</svg>", "",
    ])  # fmt: skip


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"written: {PICTURE}")
