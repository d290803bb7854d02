"""The paper's pre-training, Table 4 and Section 3: one recipe for each model and dataset of Table 3.

All use resolution 224, batch size 4,096, Adam with β 0.9 and 0.999 after clipping at global norm 1, 10,000 warm-up
steps, linear decay to zero, Inception crop and flip. As in the authors' code, the loss is a sigmoid cross-entropy,
summed over classes, and the head's initial bias matches the low frequency of each class. Not yet measured: ImageNet
takes a day on a cluster.
"""

from collections.abc import Callable
from functools import partial

from allmlp.config.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe


def imagenet(model: str) -> Recipe:
    """``mixer train imagenet-b16 --data imagenet/``: 300 epochs from scratch; published top-1 76.4 (B/16), 71.8 (L/16).

    Hardware: 93,835 steps of 4,096 images, 29 (B/16) or 103 (L/16) exaFLOP: 10 or 40 TPU-v3 core-days in Table 3.
    If the batch does not fit in memory, give --micro-batch-size. Expected here: not yet measured.
    """
    name = f"imagenet-{short_name(model)}"
    return regularized_recipe(name, model, data="imagenet", magnitude=15, mixup=0.5, head_bias=-6.9)


def imagenet21k(model: str) -> Recipe:
    """``mixer train imagenet21k-l16 --data imagenet21k/``: 300 epochs, 1,040,039 steps; for fine-tuning.

    B is regularized less than L (RandAugment 10 and 20, mixup 0.2 and 0.5). Expected here: not yet measured.
    """
    magnitude, mixup = {"B": (10, 0.2), "L": (20, 0.5)}[model[0]]
    name = f"imagenet21k-{short_name(model)}"
    return regularized_recipe(name, model, data="imagenet21k", magnitude=magnitude, mixup=mixup, head_bias=-10.0)


def jft(model: str, epochs: int, name: str | None = None) -> Recipe:
    """``mixer train jft-h14 --data images/``: a few epochs on hundreds of millions of images.

    No augmentation beyond crop and flip. Early stopping keeps the weights with the best accuracy on held-out images
    (Section 3.3). JFT-300M is not public; this is for data of that size. Expected here: not yet measured.
    """
    rate = 3e-3 if model[0] in "SB" else 1e-3
    return Recipe(
        name=name or f"jft-{short_name(model)}",
        model=ModelRecipe(model=model, head_bias=-10.0),
        data=DataRecipe(data="jft", val_fraction=0.001),
        optimization=OptimizationRecipe(epochs=epochs, learning_rate=rate, weight_decay=0.03, loss="sigmoid"),
        run=RunRecipe(keep="best", evaluate_every_epochs=0.1),
    )


def regularized_recipe(name: str, model: str, *, data: str, magnitude: float, mixup: float, head_bias: float) -> Recipe:
    """300 epochs with RandAugment, mixup and stochastic depth."""
    return Recipe(
        name=name,
        model=ModelRecipe(model=model, stochastic_depth=0.1, head_bias=head_bias),
        data=DataRecipe(data=data, val_fraction=0.01, randaugment=magnitude, mixup=mixup),
        optimization=OptimizationRecipe(epochs=300, learning_rate=1e-3, weight_decay=0.1, loss="sigmoid"),
    )


def short_name(model: str) -> str:
    """The part of a recipe's name that stands for a model: "b16" for "B/16"."""
    return model.lower().replace("/", "")


PRETRAIN: dict[str, Callable[[], Recipe]] = {
    **{f"imagenet-{short_name(model)}": partial(imagenet, model) for model in ("B/16", "L/16")},
    **{f"imagenet21k-{short_name(model)}": partial(imagenet21k, model) for model in ("B/16", "L/16")},
    **{f"jft-{short_name(model)}": partial(jft, model, 5) for model in ("S/32", "S/16")},
    **{f"jft-{short_name(model)}": partial(jft, model, 7) for model in ("B/32", "B/16", "L/32")},
    "jft-l16-7": partial(jft, "L/16", 7, "jft-l16-7"),
    **{f"jft-{short_name(model)}": partial(jft, model, 14) for model in ("L/16", "H/14")},
}
