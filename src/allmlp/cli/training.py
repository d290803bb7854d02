"""What train and finetune share: what their arguments mean, and printing the summary."""

import shlex
import sys
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allmlp.api.recipe import Overrides
from allmlp.cli.processes import LaunchOptions
from allmlp.cli.streams import saved_result
from allmlp.errors import UserError, printable
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.distributed.context import DistributedContext


NAMES = {"val": "validation", "test": "test"}


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
        check_no_model(word)
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


def check_no_model(word: str) -> None:
    """Raises a UserError for a word that is no recipe, but the name of a model or of published weights."""
    from allmlp.factory import resolve_name
    from allmlp.weights.named import NAMED

    if word.lower() in NAMED:
        raise UserError(f"{word!r} is no recipe, but published weights: mixer finetune {word} --data SOURCE")
    try:
        model = resolve_name(word)
    except UserError:
        return
    raise UserError(f"{word!r} is no recipe, but a model: give --model {model}")


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


def describe_scores(summary: dict[str, Any]) -> str:
    """The accuracies, each with that of always answering the commonest class; "" if there are none."""
    scores = []
    for split, name in NAMES.items():
        if (top1 := summary[f"{split}_top1"]) is not None:
            majority = summary.get(f"{split}_majority")  # a run of an earlier version has none
            scores.append(
                f"{name} top-1 {top1:.4f}" + ("" if majority is None else f" (commonest class {majority:.4f})")
            )
    return ", ".join(scores)


def print_scores(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        files = {"out": out, "weights": out / "model.safetensors", "report": out / "report.html"}
        print(to_json({**{name: str(path) for name, path in files.items()}, **summary}))
    else:
        print(f"{describe_scores(summary) or 'no held-out images'} after {summary['train_seconds']:.1f} s of training")
        for split, verdict in summary.get("verdicts", {}).items():
            print(f"{NAMES[split]}: this model is {verdict}")
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
