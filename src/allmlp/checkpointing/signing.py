"""Signatures of checkpoints, which show that a run of this user wrote them, on this machine or with the same home.

Loading a checkpoint can execute code (torch.distributed.checkpoint pickles its metadata), so each manifest is signed
with a key that only this user can read. Weights are exchanged as safetensors files, which hold no code.
"""

import functools
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
from pathlib import Path

from allmlp.files import sync_folder

log = logging.getLogger(__name__)

KEY_BYTES = 32


def key_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "allmlp" / "key"


def key() -> bytes | None:
    """This user's key, created on first use; None if there is no folder where it can be stored."""
    try:
        path = key_file()
        if not is_complete(path):
            create(path)
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        warn(str(error))
        return None


@functools.cache  # warns once for each reason
def warn(reason: str) -> None:
    log.warning(
        "checkpoints are not signed, so resuming from them needs --trust-checkpoint (%s): set XDG_STATE_HOME to a "
        "writable folder",
        reason,
    )


def is_complete(path: Path) -> bool:
    """Whether the file holds a whole key; a power failure may have left it empty."""
    return path.exists() and path.stat().st_size == KEY_BYTES


def create(path: Path) -> None:
    """Writes a new key atomically, readable by its owner alone; a key that another process wrote first is kept."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # created with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and not is_complete(path):
            path.unlink()
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            Path(temporary).replace(path)
        sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def signature(text: str) -> str | None:
    """The signature of a manifest's text; None without a key."""
    secret = key()
    return None if secret is None else hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def written_by_this_user(text: str, stored: object) -> bool:
    """Whether ``stored`` is this user's signature of a manifest's text."""
    expected = signature(text)
    if expected is None or not isinstance(stored, str):
        return False
    return hmac.compare_digest(expected.encode(), stored.encode(errors="surrogateescape"))
