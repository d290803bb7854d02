"""Figure 2 (right) at a size for a laptop: Mixer, ViT and ResNet, pre-trained on 3 to 100 % of half of CIFAR-10.

    python benchmarks/figure2_right.py cifar10.zip --out figure2/    # 30 to 60 minutes on two cores; resumable

What ``mixer reproduce figure2 --data cifar10.zip`` runs; see ``allmlp.reproduce.data_size``. One seed.
"""

import argparse
from pathlib import Path

import torch
from common import machine, print_table, write_results

from allmlp.reproduce.data_size import DataSizeSettings, run_data_size

COLUMNS = {
    "pretraining_val_top1": "upstream val", "pretraining_test_top1": "upstream test", "fewshot_top1": "5-shot",
    "finetuned_top1": "fine-tuned",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a SOURCE of CIFAR-10: the name cifar10, or a copy as image files")
    parser.add_argument("--out", type=Path, default=Path("figure2"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = DataSizeSettings(seed=options.seed)
    result = run_data_size(options.source, options.out, settings=settings, on_row=print_row, progress=False)
    result["source"] = "cifar10"
    write_results("figure2_right", {"machine": machine(torch.device("cpu")), **result})
    rows = [
        [row["model"], f"{row['percent']} %", f"{row['images']:,}", f"{row['epochs']:.0f}", f"{row['kept_step']}"]
        + [f"{row[key]:.3f}" for key in COLUMNS]
        + [f"{row['seconds']:.0f} s"]
        for row in result["rows"]
    ]
    print_table(["model", "part", "images", "epochs", "kept step", *COLUMNS.values(), "training"], rows)


def print_row(row: dict) -> None:
    print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
