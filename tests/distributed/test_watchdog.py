"""Which rank the watchdog names when no rank makes progress, from the heartbeats of all."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from allmlp.distributed import watchdog as module
from allmlp.distributed.watchdog import Watchdog

Diagnosis = Callable[..., tuple[str, dict[str, Any]]]


class Exited(Exception):
    pass


@pytest.fixture
def diagnose(monkeypatch: pytest.MonkeyPatch) -> Diagnosis:
    """What rank 0 of three prints when it ends the run, and the failure that the others read.

    Each rank is given by how long it has been in its activity, whether it communicates, and whether it still beats.
    """
    monkeypatch.setattr(module, "PERIOD", 0.02)

    def leave(self: Watchdog, why: str, status: int = 1) -> None:
        raise Exited(why)

    monkeypatch.setattr(Watchdog, "exit_process", leave)

    def run(*ranks: tuple[float, bool, bool], failed: str | None = None) -> tuple[str, dict[str, Any]]:
        store, done = dist.HashStore(), threading.Event()
        watchdog = Watchdog(store, 0, len(ranks), timeout=8)

        def publish(beats: int) -> None:
            for rank, (age, communicates, beating) in enumerate(ranks):
                where = {"where": f"file.py:{rank}, function", "communicates": communicates}
                heartbeat = {"beats": beats if beating else 1, "activity": f"step {rank}", "age": age, **where}
                store.set(f"alive/{rank}", json.dumps(heartbeat))

        def keep_beating() -> None:
            beats = 1
            while not done.wait(0.02):
                publish(beats := beats + 1)

        monkeypatch.setattr(Watchdog, "publish_heartbeat", lambda self: None)
        publish(1)
        if failed is not None:
            store.set("failure", json.dumps({"rank": 1, "what": failed, "status": 1}))
        others = threading.Thread(target=keep_beating)
        others.start()
        try:
            with pytest.raises(Exited) as caught:
                watchdog.diagnose_hang()
        finally:
            done.set()
            others.join()
        return str(caught.value), json.loads(store.get("failure"))

    return run


WAITING = (9.0, True, True)


def test_a_rank_without_heartbeats_is_named_whatever_the_others_do(diagnose: Diagnosis) -> None:
    what, failure = diagnose(WAITING, (9.0, False, True), (9.0, True, False))
    assert what == "no progress for 8 s: rank 2 is stopped or dead (step 2, in file.py:2, function)"
    assert failure == {"rank": 0, "what": what, "status": 1}


def test_the_ranks_that_do_not_communicate_are_those_the_others_wait_for(diagnose: Diagnosis) -> None:
    what, _ = diagnose(WAITING, (8.5, False, True), (20.0, True, True))
    assert what == "no progress for 8 s: rank 1 is stuck (step 1, in file.py:1, function)"


@pytest.mark.parametrize("communicates", [True, False])
def test_if_all_do_the_same_it_is_the_one_that_has_been_there_longest(diagnose: Diagnosis, communicates: bool) -> None:
    what, _ = diagnose((9.0, communicates, True), (8.5, communicates, True), (20.0, communicates, True))
    assert what == "no progress for 8 s: rank 2 is stuck (step 2, in file.py:2, function)"


def test_the_first_failure_reported_stands(diagnose: Diagnosis) -> None:
    what, failure = diagnose(WAITING, WAITING, (9.0, False, True), failed="it failed")
    assert what == "ended because another rank reported a failure"
    assert failure["what"] == "it failed"
