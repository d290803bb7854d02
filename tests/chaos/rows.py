"""The promises about runs that are hurt, one function each: it makes the trials, and returns (passed, of, remarks).

``trials`` bounds how often a fault is tried; ``rng`` draws where it strikes.
"""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import (
    EVALUATE,
    RECIPE,
    SAVE,
    STEPS,
    WAYS,
    Lab,
    checkpoints,
    digests,
    exact,
    leftovers,
    metrics,
    sound,
    tensors,
)


class Result(NamedTuple):
    passed: int
    of: int
    remarks: list[str]


class Tally:
    """Counts, and remembers what failed."""

    def __init__(self) -> None:
        self.passed, self.of, self.remarks = 0, 0, list[str]()

    def add(self, *wrong: str | bool | None) -> None:
        """One trial, with what went wrong in it."""
        told = [str(w) for w in wrong if w]
        self.of, self.passed = self.of + 1, self.passed + (not told)
        self.remarks += told

    def result(self, *remarks: str) -> Result:
        return Result(self.passed, self.of, [*remarks, *self.remarks])


def uninterrupted(lab: Lab, way: str, *words: object) -> str:
    """The outcome that the others are held to; made once."""
    name = " ".join(map(str, ("whole", way, *words)))
    if not (lab.root / name).exists():
        ended = lab.train(name, *WAYS[way], *words)
        assert ended.status == 0, ended.err
    return exact(lab.root / name)


def instant(rng: random.Random, kind: str, world_size: int) -> dict[str, Any]:
    """A random instant in steps, saves, an evaluation or the start."""
    rank = rng.randrange(world_size)
    moment = rng.uniform(0.0, 0.02)
    nth = {
        "step": rng.randint(1, STEPS),
        "save": rng.randint(1, STEPS // SAVE),
        "evaluation": rng.randint(1, STEPS // EVALUATE + 1),
        "start": 1,
    }[kind]
    delay = rng.uniform(0.2, 5.0 if world_size == 1 else 8.0) if kind == "start" else moment
    return {"at": kind, "nth": nth, "do": "kill", "rank": rank, "delay": delay}


def killed(lab: Lab, rng: random.Random, trials: int, way: str) -> Result:
    """Rows 1 and 2: SIGKILL at random instants, then the same command again."""
    tally, expected, world_size = Tally(), uninterrupted(lab, way), 1 if way == "1 process" else 2
    for trial in range(trials):
        kind = ("step", "save", "evaluation", "start")[trial % 4]
        fault, name = instant(rng, kind, world_size), f"killed {way} {trial}"
        hurt = lab.train(name, *WAYS[way], fault=fault)
        again = lab.train(name, *WAYS[way])
        told = f"{way}, {fault}: {hurt.status}, then {again.status}: {again.err[-300:]}"
        tally.add(
            again.status != 0 and told, again.status == 0 and exact(lab.root / name) != expected and f"{told}: differs"
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    return tally.result()


def killed_in_a_save(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 3: SIGKILL in each part of a save; the newest complete one loads, at least one sound one is kept."""
    tally, expected = Tally(), uninterrupted(lab, "1 process")
    saves = STEPS // SAVE
    places = [
        *(("copy", n) for n in (2, saves)),
        *(("write", n) for n in (2, saves)),
        *(
            ("fsync", n) for n in range(8, 20)
        ),  # each of a save's: lines of the log, tensors, metadata, state, manifest, folders
        *(("rename", n) for n in range(2, 9)),
        *(("retention", n) for n in (3, saves - 1)),
        *(("removal", n) for n in range(4, 12)),
    ]
    for place, nth in places if trials >= len(places) else rng.sample(places, trials):
        name = f"saving {place} {nth}"
        hurt = lab.train(name, fault={"at": place, "nth": nth, "do": "kill"})
        left = sound(lab.root / name)
        begun = len(checkpoints(lab.root / name)) > 0
        again = lab.train(name)
        told = f"{place} {nth}: {hurt.status}, sound {left}, then {again.status} {again.err[-300:]}"
        tally.add(
            hurt.status != -signal.SIGKILL and f"{told}: it did not strike",
            begun and not left and f"{told}: no sound checkpoint",
            again.status != 0 and told,
            again.status == 0 and exact(lab.root / name) != expected and f"{told}: differs",
            leftovers(lab.root / name) and f"{told}: leaves {leftovers(lab.root / name)}",
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    return tally.result()


def stopped_at(lab: Lab, name: str, step: int, *words: object) -> Path:
    """A run that was killed right after a step, with a checkpoint not far behind."""
    lab.train(name, *words, fault={"at": "step", "nth": step + 1, "do": "kill", "rank": 0})
    return lab.root / name


def other_workers(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 4: gone on with by 0, 2 and 4 workers, the same samples and pixels."""
    tally, step = Tally(), rng.randint(SAVE + 1, STEPS - 4)
    run = stopped_at(lab, "workers", step)
    seen = {}
    for workers in (0, 2, 4)[: max(trials, 2)]:
        copy = lab.root / f"workers {workers}"
        shutil.copytree(run, copy)
        notes = lab.root / f"notes {workers}"
        notes.mkdir()
        process = lab.begin(
            *RECIPE, "--out", copy, "--resume", "auto", "--workers", workers, note="pixels", notes=notes
        )
        _, err = process.communicate(timeout=300)
        pixels = (notes / "pixels").read_text() if process.returncode == 0 else err
        seen[workers] = ((copy / "consumed.jsonl").read_text(), pixels)
        tally.add(process.returncode != 0 and err[-300:], seen[workers] != seen[0] and f"{workers} workers: others")
        shutil.rmtree(copy, ignore_errors=True)
    whole = (lab.root / "whole 1 process" / "consumed.jsonl").read_text() if uninterrupted(lab, "1 process") else ""
    tally.add(seen[0][0] != whole and "other samples than the run that was not hurt")
    return tally.result(f"after step {step}")


def other_ranks(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 5: saved by 4 ranks, loaded by 4, 2 and 1: equal bits, the same order, losses within 1e-4 over 50 steps."""
    words = ("--steps", 60, "--save-every-steps", 10, "--log-every-steps", 1, "--keep-checkpoints", 9)
    words += ("--precision", "float32")  # bfloat16 rounds each size of batch in its own way: 1.2e-4 after 50 steps
    tally = Tally()
    ways = {"DDP": (), "FSDP2": ("--shard",)}
    worst = 0.0
    for way in list(ways)[: max(trials, 1)]:
        name = f"four {way}"
        stopped_at(lab, name, 10, *words, "--no-save-in-background", "--processes", 4, *ways[way])
        held = digests(checkpoints(lab.root / name)[0])
        outcome = {}
        for world_size in (4, 2, 1):
            copy, notes = lab.root / f"{name} to {world_size}", lab.root / f"tensors {way} {world_size}"
            shutil.copytree(lab.root / name, copy)
            notes.mkdir()
            spread = ("--processes", world_size) if world_size > 1 else ()
            process = lab.begin(
                *RECIPE, *words, "--out", copy, "--resume", "auto", *spread, *ways[way], note="tensors", notes=notes
            )
            _, err = process.communicate(timeout=600)
            if process.returncode != 0:
                tally.add(f"{way} on {world_size}: {err[-300:]}")
                continue
            losses = [record["loss"] for record in metrics(copy) if "loss" in record]
            outcome[world_size] = ((copy / "consumed.jsonl").read_text(), losses)
            loaded = json.loads((notes / "tensors").read_text())
            gap = max(abs(a - b) for a, b in zip(outcome[4][1], losses, strict=True))
            worst = max(worst, gap)
            tally.add(
                loaded != held and f"{way} on {world_size}: other bits loaded",
                outcome[world_size][0] != outcome[4][0] and f"{way} on {world_size}: another order",
                (len(losses) != 60 or gap > 1e-4)
                and f"{way} on {world_size}: {len(losses)} losses, up to {gap:.1e} apart",
            )
            shutil.rmtree(copy, ignore_errors=True)
    return tally.result(f"losses at most {worst:.1e} apart over 50 steps")


def one_and_two(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 6: two ranks against one process in float64, after 20 steps."""
    import torch

    import allmlp

    sizes = {"patch_size": 2, "num_blocks": 2, "hidden_dim": 16, "tokens_mlp_dim": 7, "channels_mlp_dim": 32}
    model = allmlp.create(num_classes=3, image_size=8, seed=0, **sizes).double()
    weights = lab.root / "float64.safetensors"
    allmlp.save(model, weights)
    words = (
        *("train", "digits", "--weights", weights, "--steps", 20, "--evaluate-every-steps", 10, "--log-every-steps", 1),
        *("--global-batch-size", 48, "--warmup-steps", 4, "--learning-rate", 3e-3, "--compile", "off", "--workers", 0),
        *("--mixup", 0.5, "--cutmix", 1.0, "--randaugment", 10, "--color-jitter", 0.2, "--dropout", 0.1),
        *("--stochastic-depth", 0.2, "--device", "cpu", "--precision", "float32", "--ema-decay", 0.9),
    )
    tally, runs, worst = Tally(), {}, 0.0
    for way, spread in WAYS.items():
        out = lab.root / f"float64 {way}"
        ended = lab.call(*words, "--out", out, *spread)
        if ended.status != 0:
            tally.add(f"{way}: {ended.err[-300:]}")
            continue
        runs[way] = tensors(checkpoints(out)[0])
        assert runs[way]["model.stem.weight"].dtype == torch.float64
        counts = [(r["step"], r["val_top1"]) for r in metrics(out) if "val_top1" in r]
        tested = json.loads((out / "summary.json").read_text())["test_top1"]
        runs[way]["counts"] = (counts, tested)
        gaps = {
            name: float(((tensor - runs["1 process"][name]).abs() / tensor.abs().clamp(min=1)).max())
            for name, tensor in runs[way].items()
            if name.startswith(("model.", "average."))
        }
        worst = max(worst, *gaps.values())
        tally.add(
            max(gaps.values()) > 1e-10 and f"{way}: {max(gaps.items(), key=lambda item: item[1])}",
            runs[way]["counts"] != runs["1 process"]["counts"] and f"{way}: other counts in evaluation",
        )
    return tally.result(f"weights at most {worst:.1e} apart")


def terminated(lab: Lab, rng: random.Random, trials: int, compile_too: bool = True) -> Result:
    """Row 7: SIGTERM to one rank, or to the launcher, in a step, an evaluation, the first compilation, a save."""
    tally, slowest = Tally(), 0.0
    places = [("step", 9), ("evaluation", 1), ("save", 2), *([("compile", 1)] if compile_too else [])]
    cases = [(*place, "2 DDP", target) for place in places for target in ("one rank", "launcher")]
    cases += [("step", 9, "2 FSDP2", "one rank"), ("save", 2, "2 FSDP2", "launcher")]
    cases += [("evaluation", 1, "1 process", "one rank"), ("step", 9, "1 process", "interrupt")]
    for at, nth, way, target in cases if trials >= len(cases) else rng.sample(cases, trials):
        name = f"term {at} {way} {target}"
        extra = ("--compile", "on") if at == "compile" else ()
        world_size = 1 if way == "1 process" else 2
        fault = {
            "at": at,
            "nth": nth,
            "do": "int" if target == "interrupt" else "term",
            "rank": rng.randrange(world_size),
        }
        if target == "launcher":
            fault["target"] = "launcher"
        hurt = lab.train(name, *WAYS[way], *extra, fault=fault)
        waited = hurt.struck if hurt.struck is not None else float("inf")
        slowest = max(slowest, waited if at != "compile" else 0)
        again = lab.train(name, *WAYS[way], *extra)
        told = f"{name}: {hurt.status} after {waited:.0f} s, then {again.status}: {hurt.err[-300:]} {again.err[-200:]}"
        tally.add(
            hurt.status != (130 if target == "interrupt" else 143) and told,
            waited > (30 if at != "compile" else 150) and told,
            "resume with" not in hurt.err and told,
            again.status != 0 and told,
            again.status == 0 and exact(lab.root / name) != uninterrupted(lab, way, *extra) and f"{told}: differs",
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    tally.add(second_signal(lab))
    return tally.result(f"gone {slowest:.1f} s after the signal at the latest (compilations apart)")


def second_signal(lab: Lab) -> str | None:
    """The first during a step, the second during the save that follows: the end comes at once, what was saved stays."""
    notes, run = lab.root / "notes second", lab.root / "second"
    notes.mkdir()
    process = lab.begin(*RECIPE, "--out", run, fault={"at": "write", "nth": 2, "do": "slow"}, notes=notes)
    limit = time.monotonic() + 60
    while not (notes / "slow").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)  # two within a second count as one
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    process.communicate(timeout=60)
    seconds = time.monotonic() - begun
    if process.returncode != 143 or seconds > 1.5 or sound(run) != [SAVE]:
        return f"second signal: {process.returncode} after {seconds:.1f} s, sound {sound(run)}"
    again = lab.call(*RECIPE, "--out", run, "--resume", "auto")
    return None if exact(run) == uninterrupted(lab, "1 process") else f"second signal: {again.err[-300:]}"


def stuck(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 8: one rank stopped, or stuck, or raising before a collective."""
    tally, timeout, slowest = Tally(), 8, 0.0
    cases = [(do, way, rank) for do in ("stop", "raise", "hang") for way in ("2 DDP", "2 FSDP2") for rank in (0, 1)]
    for do, way, rank in cases if trials >= len(cases) else rng.sample(cases, trials):
        name = f"stuck {do} {way} {rank}"
        fault = {"at": "step", "nth": 10, "do": do, "rank": rank}
        ended = lab.train(name, *WAYS[way], "--timeout-seconds", timeout, fault=fault)
        named = "ArithmeticError" if do == "raise" else f"rank {rank} is "
        slowest = max(slowest, ended.struck or float("inf"))
        told = f"{name}: {ended.status} after {ended.struck} s: {ended.err[-500:]}"
        tally.add(
            ended.status in (0, -1, 143, 130) and told,
            (ended.struck is None or ended.struck > timeout + 30) and told,
            (named not in ended.err or f"rank {rank}" not in ended.err) and told,
            do == "raise" and "Traceback" not in ended.err and told,
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    return tally.result(f"ended {slowest:.0f} s after the fault at the latest, with a timeout of {timeout} s")


def no_room(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 9: a full disk, and one that can only be read, in the background and in the foreground."""
    tally = Tally()
    where = lab.root / "mount"
    where.mkdir(exist_ok=True)
    cases = [(way, do) for way in ("background", "foreground") for do in ("fill", "readonly")]
    for way, do in cases if trials >= len(cases) else rng.sample(cases, trials):
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", where], capture_output=True, text=True)
        if made.returncode != 0:
            return Result(0, 0, [f"skipped: mounting is not allowed here ({made.stderr.strip()})"])
        try:
            run = where / "run"
            path = where / "filler" if do == "fill" else run / "checkpoints"
            fault = {"at": "save", "nth": 4, "do": do, "path": str(path)}
            words = ("--save-in-background" if way == "background" else "--no-save-in-background",)
            ended = lab.call(*RECIPE, *words, "--out", run, fault=fault)
            left = [path.name for path in checkpoints(run)]
            residue = leftovers(run)
            if do == "readonly":
                subprocess.run(["umount", path], check=True)
            else:
                path.unlink()
            held = sound(run)
            again = lab.call(*RECIPE, "--out", run, "--resume", "auto")
            told = f"{do} in the {way}: {ended.status}, {left}, sound {held}: {ended.err[-300:]} {again.err[-200:]}"
            tally.add(
                (ended.status != 1 or "cannot be written" not in ended.err) and told,
                3 * SAVE not in held and told,
                residue and f"{told}: leaves {residue}",
                (again.status != 0 or exact(run) != uninterrupted(lab, "1 process")) and f"{told}: differs",
            )
        finally:
            subprocess.run(["umount", where], check=True)
    return tally.result()


def flipped(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 10: one bit in each file of a checkpoint."""
    from allmlp.checkpointing.checkpoint import Damaged, verify
    from allmlp.checkpointing.manager import newest

    uninterrupted(lab, "2 FSDP2")
    tally = Tally()
    whole = lab.root / "whole 2 FSDP2"
    last, before = checkpoints(whole)[:2]
    for file in sorted(last.iterdir()):
        for _ in range(trials):
            copy = lab.root / "flipped"
            shutil.copytree(whole, copy)
            path = copy / "checkpoints" / last.name / file.name
            data = bytearray(path.read_bytes())
            at = rng.randrange(8 * len(data))
            data[at // 8] ^= 1 << at % 8
            path.write_bytes(data)
            try:
                verify(path.parent, trusted=True)
                named = ""
            except Damaged as error:
                named = str(error)
            found = newest(copy / "checkpoints", trusted=True)
            told = f"bit {at} of {file.name}"
            tally.add(
                str(path) not in named and f"{told}: {named or 'not found'}",
                (found is None or found[0].name != before.name) and f"{told}: no fall back",
            )
            shutil.rmtree(copy)
    return tally.result()


def no_number(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 11: the loss of one rank is NaN at a step that is not logged."""
    import allmlp

    tally = Tally()
    for way in ("2 DDP", "2 FSDP2")[: max(trials, 1)]:
        step = rng.choice([s for s in range(SAVE + 1, STEPS) if s % 3 and s % SAVE and s % EVALUATE])
        base = ("--mixup", "None", "--ema-decay", "None", *WAYS[way], "--keep-checkpoints", 99)
        reference = lab.train(f"sane {way}", *base, "--save-every-steps", 1)
        hurt = lab.train(f"nan {way}", *base, fault={"at": "loss", "do": "nan", "nth": step, "rank": rng.randrange(2)})
        run = lab.root / f"nan {way}"
        told = f"{way}, step {step}: {hurt.status}: {hurt.err[-400:]} {reference.err[-100:]}"
        kept = [int(path.name.removeprefix("step-")) for path in checkpoints(run)]
        good = tensors(lab.root / f"sane {way}" / "checkpoints" / f"step-{step - 1:08d}")
        last = allmlp.load(run / "checkpoints" / "last.safetensors") if hurt.status == 1 else None
        same = last is not None and all((good[f"model.{name}"] == p).all() for name, p in last.named_parameters())
        tally.add(
            (hurt.status != 1 or f"step {step}:" not in hurt.err or "diverged" not in hurt.err) and told,
            (max(kept, default=0) >= step or sorted(kept) != sorted(sound(run))) and f"{told}: checkpoints {kept}",
            not same and f"{told}: weights changed",
        )
    return tally.result()
