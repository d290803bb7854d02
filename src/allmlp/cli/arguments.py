"""Parses the command line into dataclasses, with tyro; its boxed errors become one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import sys
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from allmlp.config.limits import flag
from allmlp.errors import UserError

T = TypeVar("T")

WEIGHTS_HELP = (
    "A file of allmlp, the authors (.npz), timm or others, a run's folder, a name such as mixer-b16-in21k (see mixer "
    "models), or hf-hub:OWNER/NAME."
)
Weights = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="WEIGHTS", help=WEIGHTS_HELP, help_behavior_hint="(required)"),
]


SYNONYMS = {  # ours → options of that meaning in other programs
    "--batch-size": "--bs -b --batch --batchsize",
    "--clip-norm": "--clip-grad --max-grad-norm --grad-clip",
    "--data": "--data-dir --dataset --data-path --train-dir -d",
    "--device": "--gpu --cpu --cuda",
    "--dropout": "--drop",
    "--ema-decay": "--model-ema --model-ema-decay --ema",
    "--epochs": "--num-epochs --num-train-epochs --max-epochs -e",
    "--global-batch-size": "--bs --batch --batchsize --train-batch-size",
    "--image-size": "--img-size --imgsz --input-size --resolution --img",
    "--label-smoothing": "--smoothing",
    "--micro-batch-size": "--per-device-train-batch-size --gradient-accumulation-steps --grad-accum-steps",
    "--optimizer": "--opt --optim",
    "--out": "--output --output-dir --save-dir -o",
    "--part": "--split",
    "--precision": "--amp --bf16 --fp16 --half",
    "--processes": "--gpus --ngpus --nproc-per-node --num-processes",
    "--steps": "--max-steps --num-steps",
    "--stochastic-depth": "--drop-path",
    "--top": "--topk --top-k -k",
    "--warmup-steps": "--warmup --num-warmup-steps",
    "--weight-decay": "--wd --decay-weight",
    "--workers": "--num-workers --dataloader-num-workers -j",
}


def parse(kind: type[T], args: Sequence[str], *, command: str, description: str) -> T:
    """The command's arguments. ``--help`` prints the description and ends the process.

    Raises:
        UserError: a mistake in the arguments; for an unknown option, the message names ours, or the nearest.
    """
    errors, help_text = io.StringIO(), io.StringIO()
    plain = contextlib.redirect_stdout(help_text) if os.environ.get("NO_COLOR") else contextlib.nullcontext()
    try:
        with contextlib.redirect_stderr(errors), plain:
            arguments, unknown = tyro.cli(
                kind,
                prog=f"mixer {command}",
                description=description,
                args=list(args),
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if end.code == 0:
            print(help_text.getvalue(), end="")
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
            raise
        raise UserError(f"{one_line(errors.getvalue())} (mixer {command} --help)") from None
    if unknown:
        raise UserError(f"{describe_unknown(unknown[0], option_names(kind))} (mixer {command} --help)")
    return arguments


def parse_with_overrides(
    kind: type[T], groups: dict[str, Any], args: Sequence[str], *, command: str, description: str
) -> tuple[T, dict[str, dict[str, Any]]]:
    """The command's arguments, and by group (see ``overrides.option_group``) the options that were given."""
    fields = [("options", Annotated[kind, tyro.conf.arg(name="", help="")])]
    fields += [(name, Annotated[group, tyro.conf.arg(help=group.__doc__ or "")]) for name, group in groups.items()]
    combined = dataclasses.make_dataclass("Arguments", fields, frozen=True, kw_only=True)
    arguments: Any = parse(combined, args, command=command, description=description)
    return arguments.options, {name: getattr(arguments, name) for name in groups}


def describe_unknown(word: str, options: list[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    option = word.partition("=")[0]
    same = option.replace("_", "-")
    near = [ours for ours, others in SYNONYMS.items() if ours in options and same in others.split()]
    near = near or difflib.get_close_matches(option, options, 3)
    return f"unknown option {option}" + (f": did you mean {', '.join(near)}?" if near else "")


def option_names(kind: Any) -> list[str]:
    """The names of all arguments of a dataclass or TypedDict, with those nested in it, as options."""
    names = []
    for name, hint in typing.get_type_hints(kind).items():
        nested = dataclasses.is_dataclass(hint) or typing.is_typeddict(hint)
        names += option_names(hint) if nested else [flag(name)]
    return names


def one_line(box: str) -> str:
    """The first paragraph of tyro's error box."""
    words: list[str] = []
    for line in box.splitlines():
        if line.startswith("│"):
            text = line.strip("│ ")
            if text.startswith("──"):
                break
            words += text.split()
    return " ".join(words) or " ".join(box.split())
