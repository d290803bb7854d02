"""metrics.jsonl and consumed.jsonl: truncated to the checkpoint, whatever a killed run left at their ends."""

import itertools
import json
import random
import sys
import types
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from small_runs import recipe

from allmlp.config.serialize import to_json_object
from allmlp.errors import RunError
from allmlp.runs.records import CONSUMED, METRICS, Records, truncate


def opened(out: Path, step: int = 0, wandb: str | None = None, writes: bool = True) -> AbstractContextManager[Records]:
    return Records(out, wandb, to_json_object(recipe(wandb=wandb)), writes).open(step)


def write_records(out: Path, steps: range, evaluated: tuple[int, ...] = (2, 4, 6), step: int = 0) -> None:
    """Writes the lines of a run's steps, each step before its evaluation."""
    with opened(out, step) as records:
        for i in steps:
            records.log_samples(i, 12 * i, 2**64 - i)
            records.log_metrics({"step": i, "epoch": i / 2, "loss": 1 / i})
            if i in evaluated:
                records.log_metrics({"step": i, "epoch": i / 2, "val_top1": i / 10, "val_loss": 1.0})
        records.sync()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(out: Path) -> list[tuple[int, str]]:
    return [(line["step"], "val" if "val_top1" in line else "loss") for line in read(out / METRICS)]


def test_each_record_is_a_line_and_digests_have_64_bits(tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 3))
    assert read(tmp_path / METRICS) == [
        {"step": 1, "epoch": 0.5, "loss": 1.0},
        {"step": 2, "epoch": 1.0, "loss": 0.5},
        {"step": 2, "epoch": 1.0, "val_top1": 0.2, "val_loss": 1.0},
    ]
    assert read(tmp_path / CONSUMED) == [
        {"step": 1, "samples": 12, "digest": "ffffffffffffffff"},
        {"step": 2, "samples": 24, "digest": "fffffffffffffffe"},
    ]


def test_lines_are_written_at_once_by_rank_0_alone(tmp_path: Path) -> None:
    """Users can follow the run, and a resumed run finds the lines of one that was killed."""
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
    for name, writes in (("first", True), ("other", False)):
        with opened(tmp_path / name, writes=writes) as records:
            records.log_metrics({"step": 1, "loss": float("nan")})
            records.log_samples(1, 12, 5)
            records.sync()
            assert len(records.metrics) == 1
            if writes:
                assert read(tmp_path / name / METRICS) == [{"step": 1, "loss": None}]
                assert read(tmp_path / name / CONSUMED) == [{"step": 1, "samples": 12, "digest": "0000000000000005"}]
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("step", range(8))
def test_resuming_truncates_to_the_checkpoint_and_ends_like_an_uninterrupted_run(step: int, tmp_path: Path) -> None:
    """The evaluation of the checkpoint's step is repeated."""
    write_records(tmp_path, range(1, 7))
    uninterrupted = {name: (tmp_path / name).read_text() for name in (METRICS, CONSUMED)}
    expected = [pair for pair in logged(tmp_path) if pair[0] < step or pair == (step, "loss")]
    with opened(tmp_path, step) as records:
        assert logged(tmp_path) == expected
        assert records.metrics == read(tmp_path / METRICS)
        assert [line["step"] for line in read(tmp_path / CONSUMED)] == list(range(1, min(step, 6) + 1))
    if step in (0, 1, 3, 5):
        write_records(tmp_path, range(step + 1, 7), step=step)
        assert {name: (tmp_path / name).read_text() for name in uninterrupted} == uninterrupted


LINE = b'{"step": 6, "epoch": 3.0, "loss": 0.1}'
ENDINGS = (LINE[:15], b"{", LINE, bytes(300), bytes(300) + LINE + b"\n", bytes(300) + b"\n", b"\xff\xfe\x80\n")
ENDINGS += ("ä".encode()[:1], b"what is this\n", b'5\nnull\n[]\n"step"\n', b"{}\n", b"\n")


def test_garbage_at_the_end_is_removed(tmp_path: Path) -> None:
    """Lines up to the checkpoint are synced before it; after a power failure, anything may follow them."""
    write_records(tmp_path, range(1, 6))
    before = {name: (tmp_path / name).read_bytes() for name in (METRICS, CONSUMED)}
    for damaged, ending in itertools.product(before, ENDINGS):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content + (ending if name == damaged else b""))
        with opened(tmp_path, 5):
            assert {name: (tmp_path / name).read_bytes() for name in before} == before, (damaged, ending)


def test_complete_lines_are_kept_wherever_the_file_ends(tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 7))
    content, rng = (tmp_path / METRICS).read_bytes(), random.Random(0)
    for end in rng.sample(range(len(content)), 60):
        (tmp_path / METRICS).write_bytes(content[:end])
        kept = truncate(tmp_path / METRICS, lambda record: True)
        complete = content[:end].rpartition(b"\n")[0] + b"\n" if b"\n" in content[:end] else b""
        assert (tmp_path / METRICS).read_bytes() == complete
        assert kept == [json.loads(line) for line in complete.splitlines()]


def test_lines_that_are_kept_do_not_change(tmp_path: Path) -> None:
    odd = '{"step":1,   "loss": 1e-3}\n{"loss": 0.30000000000000004, "step": 2}\n{"step": 3}\n'
    (tmp_path / METRICS).write_text(odd)
    assert [record["step"] for record in truncate(tmp_path / METRICS, lambda record: record["step"] < 3)] == [1, 2]
    assert (tmp_path / METRICS).read_text() == odd[: odd.index('{"step": 3}')]


# TensorBoard and Weights & Biases


def events(out: Path) -> list[tuple[str, int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    return sorted((tag, e.step, e.value) for tag in found.Tags()["scalars"] for e in found.Scalars(tag))


@pytest.mark.parametrize("step", [0, 3])
def test_tensorboard_forgets_the_steps_that_are_repeated(step: int, tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 6), evaluated=(2, 5))
    with opened(tmp_path, step) as records:
        for i in range(step + 1, 5):
            records.log_metrics({"step": i, "epoch": i / 2, "loss": 1 / i + 1})
    losses = [(at, value) for tag, at, value in events(tmp_path) if tag == "loss"]
    assert losses == [(i, pytest.approx(1 / i + (i > step))) for i in range(1, 5)]


class Wandb(types.ModuleType):
    """Stands in for the package, with the functions that a run uses."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        return types.SimpleNamespace(log=lambda numbers, step: self.logged.append((numbers, step)), finish=self.finish)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_continues_under_the_same_wandb_id(wandb: Wandb, tmp_path: Path) -> None:
    for step in (0, 1):
        with opened(tmp_path, step, wandb="trees") as records:
            records.log_metrics({"step": step + 1, "epoch": 0.5, "loss": 0.25, "memory_bytes": None})  # pyright: ignore[reportArgumentType]
    first, second = wandb.started
    assert first["project"] == second["project"] == "trees"
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert wandb.logged == [({"loss": 0.25}, 1), ({"loss": 0.25}, 2)]
    assert wandb.finished == 2


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = "--wandb trees needs Weights & Biases: pip install wandb, or leave it out"
    with pytest.raises(RunError, match=message), opened(tmp_path, wandb="trees"):
        pass
