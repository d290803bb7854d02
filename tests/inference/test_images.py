"""Images as users have them: one or many, on disk or in memory, for predict, features and transform."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp
from allmlp.data.decode import UnreadableImage
from allmlp.data.transforms import normalize
from allmlp.errors import UserError

PIXELS = np.full((16, 16, 3), (210, 50, 40), np.uint8)  # red
EXACT: dict[str, Any] = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module")
def model(color_weights: Path) -> allmlp.Mixer:
    return allmlp.load(color_weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(PIXELS).save(folder / "red.png")
    return folder


def kinds(folder: Path) -> dict[str, Any]:
    """The same red picture in each way that it can be given."""
    path = folder / "red.png"
    return {
        "str": str(path),
        "path": path,
        "folder": folder,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "file": io.BytesIO(path.read_bytes()),
        "PIL": Image.open(path),
        "PIL, other mode": Image.fromarray(PIXELS).convert("RGBA"),
        "array": PIXELS,
        "batch of one": PIXELS[None],
        "not contiguous": np.asfortranarray(PIXELS),
        "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
        "batch of tensors": torch.from_numpy(PIXELS).permute(2, 0, 1)[None],
    }


def test_one_image_or_many_of_every_kind(model: allmlp.Mixer, folder: Path) -> None:
    expected = allmlp.predict(model, [folder / "red.png"], **EXACT)[0].classes
    assert expected[0][0] == "red"
    for name, image in kinds(folder).items():
        (found,) = allmlp.predict(model, image, **EXACT)
        assert [label for label, _ in found.classes] == [label for label, _ in expected], name
    found = allmlp.predict(model, (image for image in kinds(folder).values()), batch_size=4, **EXACT)
    assert {prediction.classes[0][0] for prediction in found} == {"red"}
    assert [prediction.image for prediction in found[2:5]] == [str(folder / "red.png"), "image 3", "image 4"]


def test_a_batch_of_pixels_and_gray(model: allmlp.Mixer) -> None:
    batch = np.stack([PIXELS, np.full_like(PIXELS, (40, 60, 210)), np.full_like(PIXELS, (40, 190, 60))])
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), [batch[:2], batch[2]]):
        assert [found.classes[0][0] for found in allmlp.predict(model, images, **EXACT)] == ["red", "blue", "green"]
    gray = allmlp.features(model, PIXELS[..., 0], **EXACT)
    assert torch.equal(gray, allmlp.features(model, np.repeat(PIXELS[..., :1], 3, axis=2), **EXACT))


def test_a_picture_in_memory_is_turned_upright() -> None:
    sizes: dict[str, Any] = {"num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8}
    model = allmlp.create(num_classes=0, image_size=(8, 16), patch_size=8, **sizes)
    stored = np.zeros((16, 8, 3), np.uint8)
    stored[:4] = 255
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6  # to be turned by a quarter clockwise
    Image.fromarray(stored).save(file, "PNG", exif=exif)
    upright = allmlp.features(model, np.rot90(stored, -1), **EXACT)
    for image in (file.getvalue(), Image.open(file)):
        assert torch.equal(allmlp.features(model, image, **EXACT), upright)


def test_features_and_transform_are_those_of_evaluation(model: allmlp.Mixer, folder: Path) -> None:
    transform = pickle.loads(pickle.dumps(allmlp.transform(model)))
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = model.eval().features(normalize(pixels, model.metadata.preprocessing))
        for name, image in kinds(folder).items():
            assert torch.allclose(model.features(transform(image)[None]), expected, atol=1e-6), name
    found = allmlp.features(model, [*kinds(folder).values()], batch_size=5, **EXACT)
    assert (found.dtype, found.shape) == (torch.float32, (13, 16))
    assert torch.allclose(found, expected.expand(13, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (None, "NoneType"),
        (7, "int"),
        ([None], "None"),
        ([["a.png"]], "list"),
        (io.StringIO("text"), "'rb'"),
        (PIXELS.astype(np.float32), "float32"),
        (PIXELS / 255, "float64"),
        (torch.zeros(3, 16, 16), "float32"),
        (torch.zeros(16, 16, 3, dtype=torch.uint8), "(16, 16, 3)"),
        (np.zeros((16, 16, 4), np.uint8), "(16, 16, 4)"),
        (np.zeros((0, 16, 3), np.uint8), "(0, 16, 3)"),
        (np.zeros(3, np.uint8), "(3,)"),
        ("no/such.png", "no/such.png"),
    ],
)
def test_what_is_no_image_is_one_error(model: allmlp.Mixer, images: Any, names: str) -> None:
    for call in (allmlp.predict, allmlp.features):
        with pytest.raises(UserError) as error:
            call(model, images, **EXACT)
        assert names in str(error.value)
    with pytest.raises(UserError):
        allmlp.transform(model)(images)


def test_unreadable_pictures(model: allmlp.Mixer, folder: Path) -> None:
    damaged = (folder / "red.png").read_bytes()[:60]
    first, second = allmlp.predict(model, [damaged, PIXELS], **EXACT)
    assert "image 0" in (first.problem or "")
    assert second.classes[0][0] == "red"
    truncated = Image.open(io.BytesIO(damaged))
    assert "image 0" in (allmlp.predict(model, truncated, **EXACT)[0].problem or "")
    with pytest.raises(UserError, match="image 1"):
        allmlp.features(model, [PIXELS, damaged], **EXACT)
    with pytest.raises(UnreadableImage):
        allmlp.transform(model)(damaged)
    with pytest.raises(UserError, match="no images"):
        allmlp.features(model, [], **EXACT)
    with pytest.raises(UserError, match="2 images"):
        allmlp.transform(model)(np.stack([PIXELS, PIXELS]))


def test_weights_that_are_nan_are_an_error(color_weights: Path) -> None:
    model = allmlp.load(color_weights)
    with torch.no_grad():
        model.get_parameter("stem.bias")[0] = float("nan")
    for call in (allmlp.predict, allmlp.features):
        with pytest.raises(UserError, match="NaN"):
            call(model, PIXELS, **EXACT)
