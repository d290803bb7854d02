"""The tensors of a checkpoint, in safetensors files that any number of ranks can read.

torch.distributed.checkpoint writes and reads them. It does not check what it is given, so this does:
an entry that is no tensor would be written into a file that cannot be read, and values of another dtype would be cast.
"""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from allmlp.distributed.context import DistributedContext
from allmlp.distributed.parallelize import local_shard
from allmlp.errors import RunError, reason, remedy

FILE_BYTES = 2**26  # of the tensors in one file, roughly: safetensors builds each file in memory before it is written


def save_tensors(tensors: dict[str, Tensor], folder: Path, context: DistributedContext) -> None:
    """Writes and syncs this rank's files. Collective.

    Raises:
        RunError: a rank could not write.
    """
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), file_numbers(packed), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # copying ahead would use the current device, which in a thread is the first GPU
    if context.world_size == 1:
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be in one process
    try:
        save_distributed(
            packed, storage_writer=writer, process_group=context.checkpoint_group, no_dist=context.world_size == 1
        )
    except CheckpointException as error:  # derives from BaseException
        rank, (cause, _) = next(iter(error.failures.items()))
        raise unwritable(folder, f"rank {rank}: {cause}" if context.world_size > 1 else cause) from error
    except (OSError, RuntimeError) as error:  # raised before PyTorch collects failures, and always in one process
        raise unwritable(folder, error) from error


def file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of each tensor's file, from 1; those of rank 0 count for all ranks."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = local_shard(tensor).nbytes
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    return numbers


def files_of_rank(folder: Path, rank: int) -> Iterable[Path]:
    return folder.glob(f"shard-{rank + 1:05d}-*.safetensors")


def unwritable(path: Path, error: object) -> RunError:
    why, mend = (reason(error), remedy(error)) if isinstance(error, OSError) else (error, "repair the storage")
    return RunError(f"the checkpoint {path} cannot be written ({why}): {mend}; earlier checkpoints are unchanged")


class ListedFiles(FileSystem):
    """Shows the reader the files of the checkpoint alone, not what a file browser or a copy has added to the folder."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def ls(self, path: Any) -> list[str]:
        return [str(Path(path) / name) for name in self.names]


def load_tensors(folder: Path, files: Sequence[str], tensors: dict[str, Tensor], context: DistributedContext) -> None:
    """Reads the files of all ranks into the tensors, in place. Collective.

    Raises:
        RunError: the files hold other tensors, or one of another shape or dtype.
    """
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = ListedFiles(files)
    try:
        context.broadcast_from_rank0(lambda: check_tensors(folder, reader, tensors))
        load_distributed(
            tensors, storage_reader=reader, process_group=context.checkpoint_group, no_dist=context.world_size == 1
        )
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise RunError(f"{folder} does not fit this run: {cause}") from error


def check_tensors(folder: Path, reader: HuggingFaceStorageReader, tensors: dict[str, Tensor]) -> None:
    """Raises a RunError unless the files hold exactly these tensors, by name, shape and dtype."""
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder} cannot be read ({error}): resume from another checkpoint, or train again") from None
    remedy = "resume it with the recipe and the version that wrote it, or start a new run from its weights (--weights)"
    for name, tensor in tensors.items():
        found = stored.get(name)
        if not isinstance(found, TensorStorageMetadata):
            raise RunError(f"{folder} does not fit this run: it has no tensor {name}; {remedy}")
        for what, there, here in (
            ("shape", tuple(found.size), tuple(tensor.shape)),
            ("dtype", found.properties.dtype, tensor.dtype),
        ):
            if there != here:
                raise RunError(
                    f"{folder} does not fit this run: {name} has {what} {there} there and {here} here; {remedy}"
                )
    if unexpected := sorted(stored.keys() - tensors.keys()):
        raise RunError(f"{folder} does not fit this run: its tensor {unexpected[0]} is not used here; {remedy}")
