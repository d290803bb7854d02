"""The names in a zip as in the folder that was packed: Windows and macOS's Finder write them in other ways."""

import posixpath
import zipfile

from allmlp.data.names import normal_form

UTF_8 = 0x800  # the flag of an entry whose name is declared as UTF-8; zipfile reads other names as code page 437
WINDOWS = (0, 10, 11)  # ``create_system`` of MS-DOS and NTFS


def renamed_entries(archive: zipfile.ZipFile) -> dict[str, str]:
    """The entries whose name in the folder differs from that in the zip: name in the folder → name in the zip.

    Backslashes of Windows become slashes, letters are composed, UTF-8 is read as such where the zip does not declare
    it, and paths lose "./" and a slash in front. Where two entries would have one name, the later keeps its own.
    """
    entries = archive.NameToInfo
    only_backslashes = not any("/" in name for name in entries)
    renamed: dict[str, str] = {}
    for name, info in entries.items():
        if name.isascii() and "\\" not in name and not name.startswith(("/", ".")) and "/." not in name:
            continue
        folder_name = name
        if not name.isascii() and not info.flag_bits & UTF_8:
            folder_name = decode_utf_8(name)
        if only_backslashes or info.create_system in WINDOWS:
            folder_name = folder_name.replace("\\", "/")
        folder_name = normal_form(normal_path(folder_name))
        if folder_name not in entries and folder_name not in renamed:
            renamed[folder_name] = name
    return renamed


def decode_utf_8(name: str) -> str:
    """The name that was read as code page 437, as UTF-8 if its bytes are that."""
    try:
        return name.encode("cp437").decode()
    except UnicodeError:
        return name


def normal_path(name: str) -> str:
    path = posixpath.normpath(f"/{name}").lstrip("/")
    return f"{path}/" if name.endswith("/") and path else path
