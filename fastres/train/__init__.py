"""Training: configuration, data, loop, checkpoints, report. The command line is `python -m fastres.train`."""

from fastres.train.augment import Augmentation
from fastres.train.checkpoint import load_checkpoint, saved_config
from fastres.train.config import TrainConfig
from fastres.train.data import load_data
from fastres.train.errors import DivergedError, InputError, RunError
from fastres.train.evaluation import evaluate
from fastres.train.find_lr import RangeTest, find_learning_rate
from fastres.train.image_data import ImageData, Split
from fastres.train.loop import load_model, train
from fastres.train.recipes import RECIPES, recipe_config
from fastres.train.report import Summary

__all__ = [
    "RECIPES",
    "Augmentation",
    "DivergedError",
    "ImageData",
    "InputError",
    "RangeTest",
    "RunError",
    "Split",
    "Summary",
    "TrainConfig",
    "evaluate",
    "find_learning_rate",
    "load_checkpoint",
    "load_data",
    "load_model",
    "recipe_config",
    "saved_config",
    "train",
]
