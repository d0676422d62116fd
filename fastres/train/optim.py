"""Optimizers by name, and their groups of parameters."""

from typing import Any

import torch
from torch import nn

from fastres.train.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups that differ in learning rate or weight decay, weights first.

    A group has params, weight_decay, and lr_factor: its learning rate in multiples of the run's.
    """
    if config.lr is None or config.weight_decay is None:
        raise ValueError(f"config: expected a resolved one, got lr={config.lr}, weight_decay={config.weight_decay}")
    norm_biases = {
        id(module.bias)
        for module in model.modules()
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
    }
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        factor = config.bias_lr_factor if id(parameter) in norm_biases else 1.0
        # Biases, and scales of normalisations, are vectors.
        decayed = config.decay_norm_bias or parameter.dim() > 1
        found.setdefault((factor, config.weight_decay / factor if decayed else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": config.lr * factor, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in sorted(found.items(), key=lambda item: item[0][0] != 1.0)
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that a resolved configuration names, from torch.optim, with torch's own weight decay."""
    groups = parameter_groups(model, config)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, **common)
        case "momentum":
            return torch.optim.SGD(groups, momentum=config.momentum, **common)
        case "nesterov":
            # SGD refuses nesterov with a momentum of 0, where the two are the same.
            return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **common)
        case "rmsprop":
            return torch.optim.RMSprop(groups, **common)
        case "adam":
            return torch.optim.Adam(groups, **common)
        case "amsgrad":
            return torch.optim.Adam(groups, amsgrad=True, **common)
        case "adamw":
            return torch.optim.AdamW(groups, **common)
