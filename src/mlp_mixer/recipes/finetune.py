"""Trained weights to one's own classes."""

from mlp_mixer.training.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe


def finetune(weights: str, data: str) -> Recipe:
    """``mixer finetune WEIGHTS --data SOURCE``: the paper's SGD, with a batch that fits a small machine.

    Section 3: momentum SGD, gradients clipped at global norm 1, a cosine after a linear warm-up, no weight decay, the
    head from zero. The paper's batch is 512 at rates of 0.003 to 0.06, chosen on held-out images; here it is 64, and
    the rate is not searched. Expected: not yet measured.
    """
    return Recipe(
        name="finetune",
        model=ModelRecipe(weights=weights, image_size=None),
        data=DataRecipe(data=data, crop=None, crop_ratio=None, interpolation=None),
        optimization=OptimizationRecipe(
            optimizer="sgd", epochs=10, global_batch_size=64, learning_rate=0.01, weight_decay=0.0, warmup_steps=100,
            decay="cosine",
        ),
        run=RunRecipe(),
    )  # fmt: skip
