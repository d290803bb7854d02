"""Which checkpoints this user's own runs wrote, on this machine or one that shares its home folder.

Loading a checkpoint can execute code (the metadata of torch.distributed.checkpoint are pickled), so each manifest is
signed with a key that only this user can read; weights to exchange are safetensors, which hold no code.
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

LENGTH = 32  # bytes of a key


def key_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "allmlp" / "key"


def key() -> bytes | None:
    """The user's, made when it is first needed; None where there is no place for it."""
    try:
        path = key_file()
        if not is_key(path):
            make(path)
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # the latter: a user without a home folder
        warn(str(error))
        return None


@functools.cache
def warn(reason: str) -> None:
    log.warning(
        "checkpoints are not signed, so going on from them needs --trust-checkpoint (%s): let XDG_STATE_HOME name a "
        "folder that can be written",
        reason,
    )


def is_key(path: Path) -> bool:
    """Whether a whole one is there; a machine that lost its power may have left an empty file."""
    return path.exists() and path.stat().st_size == LENGTH


def make(path: Path) -> None:
    """Whole at once, synced, readable by its owner alone; where another process was faster, its key stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # which makes it 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(LENGTH))
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and not is_key(path):
            path.unlink()
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without such links
            Path(temporary).replace(path)
        sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def signature(text: str) -> str | None:
    """Of a manifest; None without a key."""
    secret = key()
    return None if secret is None else hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def written_here(text: str, signed: object) -> bool:
    expected = signature(text)
    if expected is None or not isinstance(signed, str):
        return False
    return hmac.compare_digest(expected.encode(), signed.encode(errors="surrogateescape"))
