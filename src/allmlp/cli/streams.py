"""Standard output and standard error that may be closed, full, or a terminal that is gone.

What a run has computed counts more than what it prints: a message that cannot be shown is dropped, and only results
that cannot be delivered are a failure.
"""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from allmlp.errors import RunError, reason, remedy

log = logging.getLogger(__name__)

PIPE_CLOSED = 141  # the exit status of a program that SIGPIPE ended
PIPE_ERRORS = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)


class OutputError(RunError):
    """Standard output cannot be written. ``status`` is ``PIPE_CLOSED`` if its reader has closed it: no mistake."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written ({reason(error)}): {remedy(error)}")
        self.reason = reason(error)
        self.status = PIPE_CLOSED if error.errno in PIPE_ERRORS else 1


class GuardedStream:
    """A text stream that fails once at most; what is written after that is dropped.

    Args:
        stream: None: it was closed before this program began.
        raises: whether its failure raises an OutputError, or is ignored too.
    """

    def __init__(self, stream: TextIO | None, raises: bool) -> None:
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115, PTH123
        self.closed_before, self.raises = stream is None, raises
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.guard():
            if self.closed_before:
                raise OSError(errno.EBADF, "closed")
            self.stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self.guard():
            self.stream.flush()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.failed:
                self.failed = True
                self.drop_the_rest()
                if self.raises:
                    raise OutputError(error) from None

    def drop_the_rest(self) -> None:
        """Lets the buffered text, which Python writes again when it exits, go nowhere."""
        with contextlib.suppress(OSError):  # a stream in memory has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Within the block, a failure of standard output is an OutputError, and one of standard error is ignored."""
    if sys.platform != "win32":
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:  # closed: the next file that is opened would take its place, and what is printed
                os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, GuardedStream(sys.stdout, raises=True))
    sys.stderr = cast(TextIO, GuardedStream(sys.stderr, raises=False))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def saved_result(where: object, as_json: bool) -> Iterator[None]:
    """For what is printed about a result that is in a file already: that it cannot be printed is no failure.

    Raises:
        RunError: the caller asked for JSON, and it cannot be written. A closed pipe is no failure there either.
    """
    try:
        yield
        sys.stdout.flush()
    except OutputError as error:
        if error.status == PIPE_CLOSED:
            return
        if as_json:
            raise RunError(f"{error}; all is done, and the result is in {where}") from None
        log.warning("nothing can be printed to standard output (%s): the result is in %s", error.reason, where)
