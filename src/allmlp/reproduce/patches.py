"""Section 2: cost by the number of patches S, linear for Mixer and quadratic for ViT, counted and measured.

At the widths of the base models: C = 768, D_S = 384, D_C = 3072, 12 heads. D_S does not grow with S.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from allmlp.device import device_errors, exact_float32, select_device
from allmlp.errors import UserError
from allmlp.model import MixerBlock, MlpBlock

PATCHES = (49, 196, 784, 3136)  # 224 pixels in patches of 32, 16, 8 and 4
CHANNELS, TOKENS_MLP_DIM, CHANNELS_MLP_DIM, HEADS = 768, 384, 3072, 12
MIN_ROUNDS, MAX_ROUNDS = 3, 25
SAMPLE_SECONDS = 0.005  # a time is of at least so many repetitions together
MIN_BUDGET = 5.0  # seconds

Operation = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is counted and timed. ``mixer``: it is Mixer's, else ViT's. ``make``: the operation on S patches."""

    key: str
    name: str
    mixer: bool
    make: Callable[[int], Operation]


class EncoderBlock(nn.Module):
    """ViT's block (Dosovitskiy et al. 2021, Eq. 2 and 3), with attention as it is written: softmax(QKᵀ / √d) V."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS, eps=1e-6), nn.LayerNorm(CHANNELS, eps=1e-6)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.mlp = MlpBlock(CHANNELS, CHANNELS_MLP_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) → (B, S, C)."""
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(attention_products(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def attention_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ / √d) V: (B, heads, S, d) → (B, heads, S, d)."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def make_attention(patches: int) -> Operation:
    q, k, v = torch.randn(3, 1, HEADS, patches, CHANNELS // HEADS).unbind()
    return lambda: attention_products(q, k, v)


def make_fused_attention(patches: int) -> Operation:
    q, k, v = torch.randn(3, 1, HEADS, patches, CHANNELS // HEADS).unbind()
    return lambda: functional.scaled_dot_product_attention(q, k, v)


def make_token_mixing(patches: int) -> Operation:
    x, token_mixing = torch.randn(1, patches, CHANNELS), MlpBlock(patches, TOKENS_MLP_DIM)
    return lambda: token_mixing(x.mT).mT


def make_encoder_block(patches: int) -> Operation:
    x, block = torch.randn(1, patches, CHANNELS), EncoderBlock()
    return lambda: block(x)


def make_mixer_block(patches: int) -> Operation:
    x, block = torch.randn(1, patches, CHANNELS), MixerBlock(patches, CHANNELS, TOKENS_MLP_DIM, CHANNELS_MLP_DIM)
    return lambda: block(x)


ATTENTION, TOKEN_MIXING = "attention", "token_mixing"
KINDS = (
    Kind(key=ATTENTION, name="softmax(QKᵀ)V", mixer=False, make=make_attention),
    Kind(key="fused_attention", name="the same, fused", mixer=False, make=make_fused_attention),
    Kind(key="vit_block", name="ViT block", mixer=False, make=make_encoder_block),
    Kind(key=TOKEN_MIXING, name="token-mixing MLP", mixer=True, make=make_token_mixing),
    Kind(key="mixer_block", name="Mixer block", mixer=True, make=make_mixer_block),
)


def count_macs(kind: Kind, patches: int) -> int:
    """Multiply-accumulates in the matrix products of one image, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        kind.make(patches)()
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure_patches(
    patches: Sequence[int] = PATCHES,
    *,
    device: str = "auto",
    budget_seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Counts and times each operation for each number of patches, in float32, on one image.

    The operations alternate: each round times all of them once, and the medians over the rounds count. The CPU computes
    with one thread: what threads wait for one another is the same for any number of patches, and would hide the growth.

    Returns:
        For each operation and number of patches: kind, name, mixer, patches, macs, seconds (median), fastest, slowest,
        rounds, and the growth exponents log(new / old) / log(new patches / old patches) of macs and seconds against the
        number of patches before.

    Raises:
        UserError: a budget below ``MIN_BUDGET``, or an unknown device.
        RunError: too little memory.
    """
    if budget_seconds < MIN_BUDGET:
        raise UserError(f"--budget {budget_seconds:g}s is too small: give at least {MIN_BUDGET:g}s")
    chosen = select_device(device)
    end = clock() + budget_seconds
    memory = device_errors(f"{max(patches):,} patches", "free some memory, or take another --device")
    with one_thread(), exact_float32(), memory:
        with chosen:
            operations = {(kind.key, n): kind.make(n) for kind in KINDS for n in patches}
        repetitions = {}
        for case, operation in operations.items():
            timed(operation, 1, chosen, clock)  # warm-up
            once = timed(operation, 1, chosen, clock)
            repetitions[case] = max(math.ceil(SAMPLE_SECONDS / max(once, 1e-6)), 1)
        times: dict[tuple[str, int], list[float]] = {case: [] for case in operations}
        for done in range(MAX_ROUNDS):
            start = clock()
            for case, operation in operations.items():
                times[case].append(timed(operation, repetitions[case], chosen, clock))
            on_progress(done + 1, MAX_ROUNDS, f"round {done + 1} of at most {MAX_ROUNDS}")
            if done + 1 >= MIN_ROUNDS and clock() + (clock() - start) > end:
                break
    return describe(times, patches)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, the CPU computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def timed(operation: Operation, repetitions: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one repetition."""
    synchronize(device)
    start = clock()
    for _ in range(repetitions):
        operation()
    synchronize(device)
    return (clock() - start) / repetitions


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe(times: Mapping[tuple[str, int], Sequence[float]], patches: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        before: dict[str, Any] | None = None
        for number in patches:
            found = times[kind.key, number]
            row: dict[str, Any] = {
                "kind": kind.key,
                "name": kind.name,
                "mixer": kind.mixer,
                "patches": number,
                "macs": count_macs(KINDS[0] if kind.key == "fused_attention" else kind, number),
                "seconds": statistics.median(found),
                "fastest": min(found),
                "slowest": max(found),
                "rounds": len(found),
            }
            for key in ("macs", "seconds"):
                row[f"{key}_exponent"] = before and growth(before, row, key)
            rows.append(row)
            before = row
    return rows


def growth(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> float:
    """The exponent by which a quantity grows with the number of patches: 1 is linear, 2 quadratic."""
    return math.log(after[key] / before[key]) / math.log(after["patches"] / before["patches"])


def time_exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The growth of the time between the two largest numbers of patches, by kind."""
    mine = {kind.key: [row for row in rows if row["kind"] == kind.key] for kind in KINDS}
    return {key: growth(found[-2], found[-1], "seconds") for key, found in mine.items() if len(found) > 1}
