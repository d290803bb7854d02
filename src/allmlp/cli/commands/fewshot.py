"""mixer fewshot"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from allmlp.cli.arguments import WEIGHTS_HELP, parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.evaluation import ComputeOptions, Part
from allmlp.cli.processes import join_processes, launch_evaluation
from allmlp.errors import UserError
from allmlp.files import to_json

if TYPE_CHECKING:
    from allmlp.api.evaluate import EvaluationOptions
    from allmlp.distributed.context import DistributedContext
    from allmlp.evaluation.fewshot_task import FewshotResult

DESCRIPTION = """Fits linear probes to the frozen features of a few images of each class, and tests them (Section 3).

examples: mixer fewshot Mixer-B_16.npz --data pets --shots 5
          mixer fewshot a.safetensors b.safetensors --data photos/ --shots 1 5 10 25

The images are resized on both sides and cropped in the center, without augmentation. The probe is a ridge regression to
targets of ±1, as in the authors' code. Weights need no head."""


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WEIGHTS…", help=WEIGHTS_HELP, help_behavior_hint="(required)"),
    ]
    data: str
    """SOURCE: a name (digits, cifar10, pets, imagenet, …), a folder of images, or a .zip of one."""
    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Training images per class; a class with fewer gives all that it has."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each chooses other training images; the mean and standard deviation over the seeds are shown."""
    l2: float = 1024.0
    """Strength of the regularization."""
    part: Part = "test"
    """Split of the source that the probes are tested on; they choose their images from the training split."""
    crop: Literal["resmall", "resize"] = "resize"
    """resize resizes both sides, as in the paper; resmall the shorter one."""
    cache: bool = True
    """Keep features in the data folder (ALLMLP_DATA), by the content of weights and images, and use those there."""
    json: bool = False
    """Print one JSON object."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)


def run(args: Sequence[str]) -> int:
    arguments = parse(Arguments, args, command="fewshot", description=DESCRIPTION)
    if not arguments.weights:
        raise UserError("no weights: name a file, or hf-hub:OWNER/NAME (mixer fewshot --help)")
    compute = arguments.compute
    if (status := launch_evaluation(compute.processes, compute.device, ["fewshot", *args])) is not None:
        return status
    from allmlp.evaluation.fewshot import check_numbers

    check_numbers(arguments.shots, arguments.seeds, arguments.l2)
    options = compute.options(arguments.part, arguments.crop)
    with join_processes(compute.device) as context:
        results = [probe_one(weights, arguments, options, context) for weights in arguments.weights]
        if context.is_rank0:
            report(arguments, [description for description, _ in results], [result for _, result in results])
    return 0


def probe_one(
    weights: str, arguments: Arguments, options: "EvaluationOptions", context: "DistributedContext"
) -> tuple[str, "FewshotResult"]:
    """The description of the source, and the result of one model."""
    from allmlp.api.fewshot import load_for_probe, probe_source

    model = arguments.compute.load(weights)
    source = context.local_rank0_first(lambda: load_for_probe(model, arguments.data, options))
    result = probe_source(
        model,
        source,
        options,
        arguments.shots,
        arguments.seeds,
        arguments.l2,
        cache=arguments.cache,
        context=context,
    )
    return source.description, result


def report(arguments: Arguments, descriptions: list[str], results: list["FewshotResult"]) -> None:
    from allmlp.cli.display import describe_unreadable, print_letters, print_table

    first = results[0]
    if arguments.json:
        each = [
            {"weights": weights, "data": description, "part": arguments.part, **result.to_json_object()}
            for weights, description, result in zip(arguments.weights, descriptions, results, strict=True)
        ]
        print(to_json(each[0] if len(each) == 1 else {"models": each}))
    else:
        print(f"{first.test_images:,} images: the {arguments.part} split of {descriptions[0]}")
        shots = first.shots
        letters = print_letters(arguments.weights)
        rows = [
            [letter, *(format_score(result.mean(shot), result.std(shot)) for shot in shots)]
            for letter, result in zip(letters, results, strict=True)
        ]
        seeds = f"{len(arguments.seeds)} seeds: mean ± standard deviation" if len(arguments.seeds) > 1 else "one seed"
        print_table(f"top-1 of the probes, {seeds}", ["", *(f"{shot}-shot" for shot in shots)], rows)
        print(f"always answering {first.commonest_class!r}: top-1 {first.commonest_top1:.4f}")
    for shot, classes in first.small_classes.items():
        print(f"{classes:,} class(es) have fewer than {shot} training images, and gave all of them", file=sys.stderr)
    unreadable = dict.fromkeys(name for result in results for name in result.unreadable)
    if unreadable:
        print(describe_unreadable(list(unreadable)), file=sys.stderr)


def format_score(mean: float, std: float | None) -> str:
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"
