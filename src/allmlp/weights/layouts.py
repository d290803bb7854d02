"""Five ways to name and lay out a Mixer's tensors, as one table, and the sizes of a Mixer from the shapes alone."""

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

# {i} is a block's number. lucidrains' names are positions in one nn.Sequential: {b} = i + 2, {n} = blocks + 2,
# {h} = blocks + 4. ours · the authors' (flax linen) · the authors' older (flax nn) · timm · lucidrains
NAMES = (
    ("stem.weight", "stem/kernel", "embedding/kernel", "stem.proj.weight", "1.weight"),
    ("stem.bias", "stem/bias", "embedding/bias", "stem.proj.bias", "1.bias"),
    *(
        (f"blocks.{{i}}.{ours}", f"MixerBlock_{{i}}/{authors}", f"Mixer/encoderblock_{{i}}/{older}",
         f"blocks.{{i}}.{timm}", f"{{b}}.{lucidrains}")
        for ours, authors, older, timm, lucidrains in (
            ("norm1.weight", "LayerNorm_0/scale", "LayerNorm_0/scale", "norm1.weight", "0.norm.weight"),
            ("norm1.bias", "LayerNorm_0/bias", "LayerNorm_0/bias", "norm1.bias", "0.norm.bias"),
            ("token_mixing.dense_0.weight", "token_mixing/Dense_0/kernel", "token_mixing_phase_0/kernel1",
             "mlp_tokens.fc1.weight", "0.fn.0.weight"),
            ("token_mixing.dense_0.bias", "token_mixing/Dense_0/bias", "token_mixing_phase_0/bias1",
             "mlp_tokens.fc1.bias", "0.fn.0.bias"),
            ("token_mixing.dense_1.weight", "token_mixing/Dense_1/kernel", "token_mixing_phase_0/kernel2",
             "mlp_tokens.fc2.weight", "0.fn.3.weight"),
            ("token_mixing.dense_1.bias", "token_mixing/Dense_1/bias", "token_mixing_phase_0/bias2",
             "mlp_tokens.fc2.bias", "0.fn.3.bias"),
            ("norm2.weight", "LayerNorm_1/scale", "LayerNorm_1/scale", "norm2.weight", "1.norm.weight"),
            ("norm2.bias", "LayerNorm_1/bias", "LayerNorm_1/bias", "norm2.bias", "1.norm.bias"),
            ("channel_mixing.dense_0.weight", "channel_mixing/Dense_0/kernel", "channel_mixing_phase_0/kernel1",
             "mlp_channels.fc1.weight", "1.fn.0.weight"),
            ("channel_mixing.dense_0.bias", "channel_mixing/Dense_0/bias", "channel_mixing_phase_0/bias1",
             "mlp_channels.fc1.bias", "1.fn.0.bias"),
            ("channel_mixing.dense_1.weight", "channel_mixing/Dense_1/kernel", "channel_mixing_phase_0/kernel2",
             "mlp_channels.fc2.weight", "1.fn.3.weight"),
            ("channel_mixing.dense_1.bias", "channel_mixing/Dense_1/bias", "channel_mixing_phase_0/bias2",
             "mlp_channels.fc2.bias", "1.fn.3.bias"),
        )
    ),
    *(
        (f"pre_head_layer_norm.{ours}", f"pre_head_layer_norm/{theirs}", f"Mixer/encoder_norm/{theirs}",
         f"norm.{ours}", f"{{n}}.{ours}")
        for ours, theirs in (("weight", "scale"), ("bias", "bias"))
    ),
    ("head.weight", "head/kernel", "head/kernel", "head.weight", "{h}.weight"),
    ("head.bias", "head/bias", "head/bias", "head.bias", "{h}.bias"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A column of the table, and what goes without saying for weights that are stored so."""

    title: str
    column: int
    publisher: str = ""  # whose published files are in it
    flax: bool = False  # dense kernels as (in, out), the stem as (height, width, in, out)
    gelu: Gelu = "tanh"
    norm_eps: float = 1e-6
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def names(self, num_blocks: int) -> dict[str, str]:
        """Our name of every tensor of a Mixer of so many blocks, head included → the name it has here."""
        found = {}
        for row in NAMES:
            for i in range(num_blocks) if "{i}" in row[0] else (0,):
                numbers = {"i": i, "b": i + 2, "n": num_blocks + 2, "h": num_blocks + 4}
                found[row[0].format(**numbers)] = row[self.column].format(**numbers)
        return found

    def num_blocks(self, names: Iterable[str]) -> int:
        """One more than the highest block's number among the names of token-mixing kernels; 0: none, another layout."""
        kernel = next(row[self.column] for row in NAMES if row[0] == "blocks.{i}.token_mixing.dense_0.weight")
        pattern = re.compile(re.escape(kernel).replace(r"\{i\}", r"(\d{1,4})").replace(r"\{b\}", r"(\d{1,4})"))
        first = 2 if "{b}" in kernel else 0
        return max((int(m[1]) + 1 - first for m in map(pattern.fullmatch, names) if m), default=0)

    def to_ours(self, name: str, tensor: Tensor, patch: tuple[int, int, int] | None = None) -> Tensor:
        """A view of one of their tensors as ours; ``patch`` is (height, width, channels) for a stem stored flat."""
        if "_mixing." in name and self.flax:  # the older layout keeps axes of length one around these
            while tensor.ndim > (2 if name.endswith("weight") else 1) and 1 in tensor.shape:
                tensor = tensor.squeeze(tensor.shape.index(1))
        elif "token_mixing." in name and tensor.ndim == 3:  # lucidrains mixes tokens by convolutions of width one
            tensor = tensor.squeeze(-1)
        if patch is not None and name == "stem.weight" and tensor.ndim == 2:
            return tensor.unflatten(1, patch).permute(0, 3, 1, 2)
        if self.flax and name == "stem.weight" and tensor.ndim == 4:
            return tensor.permute(3, 2, 0, 1)
        return tensor.mT if self.flax and tensor.ndim == 2 else tensor

    def there(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape of ours as it is in their files."""
        if self.flax and name == "stem.weight" and len(shape) == 4:
            return shape[2:] + shape[1::-1]
        return shape[::-1] if self.flax and len(shape) == 2 else shape

    def to_theirs(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse, for the layouts that are written: the authors' and timm's."""
        if self.flax and name == "stem.weight":
            return tensor.permute(2, 3, 1, 0)
        return tensor.mT if self.flax and tensor.ndim == 2 else tensor


IMAGENET = Preprocessing(interpolation="bicubic")  # as timm evaluates the authors' weights
LAYOUTS = (
    Layout(title="this library's names", column=0),
    Layout(title="the authors' layout", column=1, publisher="authors", flax=True),
    Layout(title="the authors' older layout", column=2, publisher="authors", flax=True),
    Layout(title="timm's layout", column=3, publisher="timm", gelu="erf", preprocessing=IMAGENET),
    Layout(title="lucidrains' layout", column=4, gelu="erf", norm_eps=1e-5),
)
OURS, AUTHORS, OLDER, TIMM, LUCIDRAINS = LAYOUTS


def recognise(names: Iterable[str]) -> tuple[Layout, int] | None:
    """The layout that has these names, and the number of blocks; None for another architecture's weights."""
    names = list(names)
    found = [(layout, layout.num_blocks(names)) for layout in LAYOUTS]
    return next(((layout, blocks) for layout, blocks in found if blocks), None)


def infer(shapes: Mapping[str, tuple[int, ...]], num_blocks: int, image_size: Size | None, what: str) -> dict[str, Any]:
    """The arguments of a Mixer whose tensors have these shapes (by our names); ``what`` begins an error.

    The stem gives C, channels and patch; the first block D_S, S and D_C; the head the classes. S patches are taken as
    a square of them, unless ``image_size`` says otherwise.

    Raises:
        UserError: a tensor that decides a size is absent or has no such axis, or a grid that cannot be known.
    """
    axes = {"stem.weight": 4, "blocks.0.token_mixing.dense_0.weight": 2, "blocks.0.channel_mixing.dense_0.weight": 2}
    for name, ndim in axes.items():
        if len(shapes.get(name, ())) != ndim:
            seen = f"has the shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(f"{what}: {name} {seen}, and a Mixer's has {ndim} axes: damaged, or another architecture's")
    hidden_dim, in_channels, *patch = shapes["stem.weight"]
    tokens_mlp_dim, tokens = shapes["blocks.0.token_mixing.dense_0.weight"]
    head = shapes.get("head.weight", ())
    return {
        "num_classes": head[0] if len(head) == 2 else 0,
        "image_size": image_of(tokens, (patch[0], patch[1]), image_size, what),
        "patch_size": (patch[0], patch[1]),
        "num_blocks": num_blocks,
        "hidden_dim": hidden_dim,
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": shapes["blocks.0.channel_mixing.dense_0.weight"][0],
        "in_channels": in_channels,
    }


def image_of(tokens: int, patch: tuple[int, int], image_size: Size | None, what: str) -> tuple[int, int]:
    side = math.isqrt(tokens)
    square = (side * patch[0], side * patch[1]) if side * side == tokens else None
    if image_size is None:
        if square is None:
            raise UserError(
                f"{what}: {tokens} patches of {patch[0]}×{patch[1]} px are no square, and their shapes do not tell "
                "height from width: give image_size=(height, width) to load, or convert the file first (mixer convert "
                "IN OUT --image-size HEIGHT WIDTH)"
            )
        return square
    height, width = as_pair(image_size)
    if min(height, width) < 1:
        raise UserError(f"{what}: image_size={image_size}: give a size in pixels, at least 1")
    if height % patch[0] or width % patch[1] or height // patch[0] * (width // patch[1]) != tokens:
        trained = f"trained at {square[0]}×{square[1]} px" if square else "trained at another size"
        raise UserError(
            f"{what}: it mixes {tokens} patches of {patch[0]}×{patch[1]} px, which {height}×{width} px are not: "
            f"{trained}; load it without image_size, then resize it (allmlp.resize, mixer resize)"
        )
    return height, width


def flat_patch(width: int, in_channels: int | None, what: str) -> tuple[int, int, int]:
    """(height, width, channels) of a square patch stored as one axis; a UserError where several would fit."""
    if in_channels is not None and in_channels < 1:
        raise UserError(f"{what}: in_channels={in_channels}: give a number of channels, at least 1")
    fits = [c for c in ((in_channels,) if in_channels else (1, 3, 4)) if c and width % c == 0 and is_square(width // c)]
    if len(fits) != 1:
        guess = f"{', '.join(map(str, fits))} channels would fit" if fits else "no square patch fits"
        raise UserError(
            f"{what}: patches of {width} numbers, height × width × channels, of which {guess}"
            f"{f' with in_channels={in_channels}' if in_channels else ''}: give in_channels= to load, "
            "or mixer convert IN OUT --in-channels N"
        )
    side = math.isqrt(width // fits[0])
    return side, side, fits[0]


def is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def expected_shapes(config: Mapping[str, Any], tensors: int, what: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a Mixer's tensors; a UserError for sizes that no Mixer has, or that so few tensors cannot be.

    ``tensors`` is how many there are: a file that names a million blocks is refused before they are made.
    """
    try:
        if config["num_blocks"] > tensors:
            raise ValueError(f"{config['num_blocks']} blocks in {tensors} tensors")
        return {name: tuple(tensor.shape) for name, tensor in build_meta(config).state_dict().items()}
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise no_mixer(what, error) from None


def no_mixer(what: str, error: Exception) -> UserError:
    reason = printable(" ".join(str(error).split())[:200])
    return UserError(f"{what} describes no Mixer ({reason}): save or download it again")


def compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    unexpected: Iterable[str],
    shown: Mapping[str, str],
    what: str,
    layout: Layout | None = None,
) -> None:
    """A UserError that lists every tensor that is missing, unexpected or of another shape, and the likely cause.

    Args:
        expected, found: shapes by our names.
        unexpected: names in the file that are none of ours.
        shown: our name → the name in the file.
        what: the file, to begin the message with.
        layout: whose orientation the shapes are told in; by default ours.
    """
    layout = layout or OURS
    missing = [shown.get(name, name) for name in expected if name not in found]
    unexpected = [*unexpected, *(shown.get(name, name) for name in found if name not in expected)]
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if not (missing or unexpected or wrong):
        return
    differ = [
        f"{shown.get(name, name)} {layout.there(name, found[name])} instead of {layout.there(name, expected[name])}"
        for name in wrong
    ]
    lists = {"missing": missing, "unexpected": unexpected, "wrong shape": differ}
    told = "; ".join(f"{len(names)} {kind}: {printable(listed(names))}" for kind, names in lists.items() if names)
    raise UserError(f"{what} does not hold a whole Mixer: {told}. {likely_cause(expected, found, wrong)}")


def likely_cause(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], wrong: list[str]
) -> str:
    token = [name for name in wrong if "token_mixing" in name]
    kernels = [name for name in wrong if name.endswith("mixing.dense_0.weight") and len(found[name]) == 2]
    swap = {"token": "channel", "channel": "token"}
    if kernels and all(
        found[name][0] == expected[re.sub("token|channel", lambda m: swap[m[0]], name)][0] != expected[name][0]
        for name in kernels
    ):
        return "Likely D_S and D_C are swapped, as in lucidrains' port: train or convert it with the right widths"
    if wrong and len(token) == len(wrong):
        tokens = sorted({found[name][1] for name in kernels})
        sizes = " and ".join(f"{n} patches" for n in tokens) or "another number of patches"
        return f"Likely trained at another image size ({sizes}): load it at that size and resize it"
    if wrong and all(name.startswith("head") for name in wrong):
        return "Likely the head of another data set was put in: save the whole state dict of one model"
    if not wrong:
        return "Likely only a part was saved, or another architecture's weights: save the whole state dict"
    return "Likely the tensors of two models were mixed, or it is another architecture's: save one whole state dict"


def listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
