"""Stand-ins of VTAB's 19 tasks in the layout that people have, with a few tiny images each."""

from pathlib import Path

import numpy as np
from PIL import Image

USUAL_NAMES = [
    "caltech101",
    "cifar",
    "dtd",
    "oxford_flowers102",
    "oxford_iiit_pet",
    "svhn",
    "sun397",
    "patch_camelyon",
    "eurosat",
    "resisc45",
    "diabetic_retinopathy",
    "clevr_count",
    "clevr_dist",
    "dmlab",
    "kitti",
    "dsprites_loc",
    "dsprites_ori",
    "smallnorb_azi",
    "smallnorb_ele",
]
COUNTS = {"train800": 8, "val200": 4, "test": 6}  # images of each list


def write_task(folder: Path, classes: int = 2, seed: int = 0, size: int = 8) -> Path:
    """A task's folder: labels 0, 1, … in turn, images of a gray that tells label and list apart, some lines untidy."""
    lines: dict[str, list[str]] = {}
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(COUNTS.items()):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count):
            label = i % classes
            path = f"images/{name}/{i:04d}.png"
            pixels = np.full((size, size, 3), 100 * number + 10 * label, dtype=np.uint8)
            pixels[0, 0] = rng.integers(0, 256, 3)
            pixels[0, 1] = i
            Image.fromarray(pixels).save(folder / path)
            lines.setdefault(name, []).append(f"{path} {label}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_vtab(root: Path, names: list[str] = USUAL_NAMES) -> Path:
    for seed, name in enumerate(names):
        write_task(root / name, seed=seed)
    return root
