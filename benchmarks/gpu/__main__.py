"""`make gpu`, or `python -m benchmarks.gpu --output-dir DIR`: everything worth doing on a borrowed GPU, in ten minutes.

From a bare checkout, without a network: look around, build, test, let compute-sanitizer watch a small case, measure,
profile. Each stage has a time limit and is killed with all it started when that ends; a failure does not stop what
comes after. The folder gets summary.json and summary.md (written anew after every stage), a log for each of build,
checks and speed, results.json and trace.json.gz. The exit status is 1 where a stage failed.

Without a GPU it is a rehearsal: what needs none runs, tiny, and the summary says what was skipped and why.
docs/gpu.md describes the stages.
"""

# This module imports the standard library and rich only: it runs before anything is built, where torch may not even

# argparse rather than tyro, which a borrowed machine may lack.
from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.gpu.driver import failed, run_all, terminated_as_interrupted
from benchmarks.gpu.stages import DEADLINE_S, FILES, STAGES, Context, Settings
from benchmarks.gpu.summary import show
from benchmarks.records import ROOT


def parse(arguments: Sequence[str] | None) -> Settings:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "gpu", help="folder for everything written")
    names = [stage.name for stage in STAGES[1:]]
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="STAGE", help=", ".join(names))
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install before the build")
    parser.add_argument("--limit", nargs="+", type=_limit, default=[], metavar="STAGE=S", help="other time limits")
    parser.add_argument("--deadline-s", type=float, default=DEADLINE_S, help="seconds for everything")
    options = parser.parse_args(arguments)
    folder: Path = options.output_dir.resolve()
    if folder.exists() and not folder.is_dir():
        parser.error(f"output-dir: expected a folder, got the file {folder}")
    if options.wheels is not None and not list(options.wheels.glob("*.whl")):
        parser.error(f"wheels: expected a folder that holds wheels, got {options.wheels}")
    if not math.isfinite(options.deadline_s) or options.deadline_s <= 0:
        parser.error(f"deadline-s: expected a positive number of seconds, got {options.deadline_s}")
    found = options.wheels.resolve() if options.wheels is not None else None
    return Settings(folder, tuple(options.skip), found, options.deadline_s, dict(options.limit))


def _limit(text: str) -> tuple[str, float]:
    """A stage's name and seconds, from "name=seconds"."""
    name, _, number = text.partition("=")
    names = [stage.name for stage in STAGES]
    try:
        seconds = float(number)
    except ValueError:
        seconds = math.nan
    if name not in names or not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected STAGE=SECONDS with a stage of {', '.join(names)}, got {text!r}")
    return name, seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 1 where a stage failed."""
    settings = parse(arguments)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (settings.output_dir / name).unlink(missing_ok=True)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fastres-gpu-") as scratch, terminated_as_interrupted():
        context = Context(settings, Path(scratch))
        outcomes = run_all(STAGES, context, console)
    show(outcomes, context, console)
    return 1 if failed(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
