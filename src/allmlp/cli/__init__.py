"""The command ``mixer``: verbs to functions, nothing else. Torch is imported by the verb that needs it."""

import difflib
import importlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from typing import NoReturn

from allmlp.errors import RunError, Stopped, UserError

VERBS = {
    "train": "train a Mixer from scratch: on the embedded digits, or on your images",
    "finetune": "move trained weights to your own classes, at any image size",
    "status": "where a run is: how far, how well, its checkpoints, how to go on with it",
    "evaluate": "top-1, top-5, per class and confusion matrix of weights on labelled images",
    "predict": "labels and probabilities for image files, folders and zips",
    "info": "parameters, FLOPs and memory of a variant, or what a weights file holds",
    "resize": "weights for another image size",
    "convert": "weights in another format: ours, the authors' .npz, timm's",
}
HELP = """usage: mixer VERB [OPTIONS]

MLP-Mixer (arXiv:2105.01601): train, fine-tune, evaluate, predict.

verbs:
{verbs}

examples:
  mixer train                                   a small Mixer on handwritten digits, in seconds
  mixer train --data photos/                    on your images: one folder a class, or a .zip of that
  mixer train --resume runs/…                   goes on with a run that was stopped
  mixer evaluate runs/…/model.safetensors --data photos/
  mixer predict runs/…/model.safetensors a.jpg b.png
  mixer finetune Mixer-B_16.npz --data photos/ --image-size 448
  mixer convert Mixer-B_16.npz b16.safetensors
  mixer info B/16

WEIGHTS is a file of ours, the authors' (.npz), timm's or lucidrains', or hf-hub:OWNER/NAME.

mixer VERB --help shows a verb's options; --debug shows the traceback of an error.
exit status: 0 done, 1 a run that failed, 2 a mistake in the call, 130 or 143 stopped by a signal.""".format(
    verbs="\n".join(f"  {name:10} {what}" for name, what in VERBS.items())
)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; the exit status is 0, 1 (the run failed), 2 (the caller's mistake), 130 or 143 (a signal)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(HELP)
            sys.stdout.flush()
            return 0
        if args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS, 2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"unknown verb {args[0]!r}: {hint}there are {', '.join(VERBS)} (mixer --help)")
        set_up_logging()
        if threading.current_thread() is threading.main_thread():  # no other may
            signal.signal(signal.SIGTERM, terminate)
        status = importlib.import_module(f"allmlp.cli.{args[0]}").run(args[1:])
        sys.stdout.flush()  # here, so that a full disk or a closed pipe is met while it can be told
        return status or 0
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = None
        return 141
    except KeyboardInterrupt:
        return fail("interrupted", 130, debug)
    except Terminated:
        return fail("terminated", 143, debug)
    except Stopped as error:
        return fail(error, error.status, debug)
    except UserError as error:
        return fail(error, 2, debug)
    except (RunError, OSError, MemoryError) as error:
        return fail(error, 1, debug)
    except Exception as error:  # a fault of ours, or of a library: still one line, and where to look
        return fail(error, 1, debug, unexpected=True)


class Terminated(BaseException):
    """SIGTERM, raised where the program was, so that what is half-written is taken away."""

    status = 143


def terminate(number: int, frame: object) -> None:
    raise Terminated


def fail(error: BaseException | str, status: int, debug: bool, unexpected: bool = False) -> int:
    """One line on standard error, and the traceback where it was asked for."""
    told = " ".join(str(error).split()) or type(error).__name__
    if unexpected:
        told = f"{type(error).__name__}: {told}"
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        fail_among_others(error, told, status, debug or unexpected)
    if debug:
        logging.getLogger(__name__).exception("")
    print(f"mixer: {told}{' (--debug shows where)' if unexpected else ''}", file=sys.stderr)
    return status


def fail_among_others(error: BaseException | str, told: str, status: int, traceback: bool) -> NoReturn:
    """The end of one process of several: the first that failed tells how, and each ends at once.

    For by now, threads and clean-up may wait for processes that are gone.
    """
    rank, first = os.environ.get("RANK", "?"), getattr(error, "failed_first", None)  # what another rank has told
    if isinstance(error, Stopped):  # as all of them are
        if rank == "0":
            print(f"mixer: {told}", file=sys.stderr)
    elif first is None:
        if traceback:
            logging.getLogger(__name__).exception("")
        print(f"mixer: rank {rank}: {told}", file=sys.stderr)
    elif first["what"] != f"{type(error).__name__}: {error}":
        print(f"mixer: rank {rank}: ended because rank {first['rank']} failed: {first['what']}", file=sys.stderr)
        status = first["status"]
    sys.stderr.flush()
    os._exit(status)


class ToStandardError(logging.Handler):
    """To what standard error is at that moment: while a progress bar is shown, lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def set_up_logging() -> None:
    """Our messages to standard error; not the chatter of libraries, nor Pillow's remarks on files it can still read."""
    ours = logging.getLogger("allmlp")
    ours.handlers, ours.propagate = [ToStandardError()], False
    ours.setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its remark that there is no CUDA
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process, of course
