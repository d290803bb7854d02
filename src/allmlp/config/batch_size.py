"""How a step's batch is divided among the processes of a run."""

from allmlp.config.recipe import OptimizationRecipe, Recipe
from allmlp.errors import UserError


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Checks that ``world_size`` processes can share each step's images equally.

    Raises:
        UserError: names the option to change, and a value that works.
    """
    batch, group = recipe.optimization.global_batch_size, recipe.data.mix_group_size
    if batch % world_size:
        near = max(batch // world_size, 1) * world_size
        raise UserError(
            f"--global-batch-size {batch} on {world_size} processes: must be a multiple of {world_size}, such as {near}"
        )
    micro_batch, share = recipe.optimization.micro_batch_size, batch // world_size
    if micro_batch is not None and share % min(micro_batch, share):
        raise UserError(
            f"--micro-batch-size {micro_batch}: must divide the {share} images of each of {world_size} processes"
        )
    if recipe.data.mixes and share % group and world_size > 1:
        raise UserError(
            f"--mix-group-size {group}: the images of a group must be on one process, and each of {world_size} has "
            f"{share}: must be a divisor of {share}"
        )


def resolve_micro_batch_size(settings: OptimizationRecipe, world_size: int) -> int:
    """The number of images in one forward and backward pass of one process."""
    share = settings.global_batch_size // world_size
    return min(settings.micro_batch_size or share, share)
