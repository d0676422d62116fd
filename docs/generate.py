"""`python -m docs.generate` writes what the reference takes from the code: names, operators, the trainer's options.

tests/test_site.py fails where a page is not what this script writes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

import torch

from benchmarks.records import insert_table, row
from fastres.train.config import TrainConfig

REFERENCE = Path(__file__).parent / "reference"


def names(module: str) -> str:
    """A line for each public name of a module, at which mkdocstrings puts its docstring."""
    found = importlib.import_module(module)
    public = getattr(found, "__all__", None)
    if public is None:
        own = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == module]
        public = [name for name in own if not name.startswith("_")]
    shown = [name for name in public if not inspect.ismodule(getattr(found, name))]
    return "".join(f"\n::: {module}.{name}\n" for name in shown) + "\n"


def overloads() -> list[Any]:
    """Every operator of the library, by its name."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastres::")}
    return [getattr(torch.ops.fastres, name.removeprefix("fastres::")).default for name in sorted(names)]


def wrapped(text: str, width: int = 116) -> str:
    """A schema in lines of `width`, broken behind its commas."""
    lines = [""]
    for part in re.split(r"(?<=, )", text):
        if len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("    ")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def operators() -> str:
    """A heading and a schema for each operator."""
    sections = []
    for overload in overloads():
        name = overload._schema.name.removeprefix("fastres::")
        sections.append(f"### {name}\n\n```text\n{wrapped(str(overload._schema))}\n```\n")
    return "\n".join(sections)


def options() -> str:
    """A row for each option of `python -m fastres.train`: flag, what it takes, default, meaning."""
    text = inspect.cleandoc(TrainConfig.__doc__ or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    meanings = {name: " ".join(words.split()) for name, words in entries}
    kinds, lines = get_type_hints(TrainConfig), [row("option", "values", "default", ""), row(*["---"] * 4)]
    for field in dataclasses.fields(TrainConfig):
        flag = field.name.replace("_", "-")
        name = f"`--{flag}`, `--no-{flag}`" if kinds[field.name] is bool else f"`--{flag}`"
        cells = name, values(kinds[field.name]), default(field.default), meanings[field.name]
        lines.append(row(*(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)))
    return "\n".join(lines) + "\n"


def values(kind: Any) -> str:
    """What an option takes, in words."""
    if kind is bool:
        return ""
    arguments = [argument for argument in getattr(kind, "__args__", ()) if argument not in (type(None), ...)]
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return ", ".join(f"`{argument}`" for argument in arguments)
    if getattr(kind, "__origin__", None) is tuple:
        return f"{values(arguments[0])} ..."
    if arguments:
        return " or ".join(values(argument) for argument in arguments)
    return {Path: "path", str: "text", int: "integer", float: "number"}[kind]


def default(value: Any) -> str:
    """An option's default; empty for None, which the last column explains."""
    if value is None or value == ():
        return ""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"`{value}`"


PARTS = {
    ("fastres", "names"): functools.partial(names, "fastres"),
    ("fastres", "reference"): functools.partial(names, "fastres.reference"),
    **{
        (part, "names"): functools.partial(names, f"fastres.{part}") for part in ("functional", "nn", "models", "train")
    },
    ("operators", "operators"): operators,
    ("options", "options"): options,
}
"""(page, marker) -> what stands between `<!-- marker -->` and `<!-- /marker -->` of docs/reference/<page>.md."""


def main(folder: Path = REFERENCE) -> None:
    for (page, marker), write in PARTS.items():
        if not insert_table(folder / f"{page}.md", write(), marker):
            raise ValueError(f"{folder / page}.md: expected the lines <!-- {marker} --> and <!-- /{marker} -->")


if __name__ == "__main__":
    main()
