"""The code in the documents: Python is run as it stands there, and commands are known, with their options."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastres import activations, backend
from tests.pages import FENCE, PAGES, ROOT, blocks, name_of, snippets

pytest.importorskip("timm")
pytest.importorskip("tyro")

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
OTHERS = ("compute-sanitizer", "ncu")
"""Tools that are not Python's; of their command line what they run is looked at."""


@pytest.fixture
def clean():
    """What an example leaves behind, put back: the state of Dynamo, process groups, threads, registered activations."""
    tables = (activations.KINDS, activations._MODULES, activations._MAKERS)
    before, threads = [dict(table) for table in tables], torch.get_num_threads()
    if "fastres" not in torch._dynamo.list_backends():  # in a checkout that was not installed
        torch._dynamo.register_backend(backend.fastres, "fastres")
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_every_block_of_python_runs(page, clean, tmp_path, monkeypatch):
    """In the order of the page, in one namespace and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        # Line numbers are the page's, so that a traceback shows the line that failed.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.why_not is None and (block.needs is None or importlib.util.find_spec(block.needs) is not None):
            exec(code, namespace)


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n<!-- needs onnx -->\n```python\nb = 2\n```\n<!-- not run: takes hours -->\n"
        '```python\nc\nd\n```\n```bash\nls\n```\n```{.python}\n--8<-- "examples/drop_in.py"\n```\n'
    )
    found = [(b.line, b.text, b.needs, b.why_not) for b in blocks(page, "python")]
    assert found == [
        (2, "a = 1\n", None, None),
        (7, "b = 2\n", "onnx", None),
        (11, "c\nd\n", None, "takes hours"),
    ]
    assert snippets(page) == ["examples/drop_in.py"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_is_a_block(page):
    """None is indented or left open, and so none is missed."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(FENCE.findall(text))
    assert not [name for name in snippets(page) if not (ROOT / name).is_file()]


@pytest.mark.slow
def test_the_start_works_by_the_letter(clean, tmp_path, monkeypatch):
    """All of it but the installation, in its order: trained, fused, compiled, frozen, served."""
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": "__main__"}, ""
    for block in blocks(ROOT / "docs" / "start.md", "python", "bash"):
        if block.language == "python":
            exec(block.text, namespace)
            continue
        for words in commands(block.text):
            if words[0] == "python":
                command = [sys.executable, *words[1:]]
                printed += subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800).stdout
    assert re.search(r"zero\.png\W+0\W", printed)
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


# ----------------------------------------------------------------------------------------------------------- examples


def torchrun(script: str, processes: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", EXAMPLES, ids=name_of)
def test_every_example_runs(file, clean, tmp_path, monkeypatch, capsys):
    """As its first line says: by Python, or by torchrun in two processes."""
    head = file.read_text(encoding="utf-8").splitlines()[0]
    if "torchrun" in head:
        assert f"torchrun --standalone --nproc-per-node=2 examples/{file.name}" in head
        assert torchrun(f"examples/{file.name}", 2)
        return
    assert f"python examples/{file.name}" in head
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(file)])
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_on_a_page():
    shown = {name for page in PAGES for name in snippets(page)}
    assert EXAMPLES and not [name_of(file) for file in EXAMPLES if name_of(file) not in shown]


# ----------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """The words of each command, without comments; `a && b` are two."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            found.append(words[:at])
            words = words[at + 1 :]
        found += [words] if words else []
    return found


@functools.cache
def help_of(module: str, *subcommand: str) -> str:
    """What `python -m MODULE --help` prints."""
    out, given = io.StringIO(), sys.argv
    sys.argv = [module, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module has been imported before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = given
    assert not stopped.value.code, f"python -m {module} --help ends with {stopped.value.code}"
    return out.getvalue()


def check_module(module: str, *words: str) -> None:
    if module == "pytest":
        check_pytest(*words)
    elif module == "fastres.train":
        import tyro

        from fastres.train.config import TrainConfig, check_config

        check_config(tyro.cli(TrainConfig, args=words))
    else:
        text = help_of(module)
        for flag in (word.partition("=")[0] for word in words if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"python -m {module} has no option {flag}"


def check_pytest(*words: str) -> None:
    # The parser of a configuration with the plugins that the tests' own run has.
    from _pytest.config import get_config

    config = get_config()
    with contextlib.suppress(ImportError):
        config.pluginmanager.import_plugin("pytest_benchmark.plugin")
    known, unknown = config._parser.parse_known_and_unknown_args(list(words))
    benchmark = {"--benchmark-only"} if importlib.util.find_spec("pytest_benchmark") is None else set()
    assert not set(unknown) - benchmark, f"pytest: unknown {unknown}"
    check_paths(*known.file_or_dir)


def check_pip(subcommand: str, *words: str) -> None:
    pip = pytest.importorskip("pip._internal.commands")
    pip.create_command(subcommand).parser.parse_args(list(words))


def check_torchrun(*words: str) -> None:
    from torch.distributed.run import parse_args

    asked = parse_args(list(words))
    if asked.module:
        check_module(asked.training_script, *asked.training_script_args)
    else:
        check_paths(asked.training_script)


def check_make(*words: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        if not ASSIGNMENT.fullmatch(word):
            assert re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), f"make has no target {word}"
        elif words[0] == "gpu" and word.startswith("ARGS="):
            check_module("benchmarks.gpu", *shlex.split(word.partition("=")[2]))


def check_paths(*names: str) -> None:
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing, f"no such file or folder: {missing}"


def check_python(*words: str) -> None:
    if words[0] == "-m":
        check_module(*words[1:])
    else:
        check_paths(words[0])


def check_mkdocs(subcommand: str, *words: str) -> None:
    pytest.importorskip("mkdocs")
    check_module("mkdocs", *words) if subcommand.startswith("-") else help_of("mkdocs", subcommand)


def check_compiler(*words: str) -> None:
    """tests/test_export.py runs the command itself, and the program that it makes."""
    check_paths(*(word for word in words if word.endswith(".cpp")))


CHECKS = {
    "python": check_python, "pip": check_pip, "pytest": check_pytest, "torchrun": check_torchrun, "make": check_make,
    "mkdocs": check_mkdocs, "g++": check_compiler, "./serve": check_compiler,
}  # fmt: skip


def check_command(words: list[str]) -> None:
    while ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    if words[0] in OTHERS:
        words = words[words.index("python") :]
    assert words[0] in CHECKS, f"unknown command: {words[0]}"
    CHECKS[words[0]](*words[1:])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=name_of)
def test_every_command_exists_with_its_options(page):
    for block in blocks(page, "bash"):
        for words in commands(block.text):
            try:
                check_command(list(words))
            except (AssertionError, SystemExit, ValueError) as error:
                pytest.fail(f"{name_of(page)}, the block of line {block.line}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m fastres.train --fussed",
        "python -m fastres.train --optimizer gradients",
        "python -m fastres.info --no-such-option",
        "python -m benchmarks.results --from-yaml x",
        "python examples/gone.py",
        "pytest tests/gone.py",
        "pytest --no-such-option",
        "pip install --no-such-option x",
        "torchrun --no-such-option=2 -m fastres.train",
        "torchrun --standalone -m fastres.train --sink-bn",
        "make gone",
        'make gpu ARGS="--skip-all"',
        "fastres train",
    ],
)
def test_a_wrong_command_is_found(wrong):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(commands(wrong)[0])


def test_lines_are_read_as_a_shell_does():
    text = "FASTRES_CONV=torch python -m a \\\n    --b 'c d'  # words\n\n# all of it\npip install x && pytest\n"
    assert commands(text) == [
        ["FASTRES_CONV=torch", "python", "-m", "a", "--b", "c d"], ["pip", "install", "x"], ["pytest"],
    ]  # fmt: skip


def test_examples_are_files_of_their_own():
    """No example imports another, so that each can be copied."""
    for file in EXAMPLES:
        assert "import examples" not in file.read_text(encoding="utf-8") and not (Path(file).stat().st_size > 4000)
