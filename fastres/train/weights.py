"""The weights that training starts from, where they are not simply the network's own random ones."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastres.train.augment import normalise
from fastres.train.averages import evaluated_weights
from fastres.train.checkpoint import read_tensors
from fastres.train.config import TrainConfig
from fastres.train.data import batches
from fastres.train.errors import InputError
from fastres.train.image_data import ImageData

WHITENING_IMAGES = 5000
"""How many of the training images the whitening is computed from."""


def start_weights(model: nn.Module, config: TrainConfig, data: ImageData) -> str | None:
    """Set what zero_init_gamma, the network's whitening and pretrained ask for, before the first step.

    Returns:
        What a pretrained state_dict has and the network does not take, as a sentence; None where it took all.

    Raises:
        InputError: an option that the network does not have, or weights that do not fit it.
    """
    set_whitening: Any = getattr(model, "set_whitening", None)
    if config.whitening_bias_epochs is not None and set_whitening is None:
        raise InputError(f"whitening_bias_epochs: expected a network with a whitening layer, got {config.model}")
    if config.zero_init_gamma:
        _zero_last_gammas(model, config.model)
    if config.pretrained is not None:
        return load_pretrained(model, config.pretrained)
    if set_whitening is not None:
        # At random: a folder of images is in the order of its classes.
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.seed))
        images, _ = next(batches(data.train, chosen[:WHITENING_IMAGES], WHITENING_IMAGES))
        set_whitening(normalise(images.cpu(), data.mean, data.std))
    return None


def load_pretrained(model: nn.Module, path: Path) -> str | None:
    """Load a state_dict of torchvision's or timm's network, bare or in a dict under a usual name, or a checkpoint.

    The last layer is left as it is where the file's has another number of classes.

    Returns:
        Which layer was left as it is, as a sentence, or None.

    Raises:
        InputError: no such file, not a file of tensors, or names or shapes that differ.
    """
    weights = {name.removeprefix("module."): value for name, value in _read(path).items()}
    own = model.state_dict()
    # Torch counts batches since 0.4; files from before lack the counts.
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, value)
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise InputError(
            f"pretrained: {path} does not fit the network: {_some('it lacks', missing)}{_some('unknown:', unknown)}"
        )
    other = [name for name, value in weights.items() if value.shape != own[name].shape]
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    bad = [name for name in other if name.rpartition(".")[0] not in head]
    if bad:
        shapes = ", ".join(f"{n} is {tuple(weights[n].shape)}, expected {tuple(own[n].shape)}" for n in bad[:3])
        raise InputError(f"pretrained: {path} does not fit the network: {shapes}")
    model.load_state_dict({**weights, **{name: own[name] for name in own if name.rpartition(".")[0] in head and other}})
    if not other:
        return None
    return f"{path.name} has {len(weights[other[0]])} classes; the last layer {head[0]} starts from random weights"


def _read(path: Path) -> dict[str, Tensor]:
    state = read_tensors(path, "pretrained", "file of tensors")
    if isinstance(state, dict) and "engine" in state:
        state = evaluated_weights(state)
    for name in ("state_dict", "model", "model_state_dict", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"pretrained: {path} holds no state_dict")
    return state


def _some(text: str, names: list[str]) -> str:
    return f"{text} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}; " if names else ""


def _zero_last_gammas(model: nn.Module, name: str) -> None:
    """Goyal et al. 2017, section 5.1: with a scale of zero a residual block starts as its shortcut."""
    blocks = [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    if not blocks:
        raise InputError(f"zero_init_gamma: expected a network whose residual branches end in a norm, got {name}")
    for block in blocks:
        nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
