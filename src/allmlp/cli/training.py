"""What train and finetune share: launching processes, and printing the summary."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allmlp.api.recipe import Overrides
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.streams import saved_result
from allmlp.config.batch_size import check_world_size
from allmlp.config.recipe import Recipe
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.distributed.context import DistributedContext


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class LaunchOptions:
    resume: str | None = None
    """The folder of a run to continue from its newest checkpoint; auto: the folder of --out, if it holds a run."""
    processes: int = 1
    """Number of processes on this machine, one per GPU. Starting the run with torchrun works too."""
    nnodes: int = 1
    """Number of machines; run the command on each of them, with the same --processes."""
    node_rank: int = 0
    """Which of the machines this is, from 0."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of machine 0, where the machines meet."""

    @property
    def world_size(self) -> int:
        return self.processes * self.nnodes


def requested_folder(out: Path | None, launch: LaunchOptions) -> Path | None:
    """The run's folder as --out or --resume name it; None: a new one, named by recipe and time."""
    if launch.resume in (None, "auto"):
        if launch.resume and out is None:
            raise UserError("--resume auto without --out: name the run's folder with --out")
        return out
    if out is not None and out != Path(launch.resume):
        raise UserError(f"--resume {launch.resume} and --out {out}: a run stays in its folder, so leave out --out")
    return Path(launch.resume)


class Choice(NamedTuple):
    """What a positional argument names: a recipe; None: data to train on."""

    recipe: str | None
    note: str = ""  # how it was understood, where that may surprise


def recipe_or_data(word: str | None, recipes: Container[str], given: Overrides) -> Choice:
    """What ``word`` means: a path is data, and so is a folder or zip that is there, unless a recipe has its name.

    The data is added to the fields ``given``.

    Raises:
        UserError: data that is given twice, or a name of both a folder and a built-in data set.
    """
    if word is None:
        return Choice(None)
    path, data = Path(word), given["data"].get("data")
    if word in recipes:
        ambiguous = path.is_dir() and data is None
        return Choice(word, f"{word} is a recipe; for the folder of that name, give {word}/" if ambiguous else "")
    is_path = word.endswith(("/", "\\")) or word.startswith(("./", "../", ".\\", "..\\")) or path.is_absolute()
    if not is_path and not path.is_dir() and not (path.suffix.lower() == ".zip" and path.is_file()):
        return Choice(word)
    if data is not None:
        raise UserError(f"both {word!r} and --data {data}: give one of them")
    given["data"]["data"] = word if path.exists() else word.rstrip("\\")
    if is_path:
        return Choice(None)
    from allmlp.data.builtin.catalog import BUILT_IN

    if word in BUILT_IN:
        raise UserError(f"{word!r} is no recipe: give --data {word} for the data set, or {word}/ for the folder")
    return Choice(None, f"{printable(word)} is no recipe, but is there to train on: taken as --data {printable(word)}")


def must_launch(recipe: Recipe, launch: LaunchOptions) -> bool:
    """Whether this process has to launch the processes of the run, and is not one of them.

    Raises:
        UserError: a mistake in the launch options, or a recipe that cannot be trained by this many processes.
    """
    check_launch_options(launch)
    started = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else None
    if started is not None and launch.world_size not in (1, int(started) if started.isdecimal() else 0):
        raise UserError(
            f"--processes {launch.processes}, but this process was started as one of {started} (RANK and WORLD_SIZE "
            "are set): leave out --processes, or unset them"
        )
    if launch.world_size == 1 or started is not None:
        return False
    check_world_size(recipe, launch.world_size)  # here, so that a single process reports a mistake
    from allmlp.device import choose_device

    choose_device(recipe.run.device, launch.processes - 1, launch.world_size)
    return True


def check_launch_options(launch: LaunchOptions) -> None:
    if launch.processes < 1 or launch.nnodes < 1:
        raise UserError(f"--processes {launch.processes} --nnodes {launch.nnodes}: must be at least 1")
    if not 0 <= launch.node_rank < launch.nnodes:
        raise UserError(
            f"--node-rank {launch.node_rank} of --nnodes {launch.nnodes}: must be from 0 to {launch.nnodes - 1}"
        )
    host, _, port = (launch.rdzv_endpoint or "").rpartition(":")
    valid = host and port.isdecimal() and 0 < int(port) < 65536
    if (launch.nnodes > 1 or launch.rdzv_endpoint) and not valid:
        raise UserError(
            f"--rdzv-endpoint {launch.rdzv_endpoint}: give HOST:PORT of machine 0, such as --rdzv-endpoint node1:29500"
        )


def launch_processes(launch: LaunchOptions, words: Sequence[str]) -> int:
    """Runs ``mixer WORDS`` in each of the run's processes on this machine; returns the exit status."""
    from allmlp.distributed.launcher import LaunchConfig
    from allmlp.distributed.launcher import launch as launch_all

    config = LaunchConfig(
        nproc_per_node=launch.processes,
        nnodes=launch.nnodes,
        node_rank=launch.node_rank,
        rdzv_endpoint=launch.rdzv_endpoint,
    )
    return launch_all(config, words)


@contextlib.contextmanager
def distributed_run(recipe: Recipe) -> Iterator["DistributedContext"]:
    """Joins the processes of the run. Only rank 0 logs more than errors."""
    from allmlp.distributed.context import init_distributed

    with init_distributed(recipe.run.timeout_seconds, recipe.run.device) as context:
        if not context.is_rank0:
            logging.getLogger("allmlp").setLevel(logging.ERROR)
        yield context


def resume_with(out: Path, launch: LaunchOptions, context: "DistributedContext") -> str:
    """The command that resumes a run with as many processes."""
    command = f"mixer train --resume {shlex.quote(str(out))}"
    if context.world_size > 1:
        command += f" --processes {context.local_world_size}"
    if launch.nnodes > 1:
        command += f" --nnodes {launch.nnodes} --node-rank {launch.node_rank} --rdzv-endpoint {launch.rdzv_endpoint}"
    return command


def print_summary(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    """Prints the scores and what to do next, or the whole summary as JSON. The run is complete, and its files written.

    Raises:
        RunError: the JSON cannot be written.
    """
    from allmlp.cli.display import describe_unreadable

    with saved_result(out / "summary.json", as_json):
        print_scores(summary, out, as_json)
    if summary["unreadable"]:
        print(describe_unreadable(summary["unreadable"]), file=sys.stderr)


def print_scores(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        files = {"out": out, "weights": out / "model.safetensors", "report": out / "report.html"}
        print(to_json({**{name: str(path) for name, path in files.items()}, **summary}))
    else:
        scores = {"validation": summary["val_top1"], "test": summary["test_top1"]}
        shown = ", ".join(f"{name} top-1 {score:.4f}" for name, score in scores.items() if score is not None)
        print(f"{shown or 'no held-out images'} after {summary['train_seconds']:.1f} s of training")
        for rate, score in summary.get("search", {}).items():
            mark = " (chosen)" if float(rate) == summary["learning_rate"] else ""
            print(f"rate     {rate}: " + ("diverged" if score is None else f"held-out top-1 {score:.4f}{mark}"))
        if summary.get("test_top1_std") is not None:
            mean, deviation = summary["test_top1_mean"], summary["test_top1_std"]
            print(f"test     top-1 {mean:.4f} ± {deviation:.4f} over {len(summary['seeds'])} seeds")
        print(f"weights  {out}/model.safetensors")
        print(f"report   {out}/report.html")
        if (out / "examples").is_dir():
            print(f"try      mixer predict {out}/model.safetensors {out}/examples")
