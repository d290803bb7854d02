"""The few-shot probe by hand, against least squares in float64, and its choice of images."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.errors import UserError
from allmlp.evaluation import ridge as ridge_module
from allmlp.evaluation.fewshot import probe, shuffled_by_class
from allmlp.evaluation.ridge import Probe, fit, ridge, with_bias


def test_ridge_by_hand() -> None:
    """x = (1, 2)ᵀ, targets (1, −1): w = (x·t) / (x·x + 5) = −1 / 10, in either space."""
    column = torch.tensor([[1.0], [2.0]])
    assert ridge(column, torch.tensor([[1.0], [-1.0]]), 5.0).item() == pytest.approx(-0.1)
    # one image with features (1, 2), target 3: W = xᵀ · 3 / (5 + 5)
    assert ridge(column.mT, torch.tensor([[3.0]]), 5.0).flatten().tolist() == pytest.approx([0.3, 0.6])


def test_a_probe_by_hand() -> None:
    """Features −1 and 3 of two classes become −1 and 1 (mean 1, std 2). With the bias column the Gram matrix is
    diag(2, 20000), so that W = ((−2, 2) / (2 + λ), 0), and the border between the classes is the mean, 1."""
    x, y = torch.tensor([[-1.0], [3.0]]), np.array([0, 1])
    assert fit(x, y, 2, 1024.0).predict(torch.tensor([[-9.0], [0.99], [1.01], [9.0]])).tolist() == [0, 0, 1, 1]


def test_a_class_without_images_has_targets_of_minus_1() -> None:
    """By hand: such a column has no slope, and the bias −20000 / (20000 + λ); those of the two classes have none."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge_module, "ridge", lambda x, targets, l2: seen.append(targets) or ridge(x, targets, l2))
        fit(torch.tensor([[-1.0], [3.0]]), np.array([0, 1]), 3, 1024.0)
    assert seen[0].tolist() == [[1, -1, -1], [-1, 1, -1]]
    weights = ridge(with_bias(torch.tensor([[-1.0], [1.0]], dtype=torch.float64)), seen[0], 1024.0)
    assert (weights[1] * 100).tolist() == pytest.approx([0, 0, -20000 / 21024], abs=1e-6)


def least_squares(x: np.ndarray, y: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """The probe's (C + 1, K) coefficients as ordinary least squares: √λ I under the features, zeros under the targets.

    Independent of ours: numpy in float64, by a singular value decomposition.
    """
    mean, std = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
    x = np.hstack([(x - mean) / std, np.full((len(x), 1), 100.0)])
    targets = np.where(np.arange(classes) == y[:, None], 1.0, -1.0)
    rows = np.vstack([x, np.sqrt(l2) * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.vstack([targets, np.zeros((x.shape[1], classes))]), rcond=None)[0]


def scores_in_float64(x: np.ndarray, y: np.ndarray, test: np.ndarray, classes: int, l2: float) -> np.ndarray:
    mean, std = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
    return np.hstack([(test - mean) / std, np.full((len(test), 1), 100.0)]) @ least_squares(x, y, classes, l2)


@pytest.mark.parametrize(("images", "channels", "classes"), [(60, 768, 10), (900, 64, 10), (65, 64, 3), (64, 64, 3)])
@pytest.mark.parametrize(("dtype", "within"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_coefficients(images: int, channels: int, classes: int, dtype: type, within: float) -> None:
    """In sample space and in feature space, with unequal classes, one of them empty, and a constant feature."""
    rng = np.random.default_rng(images)
    y = rng.choice(classes - 1, images, p=(weights := np.arange(1.0, classes)) / weights.sum())
    x = (rng.normal(size=(images, channels)) * rng.uniform(0.01, 30, channels) + 5 * rng.normal(size=channels)).astype(
        dtype
    )
    x[:, 3] = 2.3
    exact = least_squares(x.astype(np.float64), y, classes, 2.0**10)
    ours = fit(torch.from_numpy(x), y, classes, 2.0**10).weights.numpy()
    assert np.abs(ours - exact).max() <= within * np.abs(exact).max()
    assert np.linalg.norm(ours - exact) <= within * np.linalg.norm(exact)
    assert np.abs(ours[3]).max() < 1e-9  # a constant feature says nothing
    assert np.ptp(ours[:-1, -1]) < 1e-9  # of the empty class, only the bias does
    assert ours[-1, -1] < 0


@given(st.integers(0, 99), st.integers(2, 5), st.integers(1, 40), st.sampled_from([1, 3, 8]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_it_is_least_squares_on_the_chosen_images(seed: int, classes: int, channels: int, shot: int) -> None:
    rng = np.random.default_rng(seed)
    y, test_y = rng.integers(0, classes, 60), rng.integers(0, classes, 200)
    means = rng.normal(size=(classes, channels))
    x, test_x = (3 + means[labels] + rng.normal(size=(len(labels), channels)) for labels in (y, test_y))
    x, test_x = x.astype(np.float32), test_x.astype(np.float32)
    draw, chosen = np.random.default_rng(seed), []
    for label in range(classes):
        chosen += draw.permutation(np.flatnonzero(y == label))[:shot].tolist()
    scores = scores_in_float64(x[chosen].astype(float), y[chosen], test_x.astype(float), classes, 2.0**10)
    best = np.sort(scores, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-4
    found = fit(torch.tensor(x[chosen]), y[chosen], classes, 2**10).predict(torch.tensor(test_x)).numpy()
    assert (found == scores.argmax(1))[clear].all()
    assert probe(x, y, torch.tensor(test_x), test_y, classes, [shot], [seed]) == {
        (seed, shot): pytest.approx((found == test_y).mean())
    }


def test_many_images_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 4)
    whole = Probe(torch.zeros(4).double(), torch.ones(4).double(), torch.randn(5, 3).double()).predict
    expected = whole(x)
    monkeypatch.setattr(ridge_module, "MAX_ROWS", 7)
    assert torch.equal(whole(x), expected)


def test_shots_are_nested_and_a_class_gives_what_it_has() -> None:
    labels = np.array([0, 3, 0, 3, 3, 0, 1])
    order = shuffled_by_class(labels, 4, seed=5)
    assert [sorted(positions.tolist()) for positions in order] == [[0, 2, 5], [6], [], [1, 3, 4]]
    rng = np.random.default_rng(5)
    assert [rng.permutation(np.array(p)).tolist() for p in ([0, 2, 5], [6], [], [1, 3, 4])] == [
        positions.tolist() for positions in order
    ]
    x = np.random.default_rng(0).normal(size=(7, 6))
    found = probe(x, labels, x, labels, 4)
    assert list(found) == [(seed, shot) for seed in (0, 1, 2) for shot in (1, 5, 10, 25)]
    assert found[0, 5] == found[0, 25] == found[2, 25]  # all images, whatever the seed


GOOD: dict[str, Any] = {
    "train_features": torch.zeros(4, 2), "train_labels": [0, 1, 0, 1],
    "test_features": torch.zeros(1, 2), "test_labels": [0], "num_classes": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_features": torch.zeros(4)}, r"train_features of shape \(4,\).*\(N, C\)"),
        ({"train_labels": [0, 1]}, r"\(4, 2\).*\(2,\)"),
        ({"test_features": torch.zeros(1, 3)}, "2 channels, test_features 3"),
        ({"test_features": torch.zeros(0, 2), "test_labels": []}, "test_features hold no image"),
        ({"test_features": torch.full((1, 2), torch.nan)}, "test_features of image 0 are not finite"),
        ({"train_labels": [0, 1, 0, 2]}, "train_labels from 0 to 2.*0 to 1"),
        ({"train_labels": [0.0, 1.0, 0.0, 1.0]}, "type float64"),
        ({"train_features": None}, "train_features None.*array"),
        ({"shots": [0]}, "shots = 0.*at least 1"),
        ({"shots": 5}, "shots = 5.*list"),
        ({"seeds": [-1]}, "seeds = -1.*at least 0"),
        ({"num_classes": "5"}, "num_classes = '5'"),
        ({"l2": 0}, "l2 = 0"),
        ({"l2": True}, "l2 = True"),
    ],
)
def test_bad_input(change: dict[str, Any], said: str) -> None:
    probe(**GOOD)
    with pytest.raises(UserError, match=said):
        probe(**GOOD | change)
