"""mixer evaluate"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from allmlp.cli.arguments import WEIGHTS_HELP, parse
from allmlp.cli.docstrings import help_from_docstrings
from allmlp.cli.evaluation import ComputeOptions, Part
from allmlp.cli.processes import join_processes, launch_evaluation
from allmlp.errors import UserError
from allmlp.files import to_json

if TYPE_CHECKING:
    import numpy as np

    from allmlp.api.evaluate import EvaluationOptions
    from allmlp.distributed.context import DistributedContext
    from allmlp.evaluation.classification import Classification
    from allmlp.evaluation.comparison import NamedPair
    from allmlp.evaluation.pages.evaluation_report import Evaluated

DESCRIPTION = """Evaluates weights on labeled images: every image counts once, classes are matched by name.

examples: mixer evaluate runs/digits/model.safetensors --data digits
          mixer evaluate a.safetensors b.safetensors --data photos/ --page comparison.html
          mixer evaluate runs/pets runs/flowers --data pets flowers102

Several weights on one source are compared on the same images, each pair with McNemar's test. With several sources, each
weights is evaluated on its own, or a single one on all, and averaged.

A source without splits is split as it was for training, so that no test image was trained on."""
MAX_CLASSES = 200  # with more classes, the table of scores shows only those with the lowest recall
MAX_ROWS = 20  # of the other tables


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class Arguments:
    weights: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WEIGHTS…", help=WEIGHTS_HELP, help_behavior_hint="(required)"),
    ]
    data: tuple[str, ...]
    """SOURCE: a name (digits, cifar10, pets, imagenet, …), a folder of images, or a .zip of one. Several: one for
    each weights, or all for a single one."""
    part: Part = "test"
    """Split of the source to evaluate on."""
    crop: Literal["resmall", "resize"] | None = None
    """resmall resizes the shorter side (the paper's Table 3), resize both sides (Table 2); None: as for the weights."""
    real_labels: Path | None = None
    """The real.json of ImageNet-ReaL, for ImageNet's validation images; None: the labels that timm contains."""
    page: Path | None = None
    """Also write an HTML page to this file: metrics, reliability diagrams, confusion matrix, hardest mistakes."""
    json: bool = False
    """Print one JSON object. Its confusion_counts lists [true class, predicted class, images] for each pair of classes
    that occurs; classes are positions in its list of classes."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)


class Evaluation(NamedTuple):
    """The predictions of one model, and on what."""

    weights: str
    image_size: tuple[int, int]
    data: str  # description of the source
    left_out: dict[str, int]
    own_data: bool  # whether the weights were trained on this source
    result: "Classification"


def run(args: Sequence[str]) -> int:
    arguments = parse(Arguments, args, command="evaluate", description=DESCRIPTION)
    if len(arguments.weights) == 1:
        arguments = dataclasses.replace(arguments, weights=arguments.weights * len(arguments.data))
    check_arguments(arguments)
    compute = arguments.compute
    if (status := launch_evaluation(compute.processes, compute.device, ["evaluate", *args])) is not None:
        return status
    options = compute.options(arguments.part, arguments.crop)
    sources = arguments.data if len(arguments.data) > 1 else arguments.data * len(arguments.weights)
    with join_processes(compute.device) as context:
        evaluations = [
            evaluate_one(weights, source, arguments, options, context)
            for weights, source in zip(arguments.weights, sources, strict=True)
        ]
        if context.is_rank0:
            report(evaluations, arguments)
    return 0


def check_arguments(arguments: Arguments) -> None:
    weights, sources = len(arguments.weights), len(arguments.data)
    if not weights or not sources:
        raise UserError(f"{weights} weights and {sources} sources: give at least one of each (mixer evaluate --help)")
    if sources not in (1, weights):
        raise UserError(f"{sources} sources for {weights} weights: give --data one source, or one for each weights")
    if sources > 1 and arguments.page is not None:
        raise UserError(f"--page {arguments.page}: a page shows models on the same images; give one source")
    if arguments.page is not None and not arguments.page.parent.is_dir():
        raise UserError(f"--page {arguments.page}: there is no folder {arguments.page.parent}; create it first")


def evaluate_one(
    weights: str, data: str, arguments: Arguments, options: "EvaluationOptions", context: "DistributedContext"
) -> Evaluation:
    from allmlp.api.evaluate import evaluate_source, load_as_trained, same_data

    model = arguments.compute.load(weights)
    source = context.local_rank0_first(lambda: load_as_trained(model, data, options))
    result = evaluate_source(model, source, options, arguments.real_labels, context)
    own_data = same_data(model, source, data)
    return Evaluation(weights, model.image_size, source.description, source.left_out, own_data, result)


def report(evaluations: list[Evaluation], arguments: Arguments) -> None:
    """Prints the results, as text or JSON, and writes the page."""
    from allmlp.evaluation.comparison import compare_all
    from allmlp.evaluation.pages.evaluation_report import Evaluated, write_evaluation_report

    several_sources, images = len(arguments.data) > 1, f"{arguments.part} split of {evaluations[0].data}"
    pairs = [] if several_sources else compare_all([evaluation.result for evaluation in evaluations])
    named = [Evaluated(one.weights, one.result) for one in evaluations]
    if arguments.page is not None:
        write_evaluation_report(arguments.page, named, pairs, images)
    if arguments.json:
        print(to_json(describe(evaluations, pairs, arguments)))
    elif several_sources:
        print_tasks(evaluations, arguments)
    elif len(evaluations) > 1:
        print(f"{len(named[0].result.labels):,} images: the {images}")
        print_models(named, pairs)
    else:
        print_one(evaluations[0], images, arguments)
    if arguments.page is not None and not arguments.json:
        print(f"page     {arguments.page}")
    print_unreadable(evaluations)


def describe(evaluations: list[Evaluation], pairs: Sequence["NamedPair"], arguments: Arguments) -> dict[str, Any]:
    """The results as JSON values: of one model, of several on the same images, or of one on each source."""
    from allmlp.evaluation.scores import to_json_object

    each = [
        {
            "weights": one.weights,
            "image_size": list(one.image_size),
            "data": one.data,
            "part": arguments.part,
            "left_out": one.left_out,
            **to_json_object(one.result),
        }
        for one in evaluations
    ]
    if len(each) == 1:
        return each[0]
    if len(arguments.data) == 1:
        return {"models": each, "pairs": [pair.to_json_object(arguments.weights) for pair in pairs]}
    return {"tasks": each, **average(evaluations, arguments)}


def average(evaluations: list[Evaluation], arguments: Arguments) -> dict[str, float | None]:
    """The mean accuracy of the sources, and the paper's "Avg. 5" if they are its five."""
    from allmlp.evaluation.scores import AVERAGE_OF_FIVE, average_of_five

    top1 = dict(zip(arguments.data, (one.result.top1 for one in evaluations), strict=True))
    mean = sum(one.result.top1 for one in evaluations) / len(evaluations)
    return {"mean_top1": mean, "average_of_five": average_of_five(top1) if set(top1) == set(AVERAGE_OF_FIVE) else None}


def print_one(evaluation: Evaluation, images: str, arguments: Arguments) -> None:
    page = Path(evaluation.weights).parent / "report.html"  # of a run, with its own held-out images
    where = f"--json lists all; {page} draws those of the run" if page.is_file() else "--json lists all"
    print_result(evaluation.result, images, where)
    if arguments.part != "all" and not evaluation.own_data:
        print("(these weights were trained on other data: --part all evaluates on every image of this source)")


def print_result(result: "Classification", images: str, where: str) -> None:
    """Prints the scores; ``where``: a hint to what the tables leave out."""
    from allmlp.cli.display import print_table
    from allmlp.evaluation.scores import list_scores

    print(f"{len(result.labels):,} images: the {images}")
    for score in list_scores(result):
        print(f"{score.label} {score.value:.4f} ({format_interval(score.interval)})")
    if result.real is not None and result.real.without_label:
        print(f"(ReaL has no label for {result.real.without_label:,} of the images: they do not count there)")
    print(f"cross-entropy {result.loss:.4f}, expected calibration error {result.calibration.ece:.4f}")
    majority = result.majority
    print(f"always answering {majority.name!r}: top-1 {majority.top1:.4f}")
    if majority.verdict is not None:
        print(f"this model is {majority.verdict}")
    scores, title = result.per_class(), "per class"
    if len(scores) > MAX_CLASSES:
        title = f"per class: {MAX_ROWS} of {len(scores):,} classes, lowest recall first ({where})"
        scores = sorted(scores, key=lambda score: math.inf if score.recall is None else score.recall)[:MAX_ROWS]
    rows = [[r.name, f"{r.images:,}", format_fraction(r.recall), format_fraction(r.precision)] for r in scores]
    print_table(title, ["class", "images", "recall", "precision"], rows)
    print_confusion(result.dataset.classes, result.confusion_counts, where)


SHORT = {"top5": "top-5", "real_top1": "ReaL", "balanced_accuracy": "balanced"}


def print_models(models: Sequence["Evaluated"], pairs: Sequence["NamedPair"]) -> None:
    """Prints the scores of several models on the same images, and how each two of them differ.

    The tables call them by letters, so that they fit into narrow terminals.
    """
    from allmlp.cli.display import print_letters, print_table
    from allmlp.evaluation.scores import list_scores

    letters = print_letters([name for name, _ in models])
    scores = [{score.key: score for score in list_scores(result)} for _, result in models]
    others = [key for key in SHORT if any(key in one for one in scores)]
    rows = [
        [
            letter,
            f"{one['top1'].value:.4f}",
            f"{one['top1'].interval[0]:.4f} to {one['top1'].interval[1]:.4f}",
            *(f"{one[key].value:.4f}" if key in one else "–" for key in others),
            f"{result.calibration.ece:.4f}",
            f"{result.loss:.4f}",
        ]
        for letter, (_, result), one in zip(letters, models, scores, strict=True)
    ]
    heads = ["", "top-1", "95 % interval", *(SHORT[key] for key in others), "ECE", "loss"]
    print_table("accuracy, expected calibration error (ECE) and cross-entropy (loss)", heads, rows)
    majority = models[0].result.majority
    print(f"always answering {majority.name!r}: top-1 {majority.top1:.4f}")
    for letter, (_, result) in zip(letters, models, strict=True):
        if (verdict := result.majority.verdict) is not None:
            print(f"{letter} is {verdict}")
    rows = [
        [
            f"{letters[first]} − {letters[second]}",
            f"{pair.difference:+.4f}",
            f"{pair.interval[0]:+.4f} to {pair.interval[1]:+.4f}",
            f"{pair.only_first:,}",
            f"{pair.only_second:,}",
            f"{pair.p_value:.2g}",
        ]
        for first, second, pair in pairs
    ]
    title = "differences in top-1, images that only one gets right, and p-values of McNemar's exact test"
    heads = ["", "difference", "95 % interval", "only 1st", "only 2nd", "p-value"]
    print_table(title, heads, rows)
    if len(pairs) > 1:
        print("(p-values are not corrected for the number of pairs)")


def print_tasks(evaluations: list[Evaluation], arguments: Arguments) -> None:
    """Prints the accuracy of each weights on its own source, and the mean."""
    from allmlp.cli.display import print_table
    from allmlp.evaluation.scores import list_scores

    rows = []
    for source, one in zip(arguments.data, evaluations, strict=True):
        top1, majority = list_scores(one.result)[0], one.result.majority
        interval = f"{top1.interval[0]:.4f} to {top1.interval[1]:.4f}"
        images = f"{len(one.result.labels):,}"
        rows.append([source, one.weights, images, f"{top1.value:.4f}", interval, f"{majority.top1:.4f}"])
    heads = ["data", "weights", "images", "top-1", "95 % interval", "commonest class"]
    print_table(f"{arguments.part} split of each source", heads, rows, names=2)
    for source, one in zip(arguments.data, evaluations, strict=True):
        if (verdict := one.result.majority.verdict) is not None:
            print(f"on {source}, {one.weights} is {verdict}")
    means = average(evaluations, arguments)
    print(f"mean of {len(evaluations)} sources: top-1 {means['mean_top1']:.4f}")
    if means["average_of_five"] is not None:
        print('these are the five tasks of the paper\'s "Avg. 5"')


def print_confusion(names: Sequence[str], counts: "np.ndarray", where: str) -> None:
    """Prints (M, 3) counts: for few classes as a matrix, else the most frequent mistakes, and where all of them are."""
    from allmlp.cli.display import print_matrix, print_table

    if len(names) <= MAX_ROWS:
        rows = [["0"] * len(names) for _ in names]
        for true, predicted, images in counts.tolist():
            rows[true][predicted] = str(images)
        if print_matrix("confusion: true class down, predicted across", list(names), rows):
            return
    mistakes = counts[counts[:, 0] != counts[:, 1]]
    most = mistakes[(-mistakes[:, 2]).argsort(kind="stable")[:MAX_ROWS]].tolist()
    pairs = [[names[true], names[predicted], f"{images:,}"] for true, predicted, images in most]
    title = f"confusion: {len(most)} of {len(mistakes):,} confused pairs, most frequent first ({where})"
    print_table(title, ["true class", "predicted as", "images"], pairs, names=2)


def print_unreadable(evaluations: list[Evaluation]) -> None:
    from allmlp.cli.display import describe_unreadable

    names = dict.fromkeys(name for one in evaluations for name in one.result.unreadable)
    if names:
        print(describe_unreadable(list(names)), file=sys.stderr)


def format_interval(interval: tuple[float, float]) -> str:
    return f"95 % interval {interval[0]:.4f} to {interval[1]:.4f}"


def format_fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
