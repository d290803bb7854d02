"""Two hundred messy folders and zips, each a mixture of what is met in the field, against what was put into them."""

import random
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trees import picture

from allmlp.data.dataset import peek
from allmlp.data.decode import UnreadableImage
from allmlp.data.sources import load_source
from allmlp.inference.images import find_images

CLASSES = ("ant", "bee", "café", "a b", "[red]", "100%", "7", "x.y", "Ünïcode", "it's", "train", "日本", "-v", "#1")
STYLES: dict[str, Callable[[str], str]] = {
    "plain": lambda part: part,
    "upper": str.upper,
    "long": lambda part: {"train": "training", "val": "validation", "test": "testing"}[part],
    "set": lambda part: f"{part}_set",
    "prefix": lambda part: f"flowers_{part}",
    "suffix": lambda part: f"{part}2017",
    "nested": lambda part: f"seg_{part}/seg_{part}",
    "images": lambda part: f"{part}/images",
    "other": lambda part: {"train": "trn", "val": "dev", "test": "Test Data"}[part],
}
CUT = 40  # bytes of a damaged image
Places = dict[str, str]  # part → where its classes lie


@dataclass
class Mess:
    """A messy folder, and what must be found in it."""

    files: dict[str, bytes] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)  # empty ones
    links: dict[str, str] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)  # by part, or "all"
    excluded: int = 0  # files that are no images, or lie where no data is
    unlabeled: int = 0  # images that are neither, but in no class
    damaged: int = 0
    linked: dict[str, bytes] = field(default_factory=dict)  # images that a link of val gives a second time
    classes: set[str] = field(default_factory=set)


def make_mess(seed: int) -> Mess:
    rng, mess = random.Random(seed), Mess()
    names = rng.sample(CLASSES, rng.randint(2, 4))
    decomposed = rng.random() < 0.3
    outer = rng.choice(["", "", "photos/", "my data/v2/"])
    parts = rng.choice([(), (), ("train", "test"), ("train", "val"), ("train", "val", "test")])
    style = rng.choice(sorted(STYLES))
    mess.classes = {unicodedata.normalize("NFC", name) for name in names}
    form = ""
    places = {part: f"{outer}{STYLES[style](part)}/" for part in parts} or {"all": outer}
    for part, place in places.items():
        for name in names:
            form = unicodedata.normalize("NFD", name) if decomposed else name
            for i in range(rng.randint(3, 6)):
                folder = f"{place}{form}/" + rng.choice(["", "", "deeper/", "2019/may/"])
                if not parts and name == "train":  # as a class, it holds images itself
                    folder = f"{place}{form}/"
                ending = rng.choice([".png", ".png", ".PNG", ".jpg", "", ".png?w=100"])
                add_image(mess, rng, f"{folder}{part}{i}{ending}")
                mess.images[part] += 1
    if rng.random() < 0.2 and {"train", "val"} <= places.keys():
        link_class(mess, f"{places['train']}{form}", f"{places['val']}{form}")  # of the last class
    kinds = sorted(MESSES.keys() - {"system", "others"} if mess.linked else MESSES)
    for kind in rng.sample(kinds, rng.randint(2, len(kinds))):
        MESSES[kind](mess, rng, outer, places, names, decomposed)
    return mess


def add_image(mess: Mess, rng: random.Random, name: str) -> None:
    mess.files[name] = picture(ascii(name))
    if rng.random() < 0.05:
        mess.files[name] = mess.files[name][:CUT]
        mess.damaged += 1


def class_folder(rng: random.Random, places: dict[str, str], names: list[str], decomposed: bool) -> str:
    name = rng.choice(names)
    return rng.choice(sorted(places.values())) + (unicodedata.normalize("NFD", name) if decomposed else name)


def add_system(mess: Mess, rng: random.Random, outer: str, places: Places, names: list[str], nfd: bool) -> None:
    system = rng.choice(["@eaDir", "lost+found", "__pycache__", ".thumbs", "__MACOSX", "Thumbs", "$RECYCLE.BIN"])
    where = rng.choice(["", outer, f"{class_folder(rng, places, names, nfd)}/"])
    for i in range(rng.randint(1, 3)):
        mess.files[f"{where}{system}/{i}.png"] = picture(str(i))
        mess.excluded += 1


def add_run(mess: Mess, rng: random.Random, outer: str, places: Places, names: list[str], nfd: bool) -> None:
    run = rng.choice(["", outer]) + rng.choice(["runs/photos-20261126-120000/", "model1/"])
    for name in ("recipe.json", "metrics.jsonl", "examples/0-1.png", "examples/1-1.png"):
        mess.files[run + name] = b"{}"
        mess.excluded += 1


def add_others(mess: Mess, rng: random.Random, outer: str, places: Places, names: list[str], nfd: bool) -> None:
    for name in rng.sample(["notes.txt", "Icon\r", ".DS_Store", "labels.csv", "a.json", "empty", "x\x1b[31m.md"], 3):
        mess.files[f"{class_folder(rng, places, names, nfd)}/{name}"] = b""
    mess.excluded += 3


def add_loose(mess: Mess, rng: random.Random, outer: str, places: Places, names: list[str], nfd: bool) -> None:
    mess.files["preview.png"] = picture("preview")
    mess.unlabeled += 1


def add_empty(mess: Mess, rng: random.Random, outer: str, places: Places, names: list[str], nfd: bool) -> None:
    mess.folders += [f"{place}fly/eggs" for place in places.values()]


def add_unlabeled(
    mess: Mess, rng: random.Random, outer: str, places: dict[str, str], names: list[str], nfd: bool
) -> None:
    if "test" in places or any("flowers" in place or "2017" in place or "seg" in place for place in places.values()):
        return
    folder = rng.choice(["test/", "Testing/"]) + ("" if "all" in places else rng.choice(["", "unlabeled/"]))
    for i in range(3):
        mess.files[f"{outer}{folder}{i}.png"] = picture(str(i))
    mess.unlabeled += 3


def link_class(mess: Mess, target: str, link: str) -> None:
    """Replaces a class folder of val by a link to that of train."""
    for name in [name for name in mess.files if name.startswith(f"{link}/")]:
        mess.damaged -= len(mess.files.pop(name)) == CUT
        mess.images["val"] -= 1
    mess.links[link] = target
    mess.linked = {name: data for name, data in mess.files.items() if name.startswith(f"{target}/")}


def link_loop(mess: Mess, rng: random.Random, outer: str, places: Places, names: list[str], nfd: bool) -> None:
    mess.links[f"{class_folder(rng, places, names, nfd)}/around"] = "."


MESSES: dict[str, Callable[[Mess, random.Random, str, dict[str, str], list[str], bool], None]] = {
    "system": add_system, "run": add_run, "others": add_others, "loose": add_loose, "empty": add_empty,
    "unlabeled": add_unlabeled, "loop": link_loop,
}  # fmt: skip


def write_folder(root: Path, mess: Mess) -> Path:
    for name, data in mess.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    for name in mess.folders:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, target in mess.links.items():
        (root / name).symlink_to((root / target).resolve(), target_is_directory=True)
    return root


def write_zip(path: Path, mess: Mess, backslashes: bool) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in [*mess.files, *(f"{folder}/" for folder in mess.folders)]:
            info = zipfile.ZipInfo("x")
            info.filename = name.replace("/", "\\") if backslashes else name
            info.create_system = 0 if backslashes else 3
            file.writestr(info, mess.files.get(name, b""))
    return path


@pytest.mark.parametrize("block", range(10))
def test_two_hundred_messy_folders(block: int, tmp_path: Path, mixer, tiny) -> None:
    """No wrong class, no image in the wrong part, no file that is not counted."""
    for seed in range(20 * block, 20 * block + 20):
        mess = make_mess(seed)
        sources = [write_folder(tmp_path / f"{seed}", mess)]
        sources.append(write_zip(tmp_path / f"{seed}.zip", mess, backslashes=seed % 3 == 0))
        for source in sources:
            check(source, mess, seed)
    words = ("--image-size", 8, "--patch-size", 4, "--epochs", 1, "--global-batch-size", 8, "--compile", "off", *tiny)
    limits = ("--max-unreadable-fraction", 1, "--workers", 0)
    for source in sources:  # of the last
        run = tmp_path / f"run{source.suffix}"
        answer = mixer("train", "--data", source, *words, *limits, "--out", run)
        assert answer.status == 0, (seed, answer.err)
        for command in (("evaluate", run, "--data", source, "--part", "all"), ("predict", run, source)):
            answer = mixer(*command)
            assert (answer.status, "Traceback" in answer.err) == (0, False), (seed, answer.err)
            assert "\x1b" not in answer.err


def check(source: Path, mess: Mess, seed: int) -> None:
    found = load_source(str(source), split_seed=seed)
    linked = [] if source.suffix == ".zip" else list(mess.linked.values())
    images = mess.images + Counter({"val": len(linked)})
    damaged = mess.damaged + [len(data) for data in linked].count(CUT)
    assert set(found.classes) == mess.classes, (seed, source)
    total, sizes = images.total(), {name: len(split) for name, split in found.splits.items()}
    if "all" not in images:
        assert sizes.get("test", 0) == images["test"], (seed, source)
        if "val" in images:
            assert sizes == images, (seed, source)
    assert sum(sizes.values()) == total, (seed, source, found.left_out)
    assert sum(found.left_out.values()) == mess.excluded + mess.unlabeled, (seed, source, found.left_out)
    whole = found.split("all")
    unreadable = 0
    for i in range(len(whole)):
        try:
            whole.read(i)
        except UnreadableImage:
            unreadable += 1
    assert unreadable == damaged, (seed, source)
    peek(whole)
    left_out: Counter[str] = Counter()
    assert len(list(find_images(source, left_out))) == total + mess.unlabeled, (seed, source)
    assert left_out.total() == mess.excluded, (seed, source)
