"""A whole run: from a recipe to the folder that holds all there is to know about it."""

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from mlp_mixer.data.parts import Source
from mlp_mixer.data.sources import hold_out, load_source
from mlp_mixer.device import select_device, select_precision
from mlp_mixer.errors import UserError
from mlp_mixer.files import to_json, write_text
from mlp_mixer.model import Mixer
from mlp_mixer.training.fit import fit
from mlp_mixer.training.folder import run_folder
from mlp_mixer.training.memory import keep_freed_memory
from mlp_mixer.training.provenance import current_commit, describe_device, peak_memory, versions
from mlp_mixer.training.recipe import Recipe, check, to_json_object
from mlp_mixer.training.start import prepare
from mlp_mixer.training.watch import Progress, R
from mlp_mixer.weights.known import variant_of
from mlp_mixer.weights.own import save

log = logging.getLogger(__name__)


Evaluate = Callable[..., R]  # (model, part, *, device, precision, on_progress) -> R


@dataclass(frozen=True, kw_only=True)
class Run(Generic[R]):
    """What a finished run leaves: its folder, its summary, the model, and the evaluation of each held-out part."""

    out: Path
    recipe: Recipe
    summary: dict[str, Any]
    metrics: list[dict[str, float]]
    model: Mixer
    source: Source
    results: dict[str, R]  # "val", "test", where there are such parts


def train(recipe: Recipe, out: Path, evaluate: Evaluate[R], progress: Progress, command: str = "") -> Run[R]:
    """Trains a model, new or from weights, and writes the run's folder, all of it but the report.

    Raises:
        UserError: a mistake in the recipe or the data; a folder this call made is removed again.
        RunError: a loss that is not finite, a batch that does not fit the memory, or a full disk.
    """
    check(recipe)
    if out.exists():
        raise UserError(f"{out} exists: name another folder with --out, or remove it")
    device = select_device(recipe.run.device)
    precision = select_precision(recipe.run.precision, device)
    start = prepare(recipe)  # a mistake in the sizes is told before any data is read
    if device.type == "cpu":
        keep_freed_memory()
    source = read_source(recipe)
    model = start(source.classes).to(device)
    origin = {
        "seed": recipe.run.seed,
        "command": command,
        "commit": current_commit(),
        "versions": versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

    def examine(model: Mixer, part: str) -> R:
        def show(done: int, total: int) -> None:
            progress.update(done, total, f"evaluating on {part}")

        return evaluate(model, source.parts[part], device=device, precision=precision, on_progress=show)

    with run_folder(out):
        (out / "checkpoints").mkdir()
        write_text(out / "recipe.json", to_json(to_json_object(recipe), indent=2) + "\n")
        fitted = fit(recipe, out, source, model, device, precision, examine, progress)
        model = fitted.model
        save(model, out / "model.safetensors", **origin)
        results = {"val": fitted.val} if fitted.val else {}
        results |= {"test": examine(model, "test")} if "test" in source.parts else {}
        images = fitted.steps * recipe.optimization.global_batch_size
        bad = fitted.unreadable + [name for result in results.values() for name in result.unreadable]
        summary = {
            "model": describe_model(model),
            "started_from": recipe.model.weights,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": recipe.data.data,
            "split": source.how,
            "images": {name: len(part) for name, part in source.parts.items()},
            "left_out": source.left_out,
            "steps": fitted.steps,
            "kept_step": fitted.kept_step,
            "warmup_steps": fitted.warmup_steps,
            "epochs": images / len(source.parts["train"]),
            "images_per_second": images / fitted.step_seconds,
            "train_seconds": fitted.compile_seconds + fitted.step_seconds,
            "compile_seconds": fitted.compile_seconds,
            "peak_memory_bytes": peak_memory(device),
            "val_top1": results["val"].top1 if "val" in results else None,
            "test_top1": results["test"].top1 if "test" in results else None,
            "device": describe_device(device),
            "precision": str(precision).removeprefix("torch."),
            "compiled": fitted.compiled,
            **origin,
            "unreadable_images": len(bad),
            "unreadable": bad,
        }
        measured = {key: summary[key] for key in ("data", "split", "epochs", "val_top1", "test_top1")}
        save(model, out / "model.safetensors", **origin, **measured)
        write_text(out / "summary.json", to_json(summary, indent=2) + "\n")
    metrics = fitted.metrics
    return Run(out=out, recipe=recipe, summary=summary, metrics=metrics, model=model, source=source, results=results)


def read_source(recipe: Recipe) -> Source:
    """The recipe's data, said to the user; a UserError where a classifier cannot be trained on it."""
    data = recipe.data
    source = find_source(recipe)
    if data.holdout:
        source = hold_out(source, data.holdout, data.split_seed)
    parts = ", ".join(f"{len(part):,} {name}" for name, part in source.parts.items())
    log.info("%s: %d classes; images: %s", source.how, len(source.classes), parts)
    for ending, count in source.left_out.items():
        log.warning("%d files left out: %s", count, ending)
    source.part("train")
    if len(source.classes) < 2:
        raise UserError(f"{data.data} has one class, {', '.join(source.classes)}: a classifier needs at least two")
    require_validation(recipe, source)
    return source


def find_source(recipe: Recipe) -> Source:
    data = recipe.data
    return load_source(
        data.data,
        val_fraction=0.0 if data.holdout else data.val_fraction,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
        max_pixels=data.max_pixels,
    )


def check_validation(recipe: Recipe) -> None:
    """A UserError where the recipe goes by validation images that its data does not have."""
    if recipe.run.keep == "best" or recipe.run.patience is not None:
        require_validation(recipe, find_source(recipe))


def require_validation(recipe: Recipe, source: Source) -> None:
    chooses = {"--keep best": recipe.run.keep == "best", "--patience": recipe.run.patience is not None}
    for choice, asked in chooses.items():
        if asked and "val" not in source.parts:
            raise UserError(f"{choice} goes by validation images, and there are none: give a --val-fraction above 0")


def describe_model(model: Mixer) -> str:
    sizes, variant = model.config, variant_of(model.config)
    named = f"Mixer-{variant}" if variant else "Mixer"
    patch = "×".join(map(str, sizes["patch_size"]))
    return f"{named}: {sizes['num_blocks']} blocks, C {sizes['hidden_dim']}, patch {patch}"
