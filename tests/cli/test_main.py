"""What main makes of failures and signals, beside bad input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import allmlp
from allmlp import cli
from allmlp.cli.commands.train import choose_recipe, parse_arguments


def test_an_error_of_ours_is_one_line(monkeypatch, capsys) -> None:
    class Verb:
        @staticmethod
        def run(args: list[str]) -> None:
            raise KeyError("of a kind\nthat nobody expected")

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Verb)
    assert cli.main(["info"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mixer: KeyError")
    assert error.count("\n") == 1
    assert "--debug" in error
    assert cli.main(["info", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_version_and_help_of_a_command(mixer) -> None:
    for option in ("--version", "-V"):
        answer = mixer(option)
        assert (answer.status, answer.out) == (0, f"mixer {allmlp.__version__}\n")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*|from source", allmlp.__version__)
    assert mixer("help", "info").out == mixer("info", "--help").out
    assert mixer("info", "help").out == mixer("info", "--help").out
    assert mixer("version").out == mixer("--version").out
    assert mixer("help").out == mixer("--help").out == mixer().out
    assert "recipe photos" in mixer("help", "train", "photos").out
    for words in (("help", "ifno"), ("ifno", "help")):
        assert mixer(*words).status == 2
        assert "did you mean info?" in mixer(*words).last


def test_sigterm_ends_a_run_with_143_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; from allmlp.cli import main; sys.exit(main())"]
    words += ["train", "--out", str(tmp_path / "new" / "run"), "--evaluate-every-epochs", "1000", "--epochs", "1000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        metrics = tmp_path / "new" / "run" / "metrics.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    run = tmp_path / "new" / "run"
    assert re.fullmatch(
        rf"mixer: stopped by SIGTERM after step \d+: resume with mixer train --resume {run}", error.splitlines()[-1]
    )
    assert "Traceback" not in error
    assert [path.name.startswith("step-") for path in (run / "checkpoints").iterdir()] == [True]


@pytest.mark.parametrize("words", [["--recipe_file", "{}"], ["--recipe-file={}"], ["--recipe_file={}"]])
def test_a_recipe_file_however_it_is_spelled(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a_b.json"
    path.write_text('{"name": "mine"}')
    assert choose_recipe(*parse_arguments([word.format(path) for word in words])).name == "mine"


def test_the_recipe_of_the_data() -> None:
    for words, name in (
        ([], "digits"),
        (["--data", "cifar10"], "cifar10"),
        (["--data=some/folder"], "photos"),
        (["digits", "--data", "some/folder"], "digits"),
        (["--data", "some/folder", "digits"], "digits"),
    ):
        assert choose_recipe(*parse_arguments(words)).name == name
