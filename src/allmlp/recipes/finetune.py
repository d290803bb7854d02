"""Fine-tuning of trained weights on other classes: as in the paper (Section 3), and for a folder of photographs.

SGD with momentum, gradients clipped at global norm 1, linear warm-up, cosine decay, no weight decay, a head that starts
at zero. The learning rate is chosen on held-out training images, then all of them are used; the paper reports three
runs.
"""

from collections.abc import Callable
from functools import partial

from allmlp.config.recipe import (
    DataRecipe,
    Decay,
    FinetuneRecipe,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunRecipe,
    SearchRecipe,
)

RATES = (0.003, 0.01, 0.03, 0.06)


def photos() -> FinetuneRecipe:
    """``mixer finetune WEIGHTS --data photos/``: ten epochs on your own images, with a batch size for a small machine.

    Five runs, of which four choose the learning rate; one run with --learning-rate. Expected: not yet measured.
    """
    return FinetuneRecipe(
        recipe=Recipe(
            name="finetune-photos",
            model=ModelRecipe(image_size=None),
            data=DataRecipe(data="", crop=None, crop_ratio=None, interpolation=None, val_fraction=0.0),
            optimization=sgd_settings(epochs=10, batch=64, warmup_steps=100),
        ),
        search=SearchRecipe(learning_rates=RATES),
    )


def paper_recipe(data: str, steps: int, search_fraction: float) -> FinetuneRecipe:
    """``mixer finetune WEIGHTS pets``: batch size 512 at 224 pixels, three runs; --image-size 448 as in Table 2.

    Augmentation as in the authors' code: Inception crop and flip. Supplement A.2 found that the crop does not help in
    fine-tuning: --train-crop none. Expected: not yet measured; Table 3 has the paper's results for B/16.
    """
    source = "" if data == "imagenet" else data  # ImageNet has no built-in name
    return FinetuneRecipe(
        recipe=Recipe(
            name=f"finetune-{data}",
            model=ModelRecipe(image_size=224),
            data=DataRecipe(
                data=source, crop=None, crop_ratio=None, interpolation=None, val_fraction=0.0
            ),
            optimization=sgd_settings(steps=steps, batch=512, warmup_steps=100 if steps == 500 else 500),
            run=RunRecipe(evaluate_every_steps=steps // 5),
        ),
        search=SearchRecipe(learning_rates=RATES, search_fraction=search_fraction, seeds=3),
    )  # fmt: skip


def sgd_settings(
    *, epochs: float = 10, steps: int | None = None, batch: int, warmup_steps: int, decay: Decay = "cosine"
) -> OptimizationRecipe:
    return OptimizationRecipe(
        optimizer="sgd", epochs=epochs, steps=steps, global_batch_size=batch, learning_rate=0.01, weight_decay=0.0,
        warmup_steps=warmup_steps, decay=decay,
    )  # fmt: skip


FINETUNE: dict[str, Callable[[], FinetuneRecipe]] = {
    "photos": photos,
    "imagenet": partial(paper_recipe, "imagenet", 20_000, 0.01),
    "cifar10": partial(paper_recipe, "cifar10", 10_000, 0.02),
    "cifar100": partial(paper_recipe, "cifar100", 10_000, 0.02),
    "pets": partial(paper_recipe, "pets", 500, 0.1),
    "flowers102": partial(paper_recipe, "flowers102", 500, 0.1),
}
