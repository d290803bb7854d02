"""One checkpoint: a folder that exists complete or not at all, and whose every file can be verified.

It holds the tensors, written by torch.distributed.checkpoint so that any number of ranks can read them;
``state.json``, everything else that resuming needs; and ``manifest.json``, the length and SHA-256 of each file, signed
(``signing.py``). It is written to a temporary folder, synced, and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from allmlp.checkpointing.signing import signature, written_by_this_user
from allmlp.distributed.context import DistributedContext
from allmlp.errors import RunError, UserError
from allmlp.files import sync_folder, to_json

FORMAT = 2  # 1: written by the package when it was called mlp_mixer
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
        write_tensors(tensors, temporary, context)
        mine = temporary.glob(f"__{context.rank}_*")
        files = on_all_ranks(context, lambda: {path.name: file_digest(path) for path in mine})
        on_all_ranks(context, lambda: finish(folder, temporary, state, files) if context.is_rank0 else None)
    except BaseException:
        if context.is_rank0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear(temporary: Path) -> None:
    """Creates an empty temporary folder, in place of an old one."""
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir()  # without parents: storage that was unmounted must not be recreated on another disk


def write_tensors(tensors: dict[str, Tensor], temporary: Path, context: DistributedContext) -> None:
    """Writes and syncs this rank's tensor files."""
    try:
        writer = FileSystemWriter(temporary, sync_files=True)
        save_distributed(
            tensors, storage_writer=writer, process_group=context.checkpoint_group, no_dist=context.world_size == 1
        )
    except CheckpointException as error:  # derives from BaseException
        rank, (cause, _) = next(iter(error.failures.items()))
        raise unwritable(temporary, f"rank {rank}: {cause}" if context.world_size > 1 else cause) from error
    except (OSError, RuntimeError) as error:  # raised before PyTorch collects failures, and always in one process
        raise unwritable(temporary, error) from error


def finish(folder: Path, temporary: Path, state: dict[str, Any], files_by_rank: list[dict[str, Any]]) -> None:
    """Adds state and manifest, and renames the temporary folder to its final name."""
    write_synced(temporary / STATE, to_json(state, indent=1) + "\n")
    files = {name: digest for files in files_by_rank for name, digest in files.items()}
    files |= {name: file_digest(temporary / name) for name in (STATE, ".metadata")}
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


def unwritable(path: Path, error: object) -> RunError:
    reason = getattr(error, "strerror", None) or error
    return RunError(
        f"the checkpoint {path} cannot be written ({reason}): free some space or repair the storage; earlier "
        "checkpoints are unchanged"
    )


def file_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def manifest_text(files: dict[str, Any]) -> str:
    """The manifest: the files, their signature, and a digest of both."""
    body = {"format": FORMAT, "files": dict(sorted(files.items()))}
    return with_digest(body | {"signature": signature(to_json(body))})


def with_digest(signed: dict[str, Any]) -> str:
    digest = hashlib.sha256(to_json(signed).encode()).hexdigest()
    return to_json({**signed, "sha256": digest}, indent=1) + "\n"


def verify_checkpoint(folder: Path, trusted: bool = False) -> dict[str, Any]:
    """Compares each file with the manifest and returns the state. Nothing in the folder is executed.

    Args:
        folder: the checkpoint.
        trusted: accept a checkpoint that was not written by this user.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or changed; the message names it.
        UserError: the checkpoint is intact, but another user or an earlier version wrote it.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        stored = json.loads(text)
        body = {"format": stored["format"], "files": stored["files"]}
        intact = text == with_digest(body | {"signature": stored["signature"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None
    if not intact:
        raise DamagedCheckpoint(f"{path} was changed since it was written")
    if stored["format"] != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {stored['format']}, and this version reads {FORMAT}: resume it with the "
            "version that wrote it, or start from its weights"
        )
    for name, expected in stored["files"].items():
        check_file(folder / name, expected)
    if not (trusted or written_by_this_user(to_json(body), stored["signature"])):
        raise UserError(
            f"{folder} was not written by a run of yours on this machine, and loading a checkpoint can execute code: "
            "give --trust-checkpoint if you trust its author; to exchange weights, use .safetensors files"
        )
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
        RunError: a tensor is missing or has another shape.
    """
    try:
        reader = FileSystemReader(folder)
        load_distributed(
            tensors, storage_reader=reader, process_group=context.checkpoint_group, no_dist=context.world_size == 1
        )
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise RunError(f"{folder} does not fit this run: {cause}") from error
