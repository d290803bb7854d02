"""A mistake in a command: status 2, one line that names the value and the remedy, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import allmlp
from allmlp.cli import COMMANDS

TWO = "train --nnodes 2 --rdzv-endpoint"
FINETUNE = "finetune w.safetensors --data data"
CONVERT = "convert w.safetensors new.safetensors"
EVALUATE = "evaluate w.safetensors --data data"
PREDICT = "predict w.safetensors data"

MISTAKES = {  # command → what the message names
    # what is not there, or not what it should be
    "train --data gone": ("gone", "give"),
    "evaluate w.safetensors --data gone": ("gone", "give"),
    "predict w.safetensors gone": ("gone", "give"),
    "finetune gone.npz --data data": ("gone.npz", "does not exist"),
    "finetune w.safetensors pets-small --data gone": ("gone", "give a folder"),
    "train --data bare": ("bare", "holds no images", "give"),
    "evaluate w.safetensors --data bare": ("bare", "holds no images", "give"),
    "predict w.safetensors bare": ("bare", "holds no images", "give"),
    "train --data hollow": ("'green'", "holds no images", "remove the folder"),
    "evaluate w.safetensors --data hollow": ("'green'", "holds no images", "remove the folder"),
    "train --data damaged.zip": ("damaged.zip", "not a valid zip"),
    "evaluate w.safetensors --data damaged.zip": ("damaged.zip", "not a valid zip"),
    "predict w.safetensors damaged.zip": ("damaged.zip", "not a valid zip"),
    "evaluate w.safetensors --data mauve": ("'mauve'", "'red'", "rename"),
    "train --data EMPTY": ("no data at ''", "unset", "give a folder"),
    "evaluate w.safetensors --data EMPTY": ("no data at ''", "give a folder"),
    "predict w.safetensors EMPTY": ("image = ''", "give a path"),
    "info EMPTY": ("''",),
    "predict w.safetensors": ("mixer predict WEIGHTS a.jpg",),
    "train imagenet-b16": ("no ImageNet at", "cannot be downloaded", "put there", "or give its folder"),
    "train jft-h14": ("no data at", "'jft'", "give a folder of images"),
    **{
        f"{verb}{kind}.safetensors{rest}": (f"{kind}.safetensors",)
        for verb, rest in (("evaluate ", " --data data"), ("predict ", " data"), ("info ", ""))
        for kind in ("gone", "folder", "text", "cut", "changed", "others", "pointer", "page")
    },
    "info pointer.safetensors ": ("Git LFS", "git lfs pull"),
    "info page.safetensors ": ("web page", "download"),
    "train --data data --out taken": ("taken", "exists", "--out"),
    # names that do not exist
    "xyzzy": (
        "'xyzzy'",
        f"there are {', '.join(COMMANDS)}",
    ),
    "trian": ("'trian'", "did you mean train?", "mixer --help"),
    "train B/16": ("'B/16' is no recipe, but a model", "--model B/16"),
    "train vit-b_16": ("--model ViT-B/16",),
    "train mixer-b16-in21k": ("mixer finetune mixer-b16-in21k --data SOURCE",),
    "train digits --model mixer-b16-in21k": ("--weights mixer-b16-in21k, or mixer finetune mixer-b16-in21k",),
    "info mixer-b16-in21": ("published weights: mixer-b16-in21k",),
    "train digitz": ("'digitz'", "did you mean digits"),
    "train --data digitz": ("'digitz'", "did you mean digits?"),
    "train cifar": ("'cifar'", "did you mean cifar10?"),
    "train imagenet-b61": ("'imagenet-b61'", "did you mean imagenet-", "jft-h14"),
    "train pets": ("'pets'", "there are digits"),  # that is one of finetune's
    "info B/17": ("'B/17'", "B/16"),
    "train --epoch 3": ("--epoch", "did you mean --epochs"),
    "train --learning_rat=3": ("did you mean --learning-rate",),
    "train --resum auto": ("did you mean --resume",),
    "evaluate w --dta x": ("--data",),
    "predict w a.jpg --topp 3": ("did you mean --top",),
    "finetune w.safetensors pet --data data": ("unknown recipe 'pet'", "did you mean pets"),
    "finetune w.safetensors vtab-svnh": ("did you mean vtab-svhn",),
    f"{FINETUNE} --learning-rat 5": ("--learning-rat", "did you mean --learning-rate"),
    # values that are impossible
    "train --epochs many": ("many",),
    "train --epochs -1": ("--epochs", "-1", "above 0"),
    "train --precision float8": ("float8", "bfloat16"),
    "train --val-fraction 1.5": ("--val-fraction", "1.5", "below 1"),
    "train --device toaster": ("'toaster'", "auto, cpu, cuda"),
    "train --image-size 15 --patch-size 4": ("15×15", "4×4", "use 16×16"),
    "info B/16 --image-size 230": ("230×230", "16×16", "use 224×224"),
    "info w.safetensors --num-classes 5": ("--num-classes 5", "leave it out"),
    f"{EVALUATE} --batch-size 0": ("--batch-size 0: must be", "at least 1"),
    f"{EVALUATE} --batch-size -1": ("--batch-size -1: must be", "at least 1"),
    f"{EVALUATE} --workers -1": ("--workers -1: must be", "at least 0"),
    f"{EVALUATE} --max-pixels 0": ("--max-pixels 0: must be", "at least 1"),
    "train --num-blocks 0": ("--num-blocks 0: must be",),
    "info B/16 --num-classes -1": ("--num-classes -1: must be",),
    f"{EVALUATE} --image-size 20": ("20×20",),
    f"{PREDICT} --batch-size 0": ("--batch-size 0: must be", "at least 1"),
    f"{PREDICT} --top 0": ("0",),
    f"{PREDICT} --device cuda:99": ("cuda:99",),
    # convert and resize
    f"{CONVERT} --classes names.txt": ("1 classes", "3"),
    f"{CONVERT} --classes twice.txt": ("'crane' twice", "rename"),
    f"{CONVERT} --std 0": ("--std", "above 0"),
    f"{CONVERT} --mean 1 2": ("one number or three",),
    "convert w.safetensors new.pth": ("new.pth", ".safetensors"),
    "convert w.safetensors new.npz --to timm": (".safetensors",),
    "convert w.safetensors gone/new.npz": ("gone", "create it first"),
    "convert gone.npz new.npz": ("gone.npz", "does not exist"),
    "convert w.safetensors new.npz --image-size 16 16 16": ("16 16 16", "or two"),
    "resize w.safetensors new.safetensors --image-size 20": ("20×20", "patch size 8×8"),
    "resize w.safetensors new.safetensors": ("--image-size",),
    "resize w.safetensors new.safetensors --image-size 8 16 24": ("8 16 24",),
    "resize w.safetensors new.npz --image-size 32": (".safetensors",),
    # finetune
    "finetune": ("no weights",),
    "finetune w.safetensors": ("no --data",),
    "finetune w.safetensors vtab-svhn": ("no --data",),
    "finetune w.safetensors imagenet": ("no --data",),
    f"{FINETUNE} --learning-rate 0.1 --learning-rates 0.1 0.2": ("both --learning-rate and",),
    f"{FINETUNE} --learning-rates 0.1 0.1": ("--learning-rates 0.1 0.1", "twice"),
    f"{FINETUNE} --learning-rates 0.1 nan": ("--learning-rates 0.1 nan", "above 0"),
    f"{FINETUNE} --search-fraction 1": ("--search-fraction 1", "below 1"),
    f"{FINETUNE} --seeds 0": ("--seeds 0", "at least 1"),
    f"{FINETUNE} --image-size 20": ("20×20", "patch size"),
    f"{FINETUNE} --micro-batch-size 5": ("--micro-batch-size 5", "--global-batch-size 64"),
    f"{FINETUNE} --model B/16": ("--model",),
    f"{FINETUNE} --optimizer adam": ("adam", "sgd"),
    "train --weights w.safetensors --data data --num-blocks 2": ("--num-blocks",),
    # recipe files
    "train --recipe-file epoch.json": ("epoch.json", "'epoch'", "epochs"),
    "train --recipe-file three.json": ("three.json", "epochs", "'three'", "float"),
    "train --recipe-file decay.json": ("decay.json", "'exponential'", "'linear', 'cosine'"),
    "train --recipe-file brace.json": ("brace.json", "recipe.json"),
    "train digits --recipe-file good.json": ("'digits'", "one of them"),
    # resuming, several processes, checkpoints
    "train --resume auto": ("--resume auto without --out",),
    "train digits --resume=auto": ("--resume auto without --out",),
    "train --resume gone": ("--resume gone: there is no run", "name its folder, or auto"),
    "train --resume .": ("--resume .: there is no run",),
    "train digits --resume gone": ("--resume gone has its own recipe: leave out the other",),
    "train --recipe-file good.json --resume gone": ("--resume gone has its own recipe",),
    "train --resume": ("--resume",),
    "train --processes 0": ("--processes 0 --nnodes 1", "at least 1"),
    "train --processes two": ("two",),
    "train --nnodes 0": ("--processes 1 --nnodes 0", "at least 1"),
    "train --nnodes 2": ("--rdzv-endpoint None", "HOST:PORT of machine 0"),
    "train --node-rank 1": ("--node-rank 1 of --nnodes 1", "from 0 to 0"),
    f"{TWO} a:1 --node-rank 2": ("--node-rank 2 of --nnodes 2", "from 0 to 1"),
    f"{TWO} a:1 --node-rank -1": ("--node-rank -1 of --nnodes 2",),
    **{f"{TWO} {endpoint}": (f"--rdzv-endpoint {endpoint}", "HOST:PORT") for endpoint in ("node1", ":295", "n:port")},
    f"{TWO} 127.0.0.1:99999 --global-batch-size 64": ("--rdzv-endpoint 127.0.0.1:99999",),
    "train --processes 2 --rdzv-endpoint nonsense --global-batch-size 64": ("--rdzv-endpoint nonsense",),
    "train --processes 3 --global-batch-size 64": ("--global-batch-size 64 on 3 processes", "such as 63"),
    f"{TWO} a:1 --processes 2 --global-batch-size 2": ("--global-batch-size 2 on 4 processes", "such as 4"),
    "train --processes 2 --global-batch-size 64 --mixup 0.5 --mix-group-size 12": (
        "--mix-group-size 12",
        "divisor of 32",
    ),
    "train --processes 2 --global-batch-size 48 --micro-batch-size 16": ("--micro-batch-size 16", "the 24 images"),
    "train --keep-checkpoints 0": ("--keep-checkpoints 0", "above 0"),
    "train --save-every-steps 0": ("--save-every-steps 0", "above 0"),
    "train --save-every-minutes -1": ("--save-every-minutes -1",),
    "train --timeout-seconds 0": ("--timeout-seconds 0",),
    # status
    "status gone": ("gone is not the folder of a run", "name one"),
    "status data": ("data is not the folder of a run", "name one"),
    "status": ("mixer status --help",),
    "status data --jsn": ("did you mean --json",),
}
LATER = {  # found when something has been read, and told about
    "train --data one --image-size 16 --patch-size 8": ("one class, red", "at least two"),
    "train --model B/61": ("'B/61'", "B/16"),
    "predict fresh.safetensors data": ("all zero", "train it first", "mixer finetune"),
    "evaluate fresh.safetensors --data digits": ("all zero", "mixer finetune"),
}


@pytest.fixture(scope="module")
def material(pictures, color_weights, digits_run, tmp_path_factory) -> Path:
    """A folder with data sets, weights and recipes, good and bad."""
    root = tmp_path_factory.mktemp("material")
    pictures(root / "data", {"red": 3, "blue": 3})
    pictures(root / "hollow", {"red": 5, "blue": 5, "green": 0})
    (root / "hollow" / "green" / "notes.txt").write_text("none")
    pictures(root / "mauve", {"red": 5, "mauve": 5})
    pictures(root / "one", {"red": 5})
    (root / "bare" / "red").mkdir(parents=True)
    (root / "bare" / "red" / "notes.txt").write_text("none")
    (root / "taken").mkdir()
    (root / "taken" / "precious.txt").write_text("keep")
    (root / "damaged.zip").write_bytes(b"PK\x03\x04 and no more")
    (root / "names.txt").write_text("only one\n")
    (root / "twice.txt").write_text("crane\nheron\ncrane\n")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    (root / "page.safetensors").write_text("\n<!DOCTYPE html><title>Log in</title>")
    whole = color_weights.read_bytes()
    (root / "w.safetensors").write_bytes(whole)
    (root / "folder.safetensors").mkdir()
    (root / "text.safetensors").write_text("no weights")
    (root / "cut.safetensors").write_bytes(whole[:-100])
    (root / "changed.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    save_file({"a": torch.zeros(2)}, root / "others.safetensors")
    sizes = {"patch_size": 8, "num_blocks": 1, "hidden_dim": 4, "tokens_mlp_dim": 2, "channels_mlp_dim": 4}
    allmlp.save(allmlp.create(num_classes=10, image_size=8, **sizes), root / "fresh.safetensors")
    recipe = json.loads((digits_run.out / "recipe.json").read_text())
    changes = {"good": {}, "epoch": {"epoch": 3}, "three": {"epochs": "three"}, "decay": {"decay": "exponential"}}
    for name, change in changes.items():
        changed = recipe | {"optimization": recipe["optimization"] | change}
        (root / f"{name}.json").write_text(json.dumps(changed))
    (root / "brace.json").write_text("{")
    return root


@pytest.fixture
def refused(mixer, material, monkeypatch):
    """Runs a command that must be refused; returns what it printed on standard error, as lines."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(material)

    def run(command: str, said: tuple[str, ...]) -> list[str]:
        before = sorted(material.rglob("*"))
        answer = mixer(*("" if word == "EMPTY" else word for word in command.split()))
        assert (answer.status, answer.out) == (2, ""), answer.err
        assert answer.errors == [answer.last]
        assert "Traceback" not in answer.err
        assert [words for words in said if words not in answer.last] == [], answer.last
        assert sorted(material.rglob("*")) == before
        return answer.err.splitlines()

    return run


@pytest.mark.parametrize("command", MISTAKES)
def test_one_line_says_what_is_wrong(refused, command: str) -> None:
    assert len(refused(command, MISTAKES[command])) == 1


@pytest.mark.parametrize("command", LATER)
def test_the_last_line_says_what_is_wrong(refused, command: str) -> None:
    refused(command, LATER[command])


def test_debug_shows_the_traceback(mixer, color_weights, tmp_path) -> None:
    answer = mixer("predict", color_weights, tmp_path / "gone.jpg", "--debug")
    assert answer.status == 2
    assert "Traceback" in answer.err
    assert len(answer.errors) == 1


def test_a_recipe_that_cannot_be_read_stops_a_resume(refused, material) -> None:
    for text in ("", "{", "[]", '{"optimisation": {}}'):
        (material / "run").mkdir()
        (material / "run" / "recipe.json").write_text(text)
        refused("train --resume run", ("run/recipe.json",))
        shutil.rmtree(material / "run")
