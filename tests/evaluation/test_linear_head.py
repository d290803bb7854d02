"""The regularized linear head against scikit-learn's own pipeline, and the classes that it has no images of."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from allmlp.errors import UserError
from allmlp.evaluation.linear_head import STRENGTHS, fit_linear_head


def samples(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(9).normal(size=(classes, 6))
    y = np.arange(count) % classes
    x = (means[y] + rng.normal(size=(count, 6))) * np.array([1, 10, 0.1, 5, 1, 1]) + np.array([0, 50, 3, 0, 0, 7])
    x[:, 5] = 2.5  # a constant feature
    return x.astype(np.float32), y


@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_scikit_learns_classifier(classes: int) -> None:
    x, y = samples(120, classes, 0)
    val_x, val_y = samples(80, classes, 1)
    head = fit_linear_head(x, y, val_x, val_y, classes)
    scores = {}
    for strength in STRENGTHS:
        theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * len(x)), max_iter=5000))
        scores[strength] = theirs.fit(x.astype(float), y).score(val_x.astype(float), val_y)
        if strength == head.strength:
            assert (head.predict(val_x) == theirs.predict(val_x)).mean() > 0.98
    assert head.tried == pytest.approx(scores, abs=0.026)  # two of 80 images, where the solvers stop early
    assert head.tried[head.strength] == max(head.tried.values())
    assert head.strength == max(s for s, score in head.tried.items() if score == max(head.tried.values()))
    assert (head.predict(val_x) == val_y).mean() == head.tried[head.strength]


def test_a_class_without_images_is_never_predicted() -> None:
    x, y = samples(60, 3, 0)
    y = np.array([0, 4, 2])[y]
    head = fit_linear_head(x, y, x, y, 6)
    assert head.weight.shape == (6, 6)
    everywhere = np.random.default_rng(0).normal(size=(2000, 6)) * 1000
    assert set(head.predict(everywhere)) <= {0, 2, 4}
    assert set(head.predict(x)) <= {0, 2, 4}  # where logits are small


def test_one_class_alone() -> None:
    x, _ = samples(10, 2, 0)
    with pytest.raises(UserError, match="all of one class"):
        fit_linear_head(x, np.zeros(10, dtype=int), x, np.zeros(10, dtype=int), 2)
