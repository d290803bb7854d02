"""Activations computed twice instead of kept: memory for time."""

import functools

from torch.utils.checkpoint import checkpoint

from allmlp.model import Mixer


def recompute_blocks(model: Mixer) -> None:
    """From now on the model keeps each block's input for the backward pass, and computes the rest of it again there.

    About a third more time for a step, and the memory of one block's activations instead of all (Chen et al. 2016).
    Random masks are the same the second time.
    """
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
