"""metrics.jsonl and consumed.jsonl: cut back to the checkpoint, whatever a killed run left at their ends."""

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from test_fit import recipe

from allmlp.errors import RunError
from allmlp.runs.records import CONSUMED, METRICS, Records, cut


def fill(out: Path, steps: range, evaluated: tuple[int, ...] = (2, 4, 6), step: int = 0) -> Records:
    """A run's lines, each step logged before its evaluation."""
    with Records(out, recipe(), step=step) as records:
        for now in steps:
            records.consume(now, 12 * now, 2**64 - now)
            records.write({"step": now, "epoch": now / 2, "loss": 1 / now})
            if now in evaluated:
                records.write({"step": now, "epoch": now / 2, "val_top1": now / 10, "val_loss": 1.0})
        records.sync()
    return records


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(out: Path) -> list[tuple[int, str]]:
    return [(line["step"], "val" if "val_top1" in line else "loss") for line in read(out / METRICS)]


def test_a_line_for_each_and_digests_of_64_bits(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 3))
    assert read(tmp_path / METRICS) == [
        {"step": 1, "epoch": 0.5, "loss": 1.0},
        {"step": 2, "epoch": 1.0, "loss": 0.5},
        {"step": 2, "epoch": 1.0, "val_top1": 0.2, "val_loss": 1.0},
    ]
    assert read(tmp_path / CONSUMED) == [
        {"step": 1, "samples": 12, "digest": "ffffffffffffffff"},
        {"step": 2, "samples": 24, "digest": "fffffffffffffffe"},
    ]


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    """For whoever looks on, and for the run that goes on where this one is killed."""
    with Records(tmp_path, recipe()) as records:
        records.write({"step": 1, "loss": float("nan")})
        records.consume(1, 12, 5)
        assert read(tmp_path / METRICS) == [{"step": 1, "loss": None}]
        assert read(tmp_path / CONSUMED) == [{"step": 1, "samples": 12, "digest": "0000000000000005"}]


@pytest.mark.parametrize("step", range(8))
def test_going_on_cuts_back_to_the_checkpoint_and_its_evaluation(step: int, tmp_path: Path) -> None:
    fill(tmp_path, range(1, 7))
    expected = [pair for pair in shown(tmp_path) if pair[0] < step or pair == (step, "loss")]
    with Records(tmp_path, recipe(), step=step) as records:
        assert shown(tmp_path) == expected
        assert records.metrics == read(tmp_path / METRICS)
        assert [line["step"] for line in read(tmp_path / CONSUMED)] == list(range(1, min(step, 6) + 1))


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_gone_on_with_the_files_are_those_of_one_run(step: int, tmp_path: Path) -> None:
    fill(tmp_path, range(1, 7))
    whole = {name: (tmp_path / name).read_text() for name in (METRICS, CONSUMED)}
    fill(tmp_path, range(step + 1, 7), step=step)
    assert {name: (tmp_path / name).read_text() for name in whole} == whole


ENDINGS = {
    "cut short": b'{"step": 6, "epo',
    "one character": b"{",
    "without its newline": b'{"step": 6, "epoch": 3.0, "loss": 0.1}',
    "zeros": bytes(300),
    "zeros, then a line": bytes(300) + b'{"step": 8, "epoch": 4.0, "loss": 0.1}\n',
    "zeros, a newline": bytes(300) + b"\n",
    "no text": b"\xff\xfe\x80\n",
    "half a character": "ä".encode()[:1],
    "no JSON": b"what is this\n",
    "JSON, but no record": b'5\nnull\n[]\n"step"\n',
    "a record of nothing": b"{}\n",
    "an empty line": b"\n",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("name", [METRICS, CONSUMED])
def test_what_a_lost_machine_left_at_the_end_goes(name: str, ending: bytes, tmp_path: Path) -> None:
    """Lines up to the checkpoint are synced before it; what follows them may be anything."""
    fill(tmp_path, range(1, 6))
    before = {kind: read(tmp_path / kind) for kind in (METRICS, CONSUMED)}
    with (tmp_path / name).open("ab") as file:
        file.write(ending)
    with Records(tmp_path, recipe(), step=5) as records:
        assert records.metrics == before[METRICS]
        records.write({"step": 6, "loss": 0.5})
        records.consume(6, 72, 1)
    assert read(tmp_path / METRICS) == [*before[METRICS], {"step": 6, "loss": 0.5}]
    assert read(tmp_path / CONSUMED)[:-1] == before[CONSUMED]


def test_cut_anywhere_what_is_whole_stays(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 7))
    content, rng = (tmp_path / METRICS).read_bytes(), random.Random(0)
    for end in rng.sample(range(len(content)), 60):
        (tmp_path / METRICS).write_bytes(content[:end])
        kept = cut(tmp_path / METRICS, lambda record: True)
        whole = content[:end].rpartition(b"\n")[0] + b"\n" if b"\n" in content[:end] else b""
        assert (tmp_path / METRICS).read_bytes() == whole
        assert kept == [json.loads(line) for line in whole.splitlines()]


def test_the_lines_that_stay_are_the_same_to_the_byte(tmp_path: Path) -> None:
    odd = '{"step":1,   "loss": 1e-3}\n{"loss": 0.30000000000000004, "step": 2}\n{"step": 3}\n'
    (tmp_path / METRICS).write_text(odd)
    assert [record["step"] for record in cut(tmp_path / METRICS, lambda record: record["step"] < 3)] == [1, 2]
    assert (tmp_path / METRICS).read_text() == odd[: odd.index('{"step": 3}')]


def test_no_file_is_no_record(tmp_path: Path) -> None:
    assert cut(tmp_path / METRICS, lambda record: True) == []
    assert not (tmp_path / METRICS).exists()


def test_another_process_than_the_first_writes_nothing(tmp_path: Path) -> None:
    with Records(tmp_path, recipe(), writes=False) as records:
        records.write({"step": 1, "loss": 0.5})
        records.consume(1, 12, 5)
        records.sync()
    assert list(tmp_path.iterdir()) == []
    assert records.metrics == [{"step": 1, "loss": 0.5}]


# where else the numbers go


def events(out: Path) -> list[tuple[str, int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    return sorted((tag, e.step, e.value) for tag in found.Tags()["scalars"] for e in found.Scalars(tag))


@pytest.mark.parametrize("step", [0, 3])
def test_tensorboard_forgets_what_is_done_again(step: int, tmp_path: Path) -> None:
    fill(tmp_path, range(1, 6), evaluated=(2, 5))
    with Records(tmp_path, recipe(), step=step) as records:
        for now in range(step + 1, 5):
            records.write({"step": now, "epoch": now / 2, "loss": 1 / now + 1})
    seen = [(at, value) for tag, at, value in events(tmp_path) if tag == "loss"]
    assert seen == [(now, pytest.approx(1 / now + (now > step))) for now in range(1, 5)]


class Wandb(types.ModuleType):
    """Weights & Biases, so far as a run sees it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.begun.append(options)
        return types.SimpleNamespace(log=lambda numbers, step: self.logged.append((numbers, step)), finish=self.finish)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_with_the_same_run(wandb: Wandb, tmp_path: Path) -> None:
    for step in (0, 1):
        with Records(tmp_path, recipe(wandb="trees"), step=step) as records:
            records.write({"step": step + 1, "epoch": 0.5, "loss": 0.25, "memory_bytes": None})  # pyright: ignore[reportArgumentType]
    first, second = wandb.begun
    assert first["project"] == second["project"] == "trees"
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert wandb.logged == [({"loss": 0.25}, 1), ({"loss": 0.25}, 2)]
    assert wandb.finished == 2


def test_wandb_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match="--wandb trees needs Weights & Biases: pip install wandb, or leave it out"):
        Records(tmp_path, recipe(wandb="trees"))
