"""All metrics against scikit-learn and torchmetrics, on random and adversarial labels; the mean of five tasks."""

import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import classified

from allmlp.errors import UserError
from allmlp.evaluation.calibration import calibrate
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.scores import AVERAGE_OF_FIVE, average_of_five, list_scores, to_json_object


def ranked(labels: np.ndarray, logits: np.ndarray) -> Classification:
    """The result of these (N,) labels and (N, K) logits."""
    classes = [f"class {i}" for i in range(logits.shape[1])]
    result = classified(labels, logits.argmax(1), classes=classes)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    probabilities = torch.tensor(logits).softmax(1).numpy()
    object.__setattr__(result, "best", best)
    object.__setattr__(result, "probabilities", np.take_along_axis(probabilities, best, 1).astype(np.float32))
    return result


ADVERSARIAL = {
    "one image": ([3], 8),
    "one class of many": ([5] * 40, 8),
    "absent classes": ([0, 0, 7, 7, 7], 8),
    "six classes": ([0, 1, 2, 3, 4, 5] * 5, 6),
    "five classes": ([0, 1, 2, 3, 4] * 5, 5),
    "two classes": ([0, 1, 1, 1], 2),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int]:
    classes = draw(st.integers(2, 30))
    return draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=60)), classes


def check(labels: list[int], classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, logits = np.array(labels), rng.normal(size=(len(labels), classes)) * rng.choice([0.1, 1, 4])
    result, predicted = ranked(truth, logits), logits.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes without images
        assert result.top1 == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
        assert result.balanced_accuracy == pytest.approx(sklearn.metrics.balanced_accuracy_score(truth, predicted))
        if classes > 5:
            found = sklearn.metrics.top_k_accuracy_score(truth, logits, k=5, labels=range(classes))
            assert result.top5 == pytest.approx(found)
        recall = sklearn.metrics.recall_score(truth, predicted, labels=range(classes), average=None, zero_division=0)
        precision = sklearn.metrics.precision_score(
            truth, predicted, labels=range(classes), average=None, zero_division=0
        )
    assert [row.recall or 0 for row in result.per_class()] == pytest.approx(recall.tolist())
    assert [row.precision or 0 for row in result.per_class()] == pytest.approx(precision.tolist())
    matrix = np.zeros((classes, classes), dtype=int)
    for true, guessed, images in result.confusion_counts:
        matrix[true, guessed] = images
    assert np.array_equal(matrix, sklearn.metrics.confusion_matrix(truth, predicted, labels=range(classes)))
    tensor = torch.tensor(logits)
    ours, theirs = (
        result.calibration.ece,
        torchmetrics.multiclass_calibration_error(
            tensor.softmax(1), torch.tensor(truth), num_classes=classes, n_bins=15
        ),
    )
    assert ours == pytest.approx(float(theirs), abs=1e-6)
    majority = sklearn.dummy.DummyClassifier(strategy="most_frequent").fit(truth, truth)
    assert result.majority.top1 == pytest.approx(majority.score(truth, truth))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_labels(name: str) -> None:
    for seed in range(3):
        check(*ADVERSARIAL[name], seed)


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_random_labels(case: tuple[list[int], int], seed: int) -> None:
    check(*case, seed)


def test_calibration_by_hand() -> None:
    """Bins of tenths: 0.05 (wrong); 0.95 and 1.0 (one of two correct); 0.3, on the border of its bin (correct)."""
    found = calibrate(np.array([0.05, 0.95, 1.0, 0.3]), np.array([False, True, False, True]), bins=10)
    assert found.images.tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert found.confidence[9] == pytest.approx(0.975)
    assert found.accuracy[9] == 0.5
    assert np.isnan(found.accuracy[1])
    assert found.ece == pytest.approx((0.05 + 2 * 0.475 + 0.7) / 4)
    assert found.rows()[0] == {"from": 0.0, "to": 0.1, "images": 1, "confidence": 0.05, "accuracy": 0.0}
    assert len(found.rows()) == 3


def test_a_calibrated_model_has_no_error() -> None:
    assert calibrate(np.full(10, 0.7), np.arange(10) < 7).ece == pytest.approx(0)


def test_no_better_than_always_answering_animal() -> None:
    labels = [0] * 60 + [1] * 40
    names = ("animal", "plant")
    assert "no better than always answering 'animal', which scores 0.6" in str(
        classified(labels, [0] * 100, classes=names).majority.verdict
    )
    lucky = classified(labels, [0] * 98 + [1] * 2, classes=names).majority  # p = 2 / 2²
    assert "not certainly better than always answering 'animal'" in str(lucky.verdict)
    assert "p = 0.5" in str(lucky.verdict)
    good = classified(labels, [0] * 90 + [1] * 10, classes=names).majority
    assert (good.name, good.top1, good.verdict) == ("animal", 0.6, None)
    assert classified(labels, [1] * 100, classes=names).majority.verdict is not None


def test_what_json_holds() -> None:
    found = to_json_object(classified([0, 1, 2, 2], [0, 1, 2, 0]))
    assert (found["top1"], found["top5"], found["real"], found["images"]) == (0.75, None, None, 4)
    assert found["majority"]["class"] == "c"
    assert found["majority"]["top1"] == 0.5
    assert list(found["intervals"]) == ["top1", "balanced_accuracy"]
    assert sum(row["images"] for row in found["calibration"]["bins"]) == 4
    assert [score.key for score in list_scores(classified([0], [0], classes=list("abcdef")))] == [
        "top1", "top5", "balanced_accuracy",
    ]  # fmt: skip


def test_average_of_five() -> None:
    top1 = dict(zip(AVERAGE_OF_FIVE, (0.8, 0.9, 0.7, 0.6, 0.5), strict=True))
    assert average_of_five(top1) == pytest.approx(3.5 / 5)
    with pytest.raises(UserError, match="lacks pets: give all of imagenet, cifar10, cifar100, pets, flowers102"):
        average_of_five({name: value for name, value in top1.items() if name != "pets"})
    with pytest.raises(UserError, match="svhn: not among the five"):
        average_of_five(top1 | {"svhn": 0.5})
