"""Optimizers by name, and their groups of parameters."""

import importlib
from typing import Any

import torch
from torch import nn

from fastres.train.config import TrainConfig
from fastres.train.errors import RunError


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
    """The optimizer that a resolved configuration names, with its own weight decay.

    torch.optim's run in the implementation that is the fastest: the fused one, which reads and writes each value once,
    where there is one. RMSprop has none, SGD has none for sharded parameters, and on a CPU SGD without momentum is
    faster parameter by parameter: these are torch's own choice.

    lars (You et al. 2017, "Large batch training of convolutional networks") and muon (Jordan et al. 2024, "Muon: an
    optimizer for hidden layers in neural networks") are timm's. torch.optim has no LARS, and its Muon takes matrices
    only; timm's takes a convolution's weight as the matrix of its filters, and steps vectors (norms and biases) by
    NAdamW with the same learning rate, to which it scales the steps of matrices. LARS adapts the learning rate of
    parameters that are decayed; the others are SGD's with momentum.

    Raises:
        RunError: timm is not installed, or too old to have the optimizer.
    """
    groups = parameter_groups(model, config)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    optimizer: torch.optim.Optimizer
    match config.optimizer:
        case "sgd" | "momentum" | "nesterov":
            momentum = 0.0 if config.optimizer == "sgd" else config.momentum
            # SGD refuses nesterov with a momentum of 0, where the two are the same.
            nesterov = config.optimizer == "nesterov" and momentum > 0
            fused = None if config.fsdp or (on_cpu and momentum == 0) else True
            optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, fused=fused, **common)
        case "rmsprop":
            optimizer = torch.optim.RMSprop(groups, **common)
        case "adam" | "amsgrad":
            optimizer = torch.optim.Adam(groups, amsgrad=config.optimizer == "amsgrad", fused=True, **common)
        case "adamw":
            optimizer = torch.optim.AdamW(groups, fused=True, **common)
        case "lars":
            optimizer = _timm("Lars")(groups, momentum=config.momentum, **common)
        case "muon":
            optimizer = _timm("Muon")(groups, momentum=config.momentum, nesterov=True, **common)
    return optimizer


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict(state), of `own_implementation`'s, with each tensor in the layout of its parameter.

    The fused implementations take a parameter, its gradient and its state to be of one layout, and do not look.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def own_implementation(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved optimizer's state_dict that leaves `optimizer` in its own implementation, whichever saved it."""
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) != len(own):
        return state  # which the optimizer refuses
    kept = ("fused", "foreach")
    groups = [{**old, **{k: new[k] for k in kept if k in new}} for old, new in zip(saved, own, strict=True)]
    return {**state, "param_groups": groups}


def _timm(name: str) -> Any:
    """An optimizer of timm's."""
    try:
        return getattr(importlib.import_module("timm.optim"), name)
    except (ImportError, AttributeError) as error:
        found = "it is not installed" if isinstance(error, ImportError) else "this one has none"
        raise RunError(
            f"optimizer: {name.lower()} is timm's, and {found}; pip install 'timm>=1.0.21' brings it"
        ) from error
