"""Checkpoints of a run: the last one, the one before it, and the best; read with weights_only=True."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastres.train.config import OLD_DEFAULTS, TrainConfig, from_dict
from fastres.train.errors import InputError, first_line, reading, shortened
from fastres.train.folder import atomic, writing

FORMAT = 1
KEYS = (
    "format", "config", "classes", "model", "optimizer", "step", "epoch", "batch", "order", "generator", "torch_rng",
    "cuda_rng", "metrics", "best_accuracy", "best_epoch", "seconds",
)  # fmt: skip


LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
RESUMABLE = (LAST, PREVIOUS, BEST)
"""What a run goes on from, the first that is whole. A kill may leave the best one alone: it is the first written."""
AUTO = Path("auto")
"""What --resume is given to go on from the output folder's checkpoint where there is one, and to begin elsewhere."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. `state` has the entries KEYS: tensors and plain Python values only.

    The last one before it stays as the previous one.
    """
    with atomic(path) as temporary:
        torch.save(state, temporary)
        if path.name == LAST and path.exists():
            os.replace(path, path.with_name(PREVIOUS))


def has_checkpoint(directory: Path) -> bool:
    """Whether the folder holds a checkpoint to go on from.

    Raises:
        RunError: it can be no folder to write in.
    """
    with writing(directory):
        return any((directory / name).is_file() for name in RESUMABLE)


def resolve_resume(config: TrainConfig) -> TrainConfig:
    """`config` with `resume` a path or None, where it was "auto".

    Raises:
        InputError: "auto" without an output folder, or without a checkpoint where one is to be tested.
    """
    if config.resume != AUTO:
        return config
    if config.output_dir is None:
        raise InputError("resume: auto looks for a checkpoint in output_dir, expected one, got None")
    found = has_checkpoint(config.output_dir)
    if config.test_only and not found:
        raise InputError(f"resume: test_only needs a checkpoint, and auto found none in {config.output_dir}")
    return dataclasses.replace(config, resume=config.output_dir if found else None)


def folder_of(path: Path) -> Path:
    """The run's folder that --resume means by `path`, a folder or a file in it."""
    return path if path.is_dir() else path.parent


def load_checkpoint(path: Path, *, notify: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Read a checkpoint, or the last good one of a run's folder, onto the CPU.

    Args:
        notify: receives a line where the last one of a folder is missing or broken, and another one is read.

    Raises:
        InputError: the file is missing, truncated, or something else than a checkpoint of this trainer.
    """
    problem: InputError | None = None
    with reading("resume", path):
        files = [path / name for name in RESUMABLE] if path.is_dir() else [path]
    for file in files:
        try:
            state = read_checkpoint(file)
        except InputError as error:
            problem = problem or error
            continue
        if problem is not None and notify is not None:
            notify(f"{problem}; going on from {file.name}, of step {state['step']}")
        return state
    assert problem is not None
    raise problem


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read one file as `load_checkpoint` does."""
    state: dict[str, Any] = read_tensors(file, "resume", "checkpoint")
    missing = [key for key in KEYS if key not in state] if isinstance(state, dict) else list(KEYS)
    if missing:
        raise InputError(f"resume: {file} is not a checkpoint of this trainer, it lacks {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise InputError(f"resume: {file} has format {state['format']}, expected {FORMAT}")
    if isinstance(state["config"], dict):
        # Before the option was there, every convolution was PyTorch's.
        state["config"].setdefault("conv_algorithm", "torch" if state["config"].get("fused") else None)
        if state["config"]["conv_algorithm"] == "direct":
            state["config"]["conv_algorithm"] = "torch"  # as it is called since
        for name, value in OLD_DEFAULTS.items():
            state["config"].setdefault(name, value)
    return state


def read_tensors(file: Path, option: str, what: str) -> Any:
    """What torch.save wrote, onto the CPU: tensors and plain Python values.

    Raises:
        InputError: no such file, or one that is damaged or holds other objects; `option` and `what` name it.
    """
    with reading(option, file):
        there = file.is_file()
    if not there:
        raise InputError(f"{option}: no {what} at {file}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a damaged file, none of them documented
        raise InputError(f"{option}: {file} is truncated or not a {what} ({first_line(error)})") from error


def saved_config(path: Path) -> TrainConfig:
    """The configuration of the run that wrote a checkpoint, as a start for going on from it.

    `resume` is set to `path`; `output_dir` and `max_steps`, which belong to one sitting, are unset.
    """
    return config_of(load_checkpoint(path), path)


def config_of(state: dict[str, Any], path: Path) -> TrainConfig:
    """`saved_config` of a checkpoint that was read from `path`."""
    try:
        return from_dict({**state["config"], "resume": str(path), "output_dir": None, "max_steps": None})
    except (TypeError, InputError) as error:
        raise InputError(f"resume: {path} holds a configuration that does not fit this version: {error}") from error


def load_state(module: Any, state: Any, *, what: str, path: Path) -> None:
    """Call module.load_state_dict(state), turning a misfit into one sentence.

    Raises:
        InputError: names or shapes differ.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        detail = shortened(" ".join(str(error).split()))
        raise InputError(f"resume: {path} does not fit the {what}: {detail}") from error
