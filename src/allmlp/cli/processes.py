"""Several processes on one machine or more: launching them, and joining them."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allmlp.cli.docstrings import help_from_docstrings
from allmlp.errors import UserError

if TYPE_CHECKING:
    from allmlp.distributed.context import DistributedContext

TIMEOUT_SECONDS = 600.0  # without progress, of an evaluation; a recipe has its own


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


def must_launch(launch: LaunchOptions, device: str, check_size: Callable[[int], object] = lambda size: None) -> bool:
    """Whether this process has to launch the processes of the command, and is not one of them.

    ``check_size`` gets their number, so that a single process reports a mistake.

    Raises:
        UserError: a mistake in the launch options, or a device that the processes cannot have.
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
    check_size(launch.world_size)
    from allmlp.device import choose_device

    choose_device(device, launch.processes - 1, launch.world_size)
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


def launch_evaluation(processes: int, device: str, words: Sequence[str]) -> int | None:
    """Runs ``mixer WORDS`` in as many processes and returns the exit status; None: this process is to do the work."""
    launch = LaunchOptions(processes=processes)
    return launch_processes(launch, words) if must_launch(launch, device) else None


@contextlib.contextmanager
def join_processes(device: str, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator["DistributedContext"]:
    """Joins the processes of the command. Only rank 0 logs more than errors."""
    from allmlp.distributed.context import init_distributed

    with init_distributed(timeout_seconds, device) as context:
        if not context.is_rank0:
            logging.getLogger("allmlp").setLevel(logging.ERROR)
        yield context
