"""Tables 1 to 4: our numbers beside the paper's, cell by cell."""

import csv
import dataclasses
import io
import json

import pytest
from made_speeds import made_speeds

from allmlp.errors import UserError
from allmlp.factory import create
from allmlp.recipes.pretrain import PRETRAIN
from allmlp.reproduce.accuracy import Accuracy, crop_of
from allmlp.reproduce.published import IMAGENET, IMAGENET21K, JFT, read_table, table_2, table_3
from allmlp.reproduce.speeds import Speed, SpeedOptions
from allmlp.reproduce.systems import config_at, cost_at
from allmlp.reproduce.tables import comparison as module
from allmlp.reproduce.tables import table1 as first
from allmlp.reproduce.tables import table4 as fourth
from allmlp.reproduce.tables.comparison import REFERENCE, TABLES, comparison, plan
from allmlp.reproduce.tables.table import Column, Table, significant

SCRATCH = {"source": {"known_as": "imagenet1k/Mixer-B_16.npz"}}


@pytest.fixture(scope="module")
def table1() -> Table:
    return first.table1()


def test_parameters_equal_the_published_column_after_rounding(table1: Table) -> None:
    for row in table1.rows:
        assert round(row["parameters"] / 1e6) == row["published_millions"]
        variant = row["model"].removeprefix("Mixer-")
        assert row["parameters_1000"] - row["parameters"] == 1000 * (row["published_channels"] + 1), variant
        assert row["gmacs_448"] > 4 * row["gmacs_224"]  # four times the patches, and D_S × 4
    assert "equal the published column in every cell" in " ".join(table1.notes)
    assert "All sizes are the published ones" in " ".join(table1.notes)


def test_a_different_count_or_size_is_reported(table1: Table) -> None:
    rows = [dict(row) for row in table1.rows]
    rows[2]["parameters"] += 2_000_000
    rows[3]["computed_layers"] = 13
    assert first.compare_parameters(rows).endswith(": Mixer-B/32.")
    assert "Mixer-B/16's layers (12 published, 13 here)" in first.compare_sizes(rows)


def test_the_arithmetic_of_the_preprints_column_holds(table1: Table) -> None:
    low, high = first.preprint_offset([dict(row) for row in table1.rows])
    assert low < high
    for offset in (low + 1e-3, (low + high) / 2, high - 1e-3):
        for row in table1.rows:
            rest = (row["parameters"] - first.JFT_CLASSES * row["published_channels"]) / 1e6
            assert round(rest + offset) == row["preprint_millions"]


def test_the_explanation_leaves_out_what_does_not_hold(table1: Table) -> None:
    rows = [dict(row) for row in table1.rows]
    assert "JFT-300M" in first.explain_preprint(rows)
    rows[0]["preprint_millions"] += 3
    assert "JFT-300M" not in first.explain_preprint(rows)


def test_every_recipe_stands_beside_its_row_of_table_4_without_a_difference() -> None:
    table = fourth.table4()
    assert sorted(row["recipe"] for row in table.rows) == sorted(PRETRAIN)
    assert [row["differences"] for row in table.rows] == [None] * len(PRETRAIN)
    assert "There is no difference" in table.notes[0]
    for row in table.rows:
        assert (row["computed_randaugment"] == 0) == (row["data"] == JFT)


@pytest.mark.parametrize(
    ("section", "field", "value", "shown"),
    [("optimization", "learning_rate", 0.002, "0.001 ≠ 0.002"), ("data", "mixup", None, "0.5 ≠ 0"),
     ("data", "randaugment", 10, "15 ≠ 10"), ("model", "dropout", 0.1, "0.0 ≠ 0.1")],
)  # fmt: skip
def test_a_recipe_that_differs_is_marked(section: str, field: str, value: float, shown: str) -> None:
    recipe = PRETRAIN["imagenet-b16"]()
    changed = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **{field: value})})
    row = fourth.row_of(read_table(4)[0], "imagenet-b16", changed)
    assert row["differences"] == field
    assert fourth.cell(row, field) == shown
    assert fourth.cell(row, "epochs") == "300"


def test_what_the_table_leaves_out_must_be_off() -> None:
    recipe = PRETRAIN["jft-b16"]()
    (published,) = [row for row in read_table(4) if (row["model"], row["dataset"]) == ("Mixer-B", "JFT-300M")]
    assert fourth.cell(fourth.row_of(published, "jft-b16", recipe), "mixup") == "off"
    changed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mixup=0.2))
    assert fourth.cell(fourth.row_of(published, "jft-b16", changed), "mixup") == "off ≠ 0.2"


def test_each_architecture_and_size_is_measured_once_and_training_at_224() -> None:
    configs, trained = plan(table_3())
    assert REFERENCE in configs
    assert len(configs) == len({row.key for row in table_3()} | {row.pretraining_key for row in table_3()})
    assert {key.rpartition(" ")[2] for key in trained} == {"224"}
    assert configs["Mixer-L/16 at 448"]["tokens_mlp_dim"] == 4 * configs["Mixer-L/16 at 224"]["tokens_mlp_dim"]
    assert set(plan(table_2()[:1])[0]) == {REFERENCE, "HaloNet-H4 at 512"}


@pytest.mark.parametrize("name", ["table2", "table3"])
def test_measured_numbers_stand_beside_the_published_ones(name: str) -> None:
    rows = TABLES[name]()
    configs, trained = plan(rows)
    table = comparison(name, rows, (), made_speeds(configs, trained, SpeedOptions()))
    base = cost_at("Mixer-B/16").macs
    assert len(table.rows) == len(rows)
    for row, published in zip(table.rows, rows, strict=True):
        assert row["top1"] == published.top1
        assert row["measured_top1"] is None
        assert row["measured_images_per_second"] == pytest.approx(1000 / row["gmacs"])
        assert row["measured_relative"] == pytest.approx(base / 1e9 / row["gmacs"])
        if published.images_per_second is not None:
            assert row["relative"] == pytest.approx(published.images_per_second / 1384)
        if published.images_seen is None:
            assert row["device_days"] is None
        else:
            seconds = published.images_seen * 3 * cost_at(published.system, 224).macs / 1e12
            assert row["device_days"] == pytest.approx(seconds / 86_400)


def test_what_was_not_measured_is_marked_with_its_reason() -> None:
    rows = [row for row in table_3() if row.system == "ViT-H/14"]
    speeds = {rows[0].key: Speed(problem="the weights do not fit into memory")}
    table = comparison("table3", rows, (), speeds)
    assert table.rows[0]["problem"] == "the weights do not fit into memory"
    assert any("ViT-H/14 at 224: the weights do not fit" in note for note in table.notes)
    for key in ("measured_images_per_second", "measured_relative", "device_days", "measured_top1"):
        assert table.rows[0][key] is None
        assert table.column(key).show(table.rows[0]) == "–"


def test_what_cannot_be_built_keeps_its_published_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, size: int) -> None:
        raise UserError(f"{name} needs timm: pip install timm")

    monkeypatch.setattr(module, "system_at", missing)
    rows = table_2()[:1]
    assert plan(rows) == ({}, frozenset())
    table = comparison("table2", rows, (), {})
    (row,) = table.rows
    assert (row["top1"], row["parameters"], row["gmacs"]) == (85.8, None, None)
    assert row["problem"] == "HaloNet-H4 needs timm: pip install timm"


def accuracy(name: str, size: int, provenance: dict, top1: float = 76.5) -> Accuracy:
    config = dict(config_at(name, size))
    return Accuracy(weights="w", config=config, provenance=provenance, images=9, top1=top1, real_top1=82.0)


def test_the_accuracy_of_published_weights_stands_in_their_row() -> None:
    table = comparison("table3", (), [accuracy("B/16", 224, SCRATCH)])
    (row,) = table.rows
    assert (row["model"], row["data"], row["top1"]) == ("Mixer-B/16", IMAGENET, 76.44)
    assert (row["measured_top1"], row["measured_real_top1"]) == (76.5, 82.0)


def test_weights_fine_tuned_from_published_ones_stand_in_the_row_of_those() -> None:
    source = {"source": {"known_as": "timm/mixer_b16_224.goog_in21k"}, "weights": "hf-hub:…"}
    (row,) = comparison("table3", (), [accuracy("B/16", 224, {"started_from": source})]).rows
    assert (row["data"], row["top1"]) == (IMAGENET21K, 80.64)


@pytest.mark.parametrize(
    ("name", "size", "provenance"),
    [("B/16", 224, {}), ("B/16", 448, SCRATCH), ("B/32", 224, SCRATCH),
     ("B/16", 224, {"source": {"known_as": "sam/Mixer-B_16.npz"}}), ("B/16", 224, {"source": "mine"})],
)  # fmt: skip
def test_other_weights_have_a_row_of_their_own(name: str, size: int, provenance: dict) -> None:
    (row,) = comparison("table3", (), [accuracy(name, size, provenance)]).rows
    assert (row["model"], row["measured_top1"], row.get("top1")) == ("w", 76.5, None)
    assert row["parameters"] == cost_at(name, size).parameters


def test_two_weights_of_one_row_are_both_shown() -> None:
    both = [accuracy("B/16", 224, SCRATCH, 76.0), accuracy("B/16", 224, SCRATCH, 77.0)]
    assert [row["measured_top1"] for row in comparison("table3", (), both).rows] == [76.0, 77.0]


def test_the_crop_is_that_of_the_table() -> None:
    mixer, bit = config_at("S/32"), {"system": "bit"}
    assert [crop_of(table, mixer) for table in ("table2", "table3")] == ["resize", "resmall"]
    assert [crop_of(table, bit) for table in ("table2", "table3")] == [None, "resize"]


@pytest.mark.parametrize("name", ["S/32", "B/16", "H/14"])
def test_a_resized_mixer_has_all_token_mixing_in_proportion(name: str) -> None:
    small, large = config_at(name), config_at(name, 448)
    assert large["tokens_mlp_dim"] == 4 * small["tokens_mlp_dim"]
    tokens, hidden, blocks = ((224 // small["patch_size"][0]) ** 2, small["tokens_mlp_dim"], small["num_blocks"])
    weights = blocks * (2 * tokens * hidden * (16 - 1) + 3 * (tokens + hidden))  # and the biases
    assert cost_at(name, 448).parameters - cost_at(name).parameters == weights


def test_files_hold_every_number_with_its_unit_and_source() -> None:
    columns = (
        Column(key="a", name="model", short="m"),
        Column(key="b", name="speed", short="s", unit="images/s", source="measured"),
        Column(key="c", name="for the terminal", short="c", in_files=False),
    )
    rows = [{"a": 'x, "y"', "b": 1.5, "c": 1}, {"a": "z", "b": None, "c": 2}]
    table = Table(name="t", title="T", columns=columns, rows=rows, views=(), details={"budget_seconds": 3})
    assert list(csv.reader(io.StringIO(table.to_csv()))) == [
        ["model", "measured speed (images/s)"], ['x, "y"', "1.5"], ["z", ""],
    ]  # fmt: skip
    found = json.loads(json.dumps(table.to_json_object()))
    assert found["rows"] == [{"a": 'x, "y"', "b": 1.5}, {"a": "z", "b": None}]
    assert found["columns"]["b"] == {"name": "speed", "unit": "images/s", "source": "measured"}
    assert found["budget_seconds"] == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (12.345, "12.3"), (0.5, "0.5"), (0.000123, "0.000123"), (0, "0"), (99.96, "100")],
)
def test_three_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_systems_are_built_as_they_are_created() -> None:
    assert dict(config_at("S/32")) == dict(create("S/32").config)
