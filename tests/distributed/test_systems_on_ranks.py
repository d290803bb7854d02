"""Comparison systems on several ranks: as one process, or, where batches are normalized, the same on all ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import rank_values
from test_equivalence import MASKED, SGD, compare, max_difference, train

from allmlp.distributed.context import SINGLE_PROCESS

NONE = dict.fromkeys(("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"))
VIT = NONE | {
    "model": "vit", "patch_size": 4, "num_blocks": 2, "hidden_dim": 8, "num_heads": 2, "channels_mlp_dim": 12
}  # fmt: skip
BIT = NONE | {"model": "bit", "depths": (1, 1, 1, 1), "width": 0.25, "stem": "small", "image_size": 16}
EFFICIENTNET = NONE | {"model": "efficientnet", "depths": (1,) * 7, "width": 0.25, "stem": "small", "image_size": 16}


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("system", [VIT, BIT], ids=["ViT", "BiT"])
def test_two_ranks_train_like_one_process(system: dict[str, Any], sharded: bool, tmp_path: Path) -> None:
    changes = {**system, **MASKED, **SGD, "micro_batch_size": 2, "ema_decay": 0.5, "steps": 3}
    expected = train(SINGLE_PROCESS, False, tmp_path / "single", changes, (3, 5), "float64")
    for found in rank_values(train, 2, sharded, tmp_path / "two", changes, (3, 5), "float64"):
        compare(found, expected)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_normalized_batches_give_the_same_model_and_scores_on_all_ranks(sharded: bool, tmp_path: Path) -> None:
    changes = {**EFFICIENTNET, **SGD, "steps": 3, "evaluate_every_steps": 1}
    first, second = rank_values(train, 2, sharded, tmp_path / "two", changes, (), "float64")
    assert max_difference(first["weights"], second["weights"]) == 0
    assert first["val_loss"] == second["val_loss"]
    assert np.isfinite(first["val_loss"]).all()
