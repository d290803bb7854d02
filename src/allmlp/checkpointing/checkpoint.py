"""One checkpoint: a folder that is there whole or not at all, and that knows what each of its files must be.

In it: the tensors, as torch.distributed.checkpoint writes them, so that another number of ranks can read them;
``state.json``, all else that a run needs to go on; and ``manifest.json``, length and SHA-256 of each file, signed
(``trust.py``). It is written beside its place, synced, and renamed.
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

from allmlp.checkpointing.trust import signature, written_here
from allmlp.distributed.context import DistributedContext
from allmlp.errors import RunError, UserError
from allmlp.files import sync_folder, to_json

FORMAT = 1
STATE, MANIFEST = "state.json", "manifest.json"


class Damaged(RunError):
    """A checkpoint of which a file is missing, cut short or changed."""


def write(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], context: DistributedContext) -> None:
    """Writes a checkpoint, all ranks together; ``folder`` is replaced where it exists.

    Raises:
        RunError: on every rank, where one could not write its part; what was there before is as it was.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        together(context, lambda: clear(temporary) if context.is_rank0 else None)
        save(tensors, temporary, context)
        mine = temporary.glob(f"__{context.rank}_*")
        shares = together(context, lambda: {path.name: fingerprint(path) for path in mine})
        together(context, lambda: complete(folder, temporary, state, shares) if context.is_rank0 else None)
    except BaseException:
        if context.is_rank0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()  # not its parents: storage that has vanished is not to be made again elsewhere


def save(tensors: dict[str, Tensor], temporary: Path, context: DistributedContext) -> None:
    """The tensors' files, synced."""
    try:
        writer = FileSystemWriter(temporary, sync_files=True)
        save_distributed(tensors, storage_writer=writer, process_group=context.saving, no_dist=context.world_size == 1)
    except CheckpointException as error:  # no Exception, in PyTorch
        rank, (cause, _) = next(iter(error.failures.items()))
        raise unwritable(temporary, f"rank {rank}: {cause}" if context.world_size > 1 else cause) from error
    except (OSError, RuntimeError) as error:  # before it shares its failures; in one process, always
        raise unwritable(temporary, error) from error


def complete(folder: Path, temporary: Path, state: dict[str, Any], shares: list[dict[str, Any]]) -> None:
    """Adds what is not tensors, and moves the folder to its place."""
    write_synced(temporary / STATE, to_json(state, indent=1) + "\n")
    files = {name: print_ for share in shares for name, print_ in share.items()}
    files |= {name: fingerprint(temporary / name) for name in (STATE, ".metadata")}
    write_synced(temporary / MANIFEST, seal(files))
    sync_folder(temporary)
    old = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def together(context: DistributedContext, action: Callable[[], Any]) -> list[Any]:
    """What the action returns on each rank; a RunError on all where it fails on one."""
    outcome: tuple[Any, str | None] = None, None
    try:
        outcome = action(), None
    except OSError as error:
        outcome = None, str(unwritable(Path(error.filename or "the checkpoint"), error))
    outcomes: list[Any] = [outcome]
    if context.world_size > 1:
        outcomes = [None] * context.world_size
        dist.all_gather_object(outcomes, outcome, group=context.saving)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise RunError(f"rank {rank}: {failure}" if context.world_size > 1 else failure)
    return [value for value, _ in outcomes]


def unwritable(path: Path, error: object) -> RunError:
    told = getattr(error, "strerror", None) or error
    return RunError(
        f"the checkpoint {path} cannot be written ({told}): free some space, or mend the storage; the checkpoints "
        "before it are as they were"
    )


def fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal(files: dict[str, Any]) -> str:
    """The manifest's text: the files, their signature, and a digest of both."""
    body = {"format": FORMAT, "files": dict(sorted(files.items()))}
    return sealed(body | {"signature": signature(to_json(body))})


def sealed(signed: dict[str, Any]) -> str:
    digest = hashlib.sha256(to_json(signed).encode()).hexdigest()
    return to_json({**signed, "sha256": digest}, indent=1) + "\n"


def verify(folder: Path, trusted: bool = False) -> dict[str, Any]:
    """Holds each file to the manifest, and returns the state. Nothing in the folder is executed.

    Args:
        folder: the checkpoint.
        trusted: whether to take one that is not this user's own.

    Raises:
        Damaged: a file is missing, cut short or changed; the message names it.
        UserError: all is as it was written, but by somebody else.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        stored = json.loads(text)
        body = {"format": stored["format"], "files": stored["files"]}
        sound = text == sealed(body | {"signature": stored["signature"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read ({error})") from None
    if not sound:
        raise Damaged(f"{path} was changed since it was written")
    if stored["format"] != FORMAT:
        raise UserError(f"{folder} has format {stored['format']}, this is {FORMAT}: use the version that wrote it")
    for name, expected in stored["files"].items():
        check_file(folder / name, expected)
    if not (trusted or written_here(to_json(body), stored["signature"])):
        raise UserError(
            f"{folder} was not written by a run of yours on this machine, and loading a checkpoint can execute code: "
            "give --trust-checkpoint if you trust whoever wrote it; what people exchange is .safetensors"
        )
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def check_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        found = fingerprint(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from None
    if found["bytes"] != expected["bytes"]:
        raise Damaged(f"{path} has {found['bytes']:,} bytes, not {expected['bytes']:,}")
    if found != expected:
        raise Damaged(f"{path} was changed since it was written (SHA-256 differs)")


def read(folder: Path, tensors: dict[str, Tensor], context: DistributedContext) -> None:
    """Fills the tensors from a verified checkpoint, whatever number of ranks wrote it.

    Raises:
        RunError: a tensor is missing or of another shape.
    """
    try:
        reader = FileSystemReader(folder)
        load_distributed(tensors, storage_reader=reader, process_group=context.saving, no_dist=context.world_size == 1)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise RunError(f"{folder} does not fit this run: {cause}") from error
