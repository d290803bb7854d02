"""Runs of ``mixer train`` that are hurt, gone on with, and held against one that was not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

DRIVER = Path(__file__).with_name("driver.py")
STEPS, EVALUATE, SAVE = 36, 12, 4
RECIPE = (
    *("train", "digits", "--steps", STEPS, "--evaluate-every-steps", EVALUATE, "--save-every-steps", SAVE),
    *("--global-batch-size", 32, "--warmup-steps", 5, "--log-every-steps", 3, "--compile", "off", "--workers", 0),
    *("--num-blocks", 2, "--hidden-dim", 16, "--tokens-mlp-dim", 8, "--channels-mlp-dim", 32),
    *("--ema-decay", 0.9, "--mixup", 0.2, "--dropout", 0.1, "--stochastic-depth", 0.1, "--randaugment", 5),
    *("--device", "cpu", "--timeout-seconds", 60),
)
WAYS = {"1 process": (), "2 DDP": ("--processes", 2), "2 FSDP2": ("--processes", 2, "--shard")}


@dataclass
class Ended:
    """What a call of the command left."""

    status: int
    err: str
    seconds: float
    struck: float | None  # seconds from the fault to the end


@dataclass
class Lab:
    """A folder for runs, and the command to make them in it."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def call(self, *words: object, fault: dict[str, Any] | None = None, note: str = "", limit: float = 300) -> Ended:
        notes = Path(tempfile.mkdtemp(dir=self.root))
        process, began = self.begin(*words, fault=fault, note=note, notes=notes), time.time()
        try:
            _, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, err = process.communicate()
            return Ended(-1, f"{err}\n(no end within {limit} s)", limit, None)
        now, struck = time.time(), notes / "struck"
        since = now - float(struck.read_text().split()[0]) if struck.exists() else None
        return Ended(process.returncode, err, now - began, since)

    def begin(
        self, *words: object, fault: dict[str, Any] | None = None, note: str = "", notes: Path | None = None
    ) -> subprocess.Popen[str]:
        told = {"NOTES": str(notes or self.root), "NOTE": note, "XDG_STATE_HOME": str(self.root / "state")}
        told |= {"CHAOS": json.dumps(fault)} if fault else {}
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | self.environment | told
        command = [sys.executable, str(DRIVER), *map(str, words)]
        return subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def train(self, name: str, *words: object, **keywords: Any) -> Ended:
        """The recipe in the run of that name, gone on with if there is one."""
        return self.call(*RECIPE, "--out", self.root / name, "--resume", "auto", *words, **keywords)


def checkpoints(run: Path) -> list[Path]:
    """The newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def tensors(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint's tensors, whole, whatever number of ranks wrote them."""
    import torch

    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in stored.items()
        if isinstance(m, TensorStorageMetadata)
    }
    load(found, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return found


def digests(checkpoint: Path) -> dict[str, str]:
    return {
        k: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for k, t in sorted(tensors(checkpoint).items())
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("images_per_second", "images_per_second_per_device", "data_wait", "memory_bytes")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def exact(run: Path) -> str:
    """SHA-256 of weights, optimiser and averages at the end, the log of consumed samples, and what was measured."""
    total = hashlib.sha256(json.dumps(digests(checkpoints(run)[0])).encode())
    total.update((run / "consumed.jsonl").read_bytes())
    total.update(json.dumps(metrics(run)).encode())
    return total.hexdigest()


def sound(run: Path) -> list[int]:
    """Steps of the checkpoints that hold what their manifests say."""
    from allmlp.checkpointing.checkpoint import Damaged, verify

    found = []
    for path in checkpoints(run):
        try:
            found.append(verify(path, trusted=True)["step"])
        except Damaged:
            continue
    return found


def leftovers(run: Path) -> list[str]:
    """Files and folders of unfinished saves."""
    return [path.name for path in (run / "checkpoints").glob(".*")]
