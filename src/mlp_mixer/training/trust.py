"""Which checkpoints this user's own runs wrote, on this machine or one that shares its home folder.

Loading a checkpoint can execute code (the metadata of torch.distributed.checkpoint are pickled), so each manifest is
signed with a key that only this user can read; weights to exchange are safetensors, which hold no code.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path


def key_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mlp-mixer" / "key"


def key() -> bytes | None:
    """The user's, made when it is first needed; None where there is no place for it."""
    path = key_file()
    with contextlib.suppress(OSError):
        if not path.exists():
            make(path)
        return path.read_bytes() or None
    return None


def make(path: Path) -> None:
    """Whole at once, readable by its owner alone; where another process was faster, its key stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # which makes it 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()


def signature(text: str) -> str | None:
    """Of a manifest; None without a key."""
    secret = key()
    return None if secret is None else hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def written_here(text: str, signed: str | None) -> bool:
    expected = signature(text)
    return expected is not None and signed is not None and hmac.compare_digest(expected, signed)
