"""How much the reduced decoding of large JPEG files changes what the model sees, in levels of 255.

    python benchmarks/decode_fidelity.py FOLDER --image-size 224

For each JPEG file below FOLDER that is decoded at a reduced size, the evaluation view is compared with that of the
file decoded at full size. Prints one line per file.
"""

import argparse
from pathlib import Path

import numpy as np
from common import print_table

from allmlp.data.decode import MAX_PIXELS, decode
from allmlp.data.transforms import EvaluationTransform
from allmlp.metadata import Preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=20, help="at most this many files")
    arguments = parser.parse_args()
    transform = EvaluationTransform(image_size=(arguments.image_size,) * 2, preprocessing=Preprocessing())
    rows: list[list[str]] = []
    for path in sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")):
        data = path.read_bytes()
        whole, reduced = (decode(data, str(path), MAX_PIXELS, side) for side in (None, transform.min_side))
        if whole.size == reduced.size or len(rows) == arguments.images:
            continue
        views = [np.asarray(transform(image)).astype(int) for image in (whole, reduced)]
        difference = np.abs(views[0] - views[1])
        sizes = [f"{image.width} × {image.height}" for image in (whole, reduced)]
        rows.append([path.name, *sizes, str(difference.max()), f"{difference.mean():.2f}"])
    print_table(["file", "size", "decoded at", "largest difference", "mean difference"], rows)


if __name__ == "__main__":
    main()
