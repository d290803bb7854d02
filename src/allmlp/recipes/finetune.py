"""Fine-tuning of trained weights on other classes: as in the paper (Section 3), and for a folder of photographs.

SGD with momentum, gradients clipped at global norm 1, linear warm-up, cosine decay, no weight decay, a head that starts
at zero. The learning rate is chosen on held-out training images, then all of them are used; the paper reports three
runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from allmlp.config.recipe import (
    DataRecipe,
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


class Task(NamedTuple):
    """A VTAB task: its group, and the usual size of its images, (height, width) in pixels."""

    group: Literal["natural", "specialized", "structured"]
    size: tuple[int, int]


TASKS = {
    "caltech101": Task("natural", (300, 200)),
    "cifar100": Task("natural", (32, 32)),
    "dtd": Task("natural", (300, 300)),
    "flowers102": Task("natural", (500, 600)),
    "pets": Task("natural", (375, 500)),
    "svhn": Task("natural", (32, 32)),
    "sun397": Task("natural", (500, 500)),
    "pcam": Task("specialized", (96, 96)),
    "eurosat": Task("specialized", (64, 64)),
    "resisc45": Task("specialized", (256, 256)),
    "retinopathy": Task("specialized", (480, 640)),
    "clevr-count": Task("structured", (320, 480)),
    "clevr-distance": Task("structured", (320, 480)),
    "dmlab": Task("structured", (360, 480)),
    "kitti-distance": Task("structured", (375, 1242)),
    "dsprites-location": Task("structured", (64, 64)),
    "dsprites-orientation": Task("structured", (64, 64)),
    "smallnorb-azimuth": Task("structured", (96, 96)),
    "smallnorb-elevation": Task("structured", (96, 96)),
}


def vtab(task: str, steps: int = 2500) -> FinetuneRecipe:
    """``mixer finetune WEIGHTS vtab-svhn --data svhn/``: VTAB-1k, with 1,000 training images.

    800 of them are trained on and 200 held out while rates are tried: a fifth of each class, rounded up, so somewhat
    more than 200 if there are many classes. The paper does not give the number of steps: 2,500 as in ViT's VTAB runs,
    or 500 as in BiT's. 448 pixels, or 224 for small images, by the BiT-HyperRule. Images are resized without a crop;
    those of structured tasks are not mirrored, as their labels describe positions. --data is a folder with the task's
    1,000 images in train/, one folder per class, and test/. Expected: not yet measured.
    """
    group, size = TASKS[task]
    return FinetuneRecipe(
        recipe=Recipe(
            name=f"finetune-vtab-{task}",
            model=ModelRecipe(image_size=resolution(*size)),
            data=DataRecipe(
                data="", crop="resize", crop_ratio=1.0, interpolation=None, val_fraction=0.0,
                train_crop="none", flip=group != "structured",
            ),
            optimization=sgd_settings(steps=steps, batch=512, warmup_steps=100 if steps == 500 else 500),
            run=RunRecipe(evaluate_every_steps=steps // 5),
        ),
        search=SearchRecipe(learning_rates=(0.003, 0.01, 0.03), search_fraction=0.2, seeds=3),
    )  # fmt: skip


def resolution(height: int, width: int) -> int:
    """224 pixels for images of less than 96 × 96 in area, 448 for larger ones (Kolesnikov et al. 2020; Section 3)."""
    return 224 if height * width < 96 * 96 else 448


def sgd_settings(*, epochs: float = 10, steps: int | None = None, batch: int, warmup_steps: int) -> OptimizationRecipe:
    return OptimizationRecipe(
        optimizer="sgd", epochs=epochs, steps=steps, global_batch_size=batch, learning_rate=0.01, weight_decay=0.0,
        warmup_steps=warmup_steps, decay="cosine",
    )  # fmt: skip


FINETUNE: dict[str, Callable[[], FinetuneRecipe]] = {
    "photos": photos,
    "imagenet": partial(paper_recipe, "imagenet", 20_000, 0.01),
    "cifar10": partial(paper_recipe, "cifar10", 10_000, 0.02),
    "cifar100": partial(paper_recipe, "cifar100", 10_000, 0.02),
    "pets": partial(paper_recipe, "pets", 500, 0.1),
    "flowers102": partial(paper_recipe, "flowers102", 500, 0.1),
    **{f"vtab-{task}": partial(vtab, task) for task in TASKS},
}
