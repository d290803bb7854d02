"""The Hugging Face hub: weights from it, pinned to their revision, and a model with its card onto it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from allmlp.errors import RunError, UserError

PREFIX = "hf-hub:"
FILES = ("model.safetensors", "pytorch_model.bin")  # the first that is there


@dataclass(frozen=True, kw_only=True)
class Download:
    """A local file, and what is known of it that does not stand in it."""

    path: Path
    source: dict[str, str] = field(default_factory=dict)  # the hub's id and revision
    config: dict[str, Any] = field(default_factory=dict)  # the config.json beside it, timm's
    config_missing: str = ""  # why it could not be had, where the hub may have one


def download(address: str) -> Download:
    """The weights at "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", from the cache where they are there.

    Raises:
        UserError: not such an address, no such repository or revision, no weights in it.
        RunError: the hub cannot be reached, and the file is not in the cache.
    """
    match = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if match is None:
        raise UserError(f"{address!r}: give {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION")
    repo, revision = match.groups()
    path, unreachable = None, None
    for name in FILES:
        try:
            path = fetch(repo, name, revision)
        except RunError as error:  # offline, another program may have fetched the other file
            unreachable = unreachable or error
        if path is not None:
            break
    if path is None:
        raise unreachable or UserError(f"{address} has none of {', '.join(FILES)}: no weights that are read here")
    commit = path.parent.name  # snapshots/COMMIT/FILE, however the revision was named
    missing = ""
    try:
        beside = fetch(repo, "config.json", commit)
    except RunError as error:  # the weights are here, so the rest can do without
        beside, missing = None, str(error)
    try:
        config = json.loads(beside.read_text(encoding="utf-8")) if beside else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{address}: its config.json is not sound ({error}): tell its owner") from None
    source = {"hub": repo, "revision": commit}
    return Download(path=path, source=source, config=config if isinstance(config, dict) else {}, config_missing=missing)


def fetch(repo: str, name: str, revision: str | None) -> Path | None:
    """The file in the hub's cache, downloaded into it if need be; None where the repository has no such file."""
    hub = huggingface_hub()
    errors = hub.errors
    try:
        return Path(hub.hf_hub_download(repo, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        if hub.try_to_load_from_cache(repo, name, revision=revision) is hub._CACHED_NO_EXIST:
            return None
        raise RunError(
            f"{repo}: {name} is not in the cache, and the hub cannot be reached ({first_line(error)}): connect once, "
            "or give a local file"
        ) from None
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{repo}{f'@{revision}' if revision else ''} is not on the hub, or it is private ({first_line(error)}): "
            "check the name, or log in with `hf auth login`"
        ) from None
    except (errors.HTTPError, OSError) as error:  # the HTTP library's need not be an OSError
        raise RunError(f"{repo}: {name} could not be downloaded ({first_line(error)}): try again later") from None


def huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError("the Hugging Face hub needs its library: pip install 'allmlp[hub]'") from None
    return huggingface_hub


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
