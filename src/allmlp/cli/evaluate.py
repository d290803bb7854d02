"""mixer evaluate"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from allmlp.cli.arguments import load_sized, parse
from allmlp.errors import UserError
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.evaluation.classification import Classification

DESCRIPTION = """Evaluates weights on labelled images: every image once, classes matched by name.

example: mixer evaluate runs/digits/model.safetensors --data digits

A source without parts is split as it was for training: its test part is what training never saw."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    weights: tyro.conf.Positional[str]
    """A file of ours, the authors' (.npz), timm's or lucidrains', or hf-hub:OWNER/NAME."""
    data: str
    """SOURCE: digits, cifar10, cifar100, pets, flowers102, a folder of images, or a .zip of one."""
    image_size: tuple[int, ...] = ()
    """Resize the weights to this size in pixels, one number, or height and width; by default as they are."""
    part: Literal["test", "val", "train", "all"] = "test"
    """Of the source."""
    batch_size: int = 256
    """Images that are computed together."""
    workers: int | None = None
    """Processes that load images; None: chosen by the number of images and cores."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 where the hardware has it."""
    max_pixels: int = 64_000_000
    """Larger images are refused."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> None:
    chosen = parse(Arguments, args, verb="evaluate", description=DESCRIPTION)
    from allmlp.cli.display import list_unreadable, progress_bar
    from allmlp.data.sources import load_source
    from allmlp.device import select_device, select_precision
    from allmlp.evaluation.classification import classify
    from allmlp.inference.predict import check_classifier
    from allmlp.weights.published import synset_names

    model = load_sized(chosen.weights, chosen.image_size)
    device = select_device(chosen.device)
    check_classifier(model, device)
    recipe = model.metadata.provenance.get("recipe")
    told = recipe.get("data") if isinstance(recipe, dict) else None
    trained = told if isinstance(told, dict) else {}
    split = {key: trained[key] for key in ("val_fraction", "test_fraction", "split_seed") if key in trained}
    source = load_source(chosen.data, max_pixels=chosen.max_pixels, **split)
    part, head = source.split(chosen.part), model.config["num_classes"]
    synsets = synset_names(head)
    if (
        model.metadata.classes == tuple(synsets.values()) and set(part.classes) <= synsets.keys()
    ):  # folders as n01440764
        part = dataclasses.replace(part, classes=tuple(synsets[name] for name in part.classes))
    part = part.relabelled(class_names(model.metadata.classes, head, source.classes))
    with progress_bar() as bar:
        result = classify(
            model,
            part,
            device=device,
            precision=select_precision(chosen.precision, device),
            batch_size=chosen.batch_size,
            workers=chosen.workers,
            on_progress=lambda done, total: bar.update(done, total, f"{done:,} of {total:,} images"),
        )
    if chosen.json:
        print(
            to_json(
                {
                    "weights": chosen.weights,
                    "image_size": list(model.image_size),
                    "data": source.description,
                    "part": chosen.part,
                    **describe(result),
                }
            )
        )
    else:
        show(result, f"{chosen.part} part of {source.description}")
        if chosen.part != "all" and trained.get("data") != chosen.data:
            print("(not the data these weights were trained on: --part all evaluates on every image of it)")
    if result.unreadable:
        print(list_unreadable(list(result.unreadable)), file=sys.stderr)


def class_names(known: tuple[str, ...] | None, head: int, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Of the logits: the weights' own, else the data's in their order, where there are as many."""
    if known is not None:
        return known
    if len(classes) != head:
        raise UserError(
            f"these weights do not name their {head} classes, and the data has {len(classes)}: save them with "
            "allmlp.save(model, path, classes=[…])"
        )
    print("these weights do not name their classes: matched with the data's by position", file=sys.stderr)
    return classes


def describe(result: "Classification") -> dict:
    return {
        "images": len(result.labels),
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "classes": list(result.dataset.classes),
        "per_class": [row._asdict() for row in result.per_class()],
        "confusion": result.confusion.tolist(),
        "unreadable_images": len(result.unreadable),
        "unreadable": result.unreadable,
    }


def show(result: "Classification", what: str) -> None:
    from allmlp.cli.display import show_table
    from allmlp.evaluation.report import wilson

    low, high = wilson(round(result.top1 * len(result.labels)), len(result.labels))
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.4f}"
    print(f"{len(result.labels):,} images: the {what}")
    print(f"top-1 {result.top1:.4f} (95 % interval {low:.4f} to {high:.4f}){top5}, cross-entropy {result.loss:.4f}")
    rows = [[r.name, f"{r.images:,}", fraction(r.recall), fraction(r.precision)] for r in result.per_class()]
    show_table("per class", ["class", "images", "recall", "precision"], rows)
    if len(rows) <= 20:
        names = result.dataset.classes
        matrix = [[name, *map(str, counts)] for name, counts in zip(names, result.confusion.tolist(), strict=True)]
        show_table("confusion: true class down, predicted across", ["", *names], matrix)


def fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
