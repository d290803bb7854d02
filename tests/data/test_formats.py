"""One image in every format gives the model the same input in training, evaluation and prediction."""

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import allmlp
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import PADDING, evaluation_batches, training_batches
from allmlp.data.sources import load_source
from allmlp.data.stores import FolderStore, ZipStore
from allmlp.data.transforms import EvaluationTransform, TrainingTransform, normalize
from allmlp.evaluation.classification import classify
from allmlp.inference.predict import find_images, predict_stream
from allmlp.metadata import Preprocessing

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8))
# Orientation (EXIF 2.32, tag 0x0112) → how to store an upright image so that this orientation restores it
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def quarters() -> Image.Image:
    """Four colors and unequal sides: every rotation, flip and permutation of channels of it differs."""
    image = Image.new("RGB", (48, 32), RED)
    image.paste(GREEN, (24, 0, 48, 16))
    image.paste(BLUE, (0, 16, 24, 32))
    image.paste(WHITE, (24, 16, 48, 32))
    return image


def with_transparent_white(image: Image.Image) -> Image.Image:
    """The image with its white quarter made transparent black."""
    pixels = np.asarray(image.convert("RGBA")).copy()
    pixels[(pixels[..., :3] == 255).all(-1)] = 0
    return Image.fromarray(pixels)


def write_color(folder: Path) -> dict[str, int]:
    """File name → error that its encoding may cause, in levels of 255."""
    image = quarters()
    palette = image.quantize(4)
    exact = {
        "upright.png": (image, {}),
        "palette.png": (palette, {}),
        "alpha.png": (with_transparent_white(image), {}),
        "still.gif": (palette, {}),
        "lossless.webp": (image, {"lossless": True}),
        "alpha.webp": (with_transparent_white(image), {"lossless": True, "exact": True}),
        "plain.bmp": (image, {}),
        "deflated.tiff": (image, {"compression": "tiff_adobe_deflate"}),
        "animated.gif": (palette, {"save_all": True, "append_images": [NOISE, NOISE]}),
        "animated.webp": (image, {"save_all": True, "append_images": [NOISE], "lossless": True}),
        "animated.png": (image, {"save_all": True, "append_images": [NOISE]}),
    }
    for name, (stored, options) in exact.items():
        stored.save(folder / name, **options)
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.fromarray(np.ascontiguousarray(store(np.asarray(image))))
        turned.save(folder / f"turned-{orientation}.jpg", quality=95, subsampling=0, exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95, subsampling=0)
    lossy = [f"turned-{i}.jpg" for i in STORED] + ["cmyk.jpg"]
    return dict.fromkeys(exact, 0) | dict.fromkeys(lossy, 4)


def write_gray(folder: Path) -> dict[str, int]:
    steps = np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))
    steps[:10] //= 3
    Image.fromarray(steps).save(folder / "upright.png")
    Image.fromarray(np.repeat(steps[..., None], 3, -1)).save(folder / "rgb.png")
    Image.fromarray(steps.astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(steps.astype(np.uint16) * 257).save(folder / "sixteen.tiff")
    Image.fromarray(np.stack([steps, np.full_like(steps, 255)], -1), "LA").save(folder / "opaque.png")
    return dict.fromkeys(("upright.png", "rgb.png", "sixteen.png", "sixteen.tiff", "opaque.png"), 0)


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    root = tmp_path_factory.mktemp("formats")
    limits = {}
    for kind, write in (("color", write_color), ("gray", write_gray)):
        (root / kind).mkdir()
        limits |= {f"{kind}/{name}": limit for name, limit in write(root / kind).items()}
    return root, limits


VIEWS = [
    Preprocessing(),
    Preprocessing(crop="resize", crop_ratio=1.0, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4)),
]


@pytest.fixture(scope="module", params=VIEWS, ids=["resmall", "resize"])
def paths(request, formats) -> dict[str, dict[str, Tensor]]:
    """Code path → file → input of the model, (3, 16, 24)."""
    root, limits = formats
    dataset = load_source(str(root), val_fraction=0, test_fraction=0).split("train")
    assert set(dataset.names) == set(limits)
    model = allmlp.create(
        num_classes=2,
        image_size=(16, 24),
        patch_size=8,
        num_blocks=1,
        hidden_dim=4,
        tokens_mlp_dim=2,
        channels_mlp_dim=4,
    )
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    model.metadata = allmlp.model.Metadata(classes=dataset.classes, preprocessing=request.param)
    seen_by = {"image_size": model.image_size, "preprocessing": request.param}
    view = TrainingTransform(**seen_by, crop="none", crop_padding=0, flip=False)
    training = training_batches(dataset, view, batch_size=len(dataset), steps=1, seed=5)
    evaluation = evaluation_batches(dataset, EvaluationTransform(**seen_by), batch_size=7)
    cpu = torch.device("cpu")
    classified = record_inputs(
        model, lambda: classify(model, dataset, device=cpu, precision=torch.float32, batch_size=5)
    )
    options = {"batch_size": 4, "device": "cpu", "precision": "float32"}
    predictions = []
    predicted = record_inputs(model, lambda: predictions.extend(predict_stream(model, find_images(root), **options)))
    assert all(prediction.problem is None for prediction in predictions)
    shown = [Path(prediction.image).relative_to(root).as_posix() for prediction in predictions]
    return {
        "training": dict(by_name(dataset, training, request.param)),
        "evaluation": dict(by_name(dataset, evaluation, request.param)),
        "classify": dict(zip(dataset.names, classified, strict=True)),
        "predict": dict(zip(shown, predicted, strict=True)),
    }


def record_inputs(model, work) -> Tensor:
    """The inputs of the model while ``work`` runs."""
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    work()
    hook.remove()
    return torch.cat(seen)


def by_name(dataset: ImageDataset, batches, preprocessing: Preprocessing) -> Iterator[tuple[str, Tensor]]:
    for batch in batches:
        assert torch.equal(batch.valid, batch.indices != PADDING)
        images = normalize(batch.images[batch.valid], preprocessing)
        yield from zip((dataset.names[i] for i in batch.indices[batch.valid].tolist()), images, strict=True)


def test_each_file_is_the_same_on_every_path(paths, formats) -> None:
    for way in ("evaluation", "classify", "predict"):
        assert paths[way].keys() == paths["training"].keys() == formats[1].keys()
        for name, expected in paths["training"].items():
            assert torch.equal(paths[way][name], expected), f"{name} differs in {way} from training"


@pytest.mark.parametrize("way", ["training", "evaluation", "classify", "predict"])
def test_every_format_gives_the_same_image(paths, formats, way: str) -> None:
    for name, limit in formats[1].items():
        upright = paths[way][f"{name.split('/')[0]}/upright.png"]
        level = 1 / 255 / 0.2 if upright[0].max() > 1.1 else 2 / 255  # for the smallest std, for std 0.5
        assert paths[way][name].shape == (3, 16, 24)
        difference = (paths[way][name] - upright).abs().max().item()
        assert difference <= limit * level * 1.001, f"{name} in {way}: {difference / level:.1f} levels off"


def test_the_upright_image_is_upright(paths) -> None:
    image = paths["predict"]["color/upright.png"]
    corners = [image[:, y, x].tolist() for y, x in ((1, 1), (1, -2), (-2, 1), (-2, -2))]
    highest, lowest = image.amax((1, 2)).tolist(), image.amin((1, 2)).tolist()
    expected = [
        [h if c else low for c, h, low in zip(color, highest, lowest, strict=True)]
        for color in (RED, GREEN, BLUE, WHITE)
    ]
    assert corners == expected
    assert all(h > low + 1.9 for h, low in zip(highest, lowest, strict=True))


def test_a_large_photograph_is_decoded_at_a_smaller_scale() -> None:
    """In training and evaluation; the result is close to that of decoding at full size."""
    from allmlp.data.decode import decode
    from allmlp.data.transforms import EvaluationTransform, TrainingTransform

    across, down = np.meshgrid(np.linspace(0, 255, 1600), np.linspace(0, 255, 1200))
    pixels = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=95)
    view = EvaluationTransform(image_size=(64, 64), preprocessing=Preprocessing())
    plain = TrainingTransform(
        image_size=(64, 64), preprocessing=Preprocessing(), crop="none", crop_padding=0, flip=False
    )
    assert plain.min_side == view.min_side == 2 * round(64 / (224 / 256))
    small, full = decode(stream.getvalue(), "photo", min_side=view.min_side), decode(stream.getvalue(), "photo")
    assert full.size == (1600, 1200)
    assert small.size == (200, 150)
    assert (view(small).int() - view(full).int()).abs().max() <= 3
    inception = TrainingTransform(
        image_size=(64, 64), preprocessing=Preprocessing(), crop="inception", crop_padding=0, flip=False
    )
    assert min(decode(stream.getvalue(), "photo", min_side=inception.min_side).size) >= 64 / 0.05**0.5


def test_a_large_photograph_is_the_same_from_a_folder_and_from_a_zip(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(tmp_path / "photo.jpg", "photo.jpg")
    stores = [FolderStore(tmp_path), ZipStore(tmp_path / "photos.zip")]
    folder, packed = (store.open("photo.jpg", 10**6, 150) for store in stores)
    assert folder.size == packed.size == (200, 150)
    assert folder.tobytes() == packed.tobytes()


def test_opening_a_pipe_with_the_name_of_an_image_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match=r"x\.png cannot be read: it is not a regular file; remove it"):
        FolderStore(tmp_path).open("x.png", 10**6)
