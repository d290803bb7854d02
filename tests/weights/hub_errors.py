"""Errors as huggingface_hub raises them."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors as E


def of_status(status: int, kind: Any = E.HfHubHTTPError) -> Callable[[], Exception]:
    """An error with a response of this status; its message has several lines."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return lambda: kind(f"{status} Client Error: for url\n\nmore", response=response)


def connection_error() -> Exception:
    """An error of the HTTP library that huggingface_hub uses; in newer versions it is not an OSError."""
    return sys.modules[E.HTTPError.__module__.partition(".")[0]].ConnectError("Name or service not known")
