"""The rules of the house, held by reading the sources: short signatures and files, imports one way only, no copies.

Nothing of the project is imported here, so a rule is checked in files that this machine cannot run as well.
"""

from __future__ import annotations

import ast
import graphlib
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_PARAMETERS = 10
MOST_LINES = 500
HEAD_LINES = 15
COPIED_LINES = 10


def python_files(root: Path, *places: str) -> list[Path]:
    """The Python files at these places, each a file or a folder; a place that is not there has none."""
    found = [[root / p] if (root / p).is_file() else sorted((root / p).rglob("*.py")) for p in places]
    return [file for files in found for file in files]


def name_of(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def report(rule: str, offenders: Sequence[str]) -> str:
    return "\n  ".join([f"{rule}:", *offenders])


# ------------------------------------------------------------------------------------------------------- signatures

LONG_SIGNATURES = {
    "fastres/functional: batch_norm_act": "public; the arguments of F.batch_norm, and ours",
    "fastres/functional: norm_act_conv3x3": "public; keyword arguments of batch_norm_act and of conv3x3",
    "fastres/functional: projection_shortcut": "public; the arguments of F.conv2d and F.batch_norm, and ours",
    "fastres/models/resnet: FusedResNet.__init__": "stands for torchvision's ResNet; its arguments, and ours",
    "fastres/nn/norm: _BatchNormAct.__init__": "stands for torch.nn.BatchNorm2d; its arguments, and ours",
    "fastres/reference: batch_norm_act": "says what the public function of this name means, argument by argument",
    "fastres/reference: projection_shortcut": "says what the public function of this name means, argument by argument",
    "@triton.jit": "a kernel's signature is its launch ABI: pointers, sizes, and the flags that it is compiled for",
}
"""Functions that may have more than ten parameters, each with its reason: room and qualified name, or a decorator.

A room is a file without its suffix, or the folder that took its place. Reasons that hold are these three: the signature
is torch's or torchvision's with a few arguments of ours, it repeats such a one, or it is a launch ABI.
"""


@dataclass(frozen=True)
class Function:
    file: str
    line: int
    name: str
    parameters: int
    decorators: tuple[str, ...]

    def is_covered_by(self, entry: str) -> bool:
        """Whether an entry of LONG_SIGNATURES means this function."""
        if entry.startswith("@"):
            return entry in self.decorators
        room, _, name = entry.partition(": ")
        return self.name == name and (self.file == f"{room}.py" or self.file.startswith(f"{room}/"))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name} has {self.parameters} parameters"


def functions(file: Path, root: Path) -> Iterator[Function]:
    """Every function, method and lambda of a file, nested ones too.

    `self`, `cls` and autograd's `ctx` are not counted, `*args` and `**kwargs` are one each.
    """

    def walk(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                name = prefix + (getattr(child, "name", "<lambda>"))
                given = child.args
                names = [a.arg for a in (*given.posonlyargs, *given.args)]
                count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"])) + len(given.kwonlyargs)
                count += (given.vararg is not None) + (given.kwarg is not None)
                marks = tuple(f"@{ast.unparse(d).partition('(')[0]}" for d in getattr(child, "decorator_list", ()))
                yield Function(name_of(file, root), child.lineno, name, count, marks)
                name += "."
            elif isinstance(child, ast.ClassDef):
                name = f"{prefix}{child.name}."
            yield from walk(child, name)

    yield from walk(ast.parse(file.read_text(encoding="utf-8"), str(file)), "")


def long_functions(root: Path) -> list[Function]:
    files = python_files(root, "fastres", "kernels", "benchmarks", "setup.py")
    return [f for file in files for f in functions(file, root) if f.parameters > MOST_PARAMETERS]


@pytest.fixture(scope="module")
def ours() -> list[Function]:
    return long_functions(ROOT)


def test_no_function_has_more_than_ten_parameters(ours):
    offenders = [str(f) for f in ours if not any(map(f.is_covered_by, LONG_SIGNATURES))]
    advice = f"at most {MOST_PARAMETERS} parameters: group what belongs together in a NamedTuple or a frozen dataclass"
    assert not offenders, report(advice, offenders)


def test_no_exception_for_a_long_signature_has_outlived_its_need(ours):
    stale = [entry for entry in LONG_SIGNATURES if not any(f.is_covered_by(entry) for f in ours)]
    advice = f"no such function with more than {MOST_PARAMETERS} parameters; take the entry off LONG_SIGNATURES"
    assert not stale, report(advice, stale)


# ------------------------------------------------------------------------------------------------------------ length

ROOMS = ("fastres", "kernels", "csrc", "benchmarks", "docs", "setup.py")
CODE = (".py", ".cpp", ".h", ".cu", ".cuh")
REASON = re.compile(r"Over 500 lines:( +\S+){3}")


def lengths(root: Path) -> Iterator[tuple[str, int, bool]]:
    """(file, its lines, whether its head gives a reason for its length) of every file of code outside tests/."""
    for room in ROOMS:
        for file in [root / room] if (root / room).is_file() else sorted((root / room).rglob("*")):
            if file.suffix in CODE and file.is_file():
                lines = file.read_text(encoding="utf-8").splitlines()
                yield name_of(file, root), len(lines), bool(REASON.search("\n".join(lines[:HEAD_LINES])))


def test_no_file_is_over_500_lines_without_a_reason_at_its_head():
    offenders = [f"{file}: {count} lines" for file, count, reason in lengths(ROOT) if count > MOST_LINES and not reason]
    advice = f'split it by ideas, or say why not in its first {HEAD_LINES} lines, in a sentence "Over 500 lines: ..."'
    assert not offenders, report(advice, offenders)


def test_no_reason_for_length_has_outlived_its_need():
    stale = [f"{file}: {count} lines" for file, count, reason in lengths(ROOT) if count <= MOST_LINES and reason]
    assert not stale, report("no longer over 500 lines; delete the sentence at the head", stale)


# ------------------------------------------------------------------------------------------------------------ imports

ARROWS = {
    # room: what its files never import. kernels/ is installed as fastres.kernels.
    "kernels": ("fastres.reference", "fastres.functional", "fastres.nn"),
    "fastres/ops": ("fastres.functional", "fastres.nn"),
    "fastres/activations.py": ("fastres",),
    "fastres/contract.py": ("fastres.reference", "fastres.ops", "fastres.functional", "fastres.nn", "fastres.kernels"),
    "fastres/reference.py": ("fastres.ops", "fastres.functional", "fastres.nn", "fastres.kernels"),
    "fastres/functional": ("fastres.nn",),
}


def package_of(file: Path, root: Path) -> list[str]:
    """The package in which a file's relative imports start."""
    parts = list(file.relative_to(root).parent.parts)
    return ["fastres", *parts] if parts[:1] == ["kernels"] else parts


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions and for type checking too.

    `from a import b` is both a and a.b, since b may be a module.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(file, root)
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, source
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def wrong_arrows(root: Path, room: str) -> list[str]:
    found = {
        (name_of(file, root), line, barred)
        for file in python_files(root, room)
        for line, name in imports(file, root)
        for barred in ARROWS[room]
        if name == barred or name.startswith(f"{barred}.")
    }
    return [f"{file}:{line} imports {barred}" for file, line, barred in sorted(found)]


@pytest.mark.parametrize("room", ARROWS)
def test_imports_run_one_way(room):
    offenders = wrong_arrows(ROOT, room)
    assert not offenders, report(f"{room} never imports {' or '.join(ARROWS[room])}", offenders)


WITHOUT_CIRCLES = (
    "fastres/backend",
    "fastres/functional",
    "fastres/models",
    "fastres/nn",
    "fastres/ops",
    "fastres/train",
)


def circle(root: Path, room: str) -> list[str]:
    """Modules of a room of which each is imported by the next one, the last being the first again; none mostly.

    Imports inside functions count. A module's own package does not, which Python has always begun to import before.
    """
    files = {name_of(f, root).removesuffix(".py").replace("/", "."): f for f in python_files(root, room)}
    graph = {module: {name for _, name in imports(file, root)} & files.keys() for module, file in files.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


@pytest.mark.parametrize("room", WITHOUT_CIRCLES)
def test_the_modules_of_a_room_do_not_import_each_other_in_circles(room):
    assert not circle(ROOT, room)


# ------------------------------------------------------------------------------------------------------------- copies

COMPARED = ("fastres/ops", "fastres/functional.py", "fastres/functional", "kernels")


def compared_lines(file: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that count: all but blank ones, comments and imports, without indentation.

    A comment behind code is cut off. Docstrings and lone brackets count like any other line.
    """
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text, str(file))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def copies(files: Sequence[Path], root: Path) -> list[str]:
    """Each block of ten lines or more that stands in two places, at its full length, in words."""
    lines = [(file, number, text) for file in files for number, text in compared_lines(file)]
    seen: dict[tuple[str, ...], list[int]] = {}
    pairs: set[tuple[int, int]] = set()
    for start in range(len(lines) - COPIED_LINES + 1):
        block = lines[start : start + COPIED_LINES]
        if block[0][0] != block[-1][0]:
            continue
        before = seen.setdefault(tuple(text for _, _, text in block), [])
        # A block that overlaps itself is a list of like lines, not a copy.
        pairs |= {(first, start) for first in before if first + COPIED_LINES <= start}
        before.append(start)
    found = []
    for first, second in sorted(pairs):
        if (first - 1, second - 1) in pairs:
            continue
        length = COPIED_LINES
        while (first + length - COPIED_LINES + 1, second + length - COPIED_LINES + 1) in pairs:
            length += 1
        places = [f"{name_of(lines[at][0], root)}:{lines[at][1]}-{lines[at + length - 1][1]}" for at in (first, second)]
        found.append(f"{' and '.join(places)}: {length} lines from {lines[first][2]!r}")
    return found


def test_no_block_of_ten_lines_stands_twice():
    offenders = copies(python_files(ROOT, *COMPARED), ROOT)
    advice = f"{COPIED_LINES} lines or more in two places (blank lines, comments and imports aside); make one of them"
    assert not offenders, report(advice, offenders)


# ----------------------------------------------------------------------------- the rules find what they are there for


def write(root: Path, **sources: str) -> Path:
    """A made-up house: a__b="text" is the file a/b.py."""
    for name, text in sources.items():
        file = root.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return root


def test_parameters_of_every_kind_are_counted_but_self_cls_and_ctx(tmp_path):
    ten = "a, b, /, c, d, *args, e, f, g, h, **kwargs"
    eleven = "a, b, /, c, d, *args, e, f, g, h, i, **kwargs"
    source = f"""
class C:
    def method(self, {ten}): ...
    @classmethod
    def made(cls, {ten}): ...
    @staticmethod
    def forward(ctx, {ten}): return lambda {eleven}: 0
def outer():
    async def inner({eleven}): ...
@triton.jit(do_not_specialize=["a"])
def kernel({eleven}): ...
"""
    root = write(tmp_path, fastres__a=source, kernels__b="def clean(a): ...")
    found = {f.name: f for f in long_functions(root)}
    assert {name: f.parameters for name, f in found.items()} == {
        "C.forward.<lambda>": 11, "outer.inner": 11, "kernel": 11,
    }  # fmt: skip
    assert found["kernel"].is_covered_by("@triton.jit") and not found["outer.inner"].is_covered_by("@triton.jit")
    assert str(found["outer.inner"]) == "fastres/a.py:9: outer.inner has 11 parameters"
    for room, covered in (("fastres/a", True), ("fastres", True), ("fastres/b", False), ("kernels/a", False)):
        assert found["outer.inner"].is_covered_by(f"{room}: outer.inner") is covered
    assert not found["outer.inner"].is_covered_by("fastres/a: inner")


def test_a_reason_for_length_stands_at_the_head_and_has_words(tmp_path):
    reason = '"""Kernels.\n\nOver 500 lines: one translation unit inlines them all.\n"""\n'
    body = "x = 1\n" * MOST_LINES
    late, empty = "\n" * HEAD_LINES + reason, '"""Over 500 lines: yes."""\n'
    root = write(tmp_path, kernels__a=reason + body, kernels__b=late + body, kernels__c=empty + body, kernels__d=body)
    (root / "csrc").mkdir()
    (root / "csrc" / "e.cuh").write_text("// Over 500 lines: short, for all that it says.\n")
    found = {file: (count > MOST_LINES, reason) for file, count, reason in lengths(root)}
    assert found == {
        "kernels/a.py": (True, True),
        "kernels/b.py": (True, False),
        "kernels/c.py": (True, False),
        "kernels/d.py": (False, False),
        "csrc/e.cuh": (False, True),
    }


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import fastres.reference", True),
        ("import fastres.reference as r", True),
        ("from fastres import contract, reference", True),
        ("from fastres.reference import Activation", True),
        ("from ..reference import Activation", True),
        ("from .. import reference", True),
        ("def f():\n    from fastres.nn.norm import x", True),
        ("importlib.import_module('fastres.functional')", True),
        ("from fastres.references import x", False),
        ("from . import reference", False),
        ("from fastres import contract", False),
        ("from torch.nn import functional", False),
        ("reference = 'import fastres.reference'", False),
    ],
)
def test_an_import_is_found_however_it_is_written(source, wrong, tmp_path):
    root = write(tmp_path, kernels__launch=source)
    line = source.count("\n") + 1
    assert [found.rpartition(" imports ")[0] for found in wrong_arrows(root, "kernels")] == (
        [f"kernels/launch.py:{line}"] * wrong
    )


def test_a_circle_is_found_through_a_function(tmp_path):
    write(tmp_path, fastres__a="from fastres.b import x", fastres__b="import fastres.c")
    assert circle(write(tmp_path, fastres__c="def f():\n    pass"), "fastres") == []
    assert set(circle(write(tmp_path, fastres__c="def f():\n    from fastres import a"), "fastres")) == {
        "fastres.a", "fastres.b", "fastres.c",
    }  # fmt: skip


def test_the_activations_import_nothing_of_the_package(tmp_path):
    for source, wrong in (("from . import ops", True), ("import fastres", True), ("import torch, math", False)):
        assert bool(wrong_arrows(write(tmp_path, fastres__activations=source), "fastres/activations.py")) is wrong


def test_copies_are_found_through_layout_comments_and_imports(tmp_path):
    block = [f"x{i} = f({i})" for i in range(12)]
    other = [line for i, text in enumerate(block) for line in (f"    {text}  # note {i}", "", "    # more")]
    other.insert(5, "    from a import (\n        b,\n    )")
    root = write(tmp_path, kernels__a="\n".join(["first = 1", *block, "last = 1"]),
                 kernels__b="\n".join(["def g():", *other, "    return 1"]))  # fmt: skip
    files = python_files(root, "kernels")
    assert copies(files, root) == ["kernels/a.py:2-13 and kernels/b.py:2-38: 12 lines from 'x0 = f(0)'"]
    for cut, expected in ((2, 1), (3, 0)):
        write(root, kernels__a="\n".join(block[: 12 - cut]))
        assert len(copies(files, root)) == expected


def test_like_lines_in_a_row_are_no_copy_until_they_stand_twice_over(tmp_path):
    for count, expected in ((2 * COPIED_LINES - 1, 0), (2 * COPIED_LINES, 1)):
        root = write(tmp_path, kernels__a="x()\n" * count)
        assert len(copies(python_files(root, "kernels"), root)) == expected
