"""Averages of the weights over the steps of a run."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's parameters and buffers; the first update copies."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


class Lookahead:
    """Slow weights that follow the network's, and that it goes on from.

    After every `period`-th step s of S: slow = d slow + (1 - d) fast, fast = slow, with d = decay^period (s / S)^3.
    After the last step: fast = slow. Running statistics are averaged as parameters are.

    Source: Zhang et al. 2019, "Lookahead optimizer"; the decay that grows: Jordan 2024, section 3.4.
    """

    def __init__(self, model: nn.Module, period: int, decay: float) -> None:
        self.period, self.decay = period, decay
        # Tensors of the network itself, which steps and load_state_dict write in place.
        self.fast = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.slow = {name: value.clone() for name, value in self.fast.items()}

    @torch.no_grad()
    def update(self, step: int, total_steps: int) -> None:
        """After a step, counted from 1."""
        fast, slow = list(self.fast.values()), list(self.slow.values())
        if step % self.period == 0:
            torch._foreach_lerp_(slow, fast, 1 - self.decay**self.period * (step / total_steps) ** 3)
        if step % self.period == 0 or step == total_steps:
            torch._foreach_copy_(fast, slow)

    def state_dict(self) -> dict[str, Tensor]:
        return self.slow

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.slow.items():
            value.copy_(state[name])


def evaluated_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint, the state_dict that was evaluated: the average of the weights where there is one."""
    averaged = state.get("engine", {}).get("averaged")
    if averaged is None:
        weights: dict[str, Tensor] = state["model"]
        return weights
    return {name.removeprefix("module."): value for name, value in averaged.items() if name != "n_averaged"}
