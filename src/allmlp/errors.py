"""The exceptions that the command line reports in one line, each with its exit status; and the words of messages."""

import errno
import functools
import os
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
    """A signal stopped a run, which can be resumed. Exit status 143 (SIGTERM), 130 (SIGINT) or 129 (SIGHUP)."""

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


def with_options(message: str) -> str:
    """``image_size = 20: must be`` becomes ``--image-size 20: must be``, for a message that begins so."""

    def option(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')} "

    return re.sub(r"^([a-z][a-z0-9]*(?:_[a-z0-9]+)*) = (?=.*: must be )", option, message)


def printable(text: str) -> str:
    """Escapes control and other unprintable characters of outside text (a file or class name) to fit in one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


REMEDIES = {  # error of the operating system → what to do about it
    errno.ENOSPC: "free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "it is read-only, so choose a place that can be written",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the name, and that its disk is mounted",
    errno.ENOTDIR: "a part of the path is a file, so choose another",
    errno.ELOOP: "its links lead in a circle, so repair them",
    errno.EMFILE: "raise the limit (ulimit -n), or use fewer --workers",
    errno.ENFILE: "the whole machine has too many files open, so end some programs",
    errno.EIO: "check the disk, or the connection to it",
    errno.EBADF: "send it to a file or a terminal",
}
if os.name == "posix":
    REMEDIES |= {
        errno.EDQUOT: "free some of your quota",
        errno.ESTALE: "the network drive has lost the file, so mount it again",
        errno.ENOTCONN: "the network drive is not connected, so mount it again",
        errno.ETIMEDOUT: "check the connection to the network drive",
    }
ELSEWHERE = (errno.EMFILE, errno.ENFILE)  # errors that no other place for a file would mend


def remedy(error: OSError, instead: str = "") -> str:
    """What to do about an error of the operating system; ``instead``: another way out, where another place is one."""
    known = REMEDIES.get(error.errno or 0, "" if instead else "try again")
    return known if error.errno in ELSEWHERE else ", or ".join(filter(None, (known, instead)))


def reason(error: OSError) -> str:
    return printable(error.strerror or str(error) or type(error).__name__)


def describe_os_error(error: OSError) -> str:
    """An error of the operating system in one line: the file, what happened, and what to do."""
    file = "" if error.filename is None else f"{printable(os.fsdecode(error.filename))}: "
    return f"{file}{reason(error)} ({remedy(error)})"
