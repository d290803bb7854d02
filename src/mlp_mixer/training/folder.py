"""The folder of a run: made, filled, and taken away again where nothing in it is of use."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mlp_mixer.errors import RunError
from mlp_mixer.files import to_json

log = logging.getLogger(__name__)


@contextlib.contextmanager
def run_folder(out: Path, worth_keeping: str = "checkpoints/*.safetensors") -> Iterator[None]:
    """Makes the folder, if it is not there; removes it, and those made on the way to it, where the run ends on an error
    before there is any file worth keeping (a pattern below the folder: its first checkpoint).
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    was_empty = out.is_dir() and not any(out.iterdir())
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if (made or was_empty) and not any(out.glob(worth_keeping)):
            shutil.rmtree(out, ignore_errors=True)
            if was_empty:
                out.mkdir()
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # another run has come to live there
                    folder.rmdir()
        if isinstance(error, OSError):
            raise disk_error(out, error) from error
        raise


def disk_error(out: Path, error: OSError) -> RunError:
    return RunError(f"{out} cannot be written ({error.strerror or error}): free some space, or name another --out")


@contextlib.contextmanager
def metrics_files(out: Path) -> Iterator[tuple[list[dict[str, float]], Callable[[dict[str, float]], None]]]:
    """The records so far, and a function that adds one: to metrics.jsonl and, where it is installed, to TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out / "tensorboard")
    except ImportError:
        log.info("no TensorBoard events are written: pip install 'mlp-mixer[tensorboard]' for them")
        board = None
    records: list[dict[str, float]] = []
    with (out / "metrics.jsonl").open("w", buffering=1, encoding="utf-8") as file:

        def write(record: dict[str, float]) -> None:
            records.append(record)
            file.write(to_json(record) + "\n")
            for key, value in record.items():
                if board is not None and key not in ("step", "epoch"):
                    board.add_scalar(key, value, int(record["step"]))

        try:
            yield records, write
        finally:
            if board is not None:
                board.close()
