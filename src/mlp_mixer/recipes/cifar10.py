"""A Mixer of 1.2 M parameters on CIFAR-10, from scratch, on a laptop."""

from mlp_mixer.training.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe


def cifar10() -> Recipe:
    """``mixer train cifar10``, or on a copy as image files: ``--data cifar10.zip``. Not yet measured."""
    return Recipe(
        name="cifar10",
        model=ModelRecipe(
            image_size=32, patch_size=4, num_blocks=8, hidden_dim=128, tokens_mlp_dim=64, channels_mlp_dim=512
        ),
        data=DataRecipe(data="cifar10", val_fraction=0.02, crop_ratio=1.0, train_crop="pad", crop_padding=4),
        optimization=OptimizationRecipe(
            epochs=10, global_batch_size=128, learning_rate=2e-3, weight_decay=0.1, warmup_steps=400, decay="cosine"
        ),
    )
