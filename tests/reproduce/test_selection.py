"""What the words after --models select."""

from pathlib import Path

import pytest

from allmlp.errors import UserError
from allmlp.reproduce.published import table_2, table_3
from allmlp.reproduce.selection import pretraining_data, select


def selected(table: str, *names: str, data: bool = False) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    rows = {"table2": table_2(), "table3": table_3()}[table]
    found = select(table, rows, names, data)
    return [(row.model, row.image_size) for row in found.rows], found.weights


def test_without_names_all_rows() -> None:
    assert len(selected("table2")[0]) == len(table_2())


@pytest.mark.parametrize("name", ["Mixer-H/14", "H/14", "h/14", "mixer-h14-".rstrip("-").replace("h14", "h/14")])
def test_a_mixer_by_any_of_its_names(name: str) -> None:
    assert selected("table3", name) == ([("Mixer-H/14", 224), ("Mixer-H/14", 448)], ())


@pytest.mark.parametrize("name", ["MPL", "mpl", "EfficientNet-B6-Wide"])
def test_a_system_by_the_tables_name_or_by_ours(name: str) -> None:
    assert selected("table2", name) == ([("MPL", 512)], ())


def test_several_keep_the_order_of_the_table() -> None:
    assert selected("table2", "ALIGN", "HaloNet")[0] == [("HaloNet", 512), ("ALIGN", 600)]


def test_weights_are_evaluated_where_there_are_images(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    assert selected("table3", "S/32", str(weights), "hf-hub:a/b", "mixer-b16-in1k", data=True) == (
        [("Mixer-S/32", 224)], (str(weights), "hf-hub:a/b", "mixer-b16-in1k"),
    )  # fmt: skip
    assert selected("table3", str(weights), data=True) == ([], (str(weights),))


@pytest.mark.parametrize(
    ("table", "names", "data", "said"),
    [
        ("table3", ["B/17"], False, r"--models B/17: unknown model; the nearest in table3: Mixer-B/"),
        ("table2", ["Halonett"], False, r"nearest in table2: HaloNet"),
        ("table2", ["xyzzy"], False, r"table2 has HaloNet, Mixer-L/16"),
        ("table2", ["S/32"], False, r"--models S/32: table2 has no row of it, but of HaloNet"),
        ("table3", ["BoTNet-T7"], False, r"--models BoTNet-T7: table3 has no row"),
        ("table3", ["w.safetensors"], False, r"w\.safetensors: weights .* give --data SOURCE too"),
        ("table3", ["S/32"], True, r"--data without weights"),
        ("table3", [], True, r"--data without weights"),
        ("table3", ["S/32", "S/32"], False, r"S/32 is there twice"),
    ],
)
def test_mistakes(table: str, names: list[str], data: bool, said: str) -> None:
    with pytest.raises(UserError, match=said):
        selected(table, *names, data=data)


def test_the_data_of_weights_is_known_for_published_ones_alone() -> None:
    known = {"source": {"known_as": "imagenet21k/Mixer-L_16.npz"}}
    assert pretraining_data(known) == "ImageNet-21k"
    assert (
        pretraining_data({"started_from": known, "source": {"known_as": "imagenet1k/Mixer-L_16.npz"}}) == "ImageNet-21k"
    )
    assert pretraining_data({"source": {"known_as": "timm/mixer_b16_224.miil_in21k"}}) is None
    assert pretraining_data({}) is None
