"""Breaks forty behaviors of the source, one at a time, and shows that a test notices each.

    python tests/mutations.py [--only WORDS ...] [--all-tests] [--skip-unbroken] [--jobs N]

It works on copies of the tree (what git tracks or would track), so the checkout is never edited. Every mutation names
the tests that should notice it: first the likeliest file, so that a run ends soon, then the folder around it, where the
test may have moved to. The exit status is 1 unless the unbroken tree passes and every mutation makes a test fail. A
text that is no longer in its file is an error: give the mutation the text that does the same job now.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 1800.0  # seconds, of one run of pytest
PASSED, FAILED, NO_TESTS = 0, 1, 5  # pytest's exit statuses


class Mutation(NamedTuple):
    behavior: str  # what the original text does
    file: str  # below src/allmlp
    original: str  # occurs once in the file
    broken: str
    tests: str  # patterns of files or folders below tests/ in the order to run, perhaps with ::word of a test's name


# fmt: off
MUTATIONS = (
    Mutation("tokens are the patches in row-major order", "model.py",
             ".flatten(2).mT", ".mT.flatten(2).mT", "test_timm* test_model* test_*"),
    Mutation("stochastic depth rises linearly over the blocks", "model.py",
             "stochastic_depth * i / max(num_blocks - 1, 1)", "stochastic_depth", "test_dropout* test_*"),
    Mutation("GELU is the tanh approximation by default", "model.py",
             'nn.GELU(approximate="tanh" if gelu == "tanh" else "none")', "nn.GELU()", "test_model* test_*"),
    Mutation("initial kernels have the variance 1 / fan_in although they are truncated", "initial_weights.py",
             " ** -0.5 / 0.87962566", " ** -0.5", "test_initial* test_*"),
    Mutation("resized token mixing reads quadrants, not runs of tokens", "resolution.py",
             "(kron(r[0], c[0]), kron(r[1], c[1]))", "(kron(c[0], r[0]), kron(c[1], r[1]))",
             "weights/*resize* weights"),
    Mutation("the authors' stem is read as height, width, in, out", "weights/layouts.py",
             "return tensor.permute(3, 2, 0, 1)", "return tensor.permute(3, 2, 1, 0)",
             "weights/*load* weights/*convert* weights"),
    Mutation("LayerNorms numbered with gaps are put in natural order", "weights/load.py",
             "sorted(numbers[match[1]]).index(", "sorted(numbers[match[1]], key=str).index(", "weights/*load* weights"),
    Mutation("two-byte voids in an .npz are bfloat16", "weights/containers.py",
             '"|V2": torch.bfloat16', '"|V2": torch.float16', "weights/*load* weights/*containers* weights"),
    Mutation("a weights file that pickles code is refused", "weights/containers.py",
             "weights_only=True, mmap", "weights_only=False, mmap", "weights/*containers* weights"),
    Mutation("the hub's config.json is of the same commit as the weights", "weights/hub.py",
             'fetch(repo, "config.json", commit)', 'fetch(repo, "config.json", None)', "weights/*hub* weights"),
    Mutation("MIIL's weights take pixels in [0, 1]", "weights/published.py",
             "MIIL = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))", "MIIL = Preprocessing()",
             "weights/*published* weights/*load* weights"),
    Mutation("a write that fails leaves no temporary file", "files.py",
             "temporary.unlink(missing_ok=True)", "pass", "test_files* test_*"),
    Mutation("EXIF orientation is applied", "data/decode.py",
             "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90", "data/*decode* data"),
    Mutation("an image with too many pixels is refused before it is decoded", "data/decode.py",
             "image.width * image.height > max_pixels", "max(image.size) > max_pixels", "data/*decode* data"),
    Mutation("a split never takes the last image of a class", "data/split.py",
             "- 1e-9), len(members) - 1)", "- 1e-9), len(members))", "data/*split* data"),
    Mutation("each epoch has another order", "data/loader.py",
             "1 << 63 | epoch).permutation", "1 << 63).permutation", "data/*loader* data"),
    Mutation("ranks train on different images", "data/loader.py",
             "(step * self.world_size + self.rank) * self.batch_size", "step * self.world_size * self.batch_size",
             "distributed/*loader* data/*loader* data distributed"),
    Mutation("an unreadable image is masked", "data/loader.py",
             "torch.tensor([problem is None and i != PADDING for", "torch.tensor([i != PADDING for",
             "data/*loader* data cli"),
    Mutation("RandAugment's magnitude is not clipped at 10", "data/randaugment.py",
             '"rotate": lambda m: m / 10 * 30', '"rotate": lambda m: min(m, 10) / 10 * 30', "data/*randaugment* data"),
    Mutation("mixup stays within a group of samples", "data/mixup.py",
             "return start + (position - start - 1) % size", "return (position - 1) % images", "data/*mixup* data"),
    Mutation("the sigmoid loss is summed over classes", "training/losses.py",
             "F.softplus(logits).sum(1) - target", "(F.softplus(logits).sum(1) - target) / logits.shape[1]",
             "training/*losses* training"),
    Mutation("biases and LayerNorm scales do not decay", "training/optimizer.py",
             '"params": others, "weight_decay": 0.0', '"params": others, "weight_decay": weight_decay',
             "training/test_optimizer.py training"),
    Mutation("a gradient that is not finite changes no weight", "training/optimizer_step.py",
             "loss.isfinite() & (self.overflows <= self.tolerated_overflows)", "loss.isfinite()",
             "training/*optimizer_step* training"),
    Mutation("micro-batches do not change the gradient", "training/step.py",
             "/ (len(inputs.labels) * self.accumulate)", "/ len(inputs.labels)", "training/test_step.py training"),
    Mutation("the average keeps the share that its decay says", "training/ema.py",
             "averages, weights, 1 - self.decay)", "averages, weights, self.decay)", "training/*trainer* training"),
    Mutation("the learning rate's decay begins after the warm-up", "training/schedules.py",
             "(step - warmup_steps) / max(steps - warmup_steps, 1)", "step / max(steps, 1)",
             "training/*schedules* training"),
    Mutation("the weights with the best validation accuracy are kept", "training/trainer.py",
             "value > self.best[1]", "value < self.best[1]", "training/*trainer* training"),
    Mutation("a resumed run continues after the samples that it has used", "data/loader.py",
             "for step in range(self.first_step, self.steps):", "for step in range(self.steps - self.first_step):",
             "data/*loader* training/*interrupted* data training"),
    Mutation("a checkpoint holds the optimizer's moments", "training/state.py",
             "for key, value in moments.items() if isinstance(value, Tensor)}",
             'for key, value in moments.items() if key == "step"}', "training/*state* training/*interrupted* training"),
    Mutation("a flipped byte in a checkpoint is found", "checkpointing/checkpoint.py",
             "if found != expected:", "if found is None:", "checkpointing/*checkpoint* checkpointing"),
    Mutation("a preempted run exits with the signal's status", "training/preemption.py",
             '{self.resume_command}", 128 + number', '{self.resume_command}", 1', "training/*preemption* training"),
    Mutation("the watchdog names the rank that the others wait for", "distributed/watchdog.py",
             "silent or (busy if 0 < len(busy) < self.world_size else [slowest])", "silent or [0]",
             "distributed/*watchdog* distributed chaos"),
    Mutation("the launcher's exit status is that of the rank that failed", "distributed/launcher.py",
             "status = code if code > 0 else 128 - code if -code in SIGNALS else 1", "status = 1",
             "distributed/*launcher* distributed"),
    Mutation("the gradient's norm is over the shards of all ranks", "distributed/parallelize.py",
             "dist.all_reduce(squares)", "pass", "distributed/*parallelize* distributed"),
    Mutation("padding of the last batch is not evaluated", "evaluation/forward.py",
             "column[batch.valid].numpy()", "column.numpy()", "evaluation/*classification* evaluation"),
    Mutation("an accuracy's interval is Wilson's", "evaluation/significance.py",
             "p * (1 - p) / total + (z / (2 * total)) ** 2", "p * (1 - p) / total",
             "evaluation/*significance* evaluation"),
    Mutation("names in the report are escaped", "pages/page.py",
             "autoescape=True", "autoescape=False", "evaluation/*report* evaluation"),
    Mutation("a mistake of the caller's exits with 2", "cli/__init__.py",
             "return fail(error, 2, debug)", "return fail(error, 1, debug)", "cli/*main* cli/*overrides* cli"),
    Mutation("messages leave standard output to the result", "cli/__init__.py",
             "print(self.format(record), file=sys.stderr)", "print(self.format(record))", "cli/*end_to_end* cli"),
    Mutation("an unknown field of a recipe is answered with the nearest", "config/serialize.py",
             "difflib.get_close_matches(key, hints, 3) or list(hints)", "list(hints)", "config/*recipe* config"),
)
# fmt: on


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="in the behavior or the file")
    parser.add_argument("--all-tests", action="store_true", help="continue with the whole suite where the named pass")
    parser.add_argument("--skip-unbroken", action="store_true", help="do not run the tests on the unbroken tree first")
    parser.add_argument("--jobs", type=int, default=1, help="mutations that are tested at the same time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if any(word in f"{m.behavior} {m.file}" for word in options.only)]
    if gone := [f"src/allmlp/{m.file} does not hold {m.original!r} once: {m.behavior}" for m in chosen if not found(m)]:
        print(*gone, sep="\n", file=sys.stderr)
        return 1
    everything = ["../tests"] if options.all_tests else []
    if not options.skip_unbroken:
        patterns = " ".join(everything or [re.sub(r"::\w+", "", m.tests) for m in chosen])
        status, last, seconds = run_tests(None, [patterns])
        print(f"unbroken: {'passes' if status == PASSED else last}, {seconds:.0f} s", flush=True)
        if status != PASSED:
            return 1

    def attempt(mutation: Mutation) -> bool:
        status, last, seconds = run_tests(mutation, [*mutation.tests.split(), *everything])
        verdict = {FAILED: "caught", PASSED: "NOT CAUGHT", None: "TIMED OUT"}.get(status, f"pytest's status {status}")
        print(f"| {verdict} | {mutation.behavior} | {mutation.file} | {last} | {seconds:.0f} s |", flush=True)
        return status == FAILED

    print("| | behavior | file | first failing test | time |\n| --- | --- | --- | --- | --- |", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        caught = list(pool.map(attempt, chosen))
    print(f"\n{sum(caught)} of {len(caught)} caught")
    return 0 if all(caught) else 1


def found(mutation: Mutation) -> bool:
    path = ROOT / "src" / "allmlp" / mutation.file
    return path.is_file() and path.read_text(encoding="utf-8").count(mutation.original) == 1


def run_tests(mutation: Mutation | None, rounds: list[str]) -> tuple[int | None, str, float]:
    """Runs pytest for each round of patterns until one does not pass: its status (None: no time left), the first test
    that failed or else its last line, and the seconds in all."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        tree, report, start = Path(work) / "tree", Path(work) / "report.txt", time.monotonic()
        copy_tree(tree)
        if mutation is not None:
            path = tree / "src" / "allmlp" / mutation.file
            text = path.read_text(encoding="utf-8").replace(mutation.original, mutation.broken)
            path.write_text(text, encoding="utf-8")
        words = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", f"--basetemp={work}/tmp"]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        status, out = NO_TESTS, "no tests have these names"
        for patterns in rounds:
            names, _, keyword = patterns.partition("::")
            paths = {str(path) for name in names.split() for path in (tree / "tests").glob(name)}
            if not paths:  # renamed: the folder comes next
                continue
            with report.open("w") as output:  # not a pipe, which an orphan could keep open
                process = subprocess.Popen(
                    [sys.executable, "-m", "pytest", *words, *sorted(paths), "-k", keyword],
                    cwd=tree, env=os.environ | environment, start_new_session=True, stdout=output, stderr=output,
                )  # fmt: skip
                try:
                    status = process.wait(TIMEOUT)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    status = None
            out = report.read_text(errors="replace")
            if status not in (PASSED, NO_TESTS):
                break
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", out, re.MULTILINE)
        return status, failed[1] if failed else out.strip().rpartition("\n")[2], time.monotonic() - start


def copy_tree(target: Path) -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # git also lists one that was removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


if __name__ == "__main__":
    sys.exit(main())
