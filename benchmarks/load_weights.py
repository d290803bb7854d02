"""Loading Mixer-B/16: time and peak memory of allmlp.load, against timm.create_model and load_state_dict.

Each load has a process of its own, after the imports; the contestants alternate, and medians are shown. The files hold
the same random weights: our safetensors, the authors' .npz, timm's names as .safetensors and .pth.

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

from allmlp.variants import create
from allmlp.weights.convert import save_as

CONTESTANTS = {  # what is shown → (who loads, which file)
    "allmlp.load, our safetensors": ("ours", "native.safetensors"),
    "allmlp.load, the authors' .npz": ("ours", "authors.npz"),
    "allmlp.load, timm's safetensors": ("ours", "timm.safetensors"),
    "allmlp.load, timm's .pth": ("ours", "timm.pth"),
    "timm, its safetensors": ("timm", "timm.safetensors"),
    "timm, its .pth": ("timm", "timm.pth"),
}
CHILD = """
import json, pathlib, sys, time
who, path = sys.argv[1:]
import torch
if who == "ours":
    from allmlp.weights.load import load
else:
    import timm
    from safetensors.torch import load_file
def memory(kind):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before, begin = memory("VmRSS"), time.perf_counter()
if who == "ours":
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
            for contestant, (who, file) in CONTESTANTS.items():
                run = load_once(who, folder / file)
                if number:  # the first round brings files and libraries into memory
                    runs[contestant].append(run)
        sizes = {file: (folder / file).stat().st_size for _, file in CONTESTANTS.values()}
    assert len({round(run["total"], 1) for some in runs.values() for run in some}) == 1, "they loaded different weights"
    median = {
        contestant: {key: statistics.median(run[key] for run in some) for key in ("seconds", "peak_bytes")}
        for contestant, some in runs.items()
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


def load_once(who: str, path: Path) -> dict:
    answer = subprocess.run([sys.executable, "-c", CHILD, who, str(path)], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
