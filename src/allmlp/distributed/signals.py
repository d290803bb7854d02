"""The signals that stop a run: each process saves a checkpoint first."""

import signal

HANG_UP: int | None = getattr(signal, "SIGHUP", None)  # a terminal was closed; Windows has no such signal
ENDING_SIGNALS = (signal.SIGTERM,) if HANG_UP is None else (signal.SIGTERM, signal.Signals(HANG_UP))
STOPPING_SIGNALS = (*ENDING_SIGNALS, signal.SIGINT)


def not_ignored(numbers: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Without those that this process ignores: nohup ignores SIGHUP, so that a program outlives its terminal."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
