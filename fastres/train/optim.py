"""Optimizers by name, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from fastres.train.config import Schedule, TrainConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that a resolved configuration names, from torch.optim, with torch's own weight decay."""
    if config.lr is None or config.weight_decay is None:
        raise ValueError(f"config: expected a resolved one, got lr={config.lr}, weight_decay={config.weight_decay}")
    lr, weight_decay = config.lr, config.weight_decay
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr, weight_decay=weight_decay)
        case "momentum":
            return torch.optim.SGD(parameters, lr, momentum=config.momentum, weight_decay=weight_decay)
        case "nesterov":
            # SGD refuses nesterov with a momentum of 0, where the two are the same.
            nesterov = config.momentum > 0
            return torch.optim.SGD(parameters, lr, config.momentum, weight_decay=weight_decay, nesterov=nesterov)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr, weight_decay=weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, lr, weight_decay=weight_decay)
        case "amsgrad":
            return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, amsgrad=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)


def lr_factor(step: int, *, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step, counted from 0.

    Rises as (step + 1) / warmup_steps, then stays at 1 or falls as (1 + cos(pi t)) / 2 with t from 0 to 1.
    A pure function of the step, so a resumed run needs no schedule state.

    Source: Loshchilov and Hutter 2016, equation 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
