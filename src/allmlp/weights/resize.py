"""Resizes a trained model to images of another size."""

import copy

from allmlp.factory import Model, as_model, build_meta, resized_config
from allmlp.sizes import Size


def resize(model: Model, image_size: Size) -> Model:
    """Returns a model for images of another size, made from this one's weights; the patch size does not change.

    A Mixer at twice the size (or any integer factor, also on a single axis) is Supplement C: the tokens are exactly
    those that the model computes for each part of the image separately. For all other sizes, token mixing is resampled
    over the grid of patches (see ``allmlp.resolution``). Of comparison systems, position embeddings are interpolated.
    In all cases the new model should be fine-tuned.

    Args:
        model: not modified; the new one has its type, device, training mode and metadata.
        image_size: height and width in pixels, or one number for both; multiples of the patch size.

    Raises:
        UserError: a size that the model cannot take, such as one that is not a multiple of the patch size.
    """
    model = as_model(model)
    resized_config(model.config, image_size)  # a wrong size is reported before anything is copied
    resized = build_meta(model.config)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    resized.load_state_dict(state, assign=True)
    for parameter, original in zip(resized.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    resized.metadata = copy.deepcopy(model.metadata)
    resized.set_input_size(image_size)
    return resized.train(model.training)
