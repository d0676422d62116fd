"""The documents say what is so: names, links, the drawing of the architecture, and the way of a training step."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.nn import FusedBasicBlock
from tests.pages import PAGES, ROOT, name_of
from tests.test_house import imports

SCREEN = 75
FOLDERS = ("fastres", "kernels", "csrc", "benchmarks", "tests", "docs", "examples")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\.\w+")
DOTTED = re.compile(r"(?<![\w./-])(?:fastres|benchmarks)(?:\.(?!md\b)[A-Za-z_]\w*)+(?!\w*[/-])")


@pytest.fixture(params=PAGES, ids=name_of)
def page(request):
    return request.param


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------------------- names


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{name_of(page)}: {link}"
            assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), f"{name_of(page)}: {link}"


def test_every_file_that_is_named_exists(page):
    # The targets of links are relative to the page, and looked for above.
    named = set(FILE.findall(re.sub(r"\]\([^)\s]+\)", "]", page.read_text(encoding="utf-8"))))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing, f"{name_of(page)} names {missing}"


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        for part in parts[size:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_python_name_can_be_imported(page):
    pytest.importorskip("matplotlib", reason="benchmarks.results draws")
    named = set(DOTTED.findall(page.read_text(encoding="utf-8")))
    missing = [name for name in sorted(named) if not is_there(name)]
    assert not missing, f"{name_of(page)} names {missing}"


def test_every_variable_that_is_named_is_read():
    code = [p for d in ("fastres", "kernels", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py")]
    text = "\n".join(p.read_text(encoding="utf-8") for p in code)
    named = {v for p in PAGES for v in re.findall(r"\bFASTRES_[A-Z_]+\b", p.read_text(encoding="utf-8"))}
    macros = {"FASTRES_ACTIVATIONS", "FASTRES_CHECK", "FASTRES_KERNELS"}
    ours = named - macros
    assert {"FASTRES_CONV", "FASTRES_EXTENSION"} <= ours
    assert not [v for v in sorted(ours) if f'"{v}"' not in text]


def test_the_names_are_looked_for():
    """A link, a file and a name that do not exist are found by the searches above."""
    text = "See [x](gone.md), `fastres/gone.py`, csrc/cpu/gone.h and `fastres.gone.f()`; fastres.reuse_cpu_memory()."
    assert LINK.findall(text) == ["gone.md"]
    assert FILE.findall(text) == ["fastres/gone.py", "csrc/cpu/gone.h"]
    assert DOTTED.findall(text) == ["fastres.gone.f", "fastres.reuse_cpu_memory"]
    assert is_there("fastres.reuse_cpu_memory") and is_there("fastres.ops.algorithms.choose_algorithm")
    assert not is_there("fastres.gone.f") and not is_there("fastres.gone")


def test_the_changes_of_this_version_are_told():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(fastres.__version__)}, ", text, re.MULTILINE)


def test_the_readme_is_one_screen():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= SCREEN, f"README.md has {len(lines)} lines, at most {SCREEN} are one screen"


# ------------------------------------------------------------------------------------------------------- architecture


def test_the_drawing_is_what_its_script_draws(drawing):
    committed = drawing.PICTURE.read_text(encoding="utf-8")
    assert committed == drawing.draw(), "run `python docs/architecture.py`"
    assert all(f">{Path(file).name}<" in committed for file in drawing.FORWARD + drawing.BACKWARD)


def test_every_file_that_is_drawn_exists(drawing):
    files = drawing.files()
    assert not [file for file in files if not (ROOT / file).is_file()]
    assert len(files) == len(set(files))
    assert set(drawing.FORWARD + drawing.BACKWARD) <= set(files)


def test_every_arrow_between_python_files_is_an_import(drawing):
    for way in (drawing.FORWARD, drawing.BACKWARD):
        for importer, imported in itertools.pairwise(file for file in way if file.endswith(".py")):
            module = imported.removesuffix(".py").replace("/", ".")
            assert module in {name for _, name in imports(ROOT / importer, ROOT)}, f"{importer} -> {imported}"


class Stacks(TorchDispatchMode):
    """Operator -> the files of the package that were on the stack when it was called, each once, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, list[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastres":
            calls = [Path(frame.filename) for frame in traceback.extract_stack()]
            ours = [file.relative_to(ROOT).as_posix() for file in calls if (ROOT / "fastres") in file.parents]
            self.files[func._opname] = [file for file, _ in itertools.groupby(ours)]
        return func(*args, **(kwargs or {}))


def test_a_training_step_goes_the_way_that_is_drawn(drawing):
    """Six files, kernels included; what is drawn is what is on the stack when the operators are called."""
    block = FusedBasicBlock(8, 8)
    with Stacks() as stacks:
        block(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    assert stacks.files["batch_norm_act_training"] == list(drawing.FORWARD[:-1])
    assert stacks.files["batch_norm_act_backward"] == list(drawing.BACKWARD[:-1])
    for operator, file in (("training", drawing.FORWARD[-1]), ("backward", drawing.BACKWARD[-1])):
        assert f'"batch_norm_act_{operator}"' in (ROOT / file).read_text(encoding="utf-8")
    assert len({*drawing.FORWARD, *drawing.BACKWARD}) <= 8


def test_the_page_tells_the_way_that_is_drawn(drawing):
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = re.findall(r"^\d\. `([\w./]+)`", text.partition("## The contract")[0], re.MULTILINE)
    assert told == list(dict.fromkeys(drawing.FORWARD + drawing.BACKWARD))
