"""Figure 2 (right) at a size for a laptop: accuracy against the number of images that a model is pre-trained on.

The paper pre-trains on 3, 10, 30 and 100 % of JFT-300M, all for the same number of steps, keeps the weights with the
best accuracy on JFT's validation images, and probes their features with five images of each of ImageNet's classes
(Section 3.3). Here the first half of a data set's classes takes JFT's place, and the other half ImageNet's.
"""

import io
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.api.fewshot import fewshot
from allmlp.api.finetune import finetune
from allmlp.api.train import train
from allmlp.config.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.sources import load_source
from allmlp.data.split import stratified_split
from allmlp.device import Precision
from allmlp.errors import Stopped, UserError
from allmlp.factory import build_meta
from allmlp.files import atomic_write, to_json, write_text
from allmlp.flops import cost

log = logging.getLogger(__name__)

PERCENT = (3, 10, 30, 100)
SHOT, VAL_FRACTION = 5, 0.1
RESULT, EXPERIMENT = "figure2-right.json", "experiment.json"

# about 5 million multiply-accumulates per image of 32 × 32 pixels, and at most 0.3 million parameters
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "Mixer": {
        "patch_size": 8, "num_blocks": 4, "hidden_dim": 128, "tokens_mlp_dim": 64, "channels_mlp_dim": 224,
    },
    "ViT": {
        "model": "vit", "patch_size": 8, "num_blocks": 4, "hidden_dim": 96, "num_heads": 3, "channels_mlp_dim": 160,
    },
    "ResNet": {"model": "bit", "depths": (1, 1, 1, 1), "width": 0.1, "stem": "small"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSizeSettings:
    """How each model is pre-trained and fine-tuned."""

    percent: tuple[int, ...] = PERCENT
    epochs: float = 6  # over all of the images; models with fewer images train for as many steps
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    evaluations: int = 20  # of the validation images, of which the best decides what weights are kept
    finetune_steps: int = 300
    finetune_rate: float = 0.03
    image_size: int = 32
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"


def run_data_size(
    source: str,
    out: Path,
    models: Sequence[str] = tuple(SMALL_MODELS),
    settings: DataSizeSettings = DataSizeSettings(),
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Pre-trains each model on each part of the images, and tests the features on the other classes.

    The data sets, as zip files, and the runs lie in ``out``. What is complete there is not repeated, and an interrupted
    run is resumed.

    Args:
        source: SOURCE with at least four classes, and with test images.
        out: the folder of the experiment.
        models: names in ``SMALL_MODELS``.
        settings: how they are trained.
        on_row: receives the result of each run.
        progress: show progress bars; None: in a terminal.

    Returns:
        The content of ``out/figure2-right.json``: "rows", one for each model and part, and the settings.

    Raises:
        UserError: unknown models, or a source with too few classes or images.
        Stopped: by a signal, after a checkpoint.
    """
    if unknown := [name for name in models if name not in SMALL_MODELS]:
        raise UserError(f"--models {unknown[0]}: this experiment has {', '.join(SMALL_MODELS)}")
    out.mkdir(parents=True, exist_ok=True)
    claim(out, {"source": source, "settings": vars(settings)})
    sets = write_sets(source, out / "data", settings)
    steps = max(round(settings.epochs * sets["images"] / settings.batch_size), settings.evaluations)
    rows = []
    result: dict[str, Any] = {}
    for percent in settings.percent:
        for model in models:
            try:
                row = run_one(model, percent, steps, sets, out, settings, progress)
            except Stopped as stop:
                raise Stopped(f"stopped by a signal: repeat the same command to resume in {out}", stop.status) from None
            rows.append(row)
            on_row(row)
            result = {
                "source": source,
                "classes": sets["classes"],
                "steps": steps,
                "settings": vars(settings),
                "models": {name: SMALL_MODELS[name] for name in models},
                "rows": rows,
            }
            write_text(out / RESULT, to_json(result, indent=2) + "\n")
    return result


def claim(out: Path, experiment: dict[str, Any]) -> None:
    """Writes down which experiment the folder holds; raises a UserError if it holds another one."""
    path, text = out / EXPERIMENT, to_json(experiment, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{out} holds this experiment with another source or other settings: name another --out")
    write_text(path, text)


def run_one(
    model: str,
    percent: int,
    steps: int,
    sets: Mapping[str, Any],
    out: Path,
    settings: DataSizeSettings,
    progress: bool | None,
) -> dict[str, Any]:
    """One model, pre-trained on a part of the images, then probed and fine-tuned on the other classes."""
    name = f"{model}-{percent}".lower()
    recipe = pretraining(model, sets["upstream"][percent], steps, settings)
    run = train(recipe, out=out / name, resume=True, progress=progress)
    where: dict[str, Any] = {"device": settings.device, "precision": settings.precision}
    probe = fewshot(run.model, sets["downstream"], shots=[SHOT], progress=progress, **where)
    tuned = finetune(
        out / name / "model.safetensors",
        sets["downstream"],
        out=out / f"{name}-tuned",
        progress=progress,
        learning_rate=settings.finetune_rate,
        steps=settings.finetune_steps,
        global_batch_size=settings.batch_size,
        train_crop="pad",
        seed=settings.seed,
        **where,
    )
    summary = run.summary
    return {
        "model": model,
        "percent": percent,
        "images": summary["images"]["train"],
        "epochs": summary["epochs"],
        "steps": summary["steps"],
        "kept_step": summary["kept_step"],
        "parameters": summary["parameters"],
        "macs": cost(build_meta(run.model.config)).macs,
        "pretraining_val_top1": summary["val_top1"],
        "pretraining_test_top1": summary["test_top1"],
        "fewshot_top1": probe.mean(SHOT),
        "finetuned_top1": tuned.summary["test_top1"],
        "commonest_class_top1": tuned.summary["test_majority"],
        "seconds": summary["train_seconds"] + tuned.summary["train_seconds"],
        "images_per_second": summary["images_per_second"],
        "seed": settings.seed,
    }


def pretraining(model: str, data: str, steps: int, settings: DataSizeSettings) -> Recipe:
    return Recipe(
        name="data-size",
        model=ModelRecipe(image_size=settings.image_size, **SMALL_MODELS[model]),
        data=DataRecipe(data=data, crop_ratio=1.0, train_crop="pad", crop_padding=settings.image_size // 8),
        optimization=OptimizationRecipe(
            steps=steps,
            global_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_steps=steps // 10,
            decay="linear",
        ),
        run=RunRecipe(
            seed=settings.seed,
            evaluate_every_steps=max(steps // settings.evaluations, 1),
            keep="best",
            precision=settings.precision,
            device=settings.device,
            log_every_steps=50,
        ),
    )


# Data sets


def write_sets(source: str, folder: Path, settings: DataSizeSettings) -> dict[str, Any]:
    """The zip files: upstream, of each percentage, with the same val and test images; and downstream.

    The smaller training sets are parts of the larger ones, with all classes as often as in the whole, at least one
    image each.
    """
    data = load_source(source, val_fraction=0.0)
    if "test" not in data.splits or len(data.classes) < 4:
        raise UserError(f"{source}: the experiment needs at least 4 classes, and test images: name another source")
    half = len(data.classes) // 2
    upstream, downstream = range(half), range(half, len(data.classes))
    train, test = data.split("train"), data.split("test")
    mine = of_classes(train, upstream)
    kept, held_out = stratified_split(mine.labels, mine.names, VAL_FRACTION, settings.seed)
    learned, val = mine.subset(kept), mine.subset(held_out)
    folder.mkdir(parents=True, exist_ok=True)
    order = nested_order(learned.labels, settings.seed)
    zips: dict[int, str] = {}
    for percent in settings.percent:
        chosen = np.sort(order[: max(round(len(order) * percent / 100), half)])
        parts = {"train": learned.subset(chosen), "val": val, "test": of_classes(test, upstream)}
        zips[percent] = str(write_zip(folder / f"upstream-{percent}.zip", parts))
    parts = {"train": of_classes(train, downstream), "test": of_classes(test, downstream)}
    return {
        "upstream": zips,
        "downstream": str(write_zip(folder / "downstream.zip", parts)),
        "images": len(learned),
        "classes": {
            "upstream": [data.classes[i] for i in upstream],
            "downstream": [data.classes[i] for i in downstream],
        },
    }


def nested_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """An order of the images in which any first part has all classes about as often as the whole."""
    rng = np.random.default_rng(seed)
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(rank, kind="stable")


def of_classes(dataset: ImageDataset, classes: range) -> ImageDataset:
    """The images of these classes."""
    return dataset.subset(np.flatnonzero(np.isin(dataset.labels, classes)))


def write_zip(path: Path, parts: Mapping[str, ImageDataset]) -> Path:
    """Writes the parts as folders of PNG images, one for each class; a file that is there is complete, and stays."""
    if path.exists():
        return path
    log.info("writing %s", path)
    with atomic_write(path) as draft, zipfile.ZipFile(draft, "w") as archive:
        for part, dataset in parts.items():
            for i, label in enumerate(dataset.labels.tolist()):
                encoded = io.BytesIO()
                try:
                    dataset.read(i).save(encoded, "png")
                except UnreadableImage as error:
                    log.warning("left out of %s: %s (%s)", path.name, dataset.names[i], error)
                    continue
                # a fixed date, so that the same images give the same file
                entry = zipfile.ZipInfo(f"{part}/{dataset.classes[label]}/{i:06}.png", (2021, 5, 4, 0, 0, 0))
                archive.writestr(entry, encoded.getvalue())
    return path
