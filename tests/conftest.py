"""What several test files share: the command in this process, small pictures on disk, and models made in a second."""

import contextlib
import io
import logging
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

COLORS = {"blue": (40, 60, 210), "green": (40, 190, 60), "red": (210, 50, 40)}
TINY = ("--num-blocks", "1", "--hidden-dim", "16", "--tokens-mlp-dim", "8", "--channels-mlp-dim", "32")


@dataclass(frozen=True)
class Answer:
    """What one call of the command left."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that tell a failure."""
        return [line for line in self.err.splitlines() if line.startswith("mixer: ")]

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]


def call(*words: object) -> Answer:
    """``mixer WORDS`` in this process; the logger is left as it was."""
    from allmlp.cli import main

    ours = logging.getLogger("allmlp")
    before = ours.handlers, ours.propagate, ours.level
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([str(word) for word in words])
            except SystemExit as end:  # of --help
                status = int(end.code or 0)
    finally:
        ours.handlers, ours.propagate = before[:2]
        ours.setLevel(before[2])
    return Answer(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def mixer() -> Callable[..., Answer]:
    return call


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options of ``mixer train`` for a model that learns next to nothing, fast."""
    return TINY


def write_pictures(root: Path, counts: dict[str, int]) -> Path:
    """``counts``: folder → how many noisy 16×16 PNGs of the color that its last name says (or gray)."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        color = COLORS.get(Path(folder).name, (128, 128, 128))
        rng = np.random.default_rng(len(folder))
        for i in range(count):
            noisy = np.clip(np.array(color) + rng.integers(-30, 31, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def pictures() -> Callable[[Path, dict[str, int]], Path]:
    return write_pictures


def huge_header() -> bytes:
    """A PNG of a few bytes that claims 30,000 × 30,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(90_001))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()[: file.tell() // 2]


@pytest.fixture(params=["truncated.jpg", "text.png", "huge.png"])
def bad_picture(request: pytest.FixtureRequest) -> tuple[str, bytes, str]:
    """(file name, its bytes, what the message about it says)."""
    return {
        "truncated.jpg": ("truncated.jpg", truncated_jpeg(), "truncated"),
        "text.png": ("text.png", b"this is no picture\n", "its format is none of JPEG, PNG"),
        "huge.png": ("huge.png", huge_header(), "30000 × 30000 pixels"),
    }[request.param]


@pytest.fixture(scope="session")
def color_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that tell blue, green and red pictures of 16×16 apart: nearest mean of the features of fresh weights."""
    import torch

    import allmlp
    from allmlp.data.transforms import normalize
    from allmlp.metadata import Preprocessing

    torch.manual_seed(0)
    sizes = {"patch_size": 8, "num_blocks": 1, "hidden_dim": 16, "tokens_mlp_dim": 8, "channels_mlp_dim": 32}
    model = allmlp.create(num_classes=3, image_size=16, **sizes)
    solid = torch.tensor(list(COLORS.values()), dtype=torch.uint8)[..., None, None].expand(3, 3, 16, 16)
    with torch.no_grad():
        means = model.features(normalize(solid, Preprocessing()))
        means -= means.mean(0)
        model.head.weight.copy_(8 * means)
        model.head.bias.copy_(-4 * means.square().sum(1))
    path = tmp_path_factory.mktemp("weights") / "colors.safetensors"
    allmlp.save(model, path, classes=list(COLORS))
    return path


@dataclass(frozen=True)
class TrainedRun:
    out: Path
    answer: Answer


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """The embedded digits, two epochs, with --json."""
    out = tmp_path_factory.mktemp("digits") / "run"
    return TrainedRun(out, call("train", "--epochs", 2, *TINY, "--out", out, "--json"))
