"""Files of a run: written whole or not at all, read with weights_only=True."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastres.train.config import OLD_DEFAULTS, TrainConfig, from_dict
from fastres.train.errors import InputError

FORMAT = 1
KEYS = (
    "format", "config", "classes", "model", "optimizer", "step", "epoch", "batch", "order", "generator", "torch_rng",
    "cuda_rng", "metrics", "best_accuracy", "best_epoch", "seconds",
)  # fmt: skip


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move it over `path` when the block ends without an exception.

    Whatever was at `path` stays as it was if the block fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. `state` has the entries KEYS: tensors and plain Python values only."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def checkpoint_path(path: Path) -> Path:
    """The file that --resume means: `path` itself, or last.pt in the folder `path`.

    Raises:
        InputError: there is no such file.
    """
    file = path / "last.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"resume: no checkpoint at {file}")
    return file


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or the last one of a run's folder, onto the CPU.

    Raises:
        InputError: the file is missing, truncated, or something else than a checkpoint of this trainer.
    """
    file = checkpoint_path(path)
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a damaged file, none of them documented
        raise InputError(f"resume: {file} is truncated or not a checkpoint ({_first_line(error)})") from error
    missing = [key for key in KEYS if key not in state] if isinstance(state, dict) else list(KEYS)
    if missing:
        raise InputError(f"resume: {file} is not a checkpoint of this trainer, it lacks {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise InputError(f"resume: {file} has format {state['format']}, expected {FORMAT}")
    if isinstance(state["config"], dict):
        # Before the option was there, every convolution was PyTorch's.
        state["config"].setdefault("conv_algorithm", "torch" if state["config"].get("fused") else None)
        for name, value in {"sync_bn": False, "fsdp": False, **OLD_DEFAULTS}.items():
            state["config"].setdefault(name, value)
    return state


def saved_config(path: Path) -> TrainConfig:
    """The configuration of the run that wrote a checkpoint, as a start for going on from it.

    `resume` is set to `path`; `output_dir` and `max_steps`, which belong to one sitting, are unset.
    """
    config = load_checkpoint(path)["config"]
    try:
        return from_dict({**config, "resume": str(path), "output_dir": None, "max_steps": None})
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
        detail = " ".join(str(error).split())
        detail = detail if len(detail) <= 200 else detail[:200] + "..."
        raise InputError(f"resume: {path} does not fit the {what}: {detail}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
