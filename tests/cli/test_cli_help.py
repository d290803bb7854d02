"""The command answers at once, explains itself, and needs no torch for either."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlp_mixer.cli import VERBS

HEAVY = ("torch", "timm", "torchvision", "numpy", "PIL", "matplotlib", "sklearn", "rich")
RUN = "import sys; from mlp_mixer.cli import main; sys.exit(main(sys.argv[1:]))"


def command() -> list[str]:
    script = Path(sys.executable).with_name("mixer")
    if script.exists():
        return [str(script)]
    return [found] if (found := shutil.which("mixer")) else [sys.executable, "-c", RUN]


@pytest.mark.parametrize(("words", "limit"), [(["--help"], 0.3), ([], 0.3), (["train", "--help"], 0.6)])
def test_help_is_there_at_once(words: list[str], limit: float) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([*command(), *words], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < limit


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom mlp_mixer.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "mlp_mixer.cli" in loaded
    assert not loaded & ({"torch", "timm"} if words != ["--help"] else set(HEAVY))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], []])
def test_help_names_every_verb(mixer, words: list[str]) -> None:
    answer = mixer(*words)
    assert answer.status == 0
    assert answer.err == ""
    for verb, what in VERBS.items():
        assert verb in answer.out
        assert what in answer.out
    assert "example" in answer.out


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_an_example(mixer, verb: str) -> None:
    answer = mixer(verb, "--help")
    assert answer.status == 0
    assert answer.err == ""
    assert f"example: mixer {verb} " in answer.out
    assert "--json" in answer.out


@pytest.mark.parametrize("recipe", ["digits", "cifar10", "photos"])
def test_help_of_a_recipe_shows_its_defaults(mixer, recipe: str) -> None:
    from mlp_mixer.recipes import get_recipe

    answer = mixer("train", recipe, "--help")
    assert f"those of the recipe {recipe}." in " ".join(answer.out.split())
    assert f"(default: {get_recipe(recipe).model.image_size})" in answer.out


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, mlp_mixer; dir(mlp_mixer); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & set(HEAVY)
