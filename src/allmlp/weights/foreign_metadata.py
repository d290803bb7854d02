"""Metadata for weights that other programs saved: preprocessing, class names and origin."""

import hashlib
import logging
from dataclasses import replace
from typing import Any

from allmlp.errors import UserError, printable
from allmlp.factory import Model
from allmlp.metadata import Metadata, Preprocessing
from allmlp.weights.containers import Container
from allmlp.weights.hub import WeightsFile
from allmlp.weights.layouts import TIMM, Layout
from allmlp.weights.published import CHECKPOINTS, MIIL, MIIL_CLASSES, PublishedCheckpoint, candidates, class_names
from allmlp.zoo.families import FAMILIES
from allmlp.zoo.model import ZooModel

log = logging.getLogger(__name__)

# of ImageNet's pixels, with which convolutional networks are usually trained
STATISTICS = replace(TIMM.preprocessing, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def foreign_metadata(container: Container, file: WeightsFile, layout: Layout, model: Model) -> Metadata:
    """Metadata from the hub's config.json if there is one, else from the published checkpoint or the layout.

    Logs a warning where the preprocessing is an assumption.
    """
    name, num_classes = printable(str(container.path.name)), model.num_classes
    checkpoint = identify_checkpoint(container, file, layout)
    source: dict[str, Any] = {"file": container.path.name, "layout": layout.title, "publisher": layout.publisher}
    classes = class_names(num_classes) if layout.publisher else None
    preprocessing = layout.preprocessing
    if checkpoint:
        source["known_as"] = checkpoint.file
        if checkpoint.note:
            log.warning("%s is %s: %s", name, checkpoint.file, checkpoint.note)
    if file.config_missing:
        log.warning("%s: %s; the usual preprocessing of %s is used", name, file.config_missing, layout.title)
    if file.config:
        labels = label_names(file.config)
        classes = labels if labels and len(labels) == num_classes else classes
        preprocessing = timm_preprocessing(file.config, preprocessing, model.in_channels)
    elif layout is TIMM and (num_classes == MIIL_CLASSES or (checkpoint and "miil" in checkpoint.file)):
        preprocessing = MIIL
    elif layout is TIMM and not checkpoint and candidates(model.config, authors=False):
        log.warning(
            "%s does not say which of timm's weights it contains: pixels normalized to [−1, 1] are assumed, but MIIL's "
            "weights need [0, 1] (mixer convert --mean 0 --std 1); despite its name, goog_in21k_ft_in1k contains the "
            "authors' from-scratch ImageNet weights",
            name,
        )
    elif not layout.publisher:
        log.warning(
            "%s does not say how pixels were normalized: [−1, 1] is assumed (to change it: mixer convert --mean --std)",
            name,
        )
    return Metadata(classes=classes, preprocessing=preprocessing, provenance={"source": source})


def system_metadata(container: Container, file: WeightsFile, family: str, model: ZooModel) -> Metadata:
    """Metadata for a comparison system in timm's layout: from the hub's config.json, else assumed, with a warning."""
    source = {"file": container.path.name, "layout": TIMM.title, "publisher": "timm"}
    classes = class_names(model.num_classes)
    preprocessing = STATISTICS if family in ("nfnet", "efficientnet") else TIMM.preprocessing
    if file.config:
        labels = label_names(file.config)
        classes = labels if labels and len(labels) == model.num_classes else classes
        preprocessing = timm_preprocessing(file.config, preprocessing, model.in_channels)
    else:
        log.warning(
            "%s does not say how pixels were normalized: mean %s and std %s are assumed, as timm has for most %s (to "
            "change it: mixer convert --mean --std)",
            printable(str(container.path.name)), preprocessing.mean, preprocessing.std, FAMILIES[family].title,
        )  # fmt: skip
    return Metadata(classes=classes, preprocessing=preprocessing, provenance={"source": source})


def input_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the images in timm's config.json; None where it does not say."""
    pretrained = config.get("pretrained_cfg")
    size = pretrained.get("input_size") if isinstance(pretrained, dict) else None
    if not isinstance(size, list) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        return None
    return size[1], size[2]


def identify_checkpoint(container: Container, file: WeightsFile, layout: Layout) -> PublishedCheckpoint | None:
    """The checkpoint that timm published as this file, by its repository on the hub or its SHA-256; else None."""
    if layout is not TIMM:
        return None
    if file.source:
        return next((checkpoint for checkpoint in CHECKPOINTS if checkpoint.file == file.source["hub"]), None)
    if container.kind != "torch":  # only .pth files are named after their digest by timm
        return None
    with container.path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return next((c for c in CHECKPOINTS if c.sha256 and digest.startswith(c.sha256)), None)


def timm_preprocessing(config: dict[str, Any], default: Preprocessing, channels: int) -> Preprocessing:
    """The preprocessing in timm's config.json; fields that it lacks, or all if one is invalid, as in ``default``."""
    pretrained = config.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    keys = {"crop_pct": "crop_ratio", "interpolation": "interpolation", "mean": "mean", "std": "std"}
    fields = {ours: pretrained[theirs] for theirs, ours in keys.items() if pretrained.get(theirs) is not None}
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    crop = "resize" if pretrained.get("crop_mode") == "squash" else default.crop
    try:
        preprocessing = replace(default, crop=crop, **fields)
        if len(preprocessing.mean) not in (1, channels):
            raise UserError(f"mean = {preprocessing.mean}: the model takes {channels} channels")
        return preprocessing
    except UserError as error:
        log.warning("the preprocessing in config.json is not supported (%s) and is ignored", error)
        return default


def label_names(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The class names in timm's config.json, which fine-tuned models on the hub have; None if there are none."""
    pretrained = config.get("pretrained_cfg")
    names = config.get("label_names") or (pretrained.get("label_names") if isinstance(pretrained, dict) else None)
    if not isinstance(names, list) or len(names) != config.get("num_classes", len(names)):
        return None
    descriptions = config.get("label_descriptions")
    descriptions = descriptions if isinstance(descriptions, dict) else {}
    return tuple(str(descriptions.get(str(name), name)) for name in names)
