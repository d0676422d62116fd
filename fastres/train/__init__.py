"""Training: configuration, data, loop, checkpoints, report. The command line is `python -m fastres.train`."""

from fastres.train.checkpoint import load_checkpoint, saved_config
from fastres.train.config import TrainConfig
from fastres.train.data import Augmentation, ImageData, Split, load_data
from fastres.train.errors import DivergedError, InputError, RunError
from fastres.train.loop import load_model, train
from fastres.train.report import Summary

__all__ = [
    "Augmentation",
    "DivergedError",
    "ImageData",
    "InputError",
    "RunError",
    "Split",
    "Summary",
    "TrainConfig",
    "load_checkpoint",
    "load_data",
    "load_model",
    "saved_config",
    "train",
]
