"""Trees of small images, as folders and as zips, for tests of what people bring."""

import io
import random
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
WHOLE = {"val_fraction": 0, "test_fraction": 0}  # arguments of load_source


def picture(name: str, kind: str = "PNG") -> bytes:
    """A small image whose pixels are a function of its name."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def names_in(folder: str, per_class: int = 10) -> list[str]:
    return [f"{folder}{c}/{i}.png" for c in CLASSES for i in range(per_class)]


def make_folder(root: Path, names: list[str]) -> Path:
    """Of these files; a name that ends in a slash is an empty folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(picture(name.encode(errors="replace").decode()))
    return root


def make_zip(path: Path, names: list[str], outer: str = "", directories: bool = False, extra: tuple = ()) -> Path:
    """Packed in a random order; ``extra`` are entries of any bytes."""
    names = random.Random(1).sample(names, len(names))
    with zipfile.ZipFile(path, "w") as file:
        for name in extra:
            file.writestr(name, b"\0\5\x16\7 AppleDouble")
        if directories:
            for folder in sorted({n[:i] for n in names for i, at in enumerate(n) if at == "/"}, reverse=True):
                file.writestr(f"{outer}{folder}/", b"")
        for name in names:
            file.writestr(outer + name, picture(name))
    return path


def write_tree(path: Path, files: dict[str, bytes]) -> Path:
    """A folder, or a zip if the path ends in .zip, of these files."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
        return path
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path
