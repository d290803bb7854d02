"""The model that a run starts from: new, or trained weights with a head for other classes and perhaps another size."""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from mlp_mixer.card import Card, Preprocessing
from mlp_mixer.errors import UserError
from mlp_mixer.model import Mixer
from mlp_mixer.training.recipe import DataRecipe, Recipe, to_json_object
from mlp_mixer.variants import create
from mlp_mixer.weights.load import load
from mlp_mixer.weights.resize import resize

Start = Callable[[tuple[str, ...]], Mixer]  # class names → a model with a head for them


def prepare(recipe: Recipe) -> Start:
    """Makes the recipe's model once the classes are known; mistakes in sizes and weights are told here, before that.

    Raises:
        UserError: sizes that do not fit, or weights that cannot be loaded or resized.
    """
    if recipe.model.weights is None:
        with torch.device("meta"):
            new(recipe, ("a", "b"))
        return lambda classes: new(recipe, classes)
    trained = load(recipe.model.weights)
    if trained.config["in_channels"] != 3:
        channels = trained.config["in_channels"]
        raise UserError(f"{recipe.model.weights} takes images of {channels} channels: RGB ones are read here, of three")
    sized = resize(trained, size(recipe) or trained.image_size)
    return lambda classes: transferred(sized, recipe, classes)


def new(recipe: Recipe, classes: tuple[str, ...]) -> Mixer:
    """The recipe's Mixer with the authors' initial weights."""
    others = ("weights", "image_width", "head_bias", "frozen")
    sizes = {key: value for key, value in asdict(recipe.model).items() if key not in others}
    sizes["image_size"] = size(recipe)
    if sizes["image_size"] is None:
        raise UserError("no --image-size: give one, or --weights, whose size is then taken")
    model = create(sizes.pop("model"), num_classes=len(classes), seed=recipe.run.seed, **sizes)
    torch.nn.init.constant_(model.get_parameter("head.bias"), recipe.model.head_bias)
    model.card = Card(classes=classes, preprocessing=view(recipe.data), provenance={"recipe": to_json_object(recipe)})
    return model


def size(recipe: Recipe) -> tuple[int, int] | None:
    """(height, width) of the recipe's images; None where it leaves them to the weights."""
    height, width = recipe.model.image_size, recipe.model.image_width
    return None if height is None else (height, width or height)


def transferred(trained: Mixer, recipe: Recipe, classes: tuple[str, ...]) -> Mixer:
    """The weights, bit for bit, with a new head of zeros for the classes (Section 3, as the authors fine-tune)."""
    settings = recipe.model
    model = with_zero_head(
        trained,
        len(classes),
        dropout=settings.dropout,
        stochastic_depth=settings.stochastic_depth,
        rescale=settings.rescale,
    )
    if settings.frozen:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    torch.nn.init.constant_(model.get_parameter("head.bias"), settings.head_bias)
    before = copy.deepcopy(trained.card.provenance)
    before.pop("recipe", None)
    model.card = Card(
        classes=classes,
        preprocessing=view(recipe.data, trained.card.preprocessing),
        provenance={"recipe": to_json_object(recipe), "started_from": {**before, "weights": settings.weights}},
    )
    return model


def with_zero_head(trained: Mixer, num_classes: int, **changes: Any) -> Mixer:
    """A copy with a head of zeros for another number of classes; ``changes`` are other arguments of ``Mixer``.

    Weights of 16 bits become float32, exactly: the small steps of training would be lost in them.
    """
    with torch.device("meta"):
        model = Mixer(**{**trained.config, "num_classes": num_classes, **changes})
    wide = torch.promote_types(trained.stem.weight.dtype, torch.float32)
    state = {
        name: tensor.to(wide, copy=True)
        for name, tensor in trained.state_dict().items()
        if not name.startswith("head.")
    }
    state |= {name: torch.zeros(t.shape, dtype=wide) for name, t in model.head.state_dict(prefix="head.").items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def view(data: DataRecipe, default: Preprocessing = Preprocessing()) -> Preprocessing:  # noqa: B008 (it is frozen)
    """The recipe's evaluation view; what it leaves open, and the normalisation, as the weights had it."""
    told = {"crop": data.crop, "crop_ratio": data.crop_ratio, "interpolation": data.interpolation}
    return replace(default, **{key: value for key, value in told.items() if value is not None})
