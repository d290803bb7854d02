"""What is guaranteed to a run that is interrupted or damaged: one function per row of the table, which makes trials.

``trials`` limits how many are made; ``rng`` draws where the fault happens.
"""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from harness import (
    EVALUATE,
    MODES,
    SAVE,
    STEPS,
    TRAIN,
    Lab,
    Result,
    Tally,
    checkpoints,
    intact_steps,
    leftovers,
    metrics,
    run_digest,
    tensor_digests,
    tensors,
)


def uninterrupted(lab: Lab, mode: str, *words: object) -> str:
    """The digest of an uninterrupted run, with which the others are compared; it is trained once."""
    name = " ".join(map(str, ("uninterrupted", mode, *words)))
    if not (lab.root / name).exists():
        outcome = lab.train(name, *MODES[mode], *words)
        assert outcome.status == 0, outcome.err
    return run_digest(lab.root / name)


def random_kill(rng: random.Random, place: str, world_size: int) -> dict[str, Any]:
    """SIGKILL at a random moment in a step, a save, an evaluation or the start."""
    rank = rng.randrange(world_size)
    moment = rng.uniform(0.0, 0.02)
    call = {
        "step": rng.randint(1, STEPS),
        "save": rng.randint(1, STEPS // SAVE),
        "evaluation": rng.randint(1, STEPS // EVALUATE + 1),
        "start": 1,
    }[place]
    delay = rng.uniform(0.2, 5.0 if world_size == 1 else 8.0) if place == "start" else moment
    return {"place": place, "call": call, "action": "kill", "rank": rank, "delay": delay}


def killed(lab: Lab, rng: random.Random, trials: int, mode: str) -> Result:
    """Rows 1 and 2: SIGKILL at random moments, then the same command again."""
    tally, expected, world_size = Tally(), uninterrupted(lab, mode), 1 if mode == "1 process" else 2
    for trial in range(trials):
        place = ("step", "save", "evaluation", "start")[trial % 4]
        fault, name = random_kill(rng, place, world_size), f"killed {mode} {trial}"
        first = lab.train(name, *MODES[mode], fault=fault)
        second = lab.train(name, *MODES[mode])
        text = f"{mode}, {fault}: {first.status}, then {second.status}: {second.err[-300:]}"
        tally.add(
            second.status != 0 and text,
            second.status == 0 and run_digest(lab.root / name) != expected and f"{text}: differs",
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    return tally.result()


def killed_during_save(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 3: SIGKILL in each part of a save; at least one intact checkpoint remains, and the newest one is loaded."""
    tally, expected = Tally(), uninterrupted(lab, "1 process")
    saves = STEPS // SAVE
    places = [
        *(("copy", n) for n in (2, saves)),
        *(("write", n) for n in (2, saves)),
        *(("fsync", n) for n in range(8, 20)),  # of a save: logs, tensors, state, manifest, folders
        *(("rename", n) for n in range(2, 9)),
        *(("remove old", n) for n in (3, saves - 1)),
        *(("rmtree", n) for n in range(4, 12)),
    ]
    for place, call in places if trials >= len(places) else rng.sample(places, trials):
        name = f"saving {place} {call}"
        first = lab.train(name, fault={"place": place, "call": call, "action": "kill"})
        intact = intact_steps(lab.root / name)
        has_checkpoints = len(checkpoints(lab.root / name)) > 0
        second = lab.train(name)
        text = f"{place} {call}: {first.status}, intact {intact}, then {second.status} {second.err[-300:]}"
        tally.add(
            first.status != -signal.SIGKILL and f"{text}: the fault did not happen",
            has_checkpoints and not intact and f"{text}: no intact checkpoint",
            second.status != 0 and text,
            second.status == 0 and run_digest(lab.root / name) != expected and f"{text}: differs",
            leftovers(lab.root / name) and f"{text}: leaves {leftovers(lab.root / name)}",
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    tally.add(killed_at_the_end(lab))
    return tally.result()


def killed_at_the_end(lab: Lab) -> str | None:
    """Killed while the checkpoints of the complete run are removed: resuming it removes the rest."""
    run, fault = lab.root / "removal", {"place": "remove all", "call": 2, "action": "kill"}
    first, kept = lab.train(run.name, fault=fault, note="removal"), len(checkpoints(run))
    second = lab.train(run.name, note="removal")
    same = (run / "consumed.jsonl").read_bytes() == (lab.root / "uninterrupted 1 process/consumed.jsonl").read_bytes()
    done = same and kept and not checkpoints(run) and "is complete" in second.err
    if first.status == -signal.SIGKILL and second.status == 0 and done:
        return None
    return f"removal: {first.status}, {kept} kept, then {second.status} {second.err[-300:]}, left {checkpoints(run)}"


def train_and_kill(lab: Lab, name: str, step: int, *words: object) -> Path:
    """The folder of a run that was killed right after a step, at or shortly after its newest checkpoint."""
    lab.train(name, *words, fault={"place": "step", "call": step + 1, "action": "kill", "rank": 0})
    return lab.root / name


def other_workers(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 4: resumed with 0, 2 and 4 workers, a run uses the same samples and pixels."""
    tally, step = Tally(), rng.randint(SAVE + 1, STEPS - 4)
    run = train_and_kill(lab, "workers", step)
    found = {}
    for workers in (0, 2, 4)[: max(trials, 2)]:
        copy = lab.root / f"workers {workers}"
        shutil.copytree(run, copy)
        notes = lab.root / f"notes {workers}"
        notes.mkdir()
        process = lab.start(*TRAIN, "--out", copy, "--resume", "auto", "--workers", workers, note="pixels", notes=notes)
        _, err = process.communicate(timeout=300)
        pixels = (notes / "pixels").read_text() if process.returncode == 0 else err
        found[workers] = ((copy / "consumed.jsonl").read_text(), pixels)
        tally.add(
            process.returncode != 0 and err[-300:],
            found[workers] != found[0] and f"{workers} workers: other samples or pixels",
        )
        shutil.rmtree(copy, ignore_errors=True)
    uninterrupted(lab, "1 process")
    expected = (lab.root / "uninterrupted 1 process" / "consumed.jsonl").read_text()
    tally.add(found[0][0] != expected and "other samples than the uninterrupted run")
    return tally.result(f"after step {step}")


def other_ranks(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 5: saved by 4 ranks, loaded by 4, 2 and 1: equal bits, the same order, losses within 1e-4 over 50 steps."""
    words = ("--steps", 60, "--save-every-steps", 10, "--log-every-steps", 1, "--keep-checkpoints", 9)
    words += ("--precision", "float32")  # bfloat16 rounds differently for each batch size: 1.2e-4 after 50 steps
    tally = Tally()
    modes = {"DDP": (), "FSDP2": ("--shard",)}
    worst = 0.0
    for mode in list(modes)[: max(trials, 1)]:
        name = f"four {mode}"
        train_and_kill(lab, name, 10, *words, "--no-save-in-background", "--processes", 4, *modes[mode])
        saved = tensor_digests(checkpoints(lab.root / name)[0])
        found = {}
        for world_size in (4, 2, 1):
            copy, notes = lab.root / f"{name} to {world_size}", lab.root / f"tensors {mode} {world_size}"
            shutil.copytree(lab.root / name, copy)
            notes.mkdir()
            processes = ("--processes", world_size) if world_size > 1 else ()
            options = ("--out", copy, "--resume", "auto", *processes, *modes[mode])
            process = lab.start(*TRAIN, *words, *options, note="tensors", notes=notes)
            _, err = process.communicate(timeout=600)
            if process.returncode != 0:
                tally.add(f"{mode} on {world_size}: {err[-300:]}")
                continue
            losses = [record["loss"] for record in metrics(copy) if "loss" in record]
            found[world_size] = ((copy / "consumed.jsonl").read_text(), losses)
            loaded = json.loads((notes / "tensors").read_text())
            difference = max(abs(a - b) for a, b in zip(found[4][1], losses, strict=True))
            worst = max(worst, difference)
            tally.add(
                loaded != saved and f"{mode} on {world_size}: other bits loaded",
                found[world_size][0] != found[4][0] and f"{mode} on {world_size}: another order",
                (len(losses) != 60 or difference > 1e-4)
                and f"{mode} on {world_size}: {len(losses)} losses that differ by up to {difference:.1e}",
            )
            shutil.rmtree(copy, ignore_errors=True)
    return tally.result(f"losses differ by at most {worst:.1e} over 50 steps")


def two_ranks_against_one(lab: Lab, rng: random.Random, trials: int) -> Result:
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
    tally, runs, accuracies, worst = Tally(), {}, {}, 0.0
    for mode, options in MODES.items():
        out = lab.root / f"float64 {mode}"
        outcome = lab.call(*words, "--out", out, *options)
        if outcome.status != 0:
            tally.add(f"{mode}: {outcome.err[-300:]}")
            continue
        runs[mode] = tensors(checkpoints(out)[0])
        assert runs[mode]["model.stem.weight"].dtype == torch.float64
        val = [(record["step"], record["val_top1"]) for record in metrics(out) if "val_top1" in record]
        accuracies[mode] = (val, json.loads((out / "summary.json").read_text())["test_top1"])
        differences = {
            name: float(((tensor - runs["1 process"][name]).abs() / tensor.abs().clamp(min=1)).max())
            for name, tensor in runs[mode].items()
            if name.startswith(("model.", "ema."))
        }
        worst = max(worst, *differences.values())
        tally.add(
            max(differences.values()) > 1e-10 and f"{mode}: {max(differences.items(), key=lambda item: item[1])}",
            not any(name.startswith("ema.") for name in differences) and f"{mode}: no averages in the checkpoint",
            accuracies[mode] != accuracies["1 process"] and f"{mode}: other accuracies",
        )
    return tally.result(f"weights differ by at most {worst:.1e}")


def terminated(lab: Lab, rng: random.Random, trials: int, compile_too: bool = True) -> Result:
    """Row 7: SIGTERM to one rank or to the launcher, in a step, an evaluation, the compilation or a save."""
    tally, slowest = Tally(), 0.0
    places = [("step", 9), ("evaluation", 1), ("save", 2), *([("compile", 1)] if compile_too else [])]
    cases = [(*place, "2 DDP", target) for place in places for target in ("one rank", "launcher")]
    cases += [("step", 9, "2 FSDP2", "one rank"), ("save", 2, "2 FSDP2", "launcher")]
    cases += [("evaluation", 1, "1 process", "one rank"), ("step", 9, "1 process", "interrupt")]
    for place, call, mode, target in cases if trials >= len(cases) else rng.sample(cases, trials):
        name = f"term {place} {mode} {target}"
        extra = ("--compile", "on") if place == "compile" else ()
        world_size = 1 if mode == "1 process" else 2
        action = "int" if target == "interrupt" else "term"
        fault = {"place": place, "call": call, "action": action, "rank": rng.randrange(world_size)}
        if target == "launcher":
            fault["target"] = "launcher"
        first = lab.train(name, *MODES[mode], *extra, fault=fault)
        waited = first.since_fault if first.since_fault is not None else float("inf")
        slowest = max(slowest, waited if place != "compile" else 0)
        second = lab.train(name, *MODES[mode], *extra)
        text = (
            f"{name}: {first.status} after {waited:.0f} s, then {second.status}: {first.err[-300:]} {second.err[-200:]}"
        )
        tally.add(
            first.status != (130 if target == "interrupt" else 143) and text,
            waited > (30 if place != "compile" else 150) and text,
            "resume with" not in first.err and text,
            second.status != 0 and text,
            second.status == 0
            and run_digest(lab.root / name) != uninterrupted(lab, mode, *extra)
            and f"{text}: differs",
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    tally.add(second_signal(lab))
    return tally.result(f"ended at most {slowest:.1f} s after the signal (except during compilation)")


def second_signal(lab: Lab) -> str | None:
    """A first signal during a step, a second during the save that follows: the run ends at once, saved steps remain."""
    notes, run = lab.root / "notes second", lab.root / "second"
    notes.mkdir()
    fault = {"place": "write", "call": 2, "action": "slow"}
    process = lab.start(*TRAIN, "--out", run, fault=fault, notes=notes)
    deadline = time.monotonic() + 60
    while not (notes / "slow").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)  # two within a second count as one
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    process.communicate(timeout=60)
    seconds = time.monotonic() - start
    if process.returncode != 143 or seconds > 1.5 or intact_steps(run) != [SAVE]:
        return f"second signal: {process.returncode} after {seconds:.1f} s, intact {intact_steps(run)}"
    resumed = lab.call(*TRAIN, "--out", run, "--resume", "auto")
    return None if run_digest(run) == uninterrupted(lab, "1 process") else f"second signal: {resumed.err[-300:]}"


def stuck(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 8: one rank is stopped, hangs, or fails before a collective operation."""
    tally, timeout, slowest = Tally(), 8, 0.0
    cases = [
        (action, mode, rank) for action in ("stop", "raise", "hang") for mode in ("2 DDP", "2 FSDP2") for rank in (0, 1)
    ]
    for action, mode, rank in cases if trials >= len(cases) else rng.sample(cases, trials):
        name = f"stuck {action} {mode} {rank}"
        fault = {"place": "step", "call": 10, "action": action, "rank": rank}
        outcome = lab.train(name, *MODES[mode], "--timeout-seconds", timeout, fault=fault)
        expected = "ArithmeticError" if action == "raise" else f"rank {rank} is "
        slowest = max(slowest, outcome.since_fault or float("inf"))
        text = f"{name}: {outcome.status} after {outcome.since_fault} s: {outcome.err[-500:]}"
        tally.add(
            outcome.status in (0, -1, 143, 130) and text,
            (outcome.since_fault is None or outcome.since_fault > timeout + 30) and text,
            (expected not in outcome.err or f"rank {rank}" not in outcome.err) and text,
            action == "raise" and "Traceback" not in outcome.err and text,
        )
        shutil.rmtree(lab.root / name, ignore_errors=True)
    return tally.result(f"ended at most {slowest:.0f} s after the fault, with a timeout of {timeout} s")


def unwritable_disk(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 9: a disk that is full or read-only, with saves in the background and in the foreground."""
    tally = Tally()
    mount = lab.root / "mount"
    mount.mkdir(exist_ok=True)
    cases = [(saves, action) for saves in ("background", "foreground") for action in ("fill", "readonly")]
    for saves, action in cases if trials >= len(cases) else rng.sample(cases, trials):
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", mount]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode != 0:
            return Result(0, 0, [f"skipped: mounting is not allowed here ({mounted.stderr.strip()})"])
        try:
            run = mount / "run"
            path = mount / "filler" if action == "fill" else run / "checkpoints"
            fault = {"place": "save", "call": 4, "action": action, "path": str(path)}
            words = ("--save-in-background" if saves == "background" else "--no-save-in-background",)
            first = lab.call(*TRAIN, *words, "--out", run, fault=fault)
            kept = [path.name for path in checkpoints(run)]
            left = leftovers(run)
            if action == "readonly":
                subprocess.run(["umount", path], check=True)
            else:
                path.unlink()
            intact = intact_steps(run)
            second = lab.call(*TRAIN, "--out", run, "--resume", "auto")
            text = (
                f"{action} in the {saves}: {first.status}, {kept}, intact {intact}: {first.err[-300:]} "
                f"{second.err[-200:]}"
            )
            tally.add(
                (first.status != 1 or "cannot be written" not in first.err) and text,
                3 * SAVE not in intact and text,
                left and f"{text}: leaves {left}",
                (second.status != 0 or run_digest(run) != uninterrupted(lab, "1 process")) and f"{text}: differs",
            )
        finally:
            subprocess.run(["umount", mount], check=True)
    return tally.result()


def flipped_bit(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 10: one flipped bit in each file of a checkpoint."""
    from allmlp.checkpointing.checkpoint import DamagedCheckpoint, verify_checkpoint
    from allmlp.checkpointing.manager import newest_intact

    uninterrupted(lab, "2 FSDP2")
    tally = Tally()
    run = lab.root / "uninterrupted 2 FSDP2"
    last, previous = checkpoints(run)[:2]
    for file in sorted(last.iterdir()):
        for _ in range(trials):
            copy = lab.root / "flipped"
            shutil.copytree(run, copy)
            path = copy / "checkpoints" / last.name / file.name
            data = bytearray(path.read_bytes())
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                verify_checkpoint(path.parent)
                message = ""
            except DamagedCheckpoint as error:
                message = str(error)
            found = newest_intact(copy / "checkpoints")
            text = f"bit {bit} of {file.name}"
            tally.add(
                str(path) not in message and f"{text}: {message or 'not found'}",
                (found is None or found[0].name != previous.name) and f"{text}: no fallback to the checkpoint before",
            )
            shutil.rmtree(copy)
    return tally.result()


def nan_loss(lab: Lab, rng: random.Random, trials: int) -> Result:
    """Row 11: the loss of one rank is NaN at a step that is not logged."""
    import allmlp

    tally = Tally()
    for mode in ("2 DDP", "2 FSDP2")[: max(trials, 1)]:
        step = rng.choice([s for s in range(SAVE + 1, STEPS) if s % 3 and s % SAVE and s % EVALUATE])
        options = ("--mixup", "None", "--ema-decay", "None", *MODES[mode], "--keep-checkpoints", 99)
        reference = lab.train(f"reference {mode}", *options, "--save-every-steps", 1)
        fault = {"place": "loss", "call": step, "action": "nan", "rank": rng.randrange(2)}
        diverged = lab.train(f"nan {mode}", *options, fault=fault)
        run = lab.root / f"nan {mode}"
        text = f"{mode}, step {step}: {diverged.status}: {diverged.err[-400:]} {reference.err[-100:]}"
        kept = [int(path.name.removeprefix("step-")) for path in checkpoints(run)]
        good = tensors(lab.root / f"reference {mode}" / "checkpoints" / f"step-{step - 1:08d}")
        last = allmlp.load(run / "checkpoints" / "last.safetensors") if diverged.status == 1 else None
        same = last is not None and all((good[f"model.{name}"] == p).all() for name, p in last.named_parameters())
        tally.add(
            (diverged.status != 1 or f"step {step}:" not in diverged.err or "diverged" not in diverged.err) and text,
            (max(kept, default=0) >= step or sorted(kept) != sorted(intact_steps(run)))
            and f"{text}: checkpoints {kept}",
            not same and f"{text}: weights changed",
        )
    return tally.result()
