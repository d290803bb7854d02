"""Learning rates as pure functions of the step."""

import math

from allmlp.config.recipe import Decay

LINEAR_END = 1e-5  # of the peak, where the linear decay ends
STAIRS = (3, 6, 9)  # tenths of the steps at which the staircase goes down to a tenth


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, decay: Decay) -> float:
    """The learning rate of step 0, 1, …, as in the authors' code.

    Linear warm-up from 0 to ``peak``, which step ``warmup_steps`` has; then linear decay to 1e-5 of the peak, or cosine
    decay to 0, which step ``steps`` would have, the first one after the run. "staircase": a tenth of the rate before,
    from 30, 60 and 90 % of the steps on, warm-up included.

    Source: big_vision, utils.py, create_learning_rate_schedule; the staircase, Kolesnikov et al. 2020, Section 3.3.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay == "staircase":
        return peak / 10 ** sum(10 * step >= tenths * steps for tenths in STAIRS)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    if decay == "linear":
        return peak * (LINEAR_END + (1 - LINEAR_END) * (1 - progress))
    return peak * (1 + math.cos(math.pi * progress)) / 2
