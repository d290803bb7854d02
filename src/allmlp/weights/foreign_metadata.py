"""The card of weights that others made: preprocessing, class names and origin, as far as anything tells."""

import hashlib
import logging
from dataclasses import replace
from typing import Any

from allmlp.errors import UserError, printable
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.weights.containers import Container
from allmlp.weights.hub import Download
from allmlp.weights.layouts import TIMM, Layout
from allmlp.weights.published import CHECKPOINTS, MIIL, MIIL_CLASSES, Checkpoint, candidates, class_names

log = logging.getLogger(__name__)


def foreign_metadata(container: Container, origin: Download, layout: Layout, model: Mixer) -> Metadata:
    """From the hub's config.json where there is one; else what is known of the file, or of its layout, and said so."""
    what, known = printable(str(container.path.name)), identify(container, origin, layout)
    source: dict[str, Any] = {"file": container.path.name, "layout": layout.title, "publisher": layout.publisher}
    names = class_names(model.config["num_classes"]) if layout.publisher else None
    view = layout.preprocessing
    if known:
        source["known_as"] = known.file
        if known.note:
            log.warning("%s is %s: %s", what, known.file, known.note)
    if origin.config_missing:
        log.warning("%s: %s; the preprocessing usual for %s is taken", what, origin.config_missing, layout.title)
    if origin.config:
        told = label_names(origin.config)
        names = told if told and len(told) == model.config["num_classes"] else names
        view = from_timm(origin.config, view, model.config["in_channels"])
    elif layout is TIMM and (model.config["num_classes"] == MIIL_CLASSES or (known and "miil" in known.file)):
        view = MIIL
    elif layout is TIMM and not known and candidates(model.config, authors=False):
        log.warning(
            "%s does not say which of timm's weights it is: pixels are taken to be normalised to [−1, 1]; MIIL's take "
            "[0, 1] (mixer convert --mean 0 --std 1), and goog_in21k_ft_in1k is, in spite of its name, the authors' "
            "from-scratch ImageNet weights",
            what,
        )
    elif not layout.publisher:
        log.warning(
            "%s does not say how pixels were normalised: taken to be [−1, 1] (else: mixer convert --mean --std)", what
        )
    return Metadata(classes=names, preprocessing=view, provenance={"source": source})


def identify(container: Container, origin: Download, layout: Layout) -> Checkpoint | None:
    """One of timm's published files: by its id on the hub, or by its digest."""
    if layout is not TIMM:
        return None
    if origin.source:
        return next((known for known in CHECKPOINTS if known.file == origin.source["hub"]), None)
    if container.kind != "torch":  # timm named its .pth files by their digests
        return None
    with container.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return next((known for known in CHECKPOINTS if known.sha256 and digest.startswith(known.sha256)), None)


def from_timm(config: dict[str, Any], default: Preprocessing, channels: int) -> Preprocessing:
    """The preprocessing of a config.json of timm's; what it does not say as in ``default``."""
    told = config.get("pretrained_cfg")
    told = told if isinstance(told, dict) else {}
    keys = {"crop_pct": "crop_ratio", "interpolation": "interpolation", "mean": "mean", "std": "std"}
    view = {ours: told[theirs] for theirs, ours in keys.items() if told.get(theirs) is not None}
    view = {key: tuple(value) if isinstance(value, list) else value for key, value in view.items()}
    try:
        found = replace(default, crop="resize" if told.get("crop_mode") == "squash" else default.crop, **view)
        if len(found.mean) not in (1, channels):
            raise UserError(f"mean = {found.mean}: the model takes {channels} channels")
        return found
    except UserError as error:
        log.warning("config.json asks for what is not known here (%s): its preprocessing is left out", error)
        return default


def label_names(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Of a fine-tuned model on the hub, whose owner named its classes."""
    told = config.get("pretrained_cfg")
    names = config.get("label_names") or (told.get("label_names") if isinstance(told, dict) else None)
    if not isinstance(names, list) or len(names) != config.get("num_classes", len(names)):
        return None
    descriptions = config.get("label_descriptions")
    words = descriptions if isinstance(descriptions, dict) else {}
    return tuple(str(words.get(str(name), name)) for name in names)
