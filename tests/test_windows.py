"""In one process, no command needs what only POSIX has: run on a simulated Windows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the simulation reads /proc")
def test_train_status_evaluate_and_predict_on_windows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = f"train digits --steps 4 --save-every-steps 1 --workers 0 --out {run}"
    evaluate = f"evaluate {run}/model.safetensors --data digits"
    words = f"{train} -- status {run} -- {evaluate} -- predict {run}/model.safetensors {run}/examples --format csv"
    script = Path(__file__).with_name("windows.py")
    ended = subprocess.run([sys.executable, "-W", "ignore", script, *words.split()], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert not (run / "checkpoints").exists(), "folders can be removed"
    assert "0-0.png" in ended.stdout
