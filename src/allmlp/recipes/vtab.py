"""Fine-tuning on the tasks of VTAB-1k, by the BiT-HyperRule (Kolesnikov et al. 2020) as in Section 3 of the paper."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from allmlp.config.recipe import DataRecipe, FinetuneRecipe, ModelRecipe, Recipe, RunRecipe, SearchRecipe
from allmlp.config.vtab import TASKS
from allmlp.recipes.finetune import sgd_settings

Schedule = Literal["bit", "vit"]
RATES = (0.003, 0.01, 0.03)


def vtab(task: str, schedule: Schedule = "bit") -> FinetuneRecipe:
    """``mixer finetune WEIGHTS vtab-svhn --data vtab/svhn``: VTAB-1k, with 1,000 training images.

    The rate is chosen on the source's own 800 and 200 images (see ``data/builtin/vtab.py``); of other data, a fifth of
    each class is held out. The paper follows the BiT-HyperRule in the image sizes and does not give the number of
    steps: "bit" has that rule's 500 steps, a tenth of the rate from 30, 60 and 90 % of them on; "vit" 2,500 steps with
    cosine decay, as ViT's VTAB runs. 448 pixels, or 224 for small images. Images are resized without a crop; those of
    structured tasks are not mirrored, as their labels describe positions. Expected: not yet measured.
    """
    group, size = TASKS[task]
    steps = 500 if schedule == "bit" else 2500
    return FinetuneRecipe(
        recipe=Recipe(
            name=f"finetune-vtab-{task}",
            model=ModelRecipe(image_size=resolution(*size)),
            data=DataRecipe(
                data="", crop="resize", crop_ratio=1.0, interpolation=None, val_fraction=0.0,
                train_crop="none", flip=group != "structured",
            ),
            optimization=sgd_settings(
                steps=steps, batch=512, warmup_steps=steps // 5, decay="staircase" if schedule == "bit" else "cosine"
            ),
            run=RunRecipe(evaluate_every_steps=steps // 5),
        ),
        search=SearchRecipe(learning_rates=RATES, search_fraction=0.2, seeds=3),
    )  # fmt: skip


def resolution(height: int, width: int) -> int:
    """224 pixels for images of less than 96 × 96 in area, 448 for larger ones (Kolesnikov et al. 2020; Section 3)."""
    return 224 if height * width < 96 * 96 else 448


VTAB: dict[str, Callable[[], FinetuneRecipe]] = {f"vtab-{task}": partial(vtab, task) for task in TASKS}
