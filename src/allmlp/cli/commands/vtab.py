"""mixer vtab"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from allmlp.api.recipe import FINETUNE_MODEL_FIELDS, Overrides
from allmlp.cli.arguments import Weights, parse_with_overrides
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.overrides import Option, option_group, options_of, section_group
from allmlp.cli.processes import LaunchOptions, join_processes, launch_processes, must_launch
from allmlp.cli.streams import saved_result
from allmlp.cli.training import requested_folder
from allmlp.config.batch_size import check_world_size
from allmlp.config.vtab import GROUPS
from allmlp.errors import UserError
from allmlp.files import to_json
from allmlp.recipes.vtab import vtab

DESCRIPTION = """Fine-tunes weights on each of the 19 tasks of VTAB-1k, and reports the means of its groups and of all.

examples: mixer vtab Mixer-B_16.npz --data vtab-1k/ --micro-batch-size 32
          mixer vtab w.safetensors --data vtab-1k/ --tasks dtd svhn --seeds 1

A task's folder, such as vtab-1k/dtd/, holds images/ and the lists train800.txt, val200.txt, train800val200.txt and
test.txt (docs/vtab.md). Tasks without one are read from copies in torchvision's format, in the folder ALLMLP_DATA. The
learning rate is chosen on the 800 and 200 images, then all 1,000 are trained on, once for each of --seeds. The same
command with the same --out resumes what was stopped, and repeats no task that is complete."""
SPLITTING = ("data", "val_fraction", "test_fraction", "split_seed", "holdout", "exclude")  # the tasks have their splits
SIZE_HELP = "In pixels, one number, or height and width; none: 224 for tasks of small images, 448 for the others."


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Weights = ""
    data: Path | None = None
    """Folder that holds the tasks' folders: caltech101/, cifar/, dtd/, and so on."""
    tasks: tuple[str, ...] = ()
    """Tasks to run; none: all 19."""
    skip_missing: bool = False
    """Run the tasks whose data is there; the means that lack a task are marked as incomplete."""
    download: bool = False
    """Let torchvision download what it can, to ALLMLP_DATA."""
    schedule: Literal["bit", "vit"] = "bit"
    """bit: 500 steps, rate ÷ 10 at 30, 60 and 90 %; vit: 2,500 steps, cosine decay."""
    out: Path | None = None
    """Folder of the results, one folder a task; by default runs/vtab-DATE-TIME."""
    json: bool = False
    """Print the result as one JSON object."""
    launch: LaunchOptions = field(default_factory=LaunchOptions)


def run(args: Sequence[str]) -> int:
    arguments, given = parse_arguments(args)
    if not arguments.weights:
        raise UserError("no weights: name a file, or hf-hub:OWNER/NAME (mixer vtab --help)")
    from allmlp.data.builtin.vtab import describe_missing, find_sources, tasks_called

    sources = find_sources(arguments.data, tasks_called(arguments.tasks), arguments.download)
    if sources.missing and (not arguments.skip_missing or not sources.found):
        raise UserError(describe_missing(sources, arguments.download))
    from allmlp.api.vtab import plan_tasks, run_vtab

    plans = plan_tasks(arguments.weights, sources.found, arguments.schedule, given)
    first = next(iter(plans.values())).recipe
    launch = arguments.launch
    launch = dataclasses.replace(launch, resume=launch.resume or ("auto" if arguments.out else None))
    out = requested_folder(arguments.out, launch)
    if must_launch(launch, first.run.device, partial(check_world_size, first)):
        return launch_processes(launch, ["vtab", *args])
    command = shlex.join(["mixer", "vtab", *args])
    from allmlp.runs.folder import claimed_folder
    from allmlp.training.run import RunOptions

    with (
        join_processes(first.run.device, first.run.timeout_seconds) as context,
        claimed_folder(out, "vtab", context) as folder,
    ):
        again = command if out else f"{command} --out {shlex.quote(str(folder))}"
        options = RunOptions(command=command, resume_command=again)
        result = run_vtab(plans, sources.missing, folder, options, context)
        if context.is_rank0:
            with saved_result(folder / "vtab.json", arguments.json):
                report(result, folder, arguments.json)
    return 0


def parse_arguments(args: Sequence[str]) -> tuple[Arguments, Overrides]:
    """The arguments, and the fields of all tasks' recipes and searches that were given as options."""
    plan = vtab("dtd")
    recipe = plan.recipe
    search, data = options_of(plan.search), options_of(recipe.data)
    model = {"image_size": Option(tuple[int, ...], SIZE_HELP, ())}
    model |= {name: option for name, option in options_of(recipe.model).items() if name in FINETUNE_MODEL_FIELDS}
    groups = {
        "search": option_group(
            type(plan.search).__doc__, {name: search[name] for name in search if name != "search_fraction"}
        ),
        "model": option_group("The model made from the weights.", model),
        "data": option_group(
            "The images and their augmentation; structured tasks are not mirrored unless --flip is given.",
            {name: data[name] for name in data if name not in SPLITTING},
        ),
        "optimization": section_group(recipe.optimization),
        "run": section_group(recipe.run),
    }
    return parse_with_overrides(Arguments, groups, args, command="vtab", description=DESCRIPTION)


def report(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    from allmlp.cli.display import describe_unreadable, print_table

    if as_json:
        print(to_json({"out": str(folder), **result}))
    else:
        seeds = max(len(row["seeds"]) for row in result["tasks"].values())
        title = f"VTAB-1k top-1, {seeds} seeds: mean ± standard deviation" if seeds > 1 else "VTAB-1k top-1, one seed"
        rows = [
            [task, row["group"], show(row), show_commonest(row), f"{row['learning_rate']:g}"]
            for task, row in result["tasks"].items()
        ]
        groups = [(group, result["groups"][group]) for group in GROUPS if group in result["groups"]]
        for name, mean in [*groups, ("all", result["all"])]:
            number = f"{mean['of']}" if mean["complete"] else f"{mean['tasks']} of {mean['of']}"
            rows.append([f"mean of {number}", name, show(mean), show_commonest(mean), ""])
        print_table(title, ["task", "group", "top-1", "commonest class", "rate"], rows, names=2)
        for task, row in result["tasks"].items():
            if row["verdict"]:
                print(f"{task}: this model is {row['verdict']}")
        if result["vtab_top1"] is None:
            tasks = result["all"]["tasks"]
            print(f"incomplete: the score of VTAB is the mean of all 19 tasks, and these are {tasks} of them")
        print(f"result   {folder}/vtab.json")
    for row in result["tasks"].values():
        for note in row["notes"]:
            print(note, file=sys.stderr)
    for task, place in result["missing"].items():
        print(f"{task} was skipped: no data in {place}", file=sys.stderr)
    for task, row in result["tasks"].items():
        if row["unreadable"]:
            print(f"{task}: {describe_unreadable(row['unreadable'])}", file=sys.stderr)


def show(score: dict[str, Any]) -> str:
    return f"{score['top1']:.4f}" + ("" if score["std"] is None else f" ± {score['std']:.4f}")


def show_commonest(score: dict[str, Any]) -> str:
    return f"{score['commonest_class_top1']:.4f}"
