"""Table 1 by name: sizes, parameters and operations of each variant."""

import csv
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allmlp.factory import create
from allmlp.model import Mixer
from allmlp.variants import VARIANTS

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
