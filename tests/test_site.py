"""The site is built without a word, its links lead somewhere, and its reference has all that the code has."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs.generate import PARTS
from fastres import functional
from tests.pages import PAGES, ROOT, name_of
from tests.test_house import python_files

REFERENCE = ROOT / "docs" / "reference"


def between(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


# ------------------------------------------------------------------------------------------------------------ the site


class Anchors(HTMLParser):
    """The ids of a page, and what it refers to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name) is not None]


def broken_links(folder: Path) -> list[str]:
    """Links of a built site that lead nowhere in it, and those to other places that are not https."""
    pages = {page: Anchors(page) for page in sorted(folder.rglob("*.html"))}
    broken = []
    for page, anchors in pages.items():
        for link in anchors.links:
            url = urlsplit(link)
            target = page if not url.path else (page.parent / unquote(url.path)).resolve()
            if url.scheme or url.netloc:
                right = url.scheme in ("https", "mailto", "data")
            elif page.name == "404.html":  # the theme's, with links from the site's root
                continue
            else:
                target = target / "index.html" if target.is_dir() else target
                anchor = unquote(url.fragment)
                right = target.is_file() and (
                    not anchor or anchor == "__consent" or target not in pages or anchor in pages[target].ids
                )
            if not right:
                broken.append(f"{page.relative_to(folder)}: {link}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]' brings what builds the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    # The theme's notice of its own future is no finding.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done, folder


def test_the_site_is_built_without_a_word(site):
    done, folder = site
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    built = {page.relative_to(folder).with_suffix("").as_posix() for page in folder.rglob("*.html")}
    pages = {p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in PAGES if ROOT / "docs" in p.parents}
    assert built == pages | {"404"}


def test_every_link_of_the_site_leads_somewhere(site):
    assert not broken_links(site[1])


def test_names_that_share_a_line_have_an_entry_each():
    pytest.importorskip("griffe", reason="pip install -e '.[docs]' brings what builds the site")
    split = importlib.import_module("docs.griffe_names").split_entries
    text = """Head, tail: words.

Args:
    a, b: of both,
        and more.
    c: of one: x, y: z.
Raises:
    TypeError, ValueError: for reasons.
"""
    both = "of both,\n        and more.\n"
    assert split(text) == text.replace(f"    a, b: {both}", f"    a: {both}    b: {both}")
    assert split("Args:\n    a, b: last") == "Args:\n    a: last\n    b: last"


def test_every_docstring_is_shown(site):
    """A name whose docstring is not found is shown without one, and without a warning."""
    text = (site[1] / "reference" / "functional.html").read_text(encoding="utf-8")
    assert 'id="fastres.functional.batch_norm_act"' in text
    assert "the dropout mask is a pure function of it" in " ".join(text.split())


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a id="x" href="b.html#y"></a><a href="#x"></a><a href="https://example.org/gone"></a>'
        '<a href="b.html#z"></a><a href="c.html"></a><img src="d.png">'
        '<a href="http://example.org"></a><a href="#y"></a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="y"></h1><a href="a.html"></a>')
    wrong = ["b.html#z", "c.html", "d.png", "http://example.org", "#y"]
    assert broken_links(tmp_path) == [f"a.html: {link}" for link in wrong]


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize(("page", "marker"), PARTS)
def test_the_reference_is_what_its_script_writes(page, marker):
    """Every public name, operator and option."""
    text = (REFERENCE / f"{page}.md").read_text(encoding="utf-8")
    assert between(text, marker) == PARTS[page, marker](), "run `python -m docs.generate`"


def test_a_line_is_written_for_each_public_name():
    shown = re.findall(r"^::: fastres\.functional\.(\w+)$", PARTS["functional", "names"](), re.MULTILINE)
    assert shown == functional.__all__
    assert "\n::: fastres.fuse\n" in PARTS["fastres", "names"]() and "functional" not in PARTS["fastres", "names"]()
    assert "\n::: fastres.reference.batch_norm_act\n" in PARTS["fastres", "reference"]()
    assert "_normalise" not in PARTS["fastres", "reference"]()


# -------------------------------------------------------------------------------------------------------- environment


def variables(source: str, helpers: tuple[str, ...] = ("_number",)) -> Iterator[str]:
    """The environment variables that a source reads: of os.environ, os.getenv, or a helper that takes a name."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names: list[ast.expr] = []
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called in ("os.environ.get", "os.environ.setdefault", "os.getenv") or called in helpers:
                names = node.args[:1]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            names = [node.slice]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            names = [node.left]
        yield from (name.value for name in names if isinstance(name, ast.Constant))


NOT_FOR_USERS = {"PYTEST_XDIST_WORKER", "TORCHELASTIC_RESTART_COUNT", "FAIL"}
"""Between processes of the tests."""


@functools.cache
def read_in_code() -> set[str]:
    files = python_files(ROOT, "fastres", "kernels", "benchmarks", "tests", "setup.py")
    found = {v for file in files for v in variables(file.read_text(encoding="utf-8"))}
    for file in (ROOT / "csrc").rglob("*.*"):
        found |= set(re.findall(r'getenv\("(\w+)"\)', file.read_text(encoding="utf-8")))
    return found - NOT_FOR_USERS


def test_the_table_of_environment_variables_is_complete():
    """All that the code reads, and nothing else; in the last section also what only PyTorch and Triton read."""
    ours, _, others = (REFERENCE / "environment.md").read_text(encoding="utf-8").partition("## Read by PyTorch")

    def listed(text: str) -> list[str]:
        rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
        return [name for row in rows for name in re.findall(r"`(\w+)`", row)]

    names = listed(ours) + listed(others)
    assert len(names) == len(set(names))
    assert not set(listed(ours)) - read_in_code() and not read_in_code() - set(names)


def test_variables_are_found_however_they_are_read():
    source = """
os.environ.get("A", "0"), os.environ["B"], "C" in os.environ, os.getenv("D"), _number("E", 1, low=1)
os.environ.setdefault("F", "1"), os.environ.get(name), environ.get("G"), {"H": 1}
"""
    assert sorted(variables(source)) == ["A", "B", "C", "D", "E", "F"]


# ------------------------------------------------------------------------------------------------------ troubleshooting


def in_code(message: str) -> bool:
    """Whether a quoted message stands in the code, where `...` are words that are filled in."""
    return all(part in texts() for part in re.split(r"\s*\.\.\.\s*", message) if part)


@functools.cache
def texts() -> str:
    """All strings of the code: adjacent ones joined, what is filled in left out."""
    found = []
    for file in python_files(ROOT, "fastres", "kernels", "setup.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("\0".join(v.value for v in node.values if isinstance(v, ast.Constant)))
    for file in (ROOT / "csrc").rglob("*.*"):
        source = re.sub(r'"\s*\n\s*"', "", file.read_text(encoding="utf-8"))
        found += [text.replace('\\"', '"') for text in re.findall(r'"((?:[^"\\\n]|\\.)*)"', source)]
    return "\0".join(found)


def quoted() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_quoted_message_stands_in_the_code():
    assert quoted() and not [message for message in quoted() if not in_code(message)]


def messages() -> Iterator[tuple[str, str]]:
    """(place, message) of every exception that the package raises; what is filled in is `...`.

    Exceptions that derive from Exception alone are caught again in the package.
    """
    trees = {f: ast.parse(f.read_text(encoding="utf-8")) for f in python_files(ROOT, "fastres", "kernels")}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    inner = {n.name for _, n in nodes if isinstance(n, ast.ClassDef) and [*map(ast.unparse, n.bases)] == ["Exception"]}
    for file, node in nodes:
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        argument = node.exc.args[0]
        if ast.unparse(node.exc.func) in inner:
            continue
        if isinstance(argument, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "..." for v in argument.values]
        elif isinstance(argument, ast.Constant):
            parts = [argument.value]
        else:  # another error's message
            continue
        yield f"{name_of(file)}:{node.lineno}", "".join(map(str, parts))


def is_covered(message: str, quotes: list[str]) -> bool:
    """Whether one of the quotes, where `...` stands for any words, begins the message or is in it."""
    for quote in quotes:
        pattern = ".*".join(re.escape(part) for part in re.split(r"\s*\.\.\.\s*", quote))
        if re.search(pattern, message):
            return True
    return False


def test_every_message_of_the_package_is_explained():
    """By its own row, or by a row for messages of its form."""
    missing = [f"{place}: {message}" for place, message in messages() if not is_covered(message, quoted())]
    assert not missing, "\n".join(["docs/troubleshooting.md has no row for:", *missing])


def test_quotes_are_compared_as_forms():
    assert is_covered("x: expected a Tensor, got ...", ["...: expected a Tensor, got"])
    assert not is_covered("x: expected a number, got ...", ["expected a Tensor"])
    assert in_code("x: expected more than 1 value a channel in training, got") and not in_code("expected nobody, got")
