"""The processes of a run: who this one is, and how all of them come to the same decision.

One process is a world of its own; nothing here then communicates, and the code that uses it is the same.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from allmlp.distributed.watchdog import CONNECTING, PATIENCE, Watchdog, connect_store
from allmlp.errors import RunError, UserError

T = TypeVar("T")
AFTER_THE_WATCHDOG = timedelta(minutes=2)  # until PyTorch itself gives up, which cannot say for whom it waited


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """Rank ``rank`` of ``ranks``; of them ``local_ranks`` on this machine, where this one is ``local_rank``.

    Ranks share a file system. Methods that communicate must be called by all ranks, in the same order.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    watchdog: Watchdog | None = None
    saving: Any = None  # the process group of checkpoints, which are written beside the training
    control: Any = None  # the process group of the host's own small messages

    @property
    def is_rank0(self) -> bool:
        """Whether this is the one that writes, draws and speaks for all."""
        return self.rank == 0

    def heartbeat(self, doing: str, slow: bool = False) -> None:
        """Says what this process does from now on; one that says nothing new for too long ends the run.

        ``slow``: it may take an hour (compiling, reading a large folder).
        """
        if self.watchdog is not None:
            self.watchdog.heartbeat(doing, slow)

    def sum(self, values: list[int]) -> list[int]:
        """The sums of each number over all ranks, modulo 2⁶⁴."""
        if self.world_size == 1:
            return values
        total = torch.tensor([(value + 2**63) % 2**64 - 2**63 for value in values])
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a device's tensor over all ranks; the host does not wait for it."""
        if self.world_size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_from_rank0(self, action: Callable[[], T]) -> T:
        """The first rank's outcome, for all: what it returns, or a failure that it can tell."""
        if self.world_size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_rank0:
            try:
                outcome[0] = action()
            except (UserError, RunError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def local_device(self, named: torch.device) -> torch.device:
        """This process's own, of the kind that is named."""
        return torch.device("cuda", self.local_rank) if self.world_size > 1 and named.type == "cuda" else named

    def local_rank0_first(self, action: Callable[[], T]) -> T:
        """What the action returns; one process of each machine does it before the others: what it downloads, they find.

        A failure of one of these is raised on all.
        """
        if self.world_size == 1:
            return action()
        done, failure = [], None
        if self.local_rank == 0:
            try:
                done.append(action())
            except (UserError, RunError, OSError) as error:
                failure = error
        failures = [error for error in self.all_gather(failure) if error is not None]
        if failures:
            raise failures[0]
        return done[0] if done else action()


SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def init_distributed(timeout_seconds: float, device: str = "auto") -> Iterator[DistributedContext]:
    """The world of the processes that torchrun, or ``--processes``, has started; of this one alone where none has.

    Args:
        timeout_seconds: without any progress, after which the run ends and the stuck rank is named.
        device: the recipe's: each process takes a GPU of its own, unless it is the CPU.

    Raises:
        UserError: variables of the environment that say which process this is are missing, or no numbers.
    """
    world_size = number_of("WORLD_SIZE", 1)
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    rank, local_rank = number_of("RANK"), number_of("LOCAL_RANK", 0)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is not set: start the run by --processes or torchrun, or unset WORLD_SIZE")
    number_of("MASTER_PORT")
    on_gpus = torch.cuda.is_available() and not device.startswith("cpu")
    if on_gpus:
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=max(timeout_seconds, PATIENCE)) + AFTER_THE_WATCHDOG
    backend, place = "cpu:gloo,cuda:nccl" if on_gpus else "gloo", connect_store(timeout, opens=rank == 0)
    dist.init_process_group(backend, store=place, rank=rank, world_size=world_size, timeout=timeout)
    watchdog = Watchdog(connect_store(CONNECTING), rank, world_size, timeout_seconds)
    context = DistributedContext(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=number_of("LOCAL_WORLD_SIZE", world_size),
        watchdog=watchdog,
        saving=dist.new_group(backend="gloo", timeout=timeout),
        control=dist.new_group(backend="gloo", timeout=timeout),
    )
    with watchdog:
        yield context
    dist.destroy_process_group()  # only after a good end: with a rank gone, it would wait for it


def number_of(variable: str, default: int | None = None) -> int:
    """A variable of the environment, as torchrun sets it."""
    told = os.environ.get(variable, "" if default is None else str(default))
    if not told.isdecimal():
        raise UserError(
            f"{variable}={told!r} in the environment: a number that says which of several processes this is; start the "
            "run by --processes or torchrun, or unset WORLD_SIZE and RANK"
        )
    return int(told)
