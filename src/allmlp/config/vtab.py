"""The 19 tasks of the Visual Task Adaptation Benchmark (Zhai et al. 2019): their groups, and the size of the images."""

from typing import Literal, NamedTuple

Group = Literal["natural", "specialized", "structured"]
GROUPS: tuple[Group, ...] = ("natural", "specialized", "structured")


class Task(NamedTuple):
    """A VTAB task: its group, and the usual size of its images, (height, width) in pixels."""

    group: Group
    size: tuple[int, int]


TASKS = {
    "caltech101": Task("natural", (300, 200)),
    "cifar100": Task("natural", (32, 32)),
    "dtd": Task("natural", (300, 300)),
    "flowers102": Task("natural", (500, 600)),
    "pets": Task("natural", (375, 500)),
    "svhn": Task("natural", (32, 32)),
    "sun397": Task("natural", (500, 500)),
    "pcam": Task("specialized", (96, 96)),
    "eurosat": Task("specialized", (64, 64)),
    "resisc45": Task("specialized", (256, 256)),
    "retinopathy": Task("specialized", (480, 640)),
    "clevr-count": Task("structured", (320, 480)),
    "clevr-distance": Task("structured", (320, 480)),
    "dmlab": Task("structured", (360, 480)),
    "kitti-distance": Task("structured", (375, 1242)),
    "dsprites-location": Task("structured", (64, 64)),
    "dsprites-orientation": Task("structured", (64, 64)),
    "smallnorb-azimuth": Task("structured", (96, 96)),
    "smallnorb-elevation": Task("structured", (96, 96)),
}
