"""One image in every format gives the model the same input in training, evaluation and prediction."""

import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import allmlp
from allmlp.data.decode import UnreadableImage, decode
from allmlp.data.loader import Batch, evaluation_batches, training_batches
from allmlp.data.sources import load_source
from allmlp.data.stores import FolderStore, ZipStore
from allmlp.data.transforms import EvaluationTransform, TrainingTransform, normalize
from allmlp.evaluation.classification import classify
from allmlp.inference.images import find_images
from allmlp.inference.predict import predict_stream
from allmlp.metadata import Metadata, Preprocessing

CPU = torch.device("cpu")
VIEWS = [
    Preprocessing(),
    Preprocessing(crop="resize", crop_ratio=1.0, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4)),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture whose rotations and permutations of channels all differ, and a gray one; each in several formats."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "color").mkdir()
    (folder / "gray").mkdir()
    image = Image.new("RGB", (48, 32), "red")
    image.paste((0, 255, 0), (24, 0, 48, 16))
    image.paste((0, 0, 255), (0, 16, 24, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "color" / "upright.png")
    image.quantize(4).save(folder / "color" / "palette.gif")
    image.convert("CMYK").save(folder / "color" / "cmyk.jpg", quality=95, subsampling=0)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "color" / "turned.jpg", quality=95, subsampling=0, exif=exif)
    steps = np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))
    Image.fromarray(steps).save(folder / "gray" / "upright.png")
    Image.fromarray(steps.astype(np.uint16) * 257).save(folder / "gray" / "sixteen.tiff")
    return folder


def of_batches(names: Iterable[str], batches: Iterable[Batch], view: Preprocessing) -> Iterator[tuple[str, Tensor]]:
    names = list(names)
    for batch in batches:
        images = normalize(batch.images[batch.valid], view)
        yield from zip((names[i] for i in batch.indices[batch.valid].tolist()), images, strict=True)


@pytest.mark.parametrize("view", VIEWS, ids=["resmall", "resize"])
def test_each_file_is_the_same_on_every_path(root: Path, view: Preprocessing) -> None:
    dataset = load_source(str(root), val_fraction=0, test_fraction=0).split("train")
    sizes = {"num_blocks": 1, "hidden_dim": 4, "tokens_mlp_dim": 2, "channels_mlp_dim": 4}
    model = allmlp.create(num_classes=2, image_size=(16, 24), patch_size=8, **sizes)
    torch.nn.init.normal_(model.get_parameter("head.weight"), generator=torch.Generator().manual_seed(0))
    model.metadata = Metadata(classes=dataset.classes, preprocessing=view)
    plain = TrainingTransform(image_size=(16, 24), preprocessing=view, crop="none", crop_padding=0, flip=False)
    evaluation = EvaluationTransform(image_size=(16, 24), preprocessing=view)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    classify(model, dataset, device=CPU, precision=torch.float32, batch_size=6)
    found = list(predict_stream(model, find_images(root), batch_size=6, device="cpu", precision="float32"))
    shown = [Path(prediction.image).relative_to(root).as_posix() for prediction in found]
    expected = dict(zip(dataset.names, seen[0], strict=True))
    for path in (
        of_batches(dataset.names, training_batches(dataset, plain, batch_size=6, steps=1, seed=5), view),
        of_batches(dataset.names, evaluation_batches(dataset, evaluation, batch_size=4), view),
        zip(shown, seen[1], strict=True),
    ):
        images = dict(path)
        assert images.keys() == expected.keys()
        assert all(torch.equal(image, expected[name]) for name, image in images.items())
    for name, image in expected.items():
        upright = expected[f"{name.split('/')[0]}/upright.png"]
        level = 1 / 255 / min(view.std)
        assert (image - upright).abs().max() <= (4 * level if name.endswith("jpg") else 1e-6)
    corner = expected["color/upright.png"][:, 1, -2]
    assert corner[1] > corner[[0, 2]].max() + 1.9  # green, at the top right


def test_a_large_photograph_is_decoded_at_a_smaller_scale(tmp_path: Path) -> None:
    """From a folder and from a zip; the result is close to that of decoding at full size."""
    across, down = np.meshgrid(np.linspace(0, 255, 1600), np.linspace(0, 255, 1200))
    pixels = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=95)
    (tmp_path / "photo.jpg").write_bytes(stream.getvalue())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(tmp_path / "photo.jpg", "photo.jpg")
    options = {"image_size": (64, 64), "preprocessing": Preprocessing()}
    plain, inception = (
        TrainingTransform(**options, crop=crop, crop_padding=0, flip=False) for crop in ("none", "inception")
    )
    view = EvaluationTransform(**options)
    assert plain.min_side == view.min_side == 2 * round(64 / (224 / 256))
    full = decode(stream.getvalue(), "photo")
    assert full.size == (1600, 1200)
    for store in (FolderStore(tmp_path), ZipStore(tmp_path / "photos.zip")):
        small = store.open("photo.jpg", 10**7, view.min_side)
        assert small.size == (200, 150)
        assert (view(small).int() - view(full).int()).abs().max() <= 3
    assert min(decode(stream.getvalue(), "photo", min_side=inception.min_side).size) >= 64 / 0.05**0.5


def test_files_that_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe with the name of an image, which would block, and files of more bytes than allowed."""
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match=r"x\.png .* not a regular file; remove it"):
        FolderStore(tmp_path).open("x.png", 10**6)
    monkeypatch.setattr("allmlp.data.disk.MAX_BYTES", 3)
    (tmp_path / "y.png").write_bytes(b"1234")
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.write(tmp_path / "y.png", "y.png")
    for store in (FolderStore(tmp_path), ZipStore(tmp_path / "y.zip")):
        with pytest.raises(UnreadableImage, match=r"y\.png .* 4 bytes, above the limit of 3"):
            store.open("y.png", 10**6)
