"""Output that is closed or full, no home folder, signals, clocks, data that goes away: how each command ends."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_commands import Ended, Server, command_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, POSIX signals")
SHORT = ("--epochs", 1, "--batch-size", 16, "--warmup-steps", 0, "--compile", "off", "--workers", 0)
VERBS = ("train", "finetune", "evaluate", "predict")


def every_verb_with(kinds: Iterable[str], *quick_kinds: str) -> Any:
    """Parameters (verb, kind). All are marked as slow but ``quick_kinds``, some for each verb, separated by "|"."""
    quick = dict(zip(VERBS, quick_kinds, strict=True))
    pairs = [(verb, kind) for verb in VERBS for kind in kinds]
    return pytest.mark.parametrize(
        ("verb", "kind"),
        [
            pytest.param(verb, kind, marks=[] if kind in quick[verb].split(" | ") else [pytest.mark.slow])
            for verb, kind in pairs
        ],
    )


SAVING = ("train", "finetune")  # whose result is a folder; that of the others is what they print


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, color_weights: Path, pictures: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("surroundings")
    pictures(folder / "data", {f"{part}/{name}": 8 for part in ("train", "val", "test") for name in ("red", "blue")})
    (folder / "weights.safetensors").write_bytes(color_weights.read_bytes())
    with command_server(folder) as server:
        yield server


@pytest.fixture
def words(tiny: tuple[str, ...], tmp_path: Path) -> Callable[..., list[object]]:
    """The words of each verb; the run of those that train is ``tmp_path / "run"``."""
    size = ("--image-size", 16, "--patch-size", 8)
    all_words: dict[str, list[object]] = {
        "train": ["train", "data/", *size, *tiny, *SHORT, "--out", tmp_path / "run"],
        "finetune": ["finetune", "weights.safetensors", "data/", "--lr", 0.01, *SHORT, "--out", tmp_path / "run"],
        "evaluate": ["evaluate", "weights.safetensors", "--data", "data", "--workers", 0],
        "predict": ["predict", "weights.safetensors", "data/test/red"],
    }
    return lambda verb, *more: [*all_words[verb], *more]


def assert_plain(ended: Ended, lines: int | None = None) -> None:
    """No traceback, no line of another library, and as many lines as are expected."""
    assert not re.search(r"Traceback|Exception ignored|Warning|atplotlib|Errno|\x1b", ended.err), ended.err
    assert lines is None or len(ended.err.splitlines()) == lines, ended.err


def assert_complete(run: Path) -> None:
    assert {"summary.json", "report.html", "model.safetensors"} <= {path.name for path in run.iterdir()}


# Output: (standard output, of text or JSON) → status of verbs that save, of verbs that print, and what is said
OUTPUT: dict[str, tuple[str | None, tuple[str, ...], int, int, str]] = {
    "closed": (None, (), 0, 1, "closed"),
    "full": ("/dev/full", (), 0, 1, "No space left on device"),
    "full, JSON": ("/dev/full", ("--json",), 1, 1, "No space left on device"),
    "reader gone": ("broken pipe", (), 0, 141, ""),
    "reader gone, JSON": ("broken pipe", ("--json",), 0, 141, ""),
}


@every_verb_with(OUTPUT, "full | reader gone", "full, JSON", "closed", " | ".join(OUTPUT))
def test_standard_output_that_cannot_be_written(
    server: Server, words: Any, tmp_path: Path, verb: str, kind: str
) -> None:
    target, more, saving, printing, said = OUTPUT[kind]
    ended = server.run(words(verb, *more), out=target)
    assert ended.status == (saving if verb in SAVING else printing), ended.err
    assert_plain(ended, None if verb in SAVING else bool(said))
    if said:
        assert said in ended.err.splitlines()[-1]
    if verb in SAVING:
        assert_complete(tmp_path / "run")
        assert not said or str(tmp_path / "run" / "summary.json") in ended.err


@every_verb_with(["closed", "full", "reader gone"], "closed", "reader gone", "full", "full")
def test_standard_error_that_cannot_be_written(server: Server, words: Any, verb: str, kind: str) -> None:
    ended = server.run(words(verb, "--json"), err=OUTPUT[kind][0])
    assert ended.status == 0
    json.loads(ended.out)  # and nothing else is in it


@every_verb_with(["none", "not writable", "empty"], "not writable", "none", "empty", "none")
def test_no_home_folder(server: Server, words: Any, tmp_path: Path, verb: str, kind: str) -> None:
    places = {
        "HOME": {"none": None, "not writable": "/proc", "empty": ""}[kind],
        "XDG_CONFIG_HOME": None,
        "XDG_CACHE_HOME": None,
        "MPLCONFIGDIR": None,
    }
    ended = server.run(words(verb), env=places | {"TORCHINDUCTOR_CACHE_DIR": None, "TMPDIR": str(tmp_path)})
    assert ended.status == 0, ended.err
    assert_plain(ended)


@pytest.mark.parametrize(
    "verb", ["train", *(pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS[1:3]), "predict"]
)
def test_data_that_may_only_be_read_and_a_clock_that_runs_back(
    server: Server, words: Any, tmp_path: Path, verb: str
) -> None:
    data = server.folder / "data"
    folders = [data, *(path for path in data.rglob("*") if path.is_dir())]
    before = {path: path.stat().st_mtime_ns for path in folders}
    for path in folders:
        path.chmod(0o555)
    try:
        ended = server.run(words(verb, "--json"), clock_runs_back=True)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert ended.status == 0, ended.err
    assert_plain(ended)
    assert {path: path.stat().st_mtime_ns for path in folders} == before  # nothing was written there
    if verb in SAVING:
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert 0 < summary["train_seconds"] < 60
        assert summary["images_per_second"] > 0


def test_runs_that_begin_at_once_have_folders_of_their_own(server: Server, words: Any) -> None:
    started = server.start(words("train")[:-2], copies=2)
    assert [ended.status for ended in started.wait()] == [0, 0]
    runs = list((server.folder / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert_complete(run)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "finetune", "evaluate"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(server: Server, words: Any, verb: str, method: str) -> None:
    """Python 3.14 starts them by a server; macOS and Windows anew."""
    ended = server.run(words(verb, "--workers", 1), start_method=method)
    assert ended.status == 0, ended.err
    assert_plain(ended)


# Long runs


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def long_run(server: Server, words: Any, tmp_path: Path) -> Callable[..., Any]:
    """Starts a run of many epochs, and returns once it has made its first steps."""

    def start(verb: str, *more: object, data: object = "data/", **how: Any) -> Any:
        long = [data if word == "data/" else word for word in words(verb, "--epochs", 100_000, *more)]
        started = server.start([*long, "--evaluate-every-epochs", 100_000], **how)
        metrics = tmp_path / "run" / "metrics.jsonl"
        until(lambda: metrics.exists() and metrics.stat().st_size)
        return started

    return start


@pytest.mark.parametrize(
    ("verb", "workers", "how", "signals", "status"),
    [
        ("train", 0, {}, [signal.SIGHUP], 129),
        ("train", 1, {"err": "broken pipe"}, [signal.SIGHUP, signal.SIGHUP], 129),  # a terminal is gone, and a shell
        pytest.param("finetune", 0, {}, [signal.SIGHUP], 129, marks=pytest.mark.slow),
        ("train", 0, {"ignore_hang_up": True}, [signal.SIGHUP, signal.SIGTERM], 143),  # nohup
    ],
)
def test_a_closed_terminal_stops_a_run_after_it_has_saved(
    long_run: Any, tmp_path: Path, verb: str, workers: int, how: Any, signals: list[int], status: int
) -> None:
    started = long_run(verb, "--workers", workers, **how)
    for number in signals:
        started.signal(number)
        time.sleep(0.1)
    (ended,) = started.wait()
    assert ended.status == status, ended.err
    assert_plain(ended)
    name = signal.Signals(status - 128).name
    assert how.get("err") or re.search(rf"stopped by {name} after step \d+: resume with ", ended.err.splitlines()[-1])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal of 40 columns: the descriptor of its other end, which may be closed, and its name."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    try:
        yield ours, os.ttyname(theirs)
    finally:
        os.close(theirs)
        with contextlib.suppress(OSError):
            os.close(ours)


def test_a_run_whose_terminal_is_closed_saves(long_run: Any, tmp_path: Path, terminal: tuple[int, str]) -> None:
    ours, name = terminal
    started = long_run("train", "--workers", 1, out=name, err=name, env={"TERM": "xterm"})
    os.close(ours)
    (ended,) = started.wait()
    assert ended.status == 129
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]


def shown(server: Server, words: list[object], terminal: tuple[int, str], env: dict[str, str | None]) -> str:
    """What the command shows on the terminal, standard error included."""
    ours, name = terminal
    text, ended = [], threading.Event()

    def read() -> None:
        while select.select([ours], [], [], 0.1)[0] or not ended.is_set():
            if select.select([ours], [], [], 0)[0]:
                text.append(os.read(ours, 1 << 16))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert server.run(words, out=name, err=name, env={"TERM": "xterm", "COLUMNS": None} | env).status == 0
    ended.set()
    reader.join()
    return b"".join(text).decode()


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}], ids=["NO_COLOR", "dumb", "any"])
def test_escape_codes_are_for_terminals_that_want_them(
    server: Server, words: Any, terminal: tuple[int, str], env: dict[str, str | None]
) -> None:
    texts = [shown(server, line, terminal, env) for line in (words("evaluate"), ["help", "info"])]
    assert ["\x1b" in text for text in texts] == [not env, not env]
    table = texts[0].partition("per class")[2].partition("confusion:")[0].replace("\r", "")
    assert max(map(len, table.splitlines())) <= 40
    assert re.search(r"^red +8 +\d\.\d{4} +\d\.\d{4}$", table, re.MULTILINE)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_goes_away_fails_the_run(long_run: Any, pictures: Any, tmp_path: Path, workers: int) -> None:
    data = pictures(tmp_path / "photos", {"red": 10, "blue": 10})
    started = long_run("train", "--workers", workers, data=data)
    data.rename(tmp_path / "elsewhere")
    (ended,) = started.wait()
    assert ended.status == 1
    assert_plain(ended)
    assert re.fullmatch(r"mixer: .*photos.* is gone: put it back, and repeat or resume", ended.err.splitlines()[-1])
