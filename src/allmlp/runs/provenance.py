"""The hardware, package versions and commit that a result comes from."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def current_commit() -> str | None:
    """The commit of the checkout this package runs from, with "-dirty" if it has changes; None without a checkout."""
    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)  # or the repository is another project's
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None


def git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@functools.cache  # reading the metadata of all installed packages is slow
def versions() -> dict[str, str]:
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    names = ("allmlp", "torch", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: installed.get(name, "from source") for name in names}
