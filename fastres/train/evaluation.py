"""The option test_only: a network on the test images, and nothing else."""

import dataclasses
from collections.abc import Callable

from rich.console import Console
from torch import nn

from fastres.train.config import TrainConfig
from fastres.train.engine import Engine, Evaluation
from fastres.train.image_data import ImageData
from fastres.train.prepare import configured_model, prepare
from fastres.train.report import describe


def evaluate(
    config: TrainConfig,
    *,
    data: ImageData | None = None,
    make_model: Callable[[TrainConfig, int], nn.Module] | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Evaluate the checkpoint that config.resume names, or the weights of config.pretrained.

    Prints the loss and the accuracy on the test images, and writes nothing. In several processes each test image is
    evaluated by one of them; all return the same.

    Args:
        config: as if test_only were set; need not be resolved. The rest as for `fastres.train.train`.

    Raises:
        TypeError, InputError: a wrong argument, data folder or checkpoint, or weights without a last layer for the
            classes of the data.
        RunError: no such device, or a data set that cannot be downloaded.
    """
    console = console or Console()
    run = prepare(dataclasses.replace(config, test_only=True), data, make_model or configured_model, console)
    engine = Engine(run)
    if run.resumed is not None:
        engine.load_state_dict(run.resumed.get("engine", {}))
    found = engine.evaluate(lambda: False)
    assert found is not None  # which would be an interruption
    if run.group.is_main:
        console.print(
            f"{run.config.resume or run.config.pretrained}: {run.config.model} ({run.backend}) on {run.device}, "
            f"{describe(run.data)}: test loss {found.loss:.4f}  accuracy {found.accuracy:.2%}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return found
