"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

import bisect
import math

from fastres.train.config import TrainConfig


def lr_factor(step: int, config: TrainConfig, *, steps_per_epoch: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step, counted from 0.

    The first warmup_epochs rise as (step + 1) / warmup_steps, or stay at warmup_factor where that is given. Then, with
    t from 0 to 1 over the rest of the steps:

        constant   1
        cosine     (1 + cos(pi t)) / 2
        step       step_factor ** (number of milestones, in epochs from the start, that are past)
        triangle   a line from triangle_start to 1 at triangle_peak of the steps, another one to triangle_end
        onecycle   half a cosine from 1/25 to 1 at 0.3 of the steps, another one to 1/250000

    Args:
        config: a resolved one.

    Source: cosine: Loshchilov and Hutter 2016, equation 5, without restarts. step: He et al. 2015, section 4.2.
        triangle: Jordan 2024, section 3. onecycle: Smith and Topin 2017, with the values of torch's OneCycleLR.
    """
    warmup_steps = round((config.warmup_epochs or 0.0) * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps if config.warmup_factor is None else config.warmup_factor
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return _half_cosine(1.0, 0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        case "step":
            past = bisect.bisect_right([round(m * steps_per_epoch) for m in config.milestones], step)
            return config.step_factor**past
        case "triangle":
            peak = config.triangle_peak * total_steps
            if step <= peak:
                return config.triangle_start + (1 - config.triangle_start) * (step / peak if peak else 1.0)
            return 1 + (config.triangle_end - 1) * (step - peak) / (total_steps - peak)
        case "onecycle":
            peak = 0.3 * total_steps - 1
            if step <= peak:
                return _half_cosine(1 / 25, 1.0, step / peak if peak else 1.0)
            return _half_cosine(1.0, 1 / 250_000, (step - peak) / max(1.0, total_steps - 1 - peak))


def _half_cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * t))
