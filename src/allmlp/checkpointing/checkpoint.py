"""One checkpoint: a folder that exists complete or not at all, and whose every file can be verified.

It holds the tensors (``tensors.py``); ``state.json``, everything else that resuming needs; and ``manifest.json``, the
length and SHA-256 of each file. It is written to a temporary folder, synced, and renamed. No file in it holds code.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from allmlp.checkpointing.tensors import files_of_rank, load_tensors, save_tensors, unwritable
from allmlp.distributed.context import DistributedContext
from allmlp.errors import RunError, UserError
from allmlp.files import sync, sync_folder, to_json

FORMAT = 3  # 1: by the package when it was called mlp_mixer; 1 and 2: with metadata that was pickled
STATE, MANIFEST = "state.json", "manifest.json"


class DamagedCheckpoint(RunError):
    """A checkpoint with a file that is missing, truncated or changed."""


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], context: DistributedContext
) -> None:
    """Writes a checkpoint. Collective; an existing ``folder`` is replaced.

    Raises:
        RunError: on every rank, when one of them could not write; an existing checkpoint is unchanged.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        on_all_ranks(context, lambda: clear(temporary) if context.is_rank0 else None)
        save_tensors(tensors, temporary, context)
        files = on_all_ranks(context, lambda: digests(files_of_rank(temporary, context.rank)))
        on_all_ranks(context, lambda: finish(folder, temporary, state, files) if context.is_rank0 else None)
    except BaseException:
        if context.is_rank0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear(temporary: Path) -> None:
    """Creates an empty temporary folder, in place of an old one."""
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir()  # without parents: storage that was unmounted must not be recreated on another disk


def finish(folder: Path, temporary: Path, state: dict[str, Any], files_by_rank: list[dict[str, Any]]) -> None:
    """Adds state and manifest, and renames the temporary folder to its final name."""
    write_synced(temporary / STATE, to_json(state, indent=1) + "\n")
    files = {name: digest for files in files_by_rank for name, digest in files.items()}
    files |= digests([temporary / STATE])
    write_synced(temporary / MANIFEST, manifest_text(files))
    sync_folder(temporary)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def on_all_ranks(context: DistributedContext, action: Callable[[], Any]) -> list[Any]:
    """The action's result from each rank; a RunError on all ranks when it fails on one."""
    outcome: tuple[Any, str | None] = None, None
    try:
        outcome = action(), None
    except OSError as error:
        outcome = None, str(unwritable(Path(error.filename or "the checkpoint"), error))
    outcomes: list[Any] = [outcome]
    if context.world_size > 1:
        outcomes = [None] * context.world_size
        dist.all_gather_object(outcomes, outcome, group=context.checkpoint_group)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise RunError(f"rank {rank}: {failure}" if context.world_size > 1 else failure)
    return [value for value, _ in outcomes]


def digests(paths: Iterable[Path]) -> dict[str, Any]:
    return {path.name: file_digest(path) for path in paths}


def file_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        sync(file.fileno())


def manifest_text(files: dict[str, Any]) -> str:
    """The manifest: the files, and a digest of the manifest itself."""
    return with_digest({"format": FORMAT, "files": dict(sorted(files.items()))})


def with_digest(body: dict[str, Any]) -> str:
    return to_json({**body, "sha256": hashlib.sha256(to_json(body).encode()).hexdigest()}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Each file of a checkpoint by name, with its length and SHA-256.

    Raises:
        DamagedCheckpoint: the manifest is missing, truncated or changed.
        UserError: another version wrote the checkpoint, in a format that is not read.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        stored = json.loads(text)
        found, files = stored["format"], stored["files"]
        intact = text == with_digest({key: value for key, value in stored.items() if key != "sha256"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None
    if not intact:
        raise DamagedCheckpoint(f"{path} was changed since it was written")
    if found != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {found}, and this version reads {FORMAT}: resume it with the version that "
            "wrote it, or start a new run from its weights (--weights)"
        )
    return files


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Compares each file with the manifest and returns the state.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or changed; the message names it.
        UserError: another version wrote the checkpoint, in a format that is not read.
    """
    for name, expected in read_manifest(folder).items():
        check_file(folder / name, expected)
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def check_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
    if found["bytes"] != expected["bytes"]:
        raise DamagedCheckpoint(f"{path} has {found['bytes']:,} bytes, not {expected['bytes']:,}")
    if found != expected:
        raise DamagedCheckpoint(f"{path} was changed since it was written (SHA-256 differs)")


def read_tensors(folder: Path, tensors: dict[str, Tensor], context: DistributedContext) -> None:
    """Reads a verified checkpoint into the tensors, in place, however many ranks wrote it. Collective.

    Raises:
        RunError: the checkpoint has other tensors, or one of another shape or dtype.
    """
    load_tensors(folder, list(read_manifest(folder)), tensors, context)
