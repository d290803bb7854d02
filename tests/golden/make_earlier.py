"""Makes tests/golden/earlier: files written by the earlier version, whose package was called mlp_mixer.

Run it in an environment with commit d3b9db7 installed: python tests/golden/make_earlier.py
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlp_mixer  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from mlp_mixer.card import Card, Preprocessing  # pyright: ignore[reportMissingImports]
from mlp_mixer.weights.export import export  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent / "earlier"
TRAIN = (
    "mixer train digits --steps 4 --num-blocks 1 --hidden-dim 8 --tokens-mlp-dim 4 --channels-mlp-dim 8 "
    "--optimizer sgd --learning-rate 0.5 --val-fraction 0.2 --test-fraction 0.4 --split-seed 3 --precision float32 "
    "--device cpu --log-every-steps 1 --evaluate-every-steps 2 --save-every-steps 2 --keep-checkpoints 1 --out run"
)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    expected = weights()
    expected |= run()
    np.savez_compressed(HERE / "expected.npz", **expected)


def weights() -> dict[str, np.ndarray]:
    """Saves one model in each format; returns its weights in the order of their names, images and their logits."""
    model = mlp_mixer.create(
        num_classes=3, image_size=(8, 12), patch_size=4, num_blocks=2, hidden_dim=8, tokens_mlp_dim=5,
        channels_mlp_dim=6, norm_eps=1e-5, stochastic_depth=0.1,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    view = Preprocessing(crop="resize", crop_ratio=0.75, interpolation="bicubic", mean=(0.1, 0.2, 0.3))
    model.card = Card(classes=("Äpfel", 'qu"ote', "猫"), preprocessing=view, provenance={"seed": 1, "by": {"ü": [0.1]}})
    images = torch.randn(4, 3, 8, 12, generator=generator)
    weights = np.concatenate([tensor.numpy().ravel() for _, tensor in sorted(model.state_dict().items())])
    with torch.no_grad():
        expected = {"weights": weights, "images": images.numpy(), "logits": model(images).numpy()}
    mlp_mixer.save(model, HERE / "native.safetensors")
    export(model, HERE / "timm.safetensors", "timm")
    export(model, HERE / "authors.npz", "npz")
    mlp_mixer.save(model.bfloat16(), HERE / "bfloat16.safetensors")
    rounded = mlp_mixer.load(HERE / "bfloat16.safetensors").float()
    with torch.no_grad():
        return expected | {"bfloat16_logits": rounded(images).numpy()}


def run() -> dict[str, np.ndarray]:
    """Keeps the folder of a run, without its large files and the checkpoint's signature; returns expected logits."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_STATE_HOME": folder}  # checkpoints are not signed with the user's key
        subprocess.run(TRAIN.split(), cwd=folder, env=environment, check=True)
        out = Path(folder) / "run"
        for unwanted in ("tensorboard", "examples"):
            shutil.rmtree(out / unwanted)
        for unwanted in ("report.html", ".lock"):
            (out / unwanted).unlink()
        shutil.rmtree(out / "checkpoints" / "step-00000002", ignore_errors=True)
        manifest = out / "checkpoints" / "step-00000004" / "manifest.json"
        manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "signature"}))
        shutil.copytree(out, HERE / "run")
    model = mlp_mixer.load(HERE / "run" / "model.safetensors")
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return {"run_images": images.numpy(), "run_logits": model(images).numpy()}


if __name__ == "__main__":
    main()
