"""`python -m benchmarks.roofline`: what a training step should take on a GPU, PREDICTED from bytes and FLOPs.

    time of a kernel = max(bytes / (share * bandwidth), FLOPs / (share * peak)) + launches * gap

Bytes, FLOPs and launches come from the real model, run without data (benchmarks/roofline/trace.py), and from rules that
say which kernels a GPU launches for an operator (benchmarks/roofline/kernels.py). Nothing here is measured.
docs/roofline.md explains the model.
"""

from __future__ import annotations

import tyro
from rich.console import Console

from benchmarks.records import insert_table
from benchmarks.roofline.kernels import kernels_of
from benchmarks.roofline.model import Config, layers, summarise
from benchmarks.roofline.report import layer_table, markdown, plot, summary_rows, summary_table, to_json
from benchmarks.workloads import SIDES
from fastres.train.folder import write_text


def main(config: Config, console: Console | None = None) -> None:
    """Trace the three sides, predict, print; write what was asked for."""
    console = console or Console()
    sides = {side: kernels_of(side, config.step()) for side in SIDES}
    summary, table = summarise(sides, config), layers(sides, config)
    rows = summary_rows(sides, summary)
    console.print(layer_table(table, config))
    console.print(summary_table(rows, config))
    if config.output_dir is not None:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(config.output_dir / "roofline.json", to_json(sides, summary, table, config))
        plot(sides, summary, config, config.output_dir / "roofline.png")
        console.print(f"written: {config.output_dir / 'roofline.json'}, {config.output_dir / 'roofline.png'}")
    if config.page is not None:
        inserted = insert_table(config.page, markdown(rows, config))
        state = "written to" if inserted else "not written, the marker lines are missing in"
        console.print(f"summary {state} {config.page}")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.roofline", description=__doc__))
