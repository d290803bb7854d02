"""Models measured side by side: what ``mixer bench`` does."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from allmlp.api.progress import progress_bar
from allmlp.data.loader import Batch
from allmlp.device import Precision, select_device, select_precision
from allmlp.errors import UserError
from allmlp.factory import Model, build_meta, create
from allmlp.metadata import Preprocessing
from allmlp.runs.provenance import current_commit, describe_device, versions
from allmlp.sizes import Size
from allmlp.throughput.device_days import PRETRAININGS, device_days
from allmlp.throughput.measure import Measurement, measure
from allmlp.throughput.subject import fill_with_noise
from allmlp.training.losses import softmax
from allmlp.training.optimizer import adamw
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.step import InputPreparation, TrainingStep
from allmlp.weights.load import load
from allmlp.weights.named import NAMED
from allmlp.weights.resize import resize
from allmlp.zoo.model import require_batches


def bench(
    models: Sequence[str],
    *,
    image_size: Size | None = None,
    budget_seconds: float = 600.0,
    batch_sizes: Sequence[int] | None = None,
    train: bool = True,
    device: str = "auto",
    precision: Precision = "auto",
    progress: bool | None = None,
) -> list[Measurement]:
    """Measures models in alternating rounds (see ``throughput.measure``).

    Args:
        models: names as for ``create``, whose weights are then random, or weights as for ``load``.
        image_size: in pixels; None: that of each model.
        budget_seconds: for everything.
        batch_sizes: those of the sweep; None: 1, 2, 4, … as far as it helps.
        train: measure training steps too: softmax, AdamW, gradients clipped, no data is loaded.
        device, precision: as for ``evaluate``.
        progress: show what is measured; None: in a terminal.

    Raises:
        UserError: an unknown model (the nearest are named) or one that is given twice, a size that a model cannot take,
            or a budget too small for anything.
    """
    if not models:
        raise UserError("no models: name some, such as mixer bench B/16 ViT-B/16")
    if twice := [name for number, name in enumerate(models) if name in models[:number]]:
        raise UserError(f"{twice[0]} is given twice: name each model once")
    where = select_device(device)
    configs = {name: config_of(name, image_size) for name in models}
    with progress_bar(progress) as bar:
        return measure(
            {name: functools.partial(make_model, name, config) for name, config in configs.items()},
            configs={name: functools.partial(build_meta, config) for name, config in configs.items()},
            device=where,
            precision=select_precision(precision, where),
            budget_seconds=budget_seconds,
            batch_sizes=batch_sizes,
            make_training_step=make_training_step if train else None,
            on_progress=lambda text: bar.update(0, None, text),
        )


def is_weights(name: str) -> bool:
    """Whether this names trained weights; else a model without any."""
    endings = (".safetensors", ".npz", ".pt", ".pth", ".bin")
    return Path(name).exists() or name.startswith("hf-hub:") or Path(name).suffix in endings or name.lower() in NAMED


def config_of(name: str, image_size: Size | None) -> dict[str, Any]:
    """The configuration of a model by name or of weights, at this image size."""
    if is_weights(name):
        model = load(name)
        return (resize(model, image_size) if image_size else model).config
    with torch.device("meta"):
        return create(name, image_size=image_size).config


def make_model(name: str, config: dict[str, Any]) -> Model:
    """The model on the CPU: with its weights, or with random ones, drawn fast."""
    if is_weights(name):
        return resize(load(name), config["image_size"])
    model = build_meta(config).to_empty(device="cpu")
    fill_with_noise(model)
    return model


def make_training_step(model: Model, device: torch.device, precision: torch.dtype) -> Callable[[int], None]:
    """Takes optimizer steps on random images, as ``mixer train`` does: uint8 pixels, softmax, clipping, AdamW."""
    optimizer_step = OptimizerStep(
        adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999), 1.0, float16=precision == torch.float16
    )
    inputs = InputPreparation(device, Preprocessing(), seed=0)
    step = TrainingStep(model, inputs, softmax, optimizer_step, lambda number: 1e-4, precision)
    numbers = itertools.count(1)
    make_batch = functools.cache(functools.partial(random_batch, model))

    def take(batch_size: int) -> None:
        require_batches(model, batch_size)
        model.train()
        step(next(numbers), [make_batch(batch_size)])

    return take


def random_batch(model: Model, batch_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, model.in_channels, *model.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(max(model.num_classes, 1), (batch_size,), generator=generator)
    return Batch(images, labels, torch.ones(batch_size, dtype=torch.bool), torch.arange(batch_size), [])


def describe_bench(rows: Sequence[Measurement], device: str, precision: Precision) -> dict[str, Any]:
    """The measurements as JSON, with the machine, the versions, and the device-days of the paper's pre-trainings."""
    where = select_device(device)
    models = []
    for row in rows:
        rate = row.train_images_per_second
        days = {one.name: device_days(one, rate) for one in PRETRAININGS} if rate else None
        models.append(row.to_json_object() | {"pretraining_device_days": days})
    return {
        "device": describe_device(where),
        "precision": str(select_precision(precision, where)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "commit": current_commit(),
        "versions": versions(),
        "models": models,
    }
