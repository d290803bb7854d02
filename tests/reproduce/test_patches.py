"""Cost by the number of patches: linear for Mixer, quadratic for attention."""

import itertools

import pytest
import torch

from allmlp.errors import UserError
from allmlp.reproduce.figures.contents import patches_table, pictures
from allmlp.reproduce.patches import (
    CHANNELS,
    CHANNELS_MLP_DIM,
    KINDS,
    PATCHES,
    TOKENS_MLP_DIM,
    attention_products,
    count_macs,
    describe,
    growth,
    measure_patches,
    time_exponents,
)

BY_KEY = {kind.key: kind for kind in KINDS}


def test_operations_grow_exactly_as_the_paper_says() -> None:
    for first, second in itertools.pairwise(PATCHES):
        for key, exponent in (("attention", 2), ("token_mixing", 1), ("mixer_block", 1)):
            old, new = (count_macs(BY_KEY[key], number) for number in (first, second))
            assert new * first**exponent == old * second**exponent  # without rounding
        old, new = (count_macs(BY_KEY["vit_block"], number) for number in (first, second))
        assert second / first < new / old < (second / first) ** 2


@pytest.mark.parametrize("patches", PATCHES)
def test_operations_are_those_of_the_formulas(patches: int) -> None:
    assert count_macs(BY_KEY["attention"], patches) == 2 * patches**2 * CHANNELS
    assert count_macs(BY_KEY["token_mixing"], patches) == 2 * CHANNELS * patches * TOKENS_MLP_DIM
    mixing = 2 * CHANNELS * patches * (TOKENS_MLP_DIM + CHANNELS_MLP_DIM)
    assert count_macs(BY_KEY["mixer_block"], patches) == mixing
    projections = patches * CHANNELS * (4 * CHANNELS + 2 * CHANNELS_MLP_DIM)
    assert count_macs(BY_KEY["vit_block"], patches) == projections + 2 * patches**2 * CHANNELS


def test_the_products_are_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention_products(q, k, v), expected)
    with torch.inference_mode():
        values = {key: BY_KEY[key].make(49)() for key in BY_KEY}
    assert {key: tuple(value.shape) for key, value in values.items()} == {
        "attention": (1, 12, 49, 64), "fused_attention": (1, 12, 49, 64), "vit_block": (1, 49, CHANNELS),
        "token_mixing": (1, 49, CHANNELS), "mixer_block": (1, 49, CHANNELS),
    }  # fmt: skip


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_growth_is_the_exponent_of_a_power_law(exponent: float) -> None:
    first, second = ({"patches": n, "seconds": 3e-6 * n**exponent} for n in (784, 3136))
    assert growth(first, second, "seconds") == pytest.approx(exponent)


def test_medians_of_the_rounds_and_growth_from_the_number_before() -> None:
    times = {
        (kind.key, number): [number**power * 1e-6 * factor for factor in (1, 9, 1.0, 0.5, 1)]
        for kind in KINDS
        for number in PATCHES
        for power in [1 if kind.mixer else 2]
    }
    rows = describe(times, PATCHES)
    assert len(rows) == len(KINDS) * len(PATCHES)
    for row in rows:
        power = 1 if row["mixer"] else 2
        assert row["seconds"] == pytest.approx(row["patches"] ** power * 1e-6)
        assert row["slowest"] == pytest.approx(18 * row["fastest"])
        if row["patches"] == PATCHES[0]:
            assert row["seconds_exponent"] is None
        else:
            assert row["seconds_exponent"] == pytest.approx(power)
    assert time_exponents(rows) == pytest.approx({kind.key: 1 if kind.mixer else 2 for kind in KINDS})
    table = patches_table(rows, {})
    assert "softmax(QKᵀ)V grows by S^2.00, the token-mixing MLP by S^1.00" in " ".join(table.notes)
    assert list(pictures(table, "cpu")) == ["patches"]


def test_measured_time_grows_faster_for_attention_than_for_token_mixing() -> None:
    threads = torch.get_num_threads()
    rows = measure_patches((196, 784), device="cpu", budget_seconds=5.0)
    assert torch.get_num_threads() == threads
    exponents = time_exponents(rows)
    assert exponents["attention"] > exponents["token_mixing"] + 0.4
    assert {row["rounds"] >= 3 for row in rows} == {True}


def test_the_budget_ends_the_rounds() -> None:
    now = [0.0]

    def clock() -> float:  # each look takes a tenth of a second
        now[0] += 0.1
        return now[0]

    rows = measure_patches((4, 9), device="cpu", budget_seconds=30.0, clock=clock)
    assert 3 <= rows[0]["rounds"] < 25
    assert now[0] < 33


def test_a_budget_too_small() -> None:
    with pytest.raises(UserError, match=r"--budget 1s is too small: give at least 5s"):
        measure_patches(budget_seconds=1.0)
