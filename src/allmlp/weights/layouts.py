"""The six layouts (names and axis orders) of a Mixer's tensors, as one table, and a Mixer's sizes from its shapes."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from allmlp.errors import UserError, printable
from allmlp.factory import build_meta
from allmlp.metadata import Preprocessing
from allmlp.sizes import Gelu, Size, as_pair

# Columns: native · the authors' (flax linen) · the authors' older (flax nn) · timm · lucidrains · mmpretrain. {i} is a
# block's number. lucidrains' names are positions in one nn.Sequential: {b} = i + 2, {n} = blocks + 2, {h} = blocks + 4.
NAMES = (
    ("stem.weight", "stem/kernel", "embedding/kernel", "stem.proj.weight", "1.weight",
     "backbone.patch_embed.projection.weight"),
    ("stem.bias", "stem/bias", "embedding/bias", "stem.proj.bias", "1.bias", "backbone.patch_embed.projection.bias"),
    *(
        (f"blocks.{{i}}.{native}", f"MixerBlock_{{i}}/{authors}", f"Mixer/encoderblock_{{i}}/{older}",
         f"blocks.{{i}}.{timm}", f"{{b}}.{lucidrains}", f"backbone.layers.{{i}}.{mmpretrain}")
        for native, authors, older, timm, lucidrains, mmpretrain in (
            ("norm1.weight", "LayerNorm_0/scale", "LayerNorm_0/scale", "norm1.weight", "0.norm.weight", "ln1.weight"),
            ("norm1.bias", "LayerNorm_0/bias", "LayerNorm_0/bias", "norm1.bias", "0.norm.bias", "ln1.bias"),
            ("token_mixing.dense_0.weight", "token_mixing/Dense_0/kernel", "token_mixing_phase_0/kernel1",
             "mlp_tokens.fc1.weight", "0.fn.0.weight", "token_mix.layers.0.0.weight"),
            ("token_mixing.dense_0.bias", "token_mixing/Dense_0/bias", "token_mixing_phase_0/bias1",
             "mlp_tokens.fc1.bias", "0.fn.0.bias", "token_mix.layers.0.0.bias"),
            ("token_mixing.dense_1.weight", "token_mixing/Dense_1/kernel", "token_mixing_phase_0/kernel2",
             "mlp_tokens.fc2.weight", "0.fn.3.weight", "token_mix.layers.1.weight"),
            ("token_mixing.dense_1.bias", "token_mixing/Dense_1/bias", "token_mixing_phase_0/bias2",
             "mlp_tokens.fc2.bias", "0.fn.3.bias", "token_mix.layers.1.bias"),
            ("norm2.weight", "LayerNorm_1/scale", "LayerNorm_1/scale", "norm2.weight", "1.norm.weight", "ln2.weight"),
            ("norm2.bias", "LayerNorm_1/bias", "LayerNorm_1/bias", "norm2.bias", "1.norm.bias", "ln2.bias"),
            ("channel_mixing.dense_0.weight", "channel_mixing/Dense_0/kernel", "channel_mixing_phase_0/kernel1",
             "mlp_channels.fc1.weight", "1.fn.0.weight", "channel_mix.layers.0.0.weight"),
            ("channel_mixing.dense_0.bias", "channel_mixing/Dense_0/bias", "channel_mixing_phase_0/bias1",
             "mlp_channels.fc1.bias", "1.fn.0.bias", "channel_mix.layers.0.0.bias"),
            ("channel_mixing.dense_1.weight", "channel_mixing/Dense_1/kernel", "channel_mixing_phase_0/kernel2",
             "mlp_channels.fc2.weight", "1.fn.3.weight", "channel_mix.layers.1.weight"),
            ("channel_mixing.dense_1.bias", "channel_mixing/Dense_1/bias", "channel_mixing_phase_0/bias2",
             "mlp_channels.fc2.bias", "1.fn.3.bias", "channel_mix.layers.1.bias"),
        )
    ),
    *(
        (f"pre_head_layer_norm.{torch_name}", f"pre_head_layer_norm/{flax_name}", f"Mixer/encoder_norm/{flax_name}",
         f"norm.{torch_name}", f"{{n}}.{torch_name}", f"backbone.ln1.{torch_name}")
        for torch_name, flax_name in (("weight", "scale"), ("bias", "bias"))
    ),
    ("head.weight", "head/kernel", "head/kernel", "head.weight", "{h}.weight", "head.fc.weight"),
    ("head.bias", "head/bias", "head/bias", "head.bias", "{h}.bias", "head.fc.bias"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A column of the table, and the settings that weights stored in this layout were trained with by default."""

    title: str
    column: int
    publisher: str = ""  # who published weights in this layout
    flax: bool = False  # dense kernels as (in, out), the stem as (height, width, in, out)
    gelu: Gelu = "tanh"
    norm_eps: float = 1e-6
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def names(self, num_blocks: int) -> dict[str, str]:
        """The native name of each tensor of a Mixer with a head → its name in this layout."""
        names = {}
        for row in NAMES:
            for i in range(num_blocks) if "{i}" in row[0] else (0,):
                numbers = {"i": i, "b": i + 2, "n": num_blocks + 2, "h": num_blocks + 4}
                names[row[0].format(**numbers)] = row[self.column].format(**numbers)
        return names

    def num_blocks(self, names: Iterable[str]) -> int:
        """The number of blocks, by the names of the token-mixing kernels; 0 if the names are not of this layout."""
        kernel = next(row[self.column] for row in NAMES if row[0] == "blocks.{i}.token_mixing.dense_0.weight")
        pattern = re.compile(re.escape(kernel).replace(r"\{i\}", r"(\d{1,4})").replace(r"\{b\}", r"(\d{1,4})"))
        first = 2 if "{b}" in kernel else 0
        return max((int(m[1]) + 1 - first for m in map(pattern.fullmatch, names) if m), default=0)

    def to_native(self, name: str, tensor: Tensor, patch: tuple[int, int, int] | None = None) -> Tensor:
        """A view of a tensor with the native order of axes.

        Args:
            name: its native name.
            tensor: as this layout stores it.
            patch: (height, width, channels) of the patches of a stem whose kernel is stored flat.
        """
        if "_mixing." in name and self.flax:  # the older layout has axes of length one here
            while tensor.ndim > (2 if name.endswith("weight") else 1) and 1 in tensor.shape:
                tensor = tensor.squeeze(tensor.shape.index(1))
        elif "token_mixing." in name and tensor.ndim == 3:  # lucidrains mixes tokens by convolutions of width one
            tensor = tensor.squeeze(-1)
        if patch is not None and name == "stem.weight" and tensor.ndim == 2:
            return tensor.unflatten(1, patch).permute(0, 3, 1, 2)
        if self.flax and name == "stem.weight" and tensor.ndim == 4:
            return tensor.permute(3, 2, 0, 1)
        return tensor.mT if self.flax and tensor.ndim == 2 else tensor

    def stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in this layout of a tensor whose native shape is ``shape``."""
        if self.flax and name == "stem.weight" and len(shape) == 4:
            return shape[2:] + shape[1::-1]
        return shape[::-1] if self.flax and len(shape) == 2 else shape

    def from_native(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of ``to_native``, for the authors' current layout and timm's, which are written too."""
        if self.flax and name == "stem.weight":
            return tensor.permute(2, 3, 1, 0)
        return tensor.mT if self.flax and tensor.ndim == 2 else tensor


IMAGENET = Preprocessing(interpolation="bicubic")  # as timm evaluates the authors' weights
LAYOUTS = (
    Layout(title="the native layout", column=0),
    Layout(title="the authors' layout", column=1, publisher="authors", flax=True),
    Layout(title="the authors' older layout", column=2, publisher="authors", flax=True),
    Layout(title="timm's layout", column=3, publisher="timm", gelu="erf", preprocessing=IMAGENET),
    Layout(title="lucidrains' layout", column=4, gelu="erf", norm_eps=1e-5),
    Layout(title="mmpretrain's layout", column=5, gelu="erf", norm_eps=1e-5, preprocessing=IMAGENET),
)
NATIVE, AUTHORS, AUTHORS_OLDER, TIMM, LUCIDRAINS, MMPRETRAIN = LAYOUTS


def detect_layout(names: Iterable[str]) -> tuple[Layout, int] | None:
    """The layout that uses these names, and the number of blocks; None for another architecture's weights."""
    names = list(names)
    counts = [(layout, layout.num_blocks(names)) for layout in LAYOUTS]
    return next(((layout, blocks) for layout, blocks in counts if blocks), None)


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], num_blocks: int, image_size: Size | None, file_name: str
) -> dict[str, Any]:
    """The arguments of a Mixer whose tensors have these native names and shapes.

    The stem gives C, channels and patch size; the first block D_S, S and D_C; the head the number of classes. The grid
    of S patches is taken as square, unless ``image_size`` is given.

    Raises:
        UserError: a tensor that determines a size is missing or has the wrong number of axes, or the grid is unknown.
    """
    axes = {"stem.weight": 4, "blocks.0.token_mixing.dense_0.weight": 2, "blocks.0.channel_mixing.dense_0.weight": 2}
    for name, ndim in axes.items():
        if len(shapes.get(name, ())) != ndim:
            problem = f"has the shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(
                f"{file_name}: {name} {problem}, and a Mixer's has {ndim} axes: damaged, or another architecture's; "
                "give a Mixer's weights"
            )
    hidden_dim, in_channels, *patch = shapes["stem.weight"]
    tokens_mlp_dim, tokens = shapes["blocks.0.token_mixing.dense_0.weight"]
    head = shapes.get("head.weight", ())
    return {
        "num_classes": head[0] if len(head) == 2 else 0,
        "image_size": infer_image_size(tokens, (patch[0], patch[1]), image_size, file_name),
        "patch_size": (patch[0], patch[1]),
        "num_blocks": num_blocks,
        "hidden_dim": hidden_dim,
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": shapes["blocks.0.channel_mixing.dense_0.weight"][0],
        "in_channels": in_channels,
    }


def infer_image_size(tokens: int, patch: tuple[int, int], image_size: Size | None, file_name: str) -> tuple[int, int]:
    """(height, width) of an image with this number of patches: square, or ``image_size`` if it is given and fits."""
    side = math.isqrt(tokens)
    square = (side * patch[0], side * patch[1]) if side * side == tokens else None
    if image_size is None:
        if square is None:
            raise UserError(
                f"{file_name}: {tokens} patches of {patch[0]}×{patch[1]} px do not form a square, so height and width "
                "are unknown: give image_size=(height, width) to load, or convert the file first (mixer convert IN OUT "
                "--image-size HEIGHT WIDTH)"
            )
        return square
    height, width = as_pair(image_size)
    if min(height, width) < 1:
        raise UserError(f"{file_name}: image_size={image_size}: give a size in pixels, at least 1")
    if height % patch[0] or width % patch[1] or height // patch[0] * (width // patch[1]) != tokens:
        trained = f"trained at {square[0]}×{square[1]} px" if square else "trained at another size"
        raise UserError(
            f"{file_name}: it mixes {tokens} patches of {patch[0]}×{patch[1]} px, which {height}×{width} px are not: "
            f"{trained}; load it without image_size, then resize it (allmlp.resize, mixer resize)"
        )
    return height, width


def infer_flat_patch(width: int, in_channels: int | None, file_name: str) -> tuple[int, int, int]:
    """(height, width, channels) of a square patch that is stored as one axis of ``width`` numbers.

    Raises:
        UserError: several numbers of channels are possible, or none.
    """
    if in_channels is not None and in_channels < 1:
        raise UserError(f"{file_name}: in_channels={in_channels}: give a number of channels, at least 1")
    fits = [c for c in ((in_channels,) if in_channels else (1, 3, 4)) if c and width % c == 0 and is_square(width // c)]
    if len(fits) != 1:
        problem = f"{', '.join(map(str, fits))} channels would fit" if fits else "no square patch fits"
        raise UserError(
            f"{file_name}: patches of {width} numbers, height × width × channels: {problem}"
            f"{f' with in_channels={in_channels}' if in_channels else ''}: give in_channels= to load, "
            "or mixer convert IN OUT --in-channels N"
        )
    side = math.isqrt(width // fits[0])
    return side, side, fits[0]


def is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def expected_shapes(config: Mapping[str, Any], tensors: int, file_name: str) -> dict[str, tuple[int, ...]]:
    """The native names and shapes of the tensors of a model with this config, without allocating them.

    Args:
        config: the arguments of ``Mixer`` or ``ZooModel``.
        tensors: how many tensors the file has; a file that claims more blocks is refused before they are built.
        file_name: named in messages.

    Raises:
        UserError: no model can have this config.
    """
    try:
        if config.get("num_blocks", 0) > tensors:
            raise ValueError(f"{config['num_blocks']} blocks in {tensors} tensors")
        return {name: tuple(tensor.shape) for name, tensor in build_meta(config).state_dict().items()}
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise not_a_mixer(file_name, error) from None


def not_a_mixer(file_name: str, error: Exception) -> UserError:
    reason = printable(" ".join(str(error).split())[:200])
    return UserError(f"{file_name} does not describe a Mixer ({reason}): save or download it again")


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    actual: Mapping[str, tuple[int, ...]],
    unexpected: Iterable[str],
    stored_names: Mapping[str, str],
    file_name: str,
    layout: Layout = NATIVE,
    kind: str = "Mixer",
) -> None:
    """Checks that a file has exactly a model's tensors.

    Args:
        expected, actual: shapes by native names.
        unexpected: names in the file that the layout does not have.
        stored_names: native name → name in the file, for the message.
        file_name: named in the message.
        layout: the file's layout; shapes are reported in its order of axes.
        kind: what the model is, for the message.

    Raises:
        UserError: lists every tensor that is missing, unexpected or of another shape, and names the likely cause.
    """
    missing = [stored_names.get(name, name) for name in expected if name not in actual]
    unexpected = [*unexpected, *(stored_names.get(name, name) for name in actual if name not in expected)]
    wrong = [name for name in expected if name in actual and actual[name] != expected[name]]
    if not (missing or unexpected or wrong):
        return
    wrong_shapes = [
        f"{stored_names.get(name, name)} {layout.stored_shape(name, actual[name])} instead of "
        f"{layout.stored_shape(name, expected[name])}"
        for name in wrong
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong_shapes}
    listed = "; ".join(
        f"{len(names)} {problem}: {printable(shortened(names))}" for problem, names in problems.items() if names
    )
    raise UserError(
        f"{file_name} does not contain a complete {kind}: {listed}. {likely_cause(expected, actual, wrong)}"
    )


def likely_cause(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], wrong: list[str]
) -> str:
    token = [name for name in wrong if "token_mixing" in name]
    kernels = [name for name in wrong if name.endswith("mixing.dense_0.weight") and len(actual[name]) == 2]
    swap = {"token": "channel", "channel": "token"}
    if kernels and all(
        actual[name][0] == expected[re.sub("token|channel", lambda m: swap[m[0]], name)][0] != expected[name][0]
        for name in kernels
    ):
        return "Likely D_S and D_C are swapped, as in lucidrains' port: train or convert it with the right widths"
    if wrong and len(token) == len(wrong):
        tokens = sorted({actual[name][1] for name in kernels})
        sizes = " and ".join(f"{n} patches" for n in tokens) or "another number of patches"
        return f"Likely trained at another image size ({sizes}): load it at that size and resize it"
    if wrong and all(name.startswith("head") for name in wrong):
        return "Likely the head is that of another dataset: save the whole state dict of one model"
    if not wrong:
        return "Likely only a part was saved, or another architecture's weights: save the whole state dict"
    return "Likely the tensors of two models were mixed, or of another architecture: save the state dict of one model"


def shortened(names: list[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
