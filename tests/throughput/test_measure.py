"""Measurements of small models: what is reported, memory that runs out, models that do not fit."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from allmlp.api.bench import bench, make_training_step
from allmlp.errors import UserError
from allmlp.factory import create
from allmlp.flops import cost
from allmlp.throughput import measure as module
from allmlp.throughput.charts import plot_measurements
from allmlp.throughput.device_days import IMAGENET, JFT, device_days
from allmlp.throughput.measure import Measurement, grouped, measure, with_ratios
from allmlp.throughput.subject import ModelSubject, OutOfMemory

CPU = {"device": torch.device("cpu"), "precision": torch.float32}
SMALL = {"num_blocks": 1, "patch_size": 8, "hidden_dim": 16, "tokens_mlp_dim": 8, "channels_mlp_dim": 32}
LARGER = SMALL | {"num_blocks": 4, "hidden_dim": 256, "channels_mlp_dim": 1024}
MAKERS = {
    "small": partial(create, image_size=32, num_classes=10, **SMALL),
    "larger": partial(create, image_size=32, num_classes=10, **LARGER),
}


def test_what_is_measured_of_two_models() -> None:
    found = measure(MAKERS, **CPU, budget_seconds=4, batch_sizes=[1, 4, 16], make_training_step=make_training_step)
    assert [row.name for row in found] == ["small", "larger"]
    for row, make in zip(found, MAKERS.values(), strict=True):
        counted = cost(make())
        assert (row.parameters, row.macs, row.image_size) == (counted.parameters, counted.macs, (32, 32))
        assert list(row.sweep) in ([1], [1, 4], [1, 4, 16])  # as time allows
        assert row.batch_size in row.sweep
        lowest, highest = row.images_per_second_range
        assert 0 < lowest <= row.images_per_second <= highest
        assert 0 < row.latency_ms["p50"] <= row.latency_ms["p90"] <= row.latency_ms["p99"]
        assert row.train_images_per_second > 0
        assert row.train_batch_size >= 2
        assert row.problem is None
        assert row.alternated
    small, larger = found
    assert small.ratio == 1.0
    assert larger.ratio < 0.9
    assert small.images_per_second > larger.images_per_second
    json.dumps(small.to_json_object())


def test_weights_that_do_not_fit_are_reported_and_the_others_measured() -> None:
    def too_large():
        if torch.get_default_device().type == "meta":
            return MAKERS["larger"]()
        raise torch.OutOfMemoryError("out of memory")

    large, small = measure({"large": too_large, "small": MAKERS["small"]}, **CPU, budget_seconds=2, latency=False)
    assert large.problem == "the weights do not fit into memory"
    assert large.images_per_second is None
    assert small.images_per_second > 0
    assert small.ratio is None


def test_memory_that_runs_out_in_the_middle_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ModelSubject.forward

    def limited(self: ModelSubject, batch_size: int) -> None:
        if self.name == "larger" and batch_size > 4:
            raise OutOfMemory
        forward(self, batch_size)

    monkeypatch.setattr(ModelSubject, "forward", limited)
    small, larger = measure(MAKERS, **CPU, budget_seconds=5, batch_sizes=[1, 8], latency=False)
    assert small.sweep[8] is not None
    assert larger.sweep[8] is None
    assert larger.batch_size == 1


LIMITED = """
import json, resource, sys, torch
from functools import partial
from allmlp.factory import create
from allmlp.throughput.measure import measure
torch.set_num_threads(1)
sizes = {"num_blocks": 1, "patch_size": 64, "hidden_dim": 16, "tokens_mlp_dim": 8, "channels_mlp_dim": 16}
make = partial(create, image_size=256, num_classes=10, **sizes)
make()(torch.zeros(1, 3, 256, 256))
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
row, = measure({"m": make}, device=torch.device("cpu"), precision=torch.float32, budget_seconds=20,
               batch_sizes=[1, 8, 2048], latency=False)
print(json.dumps(row.to_json_object()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("foresight", [True, False], ids=["foreseen", "met"])
def test_a_real_limit_of_memory_is_survived(foresight: bool) -> None:
    """2,048 images have 1.6 GB, and 300 MB are there: refused in advance, or by the allocator."""
    blind = "" if foresight else "import allmlp.throughput.subject as s; s.available_memory = lambda device: None\n"
    done = subprocess.run([sys.executable, "-c", blind + LIMITED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout)
    assert row["sweep"]["2048"] is None
    assert row["sweep"]["8"] > 0
    assert row["batch_size"] in (1, 8)


def test_training_batches_keep_to_the_memory_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, a batch that would need more is not tried: Linux would end the process."""
    from allmlp.throughput import subject as subject_module

    subject = ModelSubject("m", MAKERS["larger"], make_training_step=make_training_step, **CPU)
    subject.load()
    subject.train(2)
    subject.train(32)
    if not subject.training_bytes_per_image:
        pytest.skip("this system does not tell")
    needed = subject.training_bytes_per_image * 64
    monkeypatch.setattr(subject_module, "available_memory", lambda device: int(needed))
    with pytest.raises(OutOfMemory):
        subject.train(64)
    subject.train(32)


PEAK = """
import torch
from allmlp.throughput.memory import available_memory, peak_growth
device = torch.device("cpu")
print(available_memory(device), peak_growth(lambda: torch.ones(64 * 2**20).sum() and None, device))
"""


def test_memory_is_known_here_and_a_peak_is_seen() -> None:
    """In a process of its own: memory that was freed before and is used again would not be seen."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120)
    available, grown = done.stdout.split()
    if "None" in (available, grown):
        pytest.skip("this system does not tell")
    assert int(available) > 2**28
    assert 0.9 * 2**28 < int(grown) < 2**30


def test_models_that_do_not_fit_together_are_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": 100, "b": 900, "c": 100, "d": 800}
    assert grouped(sizes, None) == [["a", "b", "c", "d"]]
    assert grouped(sizes, 10**6) == [["a", "b", "c", "d"]]
    assert grouped(sizes, 2400) == [["a", "c"], ["b"], ["d"]]
    assert grouped(sizes, 10) == [["a"], ["b"], ["c"], ["d"]]
    monkeypatch.setattr(module, "available_memory", lambda device: 8 * 20_000)
    rows = measure(MAKERS, **CPU, budget_seconds=3, latency=False)
    assert [row.alternated for row in rows] == [False, False]
    assert all(row.images_per_second for row in rows)
    assert rows[1].ratio == pytest.approx(rows[1].images_per_second / rows[0].images_per_second)


def row(name: str, *rates: float, alternated: bool = True) -> Measurement:
    return Measurement(
        name=name, image_size=(1, 1), parameters=1, macs=1, rates=rates, alternated=alternated,
        images_per_second=sorted(rates)[len(rates) // 2],
    )  # fmt: skip


def test_ratios_are_medians_within_the_rounds() -> None:
    """Where the machine was twice as slow in one round, the ratio is not."""
    first, second = with_ratios([row("a", 10, 20, 20), row("b", 5, 10, 14)])
    assert (first.ratio, second.ratio) == (1.0, 0.5)
    assert with_ratios([row("a", 10, 20, 20), row("b", 5, 10, 14, alternated=False)])[1].ratio == 0.5
    assert with_ratios([row("a", 10, 30, 20), row("b", 5, 10, alternated=False)])[1].ratio == 0.5


def test_device_days() -> None:
    assert device_days(IMAGENET, 1000.0) == pytest.approx(1_281_167 * 300 / 1000 / 86400)
    assert device_days(JFT, 1000.0) == pytest.approx(48.6, abs=0.1)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        (["B/61"], {}, "unknown model 'B/61'; the nearest: .*B/16"),
        ([], {}, "no models: name some"),
        (["S/32", "S/32"], {}, "S/32 is given twice"),
        (["S/32"], {"image_size": 100}, "100×100 is not a multiple of the patch size"),
        (["S/32"], {"budget_seconds": 0.5}, "--budget 0.5 s for 1 model.*at least 1 s"),
        (["S/32"], {"batch_sizes": [4, 0]}, "--batch-sizes 0: must be at least 1"),
        (["missing.safetensors"], {}, "missing.safetensors"),
    ],
)
def test_bad_input_is_one_line(models: list[str], options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        bench(models, progress=False, device="cpu", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_plot(ending: str, tmp_path: Path) -> None:
    rows = [row("a", 10, 20, 20), row("b", 5, 10, 14), Measurement(name="c", image_size=(1, 1), parameters=1, macs=1)]
    from dataclasses import replace

    rows[:2] = [replace(one, sweep={1: 5.0, 2: 20.0, 4: None}, batch_size=2) for one in rows[:2]]
    plot_measurements(rows, tmp_path / f"p.{ending}", "title")
    assert (tmp_path / f"p.{ending}").stat().st_size > 1000
    with pytest.raises(UserError, match=r"--plot .*p.txt: give a file name that ends in .png, .svg, .pdf"):
        plot_measurements(rows, tmp_path / "p.txt", "title")
