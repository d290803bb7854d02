"""Evaluation and prediction ask of a model no more than the ``Classifier`` protocol."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from allmlp.classifier import Classifier, evaluation_mode
from allmlp.data.dataset import ImageDataset
from allmlp.data.stores import ArrayStore
from allmlp.errors import UserError
from allmlp.evaluation.classification import classify
from allmlp.factory import create
from allmlp.inference.images import find_images
from allmlp.inference.predict import Prediction, check_classifier, predict_stream
from allmlp.metadata import Metadata, Preprocessing

CLASSES = ("red", "green", "blue")
CPU = torch.device("cpu")


class BrightestChannel:
    """A classifier in NumPy with nothing but what the protocol names. The logits are the means of the channels."""

    __slots__ = ("image_size", "in_channels", "metadata", "num_classes", "scale")

    def __init__(self, scale: float = 1.0, num_classes: int = 3) -> None:
        self.image_size, self.in_channels, self.num_classes = (4, 6), 3, num_classes
        self.metadata = Metadata(classes=CLASSES, preprocessing=Preprocessing(crop="resize", crop_ratio=1.0))
        self.scale = scale

    def features(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 4, 6)
        return torch.from_numpy(images.numpy().mean(axis=(2, 3)))

    def __call__(self, images: Tensor) -> Tensor:
        return self.scale * self.features(images)


def solid(channel: int) -> np.ndarray:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., channel] = 255
    return pixels


def test_a_classifier_that_is_no_module_is_evaluated() -> None:
    model: Classifier = BrightestChannel()
    names = tuple(map(str, range(4)))
    store = ArrayStore(np.stack([solid(0), solid(1), solid(2), solid(2)]), names)
    dataset = ImageDataset(store=store, names=names, labels=np.array([0, 1, 2, 0]), classes=CLASSES)
    result = classify(model, dataset, device=CPU, precision=torch.float32, batch_size=3)
    assert result.best[:, 0].tolist() == [0, 1, 2, 2]
    assert result.top1 == 3 / 4
    rest = np.log(np.exp([1, -1, -1]).sum())  # the input lies in [−1, 1]
    assert result.loss == pytest.approx((3 * (rest - 1) + (rest + 1)) / 4)


def test_a_classifier_that_is_no_module_predicts(tmp_path: Path) -> None:
    for channel, name in enumerate(CLASSES):
        Image.fromarray(solid(channel)).save(tmp_path / f"{channel}-{name}.png")
    model: Classifier = BrightestChannel()
    found = list(predict_stream(model, find_images(tmp_path), top=1, device="cpu", precision="float32"))
    assert [prediction.classes[0][0] for prediction in found] == list(CLASSES)
    assert [prediction.classes[0][1] for prediction in found] == pytest.approx([1 / (1 + 2 * np.exp(-2))] * 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            create(
                num_classes=3,
                image_size=4,
                patch_size=2,
                num_blocks=1,
                hidden_dim=4,
                tokens_mlp_dim=4,
                channels_mlp_dim=4,
            ),
            r"all zero.*mixer finetune",
        ),
        (BrightestChannel(num_classes=0), "no head"),
    ],
    ids=["zero head", "no head"],
)
def test_a_classifier_that_cannot_classify_is_refused(model: Classifier, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_classifier(model)
    with pytest.raises(UserError, match=message):
        predict_stream(model, [], device="cpu")


def test_interleaved_streams_of_one_model_predict_as_each_alone(tmp_path: Path) -> None:
    """The model is in training mode, with dropout: one stream that ends must not switch it on for the other."""
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    sizes = {"patch_size": 2, "num_blocks": 2, "hidden_dim": 8, "tokens_mlp_dim": 8, "channels_mlp_dim": 8}
    model = create(num_classes=3, image_size=4, dropout=0.5, seed=0, **sizes).train()
    with torch.no_grad():
        model.get_parameter("head.weight").normal_(generator=torch.Generator().manual_seed(0))

    def stream(count: int) -> Iterator[Prediction]:
        places = list(find_images(tmp_path))[:count]
        return predict_stream(model, places, top=3, batch_size=1, device="cpu", precision="float32")

    alone = list(stream(6))
    short, long = stream(2), stream(6)
    found = []
    for _ in range(6):
        found.append(next(long))
        next(short, None)
    assert found == alone
    assert model.training


class Recorder(nn.Module):
    """Records the mode and the device of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.zeros(1)), nn.Dropout()
        self.image_size, self.in_channels, self.num_classes, self.metadata = (4, 6), 3, 3, Metadata()

    features = nn.Module.__call__

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_a_module_is_in_evaluation_mode_within_the_block_only(training: bool) -> None:
    model = Recorder().train(training)
    with evaluation_mode(model, torch.device("meta")):
        assert not model.training
        assert not model.inner.training
        assert model.weight.device.type == "meta"
    assert model.training is training
    assert model.inner.training is training
    with pytest.raises(RuntimeError, match="broken"), evaluation_mode(model, torch.device("meta")):
        raise RuntimeError("broken")
    assert model.training is training
