"""What the documents say of published files and recipes is what the code says."""

import re
from pathlib import Path

import pytest

from allmlp.cli.arguments import option_names
from allmlp.cli.commands.train import Arguments
from allmlp.cli.overrides import recipe_groups
from allmlp.config.recipe import Recipe
from allmlp.config.vtab import TASKS
from allmlp.data.builtin.vtab import FOLDERS
from allmlp.data.builtin.vtab_copies import COPIES
from allmlp.recipes.finetune import FINETUNE
from allmlp.recipes.pretrain import PRETRAIN
from allmlp.recipes.vtab import VTAB, resolution
from allmlp.weights.published import CHECKPOINTS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_published_file_is_in_the_table() -> None:
    rows = [line for line in (DOCS / "weights.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for known in CHECKPOINTS:
        (row,) = [row for row in rows if row.startswith(f"| {known.file} |")]
        top1 = "–" if known.top1 is None else f"{known.top1 * 100:.4g} %"
        assert row == (
            f"| {known.file} | Mixer-{known.variant} | {known.data} | {known.classes:,} | {top1} | {known.source} |"
        )


def table(file: str) -> dict[str, list[str]]:
    """The rows of all tables of a document by their first cell."""
    lines = (DOCS / file).read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,g}"


def test_the_pretraining_recipes_are_in_the_table() -> None:
    rows = table("training.md")
    for name, make in PRETRAIN.items():
        recipe = make()
        values = (
            recipe.optimization.epochs,
            recipe.optimization.learning_rate,
            recipe.optimization.weight_decay,
            recipe.data.randaugment,
            recipe.data.mixup,
            recipe.model.stochastic_depth,
            recipe.model.head_bias,
        )
        assert rows[name] == [shown(value) for value in values]


def test_the_fine_tuning_recipes_are_in_the_table() -> None:
    rows = table("training.md")
    for name, make in (FINETUNE | VTAB).items():
        finetune = make()
        optimization = finetune.recipe.optimization
        steps = f"{optimization.steps:,}" if optimization.steps else f"{optimization.epochs:g} epochs"
        rates = ", ".join(map(str, finetune.search.learning_rates))
        row = rows["vtab-… (19 tasks)" if name.startswith("vtab-") else name]
        assert row == [
            steps,
            f"{optimization.warmup_steps:,}",
            rates,
            f"{finetune.search.search_fraction:.0%}".replace("%", " %"),
        ]


def test_the_tasks_of_vtab_are_in_the_table() -> None:
    rows = table("vtab.md")
    assert [name for name in rows if name in TASKS] == list(TASKS)
    for task, (group, size) in TASKS.items():
        folder = FOLDERS[task]
        expected = [group, f"`{folder.names[0]}/`", str(folder.classes), str(resolution(*size))]
        assert rows[task][:4] == expected
        copies = [name.removesuffix("/") for name in re.findall(r"`([^`]*)`", rows[task][4])]
        files = COPIES[task].files if task in COPIES else ()
        assert copies == (["pcam"] if task == "pcam" else list(files))


@pytest.mark.parametrize("file", ["cluster/slurm.sh", "cluster/kubernetes.yaml", "runs.md", "../README.md"])
def test_the_options_of_mixer_train_exist(file: str) -> None:
    """In the job files and the examples, to the end of each command."""
    text = (DOCS / file).read_text(encoding="utf-8").replace("\\\n", " ").replace("mixer, train, ", "mixer train ")
    text = re.sub(r"(mixer train [^]]*)\]", lambda found: found[1].replace(",", " ").replace("\n", " "), text)
    commands = re.findall(r"mixer train ([^\n#`]*)", text)
    used = {option for command in commands for option in re.findall(r"(--[a-z0-9-]+)", command)}
    fields = [name for group in recipe_groups(Recipe()).values() for name in option_names(group)]
    assert used <= {"--help", *option_names(Arguments), *fields}
    assert "--resume" in used
