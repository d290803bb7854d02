"""Few-shot accuracy of a model on the images of a source, alone or at each evaluation of a training run."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from allmlp.data.dataset import ImageDataset
from allmlp.data.transforms import check_channels
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.distributed.parallelize import full_model
from allmlp.errors import UserError
from allmlp.evaluation.features import FeatureTable, extract_features
from allmlp.evaluation.fewshot import choose
from allmlp.evaluation.ridge import fit
from allmlp.factory import Model
from allmlp.metadata import Preprocessing

Key = tuple[int, int]  # seed and shot
SHOTS, SEEDS, L2 = (1, 5, 10, 25), (0, 1, 2), 2.0**10  # of the paper's authors


@dataclass(frozen=True, kw_only=True)
class FewshotTask:
    """The images that the probes are fitted to, each once, and those that they are tested on."""

    train: ImageDataset  # only images that a probe chooses
    test: ImageDataset
    choices: dict[Key, np.ndarray]  # positions in ``train``
    small_classes: dict[int, int]  # shot → number of classes that have fewer images, where there are any

    def run(self, extract: Callable[[ImageDataset], FeatureTable], l2: float) -> "FewshotResult":
        """Fits and tests all probes. ``extract`` computes the features of a dataset."""
        train, test = extract(self.train), extract(self.test)
        row = np.full(len(self.train), -1)
        row[train.indices] = np.arange(len(train.indices))
        x, test_x = torch.from_numpy(train.features), torch.from_numpy(test.features)
        accuracy = {}
        for key, chosen in self.choices.items():
            rows = row[chosen][row[chosen] >= 0]  # without those that cannot be read
            probe = fit(x[torch.from_numpy(rows)], train.labels[rows], len(self.train.classes), l2)
            accuracy[key] = float(np.mean(probe.predict(test_x).numpy() == test.labels))
        counts = np.bincount(test.labels)
        return FewshotResult(
            accuracy=accuracy,
            train_images=len(train.labels),
            test_images=len(test.labels),
            commonest_class=self.test.classes[int(counts.argmax())],
            commonest_top1=float(counts.max() / counts.sum()),
            small_classes=self.small_classes,
            unreadable=train.unreadable | test.unreadable,
        )


def make_task(train: ImageDataset, test: ImageDataset, shots: Sequence[int], seeds: Sequence[int]) -> FewshotTask:
    """The task on two splits with the same classes; ``shots`` and ``seeds`` as for ``fewshot.probe``."""
    if not len(train) or not len(test):
        raise UserError(f"{len(train)} training and {len(test)} test images: a probe needs at least one of each")
    choices = choose(train.labels, len(train.classes), shots, seeds)
    needed = np.unique(np.concatenate(list(choices.values())))
    images = np.bincount(train.labels, minlength=len(train.classes))
    small = {shot: int((images < shot).sum()) for shot in shots if (images < shot).any()}
    return FewshotTask(
        train=train.subset(needed),
        test=test,
        choices={key: np.searchsorted(needed, chosen) for key, chosen in choices.items()},
        small_classes=small,
    )


@dataclass(frozen=True, kw_only=True)
class FewshotResult:
    """The accuracy of each probe on all readable test images."""

    accuracy: dict[Key, float]  # by (seed, shot)
    train_images: int
    test_images: int
    commonest_class: str
    commonest_top1: float  # of always answering it
    small_classes: dict[int, int]
    unreadable: dict[str, str]

    @property
    def shots(self) -> list[int]:
        return list(dict.fromkeys(shot for _, shot in self.accuracy))

    def of_shot(self, shot: int) -> list[float]:
        """The accuracies with this number of images per class, in the order of the seeds."""
        return [value for (_, own), value in self.accuracy.items() if own == shot]

    def mean(self, shot: int) -> float:
        return statistics.fmean(self.of_shot(shot))

    def std(self, shot: int) -> float | None:
        """Standard deviation over the seeds (of a sample, n − 1); None for a single seed."""
        values = self.of_shot(shot)
        return statistics.stdev(values) if len(values) > 1 else None

    def to_json_object(self) -> dict[str, Any]:
        by_shot = {
            str(shot): {
                "mean": self.mean(shot),
                "std": self.std(shot),
                "seeds": {str(seed): value for (seed, own), value in self.accuracy.items() if own == shot},
            }
            for shot in self.shots
        }
        return {
            "top1": by_shot,
            "train_images": self.train_images,
            "test_images": self.test_images,
            "commonest_class": {"class": self.commonest_class, "top1": self.commonest_top1},
            "classes_with_fewer_images": {str(shot): count for shot, count in self.small_classes.items()},
            "unreadable_images": len(self.unreadable),
            "unreadable": self.unreadable,
        }


class FewshotEvaluator:
    """Probes the features of models in training ("linear 5-shot top-1 as a proxy", Section 3.3).

    Args:
        name: of the source, for the metric's name.
        task: the images.
        shot: images per class.
        l2: strength of the regularization.
        device, precision, workers, context, on_batch: as for ``SplitEvaluator``.
    """

    def __init__(
        self,
        name: str,
        task: FewshotTask,
        shot: int,
        l2: float,
        *,
        device: torch.device,
        precision: torch.dtype,
        workers: int | None = None,
        context: DistributedContext = SINGLE_PROCESS,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.name, self.task, self.shot, self.l2 = f"fewshot_{name}_{shot}shot", task, shot, l2
        self.options: dict[str, Any] = {
            "device": device, "precision": precision, "workers": workers, "context": context, "on_progress": on_batch,
        }  # fmt: skip
        self.result: FewshotResult | None = None  # of the last evaluation

    def __call__(self, model: Model) -> dict[str, float]:
        """The mean accuracy over the seeds, as ``fewshot_{name}_{shot}shot``."""
        model = full_model(model)  # a sharded one is gathered by its forward pass only
        check_channels(model.in_channels)
        preprocessing = probe_preprocessing(model.metadata.preprocessing)
        self.result = self.task.run(
            lambda images: extract_features(model, images, preprocessing=preprocessing, **self.options), self.l2
        )
        return {self.name: self.result.mean(self.shot)}


def probe_preprocessing(preprocessing: Preprocessing) -> Preprocessing:
    """As a model's own, with both sides resized ("resize-crop")."""
    return dataclasses.replace(preprocessing, crop="resize")
