"""The command line: python -m fastres.train."""

import signal
import sys
from collections.abc import Sequence

import tyro

from fastres.train.checkpoint import AUTO, resolve_resume, saved_config
from fastres.train.config import TrainConfig, check_config
from fastres.train.distributed import leave_group, lost_peer, recorded, report_failure
from fastres.train.errors import DivergedError, InputError, RunError
from fastres.train.evaluation import evaluate
from fastres.train.find_lr import find_learning_rate
from fastres.train.loop import train
from fastres.train.recipes import describe_recipes, recipe_config
from fastres.train.terminal import escape_output

PROGRAM = "python -m fastres.train"


def main(args: Sequence[str] | None = None) -> int:
    """Train, test, or look for a learning rate, as the command line says.

    Returns:
        Exit status: 0 done, 1 the loss diverged, 2 wrong input or environment; stopped by a signal: 130 Ctrl-C
        (SIGINT), 143 SIGTERM, 129 SIGHUP.
    """
    escape_output()
    try:
        config = tyro.cli(TrainConfig, args=args, prog=PROGRAM)
        if config.recipe == "list":
            print(describe_recipes())
            return 0
        if config.recipe is not None:
            # Once more, so that options not given are those of the recipe.
            config = tyro.cli(TrainConfig, args=args, prog=PROGRAM, default=recipe_config(config.recipe))
        if config.resume in (None, AUTO):
            check_config(config)
        # Else the options given go with those of the checkpoint, and are checked together with them.
        config = resolve_resume(config)
        if config.resume is not None:
            # Once more, so that options not given are those of the checkpoint.
            config = tyro.cli(TrainConfig, args=args, prog=PROGRAM, default=saved_config(config.resume))
        status = _run(config)
    except (InputError, RunError) as error:
        report_failure(PROGRAM, error)
        status = 1 if isinstance(error, DivergedError) else 2
    except RuntimeError as error:
        lost = lost_peer(error)
        if lost is None:
            raise
        report_failure(PROGRAM, lost)
        return 2
    except KeyboardInterrupt:
        # Before the loop, or a second time: nothing to save.
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    leave_group()
    return status


def _run(config: TrainConfig) -> int:
    """The exit status of what the options ask for."""
    if config.test_only:
        evaluate(config)
        return 0
    stopped_by = find_learning_rate(config).stopped_by if config.find_lr else train(config).stopped_by
    return 0 if stopped_by is None else 128 + signal.Signals[stopped_by]


if __name__ == "__main__":
    sys.exit(recorded(main)())
