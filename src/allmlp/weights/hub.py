"""Weights from the Hugging Face hub, pinned to a revision."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from allmlp.errors import RunError, UserError

HUB_PREFIX = "hf-hub:"
ANSWER_SECONDS = 5.0  # after which the hub counts as unreachable
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")  # in order of preference


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A local weights file; if it comes from the hub, with the hub's information about it."""

    path: Path
    source: dict[str, str] = field(default_factory=dict)  # the hub's repository ("hub") and commit ("revision")
    config: dict[str, Any] = field(default_factory=dict)  # the repository's config.json, as timm writes it
    config_missing: str = ""  # why config.json could not be read, if the repository may have one


def download(address: str) -> WeightsFile:
    """The weights at "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", from the hub's cache if they are there.

    Raises:
        UserError: an invalid address, an unknown repository or revision, or a repository without weights.
        RunError: the hub cannot be reached, and the file is not in the cache.
    """
    match = re.fullmatch(rf"{HUB_PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if match is None:
        raise UserError(f"{address!r}: give {HUB_PREFIX}OWNER/NAME or {HUB_PREFIX}OWNER/NAME@REVISION")
    repo, revision = match.groups()
    offline = why_unreachable(repo, revision)
    path, unreachable = None, None
    for name in WEIGHTS_NAMES:
        try:
            path = fetch(repo, name, revision, offline)
        except RunError as error:  # offline; the cache may still have the other file
            unreachable = unreachable or error
        if path is not None:
            break
    if path is None:
        names = " nor ".join(WEIGHTS_NAMES)
        raise unreachable or UserError(f"{address} has neither {names}: give a repository with one of them")
    commit = path.parent.name  # the cache's path is snapshots/COMMIT/FILE, also for a branch or tag
    missing = ""
    try:
        config_path = fetch(repo, "config.json", commit, offline)
    except RunError as error:  # the weights can be loaded without it
        config_path, missing = None, str(error)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{address}: its config.json is not valid JSON ({error}): report it to the owner") from None
    source = {"hub": repo, "revision": commit}
    config = config if isinstance(config, dict) else {}
    return WeightsFile(path=path, source=source, config=config, config_missing=missing)


def why_unreachable(repo: str, revision: str | None) -> str:
    """Why the hub does not answer, asked once; "" if it does. ``hf_hub_download`` would ask each time, for 25 s."""
    hub = import_huggingface_hub()
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER_SECONDS)
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, WEIGHTS_NAMES[0], revision=revision), timeout=seconds)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):  # an answer, or reported by ``fetch``
        return ""
    except (hub.errors.HTTPError, OSError) as error:  # the HTTP library's errors may not be OSErrors
        return first_line(error)
    return ""


def fetch(repo: str, name: str, revision: str | None, offline: str = "") -> Path | None:
    """A file's path in the hub's cache, downloaded if necessary; None if the repository has no such file.

    ``offline``: why the hub cannot be reached, so that only the cache is looked at.
    """
    hub = import_huggingface_hub()
    errors = hub.errors
    try:
        return Path(hub.hf_hub_download(repo, name, revision=revision, local_files_only=bool(offline)))
    except errors.LocalEntryNotFoundError as error:
        if hub.try_to_load_from_cache(repo, name, revision=revision) is hub._CACHED_NO_EXIST:
            return None
        raise RunError(
            f"{repo}: {name} is not in the cache, and the hub cannot be reached ({offline or first_line(error)}): "
            "connect once, or give a local file"
        ) from None
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{repo}{f'@{revision}' if revision else ''} is not on the hub, or it is private ({first_line(error)}): "
            "check the name, or log in with `hf auth login`"
        ) from None
    except (errors.HTTPError, OSError) as error:  # the HTTP library's errors may not be OSErrors
        raise RunError(f"{repo}: {name} could not be downloaded ({first_line(error)}): try again later") from None


def import_huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError("the package huggingface_hub is not installed: pip install 'allmlp[hub]'") from None
    return huggingface_hub


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
