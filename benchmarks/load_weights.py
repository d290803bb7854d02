"""Loading Mixer-B/16: time and peak memory of allmlp.load, against timm.create_model and load_state_dict.

Each load runs in a new process and is measured after the imports; the loaders alternate, and medians are printed. All
files contain the same random weights: native safetensors, the authors' .npz, timm's names as .safetensors and .pth.

python benchmarks/load_weights.py                     # about three minutes on two cores; reads /proc (Linux)
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, print_table, write_results

from allmlp.factory import create
from allmlp.weights.convert import save_as

CONTESTANTS = {  # label → (loader, file)
    "allmlp.load, native safetensors": ("allmlp", "native.safetensors"),
    "allmlp.load, the authors' .npz": ("allmlp", "authors.npz"),
    "allmlp.load, timm's safetensors": ("allmlp", "timm.safetensors"),
    "allmlp.load, timm's .pth": ("allmlp", "timm.pth"),
    "timm, its safetensors": ("timm", "timm.safetensors"),
    "timm, its .pth": ("timm", "timm.pth"),
}
CHILD = """
import json, pathlib, sys, time
loader, path = sys.argv[1:]
import torch
if loader == "allmlp":
    from allmlp.weights.load import load
else:
    import timm
    from safetensors.torch import load_file
def memory(kind):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before, begin = memory("VmRSS"), time.perf_counter()
if loader == "allmlp":
    model = load(path)
else:
    model = timm.create_model("mixer_b16_224")
    read = load_file if path.endswith("safetensors") else torch.load
    model.load_state_dict(read(path))
total = float(sum(p.detach().sum() for p in model.parameters()))  # touches every weight
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "peak_bytes": memory("VmHWM") - before, "total": total}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        runs: dict[str, list[dict]] = {contestant: [] for contestant in CONTESTANTS}
        for number in range(options.rounds + 1):
            for contestant, (loader, file) in CONTESTANTS.items():
                run = load_once(loader, folder / file)
                if number:  # the first round fills the caches
                    runs[contestant].append(run)
        sizes = {file: (folder / file).stat().st_size for _, file in CONTESTANTS.values()}
    assert len({round(run["total"], 1) for measured in runs.values() for run in measured}) == 1, (
        "they loaded different weights"
    )
    median = {
        contestant: {key: statistics.median(run[key] for run in measured) for key in ("seconds", "peak_bytes")}
        for contestant, measured in runs.items()
    }
    results = {"machine": machine(torch.device("cpu")), "file_bytes": sizes, "median": median, "runs": runs}
    write_results("load_weights_cpu", results)
    peer = median["timm, its safetensors"]["seconds"]
    rows = [
        [
            contestant,
            f"{median[contestant]['seconds']:.2f}",
            f"{median[contestant]['seconds'] / peer:.2f}",
            f"{median[contestant]['peak_bytes'] / 1e6:.0f}",
            f"{median[contestant]['peak_bytes'] / sizes[file]:.2f}",
        ]
        for contestant, (_, file) in CONTESTANTS.items()
    ]
    print_table(["", "seconds", "× timm's safetensors", "peak memory, MB", "× the file"], rows)


def write_files(folder: Path) -> None:
    model = create("B/16", num_classes=1000, gelu="erf", seed=0)
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.02)
    save_as(model, folder / "native.safetensors", "native")
    save_as(model, folder / "authors.npz", "npz")
    save_as(model, folder / "timm.safetensors", "timm")
    from safetensors.torch import load_file

    torch.save(load_file(folder / "timm.safetensors"), folder / "timm.pth")


def load_once(loader: str, path: Path) -> dict:
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, loader, str(path)], capture_output=True, text=True, check=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
