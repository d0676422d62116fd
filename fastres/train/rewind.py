"""The state of a run some steps back. On a GPU losses are looked at late, when later steps have spoilt the weights."""

import copy
from typing import Any

import torch

from fastres.train.engine import Engine

KEPT_STEPS = 100
"""Steps after which the state is copied anew: the copy costs about a step's time."""


class Rewind:
    """A copy of all that decides the next steps: weights, optimizer, averages, random generators."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._parts: dict[str, Any] = {"model": engine.model, "optimizer": engine.optimizer, "engine": engine}
        self.step = self.batch = 0  # the first ones after the copy
        self._state: dict[str, Any] | None = None

    def keep(self, step: int, batch: int) -> None:
        """Copy the state before a step where the copy is of another epoch or KEPT_STEPS steps old.

        Args:
            step: of the run, from 0.
            batch: of the epoch, from 0.
        """
        if self._state is not None and batch - self.batch == step - self.step < KEPT_STEPS:
            return
        engine, self.step, self.batch = self.engine, step, batch
        self._state = None  # so that there are never two
        state: dict[str, Any] = {name: copy.deepcopy(part.state_dict()) for name, part in self._parts.items()}
        state["generators"] = engine.generator.get_state(), torch.get_rng_state()
        if engine.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(engine.device)
        self._state = state

    def restore(self) -> None:
        """Go back to the copy, once."""
        engine, state = self.engine, self._state
        if state is None:
            raise RuntimeError("nothing was kept")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        engine.generator.set_state(state["generators"][0])
        torch.set_rng_state(state["generators"][1])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], engine.device)
        self._state = None
