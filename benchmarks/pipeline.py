"""Training pipeline: images per second on one core, from file to augmented uint8, ours and timm's; loader overhead.

    python benchmarks/pipeline.py --cifar10 cifar10/ --photos photos/          # about five minutes

Both decode the same JPEG files and apply the same crop box, flip and two layers of RandAugment at magnitude 10. Ours
draws them from (seed, epoch, index), as in training. timm's create_transform draws the same number of parameters with
its own code, but then applies ours, so that the work on pixels is the same; "timm, given draws" does not draw any. timm
has no cutout and calls ours instead. Passes alternate. Figures are medians; ratios are medians of the ratios within a
pass. The overhead of the loader is the extra cost of batches from worker processes, compared with the same images made
in as many processes without a loader.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine, print_table, write_results
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision.transforms import functional as TF

from allmlp.data import randaugment, transforms
from allmlp.data.dataset import ImageDataset
from allmlp.data.loader import TrainingOrder, sample_generator, training_batches
from allmlp.data.randaugment import FILL_COLOR, REFERENCE_SIDE, RandAugment, apply_operation
from allmlp.data.sources import load_source
from allmlp.data.transforms import TrainingTransform
from allmlp.metadata import Preprocessing

MAGNITUDE = 10


def make_transform(size: int) -> TrainingTransform:
    return TrainingTransform(
        image_size=(size, size),
        preprocessing=Preprocessing(),
        crop="inception",
        crop_padding=0,
        flip=True,
        randaugment=RandAugment(layers=2, magnitude=MAGNITUDE),
    )


class Draws:
    """The random parameters that our transform drew for one image."""

    def __init__(self) -> None:
        self.box, self.scale, self.flip = (0, 0, 0, 0), 1.0, False
        self.operations: list[tuple[str, float, tuple[float, float]]] = []


def record(dataset: ImageDataset, transform: TrainingTransform, index: int) -> Draws:
    """Runs our transform once and records its draws."""
    draws, box_of, apply_one = Draws(), transforms.inception_box, randaugment.apply_operation

    def record_box(height: int, width: int, rng: object) -> tuple[int, int, int, int]:
        draws.box = box_of(height, width, rng)
        draws.scale = width
        return draws.box

    def record_operation(image: Image.Image, name: str, strength: float, center: tuple[float, float]) -> Image.Image:
        draws.operations.append((name, strength, center))
        return apply_one(image, name, strength, center)

    transforms.inception_box, randaugment.apply_operation = record_box, record_operation
    try:
        rng = sample_generator(0, 0, index)
        image = dataset.read(index, transform.min_side)
        probe = sample_generator(0, 0, index)
        box_of(image.height, image.width, probe)
        draws.flip = bool(probe.random() < 0.5)
        transform(image, rng)
    finally:
        transforms.inception_box, randaugment.apply_operation = box_of, apply_one
    return draws


PIXELS: dict[str, Callable] = {
    "autocontrast": lambda image, strength, **fill: auto_augment.auto_contrast(image, **fill),
    "equalize": lambda image, strength, **fill: auto_augment.equalize(image, **fill),
    "invert": lambda image, strength, **fill: auto_augment.invert(image, **fill),
    "rotate": auto_augment.rotate,
    "posterize": auto_augment.posterize,
    "solarize": auto_augment.solarize,
    "color": auto_augment.color,
    "contrast": auto_augment.contrast,
    "brightness": auto_augment.brightness,
    "sharpness": auto_augment.sharpness,
    "shear_x": auto_augment.shear_x,
    "shear_y": auto_augment.shear_y,
    "solarize_add": auto_augment.solarize_add,
}


def draw_only(operation: auto_augment.AugmentOp) -> None:
    """The random draws that timm's AugmentOp makes before it calls its pixel function."""
    if operation.prob < 1.0 and random.random() > operation.prob:
        return
    strength = max(0.0, min(10.0, operation.magnitude))
    if operation.level_fn is not None:
        operation.level_fn(strength, operation.hparams)


class TimmTransform:
    """timm's training transform, which applies recorded draws; with ``also_draws``, it also makes its own."""

    def __init__(self, size: int, also_draws: bool) -> None:
        self.transform = create_transform(
            size,
            is_training=True,
            scale=(0.05, 1.0),
            auto_augment=f"rand-m{MAGNITUDE}-n2-p1.0",
            use_prefetcher=True,
            color_jitter=0.0,
        )
        crop, self.flip, self.augment, *rest = self.transform.transforms
        assert [type(t).__name__ for t in rest] == ["MaybePILToTensor"], self.transform
        self.draws, self.size, self.also_draws, self.get_params = Draws(), size, also_draws, crop.get_params
        crop.get_params = self.box
        crop.interpolation = TF.InterpolationMode.BILINEAR
        self.transform.transforms = [crop, self.maybe_flip, self.randaugment, *rest]

    def box(self, image: Image.Image, *ranges: object) -> tuple[int, int, int, int]:
        """top, left, height, width. The box may have been drawn on an image decoded at a smaller scale."""
        if self.also_draws:
            self.get_params(image, *ranges)
        scale = image.width / self.draws.scale
        left, top, right, bottom = (round(scale * edge) for edge in self.draws.box)
        return top, left, bottom - top, right - left

    def maybe_flip(self, image: Image.Image) -> Image.Image:
        if self.also_draws:
            torch.rand(1)
        return TF.hflip(image) if self.draws.flip else image

    def randaugment(self, image: Image.Image) -> Image.Image:
        if self.also_draws:
            for operation in np.random.choice(self.augment.ops, self.augment.num_layers):  # noqa: NPY002 (timm's)
                draw_only(operation)
        fill = {"fillcolor": FILL_COLOR, "resample": Image.Resampling.NEAREST}
        for name, strength, center in self.draws.operations:
            if name == "cutout":
                image = apply_operation(image, name, strength, center)
            elif name.startswith("translate"):
                move = auto_augment.translate_x_abs if name.endswith("x") else auto_augment.translate_y_abs
                image = move(image, strength * self.size / REFERENCE_SIDE, **fill)
            else:
                image = PIXELS[name](image, strength, **fill)
        return image

    def __call__(self, path: Path, draws: Draws) -> object:
        self.draws = draws
        with path.open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def compare(folder: str, size: int, images: int, passes: int) -> dict[str, float]:
    """Images per second of both on one core; passes alternate."""
    torch.set_num_threads(1)
    dataset = load_source(folder, val_fraction=0.0, test_fraction=0.0).splits["train"]
    chosen = range(0, len(dataset), max(len(dataset) // images, 1))
    root, transform = dataset.store.root, make_transform(size)
    draws = {i: record(dataset, transform, i) for i in chosen}
    drawing, given = TimmTransform(size, also_draws=True), TimmTransform(size, also_draws=False)
    makers: dict[str, Callable[[int], object]] = {
        "ours": lambda i: transform(dataset.read(i, transform.min_side), sample_generator(0, 0, i)),
        "timm": lambda i: drawing(root / dataset.names[i], draws[i]),
        "handed": lambda i: given(root / dataset.names[i], draws[i]),
    }
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(passes):
        for name, make in makers.items():
            begin = time.perf_counter()
            for i in chosen:
                make(i)
            rates[name].append(len(chosen) / (time.perf_counter() - begin))
    found = {name: statistics.median(rate) for name, rate in rates.items()}
    for name in ("timm", "handed"):
        ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        found[f"ratio_{name}"] = statistics.median(ratios)
    return found


def bare(folder: str, size: int, keys: list[tuple[int, int]]) -> float:
    """Seconds that this process takes to make the samples of these (epoch, index), without a loader."""
    torch.set_num_threads(1)
    dataset = load_source(folder, val_fraction=0.0, test_fraction=0.0).splits["train"]
    transform = make_transform(size)
    begin = time.perf_counter()
    for epoch, i in keys:
        transform(dataset.read(i, transform.min_side), sample_generator(0, epoch, i))
    return time.perf_counter() - begin


def overhead(folder: str, size: int, batch_size: int, images: int, passes: int) -> dict[str, float]:
    """Images per second of the loader with a worker per core, and of as many processes without it, same samples."""
    dataset = load_source(folder, val_fraction=0.0, test_fraction=0.0).splits["train"]
    cores, steps = os.cpu_count() or 1, images // batch_size
    keys = [key for batch in TrainingOrder(len(dataset), batch_size, steps, seed=0) for key in batch]
    shares = [keys[i::cores] for i in range(cores)]
    rates: dict[str, list[float]] = {"loader": [], "bare": []}
    for _ in range(passes):
        loader = training_batches(
            dataset, make_transform(size), batch_size=batch_size, steps=steps, seed=0, workers=cores
        )
        batches = iter(loader)
        next(batches)  # the workers have started
        begin = time.perf_counter()
        made = sum(len(batch.labels) for batch in batches)
        rates["loader"].append(made / (time.perf_counter() - begin))
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            seconds = max(pool.map(partial(bare, folder, size), shares, chunksize=1))
        rates["bare"].append(len(keys) / seconds)
    ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    return {name: statistics.median(found) for name, found in rates.items()} | {"overhead": ratio - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True, help="CIFAR-10 as a folder of JPEG files")
    parser.add_argument("--photos", required=True, help="a folder of photographs, with one folder per class")
    parser.add_argument("--passes", type=int, default=7)
    options = parser.parse_args()
    results, rows = {"machine": machine(torch.device("cpu"))}, []
    for name, folder, size, images, batch in (
        ("cifar10", options.cifar10, 32, 5000, 128),
        ("photos", options.photos, 224, 500, 32),
    ):
        found = compare(folder, size, images, options.passes)
        loader = overhead(folder, size, batch, 20_000 if size == 32 else 2_000, 3)
        results[name] = found | loader
        rates = [f"{found[who]:,.0f}" for who in ("ours", "timm", "handed")]
        ratios = [f"{found[f'ratio_{who}']:.2f} ×" for who in ("timm", "handed")]
        rows.append([f"{name}, {size} px", *rates, *ratios, f"{loader['overhead']:.1%}"])
    write_results("pipeline", results)
    print_table(["images", "ours", "timm", "timm, given draws", "ratio", "ratio, given draws", "loader overhead"], rows)


if __name__ == "__main__":
    main()
