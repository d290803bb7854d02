"""The exceptions that the command line reports in one line, each with its exit status; and the words of messages."""

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar


class UserError(ValueError):
    """A mistake in the input. The message is one line: what is wrong, the value, and the remedy. Exit status 2."""

    status = 2


class RunError(RuntimeError):
    """A failure that the user's input did not cause (a full disk, an unreachable server). Exit status 1."""

    status = 1


class Stopped(Exception):
    """A signal stopped a run, which can be resumed. Exit status 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def brief(value: object) -> str:
    """A value for a message: its ``repr`` in one line, shortened."""
    text = printable(" ".join(repr(value).split()))
    return text if len(text) <= 80 else f"{text[:60]}… ({type(value).__name__})"


P = ParamSpec("P")
R = TypeVar("R")


def naming_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """For a function that Python calls: its errors name keywords where those of the command name options."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (UserError, RunError) as error:
            error.args = (with_keywords(str(error)),)
            raise

    return call


def with_keywords(message: str) -> str:
    """``--image-size 20`` becomes ``image_size 20``, but not in commands such as ``mixer train --processes``."""

    def keyword(found: re.Match[str]) -> str:
        return found[0] if found[1] is None else found[1].replace("-", "_")

    message = re.sub(r"--resume \S+?(?=[,:;)]|$)", "resume=True", message)
    return re.sub(r"\bmixer [^,:;)]*|--([a-z][a-z-]*)", keyword, message)


def printable(text: str) -> str:
    """Escapes control and other unprintable characters of outside text (a file or class name) to fit in one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
