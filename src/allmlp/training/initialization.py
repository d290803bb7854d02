"""The model that a run starts from: new, or trained weights with a head for other classes and perhaps another size."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from allmlp.config.recipe import DataRecipe, Recipe, to_json_object
from allmlp.distributed.parallelize import copy_to_shard
from allmlp.errors import UserError
from allmlp.factory import build_meta, create
from allmlp.initial_weights import init_weights
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.weights.load import load
from allmlp.weights.resize import resize


@dataclass(frozen=True)
class ModelInitializer:
    """Makes the model in two steps, between which it may be sharded; or at once, on the CPU: ``start(classes)``."""

    build_meta: Callable[
        [tuple[str, ...]], Mixer
    ]  # class names → the model with a head for them, without memory ("meta")
    fill: Callable[[Mixer], None]  # the initial weights into its memory

    def __call__(self, classes: tuple[str, ...]) -> Mixer:
        model = self.build_meta(classes).to_empty(device="cpu")
        self.fill(model)
        return model


def prepare(recipe: Recipe) -> ModelInitializer:
    """Makes the recipe's model once the classes are known; mistakes in sizes and weights are told here, before that.

    Raises:
        UserError: sizes that do not fit, or weights that cannot be loaded or resized.
    """
    if recipe.model.weights is None:
        new(recipe, ("a", "b"))
        return ModelInitializer(lambda classes: new(recipe, classes), lambda model: draw(model, recipe))
    trained = load(recipe.model.weights)
    if trained.config["in_channels"] != 3:
        channels = trained.config["in_channels"]
        raise UserError(f"{recipe.model.weights} takes images of {channels} channels: RGB ones are read here, of three")
    sized = resize(trained, size(recipe) or trained.image_size)
    return ModelInitializer(
        lambda classes: transferred(sized, recipe, classes), lambda model: take(model, sized, recipe.model.head_bias)
    )


def new(recipe: Recipe, classes: tuple[str, ...]) -> Mixer:
    """The recipe's Mixer, on "meta"."""
    others = ("weights", "image_width", "head_bias", "frozen")
    sizes = {key: value for key, value in asdict(recipe.model).items() if key not in others}
    sizes["image_size"] = size(recipe)
    if sizes["image_size"] is None:
        raise UserError("no --image-size: give one, or --weights, whose size is then taken")
    with torch.device("meta"):
        model = create(sizes.pop("model"), num_classes=len(classes), **sizes)
    model.metadata = Metadata(
        classes=classes, preprocessing=view(recipe.data), provenance={"recipe": to_json_object(recipe)}
    )
    return model


def draw(model: Mixer, recipe: Recipe) -> None:
    """The authors' initial weights, and the recipe's head bias."""
    init_weights(model, recipe.run.seed, copy_to_shard)
    torch.nn.init.constant_(model.get_parameter("head.bias"), recipe.model.head_bias)


def take(model: Mixer, trained: Mixer, head_bias: float = 0.0) -> None:
    """The trained weights bit for bit, and a new head, of zeros but for its bias."""
    state = trained.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                parameter.zero_()
            else:
                copy_to_shard(parameter, state[name])
    torch.nn.init.constant_(model.get_parameter("head.bias"), head_bias)


def size(recipe: Recipe) -> tuple[int, int] | None:
    """(height, width) of the recipe's images; None where it leaves them to the weights."""
    height, width = recipe.model.image_size, recipe.model.image_width
    return None if height is None else (height, width or height)


def transferred(trained: Mixer, recipe: Recipe, classes: tuple[str, ...]) -> Mixer:
    """A model for the weights and a new head for the classes (Section 3, as the authors fine-tune), on "meta"."""
    settings = recipe.model
    model = with_new_head(
        trained,
        len(classes),
        dropout=settings.dropout,
        stochastic_depth=settings.stochastic_depth,
        rescale=settings.rescale,
    )
    if settings.frozen:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    before = copy.deepcopy(trained.metadata.provenance)
    before.pop("recipe", None)
    model.metadata = Metadata(
        classes=classes,
        preprocessing=view(recipe.data, trained.metadata.preprocessing),
        provenance={"recipe": to_json_object(recipe), "started_from": {**before, "weights": settings.weights}},
    )
    return model


def with_new_head(trained: Mixer, num_classes: int, **changes: Any) -> Mixer:
    """The same sizes with a head for other classes, on "meta"; ``changes`` are other arguments of ``Mixer``.

    Weights of 16 bits become float32, exactly: the small steps of training would be lost in them.
    """
    model = build_meta({**trained.config, "num_classes": num_classes, **changes})
    return model.to(torch.promote_types(trained.stem.weight.dtype, torch.float32))


def view(data: DataRecipe, default: Preprocessing = Preprocessing()) -> Preprocessing:  # noqa: B008 (it is frozen)
    """The recipe's evaluation view; what it leaves open, and the normalisation, as the weights had it."""
    told = {"crop": data.crop, "crop_ratio": data.crop_ratio, "interpolation": data.interpolation}
    return replace(default, **{key: value for key, value in told.items() if value is not None})
