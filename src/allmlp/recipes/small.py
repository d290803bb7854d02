"""Small versions of recipes: the same methods, at sizes that train on a laptop in a minute."""

from dataclasses import replace

from allmlp.config.recipe import FinetuneRecipe, Recipe


def small(recipe: Recipe) -> Recipe:
    """``mixer train imagenet-b16-small``: the same augmentation, loss, optimizer and schedule on the embedded digits.

    For trying a recipe before it runs on a cluster, not for accuracy: 16 × 16 pixels, 2 blocks of 32 channels, batches
    of 64, 40 epochs, and a head bias for 10 classes. --data uses other images.
    """
    model = replace(
        recipe.model, model=None, image_size=16, patch_size=4, num_blocks=2, hidden_dim=32, tokens_mlp_dim=16,
        channels_mlp_dim=128, head_bias=-2.2 if recipe.model.head_bias else 0.0,
    )  # fmt: skip
    return replace(
        recipe,
        name=f"{recipe.name}-small",
        model=model,
        data=replace(recipe.data, data="digits", val_fraction=0.1),
        optimization=replace(recipe.optimization, epochs=40, global_batch_size=64),
        run=replace(recipe.run, evaluate_every_epochs=5.0),
    )


def small_finetune(finetune: FinetuneRecipe) -> FinetuneRecipe:
    """``mixer finetune WEIGHTS pets-small --data photos/``: the same methods, in 20 steps of 16 images."""
    recipe = finetune.recipe
    small_recipe = replace(
        recipe,
        name=f"{recipe.name}-small",
        model=replace(recipe.model, image_size=None),
        data=replace(recipe.data, data="digits"),
        optimization=replace(recipe.optimization, steps=20, global_batch_size=16),
        run=replace(recipe.run, evaluate_every_steps=10),
    )
    return replace(finetune, recipe=small_recipe, search=replace(finetune.search, search_fraction=0.2))
