"""Resizes a trained Mixer to images of another size."""

import copy

from allmlp.factory import as_mixer, build_meta
from allmlp.model import Mixer
from allmlp.resolution import resized_config
from allmlp.sizes import Size


def resize(model: Mixer, image_size: Size) -> Mixer:
    """Returns a Mixer for images of another size, made from this one's weights; the patch size does not change.

    Twice the size (or any integer factor, also on a single axis) is Supplement C: the tokens are exactly those that
    the model computes for each part of the image separately. For all other sizes, token mixing is resampled over the
    grid of patches (see ``allmlp.resolution``). In both cases the new model should be fine-tuned.

    Args:
        model: not modified; the new one has its type, device, training mode and metadata.
        image_size: height and width in pixels, or one number for both; multiples of the patch size.

    Raises:
        UserError: a size that is not a multiple of the patch size.
    """
    model = as_mixer(model)
    resized_config(model.config, image_size)  # a wrong size is reported before anything is copied
    resized = build_meta(model.config)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    resized.load_state_dict(state, assign=True)
    for parameter, original in zip(resized.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    resized.metadata = copy.deepcopy(model.metadata)
    resized.set_input_size(image_size)
    return resized.train(model.training)
