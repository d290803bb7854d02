"""The accuracy of resized models: a small Mixer is trained on CIFAR-10 at 32 px, then resized.

At 64 px (Supplement C, K = 2), 48, 40 and 24 px: test top-1 directly after the resize, and after one epoch of
fine-tuning, for allmlp.resize, for plain bilinear interpolation of W1 and W2 over the grid, and for new random
token-mixing weights. Paired: for each seed, the three methods start from the same model and see the same batches.

python benchmarks/resize_cifar10.py --data cifar10.zip       # about 50 minutes on two cores
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import machine, print_table, train_steps, write_results
from torch import Tensor

from allmlp.data.dataset import ImageDataset
from allmlp.data.loader import Batch
from allmlp.data.sources import load_source
from allmlp.data.transforms import normalize
from allmlp.factory import create
from allmlp.metadata import Preprocessing
from allmlp.model import Mixer
from allmlp.training.losses import softmax
from allmlp.training.optimizer import adamw, sgd
from allmlp.training.optimizer_step import OptimizerStep
from allmlp.training.schedules import learning_rate
from allmlp.training.step import InputPreparation, TrainingStep
from allmlp.weights.load import load
from allmlp.weights.native import save
from allmlp.weights.resize import resize

SIZES = (64, 48, 40, 24)
METHODS = ("resize", "bilinear", "random")
MODEL = {"patch_size": 4, "num_blocks": 4, "hidden_dim": 64, "tokens_mlp_dim": 32, "channels_mlp_dim": 128}
BATCH, BASE_EPOCHS, BASE_RATE, TUNE_RATE = 128, 5, 2e-3, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as image files: a folder or zip with train/ and test/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=None, help="use only this many to try the script")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool,  # one core each
    ):
        folder = Path(name)
        source = load_source(options.data, val_fraction=0.0, test_fraction=0.1, split_seed=0, max_pixels=10**6)
        data = {split: pixels(source.splits[split], options.images) for split in ("train", "test")}
        torch.save(data, folder / "data.pt")
        bases = dict(zip(options.seeds, pool.map(partial(train_base, folder), options.seeds), strict=True))
        for seed, top1 in bases.items():
            print(f"seed {seed}: {top1:.4f} at 32 px after {BASE_EPOCHS} epochs", flush=True)
        cells = [(seed, size, method) for size in SIZES for seed in options.seeds for method in METHODS]
        runs = []
        for run in pool.map(partial(resize_and_tune, folder), cells):
            runs.append(run)
            print(" ".join(f"{key} {value}" for key, value in run.items()), flush=True)
    results = {"machine": machine(torch.device("cpu")), "base_top1": bases, "runs": runs}
    write_results("resize_cifar10", results)
    rows = []
    for size in SIZES:
        for method in METHODS:
            cell = [run for run in runs if (run["size"], run["method"]) == (size, method)]
            scores = [mean_sd([run[key] for run in cell]) for key in ("before", "after")]
            texts = [f"{mean:.4f} ± {sd:.4f}" for mean, sd in scores]
            rows.append([f"{size} px", method, str(cell[0]["tokens_mlp_dim"]), *texts])
    print_table(["image", "token mixing", "D_S", "top-1 directly", "after one epoch"], rows)


def pixels(dataset: ImageDataset, limit: int | None) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 and (N,) labels of the images, or of a random sample of them."""
    chosen = np.random.default_rng(0).permutation(len(dataset))[:limit]
    images = np.stack([np.asarray(dataset.read(int(i))) for i in chosen])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(dataset.labels[chosen])


def read(folder: Path, split: str, size: int) -> tuple[Tensor, Tensor]:
    images, labels = torch.load(folder / "data.pt", weights_only=True)[split]
    if size == 32:
        return images, labels
    scaled = partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    return torch.cat([scaled(some.float()).round().byte() for some in images.split(1000)]), labels


def train_base(folder: Path, seed: int) -> float:
    torch.set_num_threads(1)
    model = create(num_classes=10, image_size=32, seed=seed, **MODEL)
    train(model, read(folder, "train", 32), BASE_EPOCHS, adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.999), seed)
    save(model, folder / f"{seed}.safetensors")
    return top1(model, read(folder, "test", 32))


def resize_and_tune(folder: Path, cell: tuple[int, int, str]) -> dict:
    torch.set_num_threads(1)
    seed, size, method = cell
    model = load(folder / f"{seed}.safetensors")
    model = {"resize": resize, "bilinear": bilinear, "random": reinitialized}[method](model, size)
    test, begin = read(folder, "test", size), time.perf_counter()
    before = top1(model, test)
    train(model, read(folder, "train", size), 1, sgd(model, momentum=0.9), 1000 + seed)
    width = model.config["tokens_mlp_dim"]
    result = {"seed": seed, "size": size, "method": method, "tokens_mlp_dim": width, "before": before}
    return result | {"after": top1(model, test), "seconds": round(time.perf_counter() - begin)}


def bilinear(model: Mixer, size: int) -> Mixer:
    """Interpolates W1's rows, W2's columns and b2 as images on the grid; D_S does not change."""
    new, (h, w) = create(**(model.config | {"image_size": size, "seed": 0})), model.grid
    state = model.state_dict()
    for name in state:
        if name.endswith(("token_mixing.dense_0.weight", "token_mixing.dense_1.weight", "token_mixing.dense_1.bias")):
            over_grid = state[name] if "dense_0" in name else state[name].reshape(h * w, -1).T
            maps = over_grid.unflatten(1, (h, w))[:, None]
            resized = F.interpolate(maps, new.grid, mode="bilinear", align_corners=False)[:, 0].flatten(1)
            state[name] = resized if "dense_0" in name else resized.T.reshape(-1, *state[name].shape[1:])
    new.load_state_dict(state)
    return new


def reinitialized(model: Mixer, size: int) -> Mixer:
    """Replaces token mixing by the authors' initial weights, with the same D_S; keeps all other weights."""
    new = create(**(model.config | {"image_size": size, "seed": 0}))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "token_mixing" not in name}
    new.load_state_dict(new.state_dict() | kept)
    return new


def train(model: Mixer, data: tuple[Tensor, Tensor], epochs: int, optimizer: torch.optim.Optimizer, seed: int) -> None:
    steps = epochs * len(data[1]) // BATCH
    peak = TUNE_RATE if isinstance(optimizer, torch.optim.SGD) else BASE_RATE
    schedule = partial(learning_rate, peak=peak, warmup_steps=max(steps // 10, 1), steps=steps, decay="cosine")
    inputs = InputPreparation(torch.device("cpu"), Preprocessing(), seed)
    step = TrainingStep(model, inputs, softmax, OptimizerStep(optimizer, clip_norm=1.0), schedule)
    for _ in train_steps(model, step, batches(*data, steps, seed)):
        pass


def batches(images: Tensor, labels: Tensor, steps: int, seed: int) -> Iterator[Batch]:
    """Random crops of images padded by reflection by an eighth of the side; half of them are mirrored."""
    generator = torch.Generator().manual_seed(seed)
    side, border = images.shape[-1], images.shape[-1] // 8
    order = torch.cat(
        [torch.randperm(len(labels), generator=generator) for _ in range(steps * BATCH // len(labels) + 1)]
    )
    for chosen in order[: steps * BATCH].split(BATCH):
        padded = F.pad(images[chosen].float(), (border,) * 4, mode="reflect")
        start = torch.randint(2 * border + 1, (BATCH, 2), generator=generator)
        rows, columns = start[:, :1] + torch.arange(side), start[:, 1:] + torch.arange(side)
        mirrored = torch.rand(BATCH, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        n, c = torch.arange(BATCH)[:, None, None, None], torch.arange(3)[:, None, None]
        view = padded[n, c, rows[:, None, :, None], columns[:, None, None, :]]
        yield Batch(view.byte(), labels[chosen], torch.ones(BATCH, dtype=torch.bool), chosen, [])


@torch.inference_mode()
def top1(model: Mixer, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    pairs = zip(data[0].split(500), data[1].split(500), strict=True)
    correct = sum(int((model(normalize(x, Preprocessing())).argmax(1) == y).sum()) for x, y in pairs)
    return correct / len(data[1])


def mean_sd(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
