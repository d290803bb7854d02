"""Errors of the operating system in words, and options or keywords as the caller has given them."""

import errno
import os
from pathlib import Path

import pytest

from allmlp.errors import describe_os_error, remedy, with_keywords, with_options
from allmlp.runs.folder import disk_error

SAID = {  # error → a part of what to do
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EACCES: "permissions",
    errno.ENAMETOOLONG: "shorter",
    errno.EMFILE: "ulimit -n",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount it again",
    errno.EXDEV: "try again",  # one that has no words of its own
}


@pytest.mark.parametrize("number", SAID, ids=[errno.errorcode[number] for number in SAID])
def test_an_error_says_what_happened_to_what_and_what_to_do(number: int) -> None:
    error = OSError(number, os.strerror(number), "/some/file\n")
    assert describe_os_error(error).startswith(f"/some/file\\n: {os.strerror(number)} (")
    assert SAID[number] in describe_os_error(error)
    assert describe_os_error(OSError(number, os.strerror(number))).startswith(os.strerror(number))
    assert ("or save elsewhere" in remedy(error, "save elsewhere")) == (number not in (errno.EMFILE, errno.EXDEV))


def test_the_folder_of_a_run_is_told_or_the_other_file_that_failed() -> None:
    out = Path("runs/mine")
    for file, told in ((None, "runs/mine cannot be written"), ("runs/mine/a/b", "runs/mine cannot be written")):
        message = str(disk_error(out, OSError(errno.EROFS, os.strerror(errno.EROFS), file)))
        assert message.startswith(f"{told} (Read-only file system): ")
        assert message.endswith("name another folder with --out")
    message = str(disk_error(out, OSError(errno.EIO, os.strerror(errno.EIO), "/data/red/0.png")))
    assert message.startswith("/data/red/0.png: Input/output error (")
    assert "--out" not in message


@pytest.mark.parametrize(
    ("keywords", "options"),
    [
        ("batch_size = 0: must be a whole number", "--batch-size 0: must be a whole number"),
        ("image_size = (0, 0): must be at least 1 pixel", "--image-size (0, 0): must be at least 1 pixel"),
        ("image = '': give a path", None),  # a positional argument
        ("a.png: in_channels = 3", None),
    ],
)
def test_a_message_names_options_on_the_command_line(keywords: str, options: str | None) -> None:
    assert with_options(keywords) == (options or keywords)
    assert with_keywords("--batch-size 0: must be") == "batch_size 0: must be"
