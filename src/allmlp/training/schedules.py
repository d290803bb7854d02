"""Learning rates as pure functions of the step."""

import math

from allmlp.config.recipe import Decay


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, decay: Decay) -> float:
    """The learning rate of step 0, 1, …: linear warm-up to ``peak``, then decay to 0 after the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)
