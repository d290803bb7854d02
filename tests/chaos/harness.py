"""Runs ``mixer train`` with a fault, resumes it, and describes the outcome, to compare it with an uninterrupted run."""

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
from typing import Any, NamedTuple

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

DRIVER = Path(__file__).with_name("driver.py")
STEPS, EVALUATE, SAVE = 36, 12, 4
TRAIN = (
    *("train", "digits", "--steps", STEPS, "--evaluate-every-steps", EVALUATE, "--save-every-steps", SAVE),
    *("--global-batch-size", 32, "--warmup-steps", 5, "--log-every-steps", 3, "--compile", "off", "--workers", 0),
    *("--num-blocks", 2, "--hidden-dim", 16, "--tokens-mlp-dim", 8, "--channels-mlp-dim", 32),
    *("--ema-decay", 0.9, "--mixup", 0.2, "--dropout", 0.1, "--stochastic-depth", 0.1, "--randaugment", 5),
    *("--device", "cpu", "--timeout-seconds", 60),
)
MODES = {"1 process": (), "2 DDP": ("--processes", 2), "2 FSDP2": ("--processes", 2, "--shard")}


@dataclass
class Outcome:
    """How a call of the command ended."""

    status: int  # -1: it did not end in time
    err: str
    seconds: float
    since_fault: float | None  # seconds from the fault to the end


@dataclass
class Lab:
    """A folder for runs, in which the command is called."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def call(
        self, *words: object, fault: dict[str, Any] | None = None, note: str = "", timeout: float = 300
    ) -> Outcome:
        notes = Path(tempfile.mkdtemp(dir=self.root))
        process, start = self.start(*words, fault=fault, note=note, notes=notes), time.time()
        try:
            _, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, err = process.communicate()
            return Outcome(-1, f"{err}\n(did not end within {timeout} s)", timeout, None)
        end, fault_note = time.time(), notes / "fault"
        since_fault = end - float(fault_note.read_text().split()[0]) if fault_note.exists() else None
        return Outcome(process.returncode, err, end - start, since_fault)

    def start(
        self, *words: object, fault: dict[str, Any] | None = None, note: str = "", notes: Path | None = None
    ) -> subprocess.Popen[str]:
        variables = {"NOTES": str(notes or self.root), "NOTE": note}
        variables |= {"CHAOS": json.dumps(fault)} if fault else {}
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | self.environment | variables
        command = [sys.executable, str(DRIVER), *map(str, words)]
        return subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def train(self, name: str, *words: object, **keywords: Any) -> Outcome:
        """Trains in the folder of that name; resumes the run there if there is one."""
        return self.call(*TRAIN, "--out", self.root / name, "--resume", "auto", *words, **keywords)


def checkpoints(run: Path) -> list[Path]:
    """Newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def tensors(checkpoint: Path) -> dict[str, Any]:
    """All full tensors of a checkpoint, whatever number of ranks wrote it."""
    import torch

    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    full = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in stored.items()
        if isinstance(m, TensorStorageMetadata)
    }
    load(full, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return full


def tensor_digests(checkpoint: Path) -> dict[str, str]:
    """Name → SHA-256."""
    return {
        k: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for k, t in sorted(tensors(checkpoint).items())
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without times and memory."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    varying = ("images_per_second", "images_per_second_per_device", "data_wait", "memory_bytes")
    return [{key: value for key, value in record.items() if key not in varying} for record in records]


def run_digest(run: Path) -> str:
    """SHA-256 of the final weights, optimizer state and averages, the log of consumed samples, and the metrics."""
    total = hashlib.sha256(json.dumps(tensor_digests(checkpoints(run)[0])).encode())
    total.update((run / "consumed.jsonl").read_bytes())
    total.update(json.dumps(metrics(run)).encode())
    return total.hexdigest()


def intact_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that match their manifests."""
    from allmlp.checkpointing.checkpoint import DamagedCheckpoint, verify_checkpoint

    steps = []
    for path in checkpoints(run):
        try:
            steps.append(verify_checkpoint(path)["step"])
        except DamagedCheckpoint:
            continue
    return steps


def leftovers(run: Path) -> list[str]:
    """Files and folders of unfinished saves."""
    return [path.name for path in (run / "checkpoints").glob(".*")]


class Result(NamedTuple):
    passed: int
    trials: int
    remarks: list[str]


class Tally:
    """Counts trials and collects what failed."""

    def __init__(self) -> None:
        self.passed, self.trials, self.remarks = 0, 0, list[str]()

    def add(self, *failures: str | bool | None) -> None:
        """Counts one trial, with the failures in it; those that are False or None did not happen."""
        remarks = [str(failure) for failure in failures if failure]
        self.trials, self.passed = self.trials + 1, self.passed + (not remarks)
        self.remarks += remarks

    def result(self, *remarks: str) -> Result:
        return Result(self.passed, self.trials, [*remarks, *self.remarks])
