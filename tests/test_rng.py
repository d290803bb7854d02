"""Random streams: their definition, their statistics, and what they depend on."""

import hashlib
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from allmlp.rng import parameter_generator, rng_stream, sample_keys, uniform

SEEDS = (0, 1, 2**31 - 1)
WRAP = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    """Steele et al. 2014's finalizer of 64 bits, in Python's integers."""
    z &= WRAP
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WRAP
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WRAP
    return z ^ (z >> 31)


def keys_of(samples: int = 256, seed: int = 0, first: int = 0) -> Tensor:
    return sample_keys(seed, torch.arange(first, first + samples))


def drawn(keys: Tensor, stream: int = 0, shape: tuple[int, ...] = (16, 64)) -> np.ndarray:
    return uniform(keys, stream, torch.empty(len(keys), *shape)).numpy()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of what independent numbers show."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return abs(float(np.corrcoef(a, b)[0, 1])) * math.sqrt(len(a))


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_are_their_definition(seed: int) -> None:
    samples = [0, 1, 2**32, 2**40 + 3, 2**62]
    expected = [splitmix(splitmix(sample + seed * (2**32 + 1)) + GOLDEN) for sample in samples]
    assert [key & WRAP for key in sample_keys(seed, torch.tensor(samples)).tolist()] == expected


def test_shape_type_and_range() -> None:
    found = uniform(keys_of(256), 3, torch.empty(256, 64, 16, dtype=torch.bfloat16).mT)
    assert (found.shape, found.dtype) == ((256, 16, 64), torch.float32)
    assert 0 <= found.min() < 1e-4
    assert 1 - 1e-4 < found.max() < 1
    assert uniform(keys_of(2), 3, torch.empty(2, 1, 1)).shape == (2, 1, 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 70])
def test_the_numbers_are_uniform(seed: int, stream: int) -> None:
    values = drawn(keys_of(512, seed), stream).astype(np.float64)
    n = values.size
    assert abs(values.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(((values - 1 / 2) ** 2).mean() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = np.histogram(values, bins=256, range=(0, 1))[0]
    chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    bits = (values * 2**24).astype(np.int64)
    assert (bits == values * 2**24).all()
    for bit in range(24):
        assert abs(((bits >> bit) & 1).mean() - 1 / 2) < 5 * math.sqrt(1 / 4 / n), bit


@pytest.mark.parametrize("seed", SEEDS)
def test_one_number_a_sample_is_uniform_over_the_samples(seed: int) -> None:
    for stream in (0, 1, 42):  # what stochastic depth draws
        values = drawn(keys_of(100_000, seed), stream, (1, 1)).ravel().astype(np.float64)
        counts = np.histogram(values, bins=100, range=(0, 1))[0]
        assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 5 * math.sqrt(2 * 99)
        for lag in (1, 2, 8, 64):
            assert correlation(values[lag:], values[:-lag]) < 5


def test_neighbors_are_independent() -> None:
    values = drawn(keys_of(512))
    pairs = {
        "samples": (values[1:], values[:-1]),
        "rows": (values[:, 1:], values[:, :-1]),
        "elements": (values[:, :, 1:], values[:, :, :-1]),
        "streams": (values, drawn(keys_of(512), 1)),
        "blocks": (values, drawn(keys_of(512), 6)),
        "steps": (values, drawn(keys_of(512, first=512))),
        "seeds": (values, drawn(keys_of(512, seed=1))),
    }
    for name, (a, b) in pairs.items():
        assert correlation(a, b) < 5, name
        assert correlation(a < 0.1, b < 0.1) < 5, name  # as masks at a low rate


def test_a_samples_numbers_do_not_depend_on_the_batch_around_it() -> None:
    keys = keys_of(32)
    whole = drawn(keys, 5)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(drawn(keys[order], 5), whole[order.numpy()])
    for i in (0, 7, 31):
        assert np.array_equal(drawn(keys[i : i + 1], 5)[0], whole[i])


def test_with_keys_torchs_generator_is_not_used() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(keys_of(4), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(drawn(keys_of(4), 2), first)


def test_without_keys_torchs_generator_is_used() -> None:
    torch.manual_seed(1)
    first = uniform(None, 0, torch.empty(3, 4))
    assert not torch.equal(uniform(None, 0, torch.empty(3, 4)), first)
    torch.manual_seed(1)
    assert torch.equal(uniform(None, 7, torch.empty(3, 4)), first)


def test_keys_are_distinct_over_seeds_and_samples() -> None:
    first = (0, 2**31 - 50_000, 2**40)
    keys = torch.cat([keys_of(100_000, seed, start) for seed in (*SEEDS, 12345) for start in first])
    assert len(keys.unique()) == len(keys) == 4 * 3 * 100_000


def test_numpy_streams_are_philox_with_seed_and_stream_for_a_key() -> None:
    def first(seed: int, stream: int) -> int:
        return int(rng_stream(seed, stream).integers(2**62))

    expected = np.random.Generator(np.random.Philox(key=np.array([3, 1 << 63 | 5], dtype=np.uint64)))
    assert first(3, 1 << 63 | 5) == int(expected.integers(2**62)) == first(3, 1 << 63 | 5)
    assert len({first(seed, stream) for seed in (0, 1, 2**31) for stream in (0, 1, 1 << 62, WRAP)}) == 12


def test_a_parameters_generator_is_seeded_by_the_digest_of_seed_and_name() -> None:
    def first(seed: int, name: str) -> float:
        return torch.rand((), generator=parameter_generator(seed, name), dtype=torch.float64).item()

    state = torch.get_rng_state()
    digest = hashlib.sha256(b"7/stem.weight").digest()
    expected = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    assert first(7, "stem.weight") == torch.rand((), generator=expected, dtype=torch.float64).item()
    assert len({first(seed, name) for seed in (0, 1, 11) for name in ("a", "b", "1/a")}) == 9
    assert torch.equal(torch.get_rng_state(), state)


COMPILED = """
import torch
from allmlp.rng import sample_keys, uniform
from allmlp.model import Mixer

def masks(keys, x):
    return [uniform(keys, stream, x) for stream in (0, 1, 50)] + [(uniform(keys, 2, x) >= 0.3).to(x.dtype) * x]

keys, x = sample_keys(3, torch.arange(8)), torch.ones(8, 5, 7)
for found, expected in zip(torch.compile(masks)(keys, x), masks(keys, x), strict=True):
    assert torch.equal(found, expected), (found - expected).abs().max()
"""

COMPILED_MODEL = """
import torch
from allmlp.rng import sample_keys
from allmlp.model import Mixer
from allmlp.training.compilation import compile_model
from allmlp.training.memory import recompute_blocks

def gradients(recompute, compiled):
    model = Mixer(num_classes=3, image_size=8, patch_size=2, num_blocks=2, hidden_dim=12, tokens_mlp_dim=6,
                  channels_mlp_dim=20, seed=0, dropout=0.3, stochastic_depth=0.5).train()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    if recompute:
        recompute_blocks(model)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    forward, _ = compile_model(model, "on" if compiled else "off", batch_size=6, training_flop=1.0,
                               device=torch.device("cpu"), precision=torch.float32)
    logits = forward(images, sample_keys(3, torch.arange(6)))
    logits.logsumexp(1).sum().backward()
    return [logits.detach()] + [p.grad for p in model.parameters()]

expected = gradients(False, False)
for found in (gradients(False, True), gradients(True, True)):
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), (a - b).abs().max()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("program", [COMPILED, COMPILED_MODEL], ids=["masks", "model"])
def test_compiled_code_draws_the_same(program: str) -> None:
    """In a separate process: wrong code may write anywhere in memory."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, (ended.returncode, ended.stderr[-500:])
