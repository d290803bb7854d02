"""Table 1 by name: sizes, parameters and operations of each variant, and what create() takes and refuses."""

import csv
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allmlp.errors import UserError
from allmlp.model import Mixer
from allmlp.variants import VARIANTS, create, resolve_variant

PAPER = Path(__file__).resolve().parents[2] / "shared" / "paper"

PARAMETERS = {  # with a head of 1000 classes, at 224 pixels
    "S/32": 19_104_624,
    "S/16": 18_528_264,
    "B/32": 60_293_428,
    "B/16": 59_880_472,
    "L/32": 206_939_264,
    "L/16": 208_196_168,
    "H/14": 432_350_952,
}


def shape_only(variant: str | None, **options) -> Mixer:
    with torch.device("meta"):
        return create(variant, **options)


def count(model: Mixer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def table(name: str) -> dict[str, dict[str, str]]:
    path = PAPER / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    with path.open(encoding="utf-8", newline="") as file:
        return {row["model"].removeprefix("Mixer-"): row for row in csv.DictReader(file)}


def test_the_variants_are_the_seven_of_table_1() -> None:
    assert VARIANTS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize(("variant", "parameters"), PARAMETERS.items())
def test_parameter_counts_are_exact(variant: str, parameters: int) -> None:
    assert count(shape_only(variant)) == parameters


@pytest.mark.parametrize("variant", PARAMETERS)
def test_sizes_are_those_of_table_1(variant: str) -> None:
    row = table("table1.csv")[variant]
    model = shape_only(variant, num_classes=0)
    block = model.blocks[0]
    assert len(model.blocks) == int(row["num_layers"])
    assert model.patch_size == (int(row["patch_size_px"]),) * 2
    assert model.stem.out_channels == int(row["hidden_size_C"])
    assert block.token_mixing.dense_0.in_features == int(row["sequence_length_S_at_224"])
    assert block.token_mixing.dense_0.out_features == int(row["mlp_dim_DS"])
    assert block.channel_mixing.dense_0.in_features == int(row["hidden_size_C"])
    assert block.channel_mixing.dense_0.out_features == int(row["mlp_dim_DC"])
    assert round(count(model) / 1e6) == int(row["params_v2_millions"])  # the paper counts without the head


@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameters_and_operations_agree_with_the_computed_table(variant: str, size: int) -> None:
    row = table("table1_computed.csv")[variant]
    widening = (size // 224) ** 2  # Supplement C: the number of tokens grows by K², and D_S with it
    tokens_mlp_dim = VARIANTS[variant]["tokens_mlp_dim"] * widening
    model = shape_only(variant, num_classes=0, image_size=size, tokens_mlp_dim=tokens_mlp_dim)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    assert count(model) / 1e6 == pytest.approx(float(row[f"params_no_head_{size}_millions"]), abs=5.1e-4)
    assert counter.get_total_flops() / 2e9 == pytest.approx(float(row[f"gmacs_per_image_{size}"]), abs=5.1e-4)


# create()


@pytest.mark.parametrize(
    "name", ["B/16", "b/16", "B_16", "b_16", "Mixer-B/16", "mixer-b/16", "Mixer-B_16", "mixer_b_16"]
)
def test_spellings_of_a_variant_are_one(name: str) -> None:
    assert resolve_variant(name) == "B/16"
    assert shape_only(name).config == shape_only("B/16").config


def test_defaults_are_the_papers() -> None:
    config = shape_only("B/16").config
    assert config["image_size"] == (224, 224)
    assert config["num_classes"] == 1000
    assert config["in_channels"] == 3
    assert config["gelu"] == "tanh"
    assert config["dropout"] == config["stochastic_depth"] == 0


def test_options_override_the_variants_sizes_and_none_leaves_them() -> None:
    plain = shape_only("B/16").config
    model = shape_only("B/16", num_classes=10, image_size=(32, 48), num_blocks=2, hidden_dim=None, gelu="erf")
    changes = {"num_classes": 10, "image_size": (32, 48), "num_blocks": 2, "gelu": "erf"}
    assert model.config == plain | changes
    assert len(model.blocks) == 2
    assert model.grid == (2, 3)
    assert VARIANTS["B/16"]["num_blocks"] == 12  # the table itself is left alone


def test_sizes_of_ones_own_need_no_variant() -> None:
    sizes = {"num_blocks": 2, "patch_size": 4, "hidden_dim": 8, "tokens_mlp_dim": 6, "channels_mlp_dim": 12}
    options = {"num_classes": 3, "image_size": 8, "in_channels": 1, "seed": 4}
    model, direct = create(**sizes, **options), Mixer(**sizes, **options)
    assert model.config == direct.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), direct.parameters(), strict=True))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_seed_is_passed_on() -> None:
    options = {"num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 6, "channels_mlp_dim": 12, "image_size": 32}
    stems = [create("S/16", **options, seed=seed).stem.weight for seed in (1, 1, 2)]
    assert torch.equal(stems[0], stems[1])
    assert not torch.equal(stems[0], stems[2])


def test_missing_sizes_are_named() -> None:
    with pytest.raises(UserError, match=r"no variant .* hidden_dim, channels_mlp_dim missing: .* 'B/16'"):
        create(num_blocks=2, patch_size=4, tokens_mlp_dim=6)
    with pytest.raises(UserError, match="num_blocks, patch_size, hidden_dim, tokens_mlp_dim, channels_mlp_dim missing"):
        create()


@pytest.mark.parametrize(
    ("name", "nearest"), [("B/61", "B/16"), ("B16", "B/16"), ("H/16", "H/14"), ("mixer-l/14", "L/16")]
)
def test_unknown_variant_is_told_the_nearest_and_all(name: str, nearest: str) -> None:
    with pytest.raises(
        UserError, match=rf"unknown variant '{name}'; the nearest: [^;]*{nearest}.*; there are S/32, .*H/14"
    ):
        create(name)


def test_variant_like_no_other_is_told_them_all() -> None:
    with pytest.raises(UserError, match=r"unknown variant 'zzz'; there are S/32, S/16, B/32, B/16, L/32, L/16, H/14"):
        create("zzz")


@pytest.mark.parametrize(
    ("option", "nearest"), [("hiden_dim", "hidden_dim"), ("drop_out", "dropout"), ("blocks", "num_blocks")]
)
def test_unknown_option_is_told_the_nearest(option: str, nearest: str) -> None:
    with pytest.raises(
        UserError, match=rf"unknown option '{option}' of a Mixer: the nearest are {nearest}(, \w+){{0,2}}$"
    ):
        create("S/32", **{option: 1})


def test_option_like_no_other_is_told_them_all() -> None:
    with pytest.raises(UserError, match=r"unknown option 'zzz' .*channels_mlp_dim, .*stochastic_depth, tokens_mlp_dim"):
        create("S/32", zzz=1)


def test_image_size_that_does_not_fit_names_both_sizes() -> None:
    with pytest.raises(UserError, match="image size 225×225 is not a multiple of the patch size 16×16: use 224×224"):
        create("B/16", image_size=225)
