"""The program ``mixer``: runs the module of the given command, each of which imports torch only when it needs it."""

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

from allmlp.cli.streams import PIPE_CLOSED, OutputError, guarded_streams
from allmlp.distributed.signals import ENDING_SIGNALS, HANG_UP, not_ignored
from allmlp.errors import RunError, Stopped, UserError, describe_os_error, printable, with_options

COMMANDS = {
    "train": "train a Mixer from scratch: on the embedded digits, or on your images",
    "finetune": "train weights further on your own classes, at any image size",
    "status": "progress of a run: step, accuracy, checkpoints, how to resume it",
    "evaluate": "top-1, top-5, per-class results and confusion matrix on labeled images",
    "fewshot": "accuracy of linear probes on frozen features, fitted to a few images of each class",
    "vtab": "fine-tune on each task of VTAB-1k, and the means of its groups and of all 19",
    "predict": "labels and probabilities for image files, folders and zips",
    "data": "what is in a data set: classes, sizes, duplicates; and which images are in test sets too",
    "models": "the models that there are: Mixers, comparison systems, published weights",
    "bench": "images per second, latency, training and memory of models, side by side",
    "reproduce": "the paper's tables and figures, with our numbers beside the published ones",
    "info": "parameters, FLOPs and memory of a variant, or the contents of a weights file",
    "resize": "convert weights to another image size",
    "convert": "convert weights to another format: allmlp's, the authors' .npz, timm's",
}
HELP = """usage: mixer COMMAND [OPTIONS]

MLP-Mixer (arXiv:2105.01601): train, fine-tune, evaluate, predict.

commands:
{commands}

examples:
  mixer train                                   train a small Mixer on handwritten digits, in seconds
  mixer train --data photos/                    train on your images: one folder per class, or a .zip of that
  mixer train --resume runs/…                   resume a run that was stopped
  mixer evaluate runs/…/model.safetensors --data photos/
  mixer predict runs/…/model.safetensors a.jpg b.png
  mixer finetune Mixer-B_16.npz --data photos/ --image-size 448
  mixer convert Mixer-B_16.npz b16.safetensors
  mixer info B/16
  mixer bench B/16 ViT-B/16

WEIGHTS is a file of allmlp, the authors (.npz), timm or lucidrains, a name such as mixer-b16-in21k (mixer models lists
them), or hf-hub:OWNER/NAME.

mixer COMMAND --help shows a command's options, mixer --version the version; --debug shows the traceback of an error.
exit status: 0 done, 1 the run failed, 2 a mistake in the command, 129, 130 or 143 stopped by a signal.""".format(
    commands="\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0, 1 (the run failed), 2 (a mistake in the command), 129, 130 or 143 (a signal)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be invalid UTF-8
    if args[:1] == ["help"] and len(args) > 1:
        args = [*args[1:], "--help"]
    elif args[1:] == ["help"]:
        args = [args[0], "--help"]
    with guarded_streams():
        try:
            if (text := general_text(args)) is not None:
                print(text)
                status = 0
            else:
                set_up_logging()
                set_up_signals()
                status = importlib.import_module(f"allmlp.cli.commands.{args[0]}").run(args[1:]) or 0
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
            return status
        except SystemExit as end:  # of --help
            return int(end.code or 0)
        except OutputError as error:
            return PIPE_CLOSED if error.status == PIPE_CLOSED else fail(error, error.status, debug)
        except KeyboardInterrupt:
            return fail("interrupted", 130, debug)
        except (Terminated, Stopped) as error:
            ignore_hang_up()
            return fail(error, error.status, debug)
        except UserError as error:
            return fail(error, 2, debug)
        except (RunError, OSError) as error:
            return fail(error, 1, debug)
        except Exception as error:  # a device that failed, or a bug here or in a library: still one line
            if "torch" in sys.modules:
                from allmlp.device import describe_failure, is_device_failure, is_out_of_memory

                if is_out_of_memory(error) or is_device_failure(error):
                    return fail(RunError(describe_failure(error)), 1, debug)
            return fail(error, 1, debug, unexpected=True)


def general_text(args: list[str]) -> str | None:
    """What to print where no command is run: the version or the help; None for a command.

    Raises:
        UserError: there is no such command.
    """
    if args[:1] in (["--version"], ["-V"], ["version"]):
        return f"mixer {importlib.import_module('allmlp').__version__}"
    if not args or args[0] in ("-h", "--help", "help"):
        return HELP
    if args[0] in COMMANDS:
        return None
    near = difflib.get_close_matches(args[0], COMMANDS, 2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"unknown command {args[0]!r}: {hint}there are {', '.join(COMMANDS)} (mixer --help)")


class Terminated(BaseException):
    """SIGTERM or SIGHUP as an exception, so that unfinished files are cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__("terminated" if number == signal.SIGTERM else "its terminal was closed")
        self.status = 128 + number


def set_up_signals() -> None:
    """SIGTERM and SIGHUP raise Terminated, except for those that this process ignores."""
    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        for number in not_ignored(ENDING_SIGNALS):
            signal.signal(number, raise_terminated)


def raise_terminated(number: int, frame: object) -> None:
    """Handles the first of these signals; a second SIGTERM has its usual effect."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ignore_hang_up()
    raise Terminated(number)


def ignore_hang_up() -> None:
    """From here on, SIGHUP does nothing: this process is ending, and still has to print why."""
    if HANG_UP is not None and threading.current_thread() is threading.main_thread():
        signal.signal(HANG_UP, signal.SIG_IGN)


def fail(error: BaseException | str, status: int, debug: bool, unexpected: bool = False) -> int:
    """Prints the error in one line on standard error, after its traceback if ``debug``; returns the status."""
    text = describe_os_error(error) if isinstance(error, OSError) else str(error)
    message = printable(" ".join(text.split())) or type(error).__name__
    if isinstance(error, UserError):
        message = with_options(message)
    if unexpected:
        message = f"{type(error).__name__}: {message}"
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        exit_rank(error, message, status, debug or unexpected)
    if debug:
        logging.getLogger(__name__).exception("")
    print(f"mixer: {message}{' (--debug shows where)' if unexpected else ''}", file=sys.stderr)
    return status


def exit_rank(error: BaseException | str, message: str, status: int, traceback: bool) -> NoReturn:
    """Ends one process of several. Only the rank that failed first reports how.

    Exits without clean-up, which could wait forever for processes that have already ended.
    """
    rank, first = os.environ.get("RANK", "?"), getattr(error, "failed_first", None)  # the failure of another rank
    if isinstance(error, Stopped):  # all ranks stop with the same message
        if rank == "0":
            print(f"mixer: {message}", file=sys.stderr)
    elif first is None:
        if traceback:
            logging.getLogger(__name__).exception("")
        print(f"mixer: rank {rank}: {message}", file=sys.stderr)
    elif first["what"] != f"{type(error).__name__}: {error}":
        print(f"mixer: rank {rank}: ended because rank {first['rank']} failed: {first['what']}", file=sys.stderr)
        status = first["status"]
    sys.stderr.flush()
    for process in importlib.import_module("multiprocessing").active_children():  # those that load images
        process.kill()
    os._exit(status)


class StderrHandler(logging.Handler):
    """Logs to the current ``sys.stderr``: while a progress bar is shown, that prints above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        print(text if record.exc_info else printable(text), file=sys.stderr)


def set_up_logging() -> None:
    """Sends the package's messages to standard error, and silences those of libraries, which need no action."""
    logging.getLogger().addHandler(logging.NullHandler())  # without any handler, Python prints their warnings
    logger = logging.getLogger("allmlp")
    logger.handlers, logger.propagate = [StderrHandler()], False
    logger.setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if there is no CUDA
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about files that it can read nevertheless
