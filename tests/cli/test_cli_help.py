"""The command answers at once, explains itself, and needs no torch for either."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allmlp.cli import COMMANDS

HEAVY = ("torch", "timm", "torchvision", "numpy", "PIL", "matplotlib", "sklearn", "rich")
RUN = "import sys; from allmlp.cli import main; sys.exit(main(sys.argv[1:]))"


def command() -> list[str]:
    script = Path(sys.executable).with_name("mixer")
    if script.exists():
        return [str(script)]
    return [found] if (found := shutil.which("mixer")) else [sys.executable, "-c", RUN]


@pytest.mark.parametrize(
    ("words", "limit"), [(["--help"], 0.3), ([], 0.3), (["train", "--help"], 0.6), (["finetune", "--help"], 0.6)]
)
def test_help_is_there_at_once(words: list[str], limit: float) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([*command(), *words], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < limit


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom allmlp.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "allmlp.cli" in loaded
    assert not loaded & ({"torch", "timm"} if words != ["--help"] else set(HEAVY))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], []])
def test_help_names_every_verb(mixer, words: list[str]) -> None:
    answer = mixer(*words)
    assert answer.status == 0
    assert answer.err == ""
    for command, what in COMMANDS.items():
        assert command in answer.out
        assert what in answer.out
    assert "example" in answer.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(mixer, command: str) -> None:
    answer = mixer(command, "--help")
    assert answer.status == 0
    assert answer.err == ""
    assert re.search(rf"examples?: mixer {command} ", answer.out)
    assert "--json" in answer.out


def default_of(option: str, text: str) -> str:
    """What the help says of an option's default, as typed."""
    found = re.search(rf"{option} [A-Z{{\[].*?\(default: ([^)]*)\)", " ".join(text.split()))
    assert found, option
    return found[1]


@pytest.mark.parametrize(
    "recipe", ["digits", "cifar10", "photos", "imagenet-b16", "imagenet-b16-small", "jft-h14", "imagenet21k-l16"]
)
def test_help_of_a_recipe_shows_its_defaults(mixer, recipe: str) -> None:
    from allmlp.recipes import get_recipe

    answer, expected = mixer("train", recipe, "--help"), get_recipe(recipe)
    assert f"those of the recipe {recipe}." in " ".join(answer.out.split())
    assert default_of("--image-size", answer.out) == str(expected.model.image_size)
    assert default_of("--randaugment", answer.out) == str(expected.data.randaugment)
    assert default_of("--mixup", answer.out) == str(expected.data.mixup)
    assert default_of("--loss", answer.out) == expected.optimization.loss
    assert default_of("--keep", answer.out) == expected.run.keep


def test_help_of_a_fine_tuning_recipe_shows_its_defaults(mixer) -> None:
    from allmlp.recipes import get_finetune_recipe

    for words, recipe in (
        (["w.npz", "pets"], "pets"),
        (["w.npz", "vtab-svhn"], "vtab-svhn"),
        (["w.npz", "--data", "flowers102"], "photos"),
        (["w.npz", "--data=photos/"], "photos"),
        ([], "photos"),
    ):
        answer, expected = mixer("finetune", *words, "--help"), get_finetune_recipe(recipe)
        assert f"those of the recipe finetune-{recipe}." in " ".join(answer.out.split())
        assert default_of("--learning-rates", answer.out) == " ".join(map(str, expected.search.learning_rates))
        assert default_of("--search-fraction", answer.out) == str(expected.search.search_fraction)
        assert default_of("--seeds", answer.out) == str(expected.search.seeds)
        assert default_of("--steps", answer.out) == str(expected.recipe.optimization.steps)


def test_help_names_every_recipe(mixer) -> None:
    from allmlp.recipes import FINETUNE_RECIPES, RECIPES

    for command, recipes in (("train", RECIPES), ("finetune", FINETUNE_RECIPES)):
        listed = re.search(r"RECIPE is one of (.*?); without one", " ".join(mixer(command, "--help").out.split()))
        assert listed
        assert set(listed[1].split(", ")) >= {name for name in recipes if not name.endswith("-small")}
        assert "-small" in mixer(command, "--help").out  # the twins are there too


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, allmlp; dir(allmlp); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & set(HEAVY)
