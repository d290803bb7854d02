"""Which rows of a table, and which weights, the words after --models name."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allmlp.errors import UserError
from allmlp.factory import name_of, resolve_name
from allmlp.reproduce.published import IMAGENET, IMAGENET21K, PublishedRow
from allmlp.variants import VARIANTS
from allmlp.weights.published import CHECKPOINTS, IN21K, SCRATCH

FILE_ENDINGS = (".safetensors", ".npz", ".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class Selection:
    rows: tuple[PublishedRow, ...]
    weights: tuple[str, ...] = ()


def select(table: str, rows: Sequence[PublishedRow], names: Sequence[str], has_data: bool) -> Selection:
    """The rows that the names select, all without names; names of no model are weights to evaluate.

    Args:
        table: its name, for messages.
        rows: of the table.
        names: what the table or ``allmlp.create`` calls a model, or WEIGHTS.
        has_data: whether there are images to evaluate weights on.

    Raises:
        UserError: a model without a row in this table, or weights without data to evaluate them on, or neither.
    """
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"--models {repeated[0]} is there twice: name it once")
    chosen, weights = [], []
    for name in names:
        system = system_named(name, rows)
        if system is not None and not is_file(name):
            chosen += rows_of(system, name, table, rows)
        elif is_file(name) or has_data:
            weights.append(name)
        else:
            raise UserError(unknown(name, table, rows))
    if weights and not has_data:
        raise UserError(f"--models {weights[0]}: weights are evaluated on images: give --data SOURCE too")
    if has_data and not weights:
        raise UserError("--data without weights: name them after --models, such as --models model.safetensors")
    kept = [row for row in rows if row in chosen] if chosen or weights else rows
    return Selection(rows=tuple(kept), weights=tuple(weights))


def is_file(name: str) -> bool:
    """Whether this can only be the name of weights."""
    return Path(name).exists() or Path(name).suffix in FILE_ENDINGS or name.startswith("hf-hub:")


def system_named(name: str, rows: Sequence[PublishedRow]) -> str | None:
    """The name that rows have for the system that the user calls so; None if there is no such system."""
    same = {row.model.lower(): row.system for row in rows}
    if name.lower() in same:
        return same[name.lower()]
    try:
        found = resolve_name(name)
    except UserError:
        return None
    return f"Mixer-{found}" if found in VARIANTS else found


def rows_of(system: str, name: str, table: str, rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    found = [row for row in rows if row.system == system]
    if not found:
        raise UserError(f"--models {name}: {table} has no row of it, but of {models_of(rows)}")
    return found


def models_of(rows: Sequence[PublishedRow]) -> str:
    return ", ".join(dict.fromkeys(row.model for row in rows))


def unknown(name: str, table: str, rows: Sequence[PublishedRow]) -> str:
    known = {row.model.lower(): row.model for row in rows}
    known |= {key.removeprefix("mixer-"): model for key, model in known.items()}
    near = [known[key] for key in difflib.get_close_matches(name.lower(), known, 4, cutoff=0.5)]
    hint = f"the nearest in {table}: {', '.join(dict.fromkeys(near))}" if near else f"{table} has {models_of(rows)}"
    return f"--models {name}: unknown model; {hint}; weights need --data SOURCE"


def row_of_weights(
    rows: Sequence[PublishedRow], config: Mapping[str, Any], provenance: Mapping[str, Any]
) -> PublishedRow | None:
    """The row that reports the accuracy of such weights: their architecture, image size and pre-training data.

    The data is known for published weights, and for those fine-tuned from them; None for all others.
    """
    size, data = config["image_size"], pretraining_data(provenance)
    if size[0] != size[1] or data is None:
        return None
    name = name_of(config)
    found = [row for row in rows if (row.system, row.image_size, row.data) == (name, size[0], data)]
    return found[0] if len(found) == 1 else None


def pretraining_data(provenance: Mapping[str, Any]) -> str | None:
    """What weights were trained on at first, as the tables call it."""
    first = provenance.get("started_from")
    source = (first if isinstance(first, dict) else provenance).get("source")
    known = source.get("known_as") if isinstance(source, dict) else None
    by_file = {checkpoint.file: checkpoint.data for checkpoint in CHECKPOINTS}
    trained = {SCRATCH: IMAGENET, IN21K: IMAGENET21K}
    return trained.get(by_file.get(known or "", ""))
