"""The few-shot probe by hand, against least squares in float64, and its choice of images."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.errors import UserError
from allmlp.evaluation import fewshot
from allmlp.evaluation.fewshot import predict, probe, ridge, shuffled_by_class, with_bias


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
    assert predict(x, y, torch.tensor([[-9.0], [0.99], [1.01], [9.0]]), 2, 1024.0).tolist() == [0, 0, 1, 1]


def test_a_class_without_images_has_targets_of_minus_1() -> None:
    """By hand: such a column has no slope, and the bias −20000 / (20000 + λ); those of the two classes have none."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewshot, "ridge", lambda x, targets, l2: seen.append(targets) or ridge(x, targets, l2))
        predict(torch.tensor([[-1.0], [3.0]]), np.array([0, 1]), torch.tensor([[0.0]]), 3, 1024.0)
    assert seen[0].tolist() == [[1, -1, -1], [-1, 1, -1]]
    weights = ridge(with_bias(torch.tensor([[-1.0], [1.0]])), seen[0], 1024.0)
    assert (weights[1] * 100).tolist() == pytest.approx([0, 0, -20000 / 21024], abs=1e-6)


def scores_in_float64(x: np.ndarray, y: np.ndarray, test: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """The same probe as an ordinary least-squares problem: √λ I under the features, zeros under the targets."""
    mean, std = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
    x, test = (np.hstack([(a - mean) / std, np.full((len(a), 1), 100.0)]) for a in (x, test))
    targets = np.where(np.arange(classes) == y[:, None], 1.0, -1.0)
    rows = np.vstack([x, np.sqrt(l2) * np.eye(x.shape[1])])
    solution = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((x.shape[1], classes))]), rcond=None)[0]
    return test @ solution


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
    found = predict(torch.tensor(x[chosen]), y[chosen], torch.tensor(test_x), classes, 2**10).numpy()
    assert (found == scores.argmax(1))[clear].all()
    assert probe(x, y, torch.tensor(test_x), test_y, classes, [shot], [seed]) == {
        (seed, shot): pytest.approx((found == test_y).mean())
    }


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
    ],
)
def test_bad_input(change: dict[str, Any], said: str) -> None:
    probe(**GOOD)
    with pytest.raises(UserError, match=said):
        probe(**GOOD | change)
