"""The methods that users of timm call on a model; ``Mixer`` inherits them, so that model.py holds the paper alone."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from allmlp.classifier import require_classifier
from allmlp.device import device_errors
from allmlp.errors import UserError
from allmlp.metadata import Metadata
from allmlp.resolution import patch_grid, resized_config, resized_state
from allmlp.sizes import Size, check_config, check_tokens

SCORES = ("val_top1", "test_top1")  # in the provenance; they no longer hold when the weights change


class TimmMethods(nn.Module):
    """Feature extraction, a new head and another image size under timm's names, for a module with these attributes."""

    config: dict[str, Any]
    metadata: Metadata
    num_classes: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    stem: nn.Conv2d
    blocks: nn.ModuleList
    pre_head_layer_norm: nn.LayerNorm
    head: nn.Module

    def embed(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def tokens(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """C, the size of the features."""
        return self.config["hidden_dim"]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, S, C): the normalized tokens."""
        return self.pre_head_layer_norm(self.tokens(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """The normalized tokens (B, S, C) → (B, num_classes), or (B, C) with ``pre_logits``."""
        check_tokens(tokens, self.grid[0] * self.grid[1], self.num_features)
        features = tokens.mean(1)
        return features if pre_logits else self.head(features)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """The normalized tokens (B, S, C), and the outputs of the chosen blocks, (B, C, rows, columns) each.

        Args:
            indices: numbers of blocks, negative ones counted from the end, or how many of the last; None: all blocks.
            norm: apply the LayerNorm before the head to every output.
            stop_early: leave out the blocks after the last chosen one.
            output_fmt: "NLC" gives outputs (B, S, C).
            intermediates_only: return the list of outputs alone.

        Raises:
            UserError: a block that the model does not have, or another output_fmt.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt = {output_fmt!r}: must be 'NCHW' (B, C, rows, columns) or 'NLC' (B, S, C)")
        chosen = block_numbers(indices, len(self.blocks))
        tokens, outputs = self.embed(images), []
        for i, block in enumerate(self.blocks[: max(chosen) + 1] if stop_early else self.blocks):
            tokens = block(tokens)
            if i in chosen:
                output = self.pre_head_layer_norm(tokens) if norm else tokens
                outputs.append(output.mT.unflatten(2, self.grid).contiguous() if output_fmt == "NCHW" else output)
        return outputs if intermediates_only else (self.pre_head_layer_norm(tokens), outputs)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head, in place, by a zero one, as the authors fine-tune; 0 leaves it out.

        The class names and scores of the old head leave ``metadata``. Make the optimizer afterwards.

        Raises:
            UserError: a negative number of classes.
        """
        self.config = check_config(self.config | {"num_classes": num_classes})
        self.num_classes, like = self.config["num_classes"], self.stem.weight
        if self.num_classes:
            self.head = nn.Linear(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        else:
            self.head = nn.Identity()
        self.head.train(self.training)
        provenance = {key: value for key, value in self.metadata.provenance.items() if key not in SCORES}
        self.metadata = replace(self.metadata, classes=None, provenance=provenance)

    def set_input_size(self, img_size: Size) -> None:
        """Resizes the model, in place, to images of another size, as ``allmlp.resize`` does with a copy.

        Make the optimizer afterwards.

        Raises:
            UserError: a size that is not a multiple of the patch size, or a model on the meta device.
        """
        require_classifier(self)
        config = resized_config(self.config, img_size)
        old_size = self.image_size
        with device_errors(f"token mixing at {config['image_size']} px", "use a smaller image size"):
            parameters = resized_state(self.config, self.state_dict(), img_size)
        for name, value in parameters.items():
            layer, kind = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            trained = getattr(layer, kind).requires_grad
            setattr(layer, kind, nn.Parameter(value, requires_grad=trained))
            if isinstance(layer, nn.Linear):
                layer.out_features, layer.in_features = layer.weight.shape
        self.config, self.image_size, self.grid = config, config["image_size"], patch_grid(config)
        if parameters:
            self.metadata = replace(self.metadata, provenance=after_resize(self.metadata.provenance, old_size))


def block_numbers(indices: int | Sequence[int] | None, num_blocks: int) -> set[int]:
    """The numbers of the chosen blocks: all for None, the last n for a number, negative ones counted from the end."""
    if indices is None:
        return set(range(num_blocks))
    if isinstance(indices, int) and 1 <= indices <= num_blocks:
        return set(range(num_blocks - indices, num_blocks))
    if isinstance(indices, Sequence):
        numbers = {i % num_blocks for i in indices if isinstance(i, int) and -num_blocks <= i < num_blocks}
        if numbers and len(numbers) == len(indices):
            return numbers
    raise UserError(
        f"indices = {indices!r}: give how many of the last blocks, 1 to {num_blocks}, or a list of different blocks, "
        f"{-num_blocks} to {num_blocks - 1}"
    )


def after_resize(provenance: dict[str, Any], old_size: tuple[int, int]) -> dict[str, Any]:
    """The provenance of a resized model: its size before, and with it the scores, which hold no longer."""
    resized = copy.deepcopy(provenance)
    scores = {key: resized.pop(key) for key in SCORES if key in resized}
    if any(score is not None for score in scores.values()):
        resized["before_resize"] = {"image_size": list(old_size), **scores}
    resized["resized_from"] = [*resized.get("resized_from", []), list(old_size)]
    return resized
