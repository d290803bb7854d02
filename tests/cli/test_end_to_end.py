"""From images to predictions by the command alone, on the embedded digits and on small folders."""

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import allmlp
from allmlp.data.sources import load_source

SUMMARY_KEYS = {
    *("model", "parameters", "data", "steps", "images_per_second", "train_seconds", "peak_memory_bytes", "val_top1"),
    *("test_top1", "seed", "command", "commit", "versions", "unreadable_images"),
}
COMMAND = [sys.executable, "-c", "import sys; from allmlp.cli import main; sys.exit(main())"]


def one_object(text: str) -> dict:
    """Standard output is one JSON object, alone, on one line."""
    assert text.count("\n") == 1
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


# train


def test_a_run_writes_its_folder(digits_run) -> None:
    out, answer = digits_run.out, digits_run.answer
    assert answer.status == 0, answer.err
    assert not {"\x1b", "\r"} & set(answer.err), "without a terminal there is no progress bar"
    files = {"out": out, "weights": out / "model.safetensors", "report": out / "report.html"}
    stored = json.loads((out / "summary.json").read_text())
    assert one_object(answer.out) == {name: str(path) for name, path in files.items()} | stored
    assert {path.name for path in out.iterdir()} == {
        *("recipe.json", "metrics.jsonl", "tensorboard", "starts.json", "model.safetensors"),
        *("report.html", "per_class.csv", "examples", "summary.json", "consumed.jsonl", ".lock"),
    }
    assert any(path.stat().st_size for path in (out / "tensorboard").glob("events.out.tfevents.*"))
    assert "</html>" in (out / "report.html").read_text()


def test_summary_and_metrics_say_what_was_done(digits_run) -> None:
    summary = one_object(digits_run.answer.out)
    model = allmlp.load(digits_run.out / "model.safetensors")
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert (summary["data"], summary["seed"], summary["unreadable_images"]) == ("digits", 0, 0)
    assert summary["command"].startswith("mixer train --epochs 2 --num-blocks 1")
    assert {"python", "torch", "allmlp"} <= summary["versions"].keys()
    parts = summary["images"]
    assert sum(parts.values()) == 1797
    assert parts["test"] >= 0.2 * 1797
    assert summary["steps"] == 2 * parts["train"] // 64  # two epochs at the most
    computing = summary["train_seconds"] - summary["compile_seconds"]
    assert summary["images_per_second"] == pytest.approx(summary["steps"] * 64 / computing)
    assert summary["peak_memory_bytes"] > 10 * 2**20
    assert 0.15 < summary["val_top1"] < 1  # chance is 0.1: it has begun to learn
    assert summary["test_top1"] * parts["test"] == pytest.approx(round(summary["test_top1"] * parts["test"]))
    lines = [json.loads(line) for line in (digits_run.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(np.log(10), rel=0.02)  # soon after a head of zeros
    assert losses[-1] < losses[0]
    assert [line for line in lines if "val_top1" in line][-1]["val_top1"] == summary["val_top1"]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)


def test_the_recipe_again_gives_the_same_weights(mixer, digits_run, tmp_path) -> None:
    recipe = digits_run.out / "recipe.json"
    for name, words in (("same", []), ("other", ["--seed", 1])):
        answer = mixer("train", "--recipe-file", recipe, "--out", tmp_path / name, *words)
        assert answer.status == 0, answer.err
    first, same, other = (
        load_file(folder / "model.safetensors") for folder in (digits_run.out, tmp_path / "same", tmp_path / "other")
    )
    assert first.keys() == same.keys() == other.keys()
    assert all((first[name].numpy() == same[name].numpy()).all() for name in first)
    for name in ("head.weight", "stem.weight"):
        assert not np.array_equal(first[name], other[name])
    again = (tmp_path / "same" / "recipe.json").read_text()
    assert json.loads(again) == json.loads(recipe.read_text())


def test_a_folder_or_zip_without_a_recipe_uses_that_for_photos(mixer, tiny, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 10, "blue": 10})
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", data)
    size = ("--image-size", "16", "--patch-size", "8", "--epochs", "1", "--crop-ratio", "1")
    weights = []
    for name, source in (("a", data), ("b", packed)):
        answer = mixer("train", "--data", source, *tiny, *size, "--out", tmp_path / name)
        assert answer.status == 0, answer.err
        assert f"{tmp_path / name}/model.safetensors" in answer.out
        assert f"{tmp_path / name}/report.html" in answer.out
        recipe = json.loads((tmp_path / name / "recipe.json").read_text())
        assert recipe["name"] == "photos"
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all((weights[0][name].numpy() == weights[1][name].numpy()).all() for name in weights[0])
    assert allmlp.load(tmp_path / "a" / "model.safetensors").metadata.classes == ("blue", "red")


# evaluate


def test_evaluate_agrees_with_the_run(mixer, digits_run) -> None:
    summary = one_object(digits_run.answer.out)
    answer = mixer("evaluate", digits_run.out / "model.safetensors", "--data", "digits", "--json")
    assert answer.status == 0
    assert answer.err == ""
    found = one_object(answer.out)
    assert found["top1"] == summary["test_top1"]
    assert found["images"] == summary["images"]["test"]
    truth = load_source("digits").split("test").labels
    confusion = np.zeros((10, 10), dtype=int)
    for true, predicted, images in found["confusion_counts"]:
        confusion[true, predicted] = images
    assert confusion.sum(1).tolist() == np.bincount(truth, minlength=10).tolist()
    assert confusion.trace() / confusion.sum() == found["top1"]
    assert [row["images"] for row in found["per_class"]] == confusion.sum(1).tolist()
    assert found["top5"] > found["top1"]
    assert found["classes"] == [str(i) for i in range(10)]
    val = one_object(
        mixer("evaluate", digits_run.out / "model.safetensors", "--data", "digits", "--part", "val", "--json").out
    )
    assert val["top1"] == summary["val_top1"]


def test_evaluate_uses_the_split_of_the_training(mixer, tiny, tmp_path) -> None:
    split = ("--test-fraction", "0.4", "--split-seed", "7")
    summary = one_object(mixer("train", "--epochs", 0.5, *tiny, *split, "--out", tmp_path / "run", "--json").out)
    found = one_object(mixer("evaluate", tmp_path / "run/model.safetensors", "--data", "digits", "--json").out)
    assert found["images"] == summary["images"]["test"] >= 0.4 * 1797
    assert found["top1"] == summary["test_top1"]


def test_a_missing_class_shifts_no_label(mixer, color_weights, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"blue": 7, "green": 5, "red": 9})

    def recalls() -> dict[str, tuple[int, float | None]]:
        found = one_object(mixer("evaluate", color_weights, "--data", data, "--part", "all", "--json").out)
        assert found["classes"] == ["blue", "green", "red"]
        return {row["name"]: (row["images"], row["recall"]) for row in found["per_class"]}

    whole = recalls()
    assert whole == {"blue": (7, 1.0), "green": (5, 1.0), "red": (9, 1.0)}
    shutil.rmtree(data / "green")
    assert recalls() == whole | {"green": (0, None)}
    shutil.rmtree(data / "blue")
    assert recalls() == {"blue": (0, None), "green": (0, None), "red": whole["red"]}


# predict


def test_predict_in_every_format(mixer, digits_run) -> None:
    weights, folder = digits_run.out / "model.safetensors", digits_run.out / "examples"
    expected = sorted(str(path) for path in folder.iterdir())
    assert len(expected) == 8

    rows = one_object(mixer("predict", weights, folder, "--json").out)["predictions"]
    assert [row["image"] for row in rows] == expected
    for row in rows:
        probabilities = [c["probability"] for c in row["predictions"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1 + 1e-6
        names = [c["class"] for c in row["predictions"]]
        assert len(set(names)) == 5
        assert set(names) <= set("0123456789")

    lines = mixer("predict", weights, folder, "--format", "jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == rows

    table = list(csv.DictReader(io.StringIO(mixer("predict", weights, folder, "--format", "csv").out)))
    assert [(r["image"], int(r["rank"]), r["class"]) for r in table] == [
        (row["image"], rank, c["class"]) for row in rows for rank, c in enumerate(row["predictions"], 1)
    ]
    assert float(table[0]["probability"]) == pytest.approx(rows[0]["predictions"][0]["probability"], rel=1e-5)

    shown = mixer("predict", weights, folder, "--top", 2).out.splitlines()
    assert len(shown) == 8
    for line, row in zip(shown, rows, strict=True):
        best, second = row["predictions"][:2]
        assert line.startswith(f"{row['image']}\t{best['class']} {best['probability']:.4f}  {second['class']} ")
        assert row["predictions"][2]["class"] not in line.split("\t")[1].split()[::2]


def test_predict_a_file_a_folder_and_a_zip_in_the_order_given(mixer, color_weights, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 3, "blue": 2, "green": 1})
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for name in ("green/000.png", "blue/001.png"):
            archive.write(data / name, name)
        archive.writestr("notes.txt", "not an image")
    words = (data / "green/000.png", tmp_path / "more.zip", data / "red", data / "blue/000.png")
    answer = mixer("predict", color_weights, *words, "--json")
    assert answer.err == f"{tmp_path / 'more.zip'}: 1 files left out: 1 .txt\n"
    rows = one_object(answer.out)["predictions"]
    assert [row["image"] for row in rows] == [
        *(f"{data}/green/000.png", f"{tmp_path}/more.zip/blue/001.png", f"{tmp_path}/more.zip/green/000.png"),
        *(f"{data}/red/00{i}.png" for i in range(3)),
        f"{data}/blue/000.png",
    ]
    best = [row["predictions"][0]["class"] for row in rows]
    assert best == ["green", "blue", "green", "red", "red", "red", "blue"]  # the names came with the weights
    assert len(rows[0]["predictions"]) == 3  # of five asked for
    batched = one_object(mixer("predict", color_weights, *words, "--json", "--batch-size", 2).out)["predictions"]
    assert [row["image"] for row in batched] == [row["image"] for row in rows]


def test_a_closed_pipe_leaves_no_traceback(color_weights, pictures, tmp_path) -> None:
    data = pictures(tmp_path / "data", {"red": 200})
    for command in (["predict", color_weights, data, "--format", "jsonl"], ["train", "--help"]):
        process = subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
        process.wait(60)
        assert error == ""


# info


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        (["B/16"], 59_880_472),
        (["mixer-b_16"], 59_880_472),
        (["S/32"], 19_104_624),
        (["B/16", "--num-classes", "10"], 59_880_472 - 990 * 769),
        # 784 tokens in place of 196: two kernels of 384 and one bias for each new token in each of 12 blocks
        (["B/16", "--image-size", "448"], 59_880_472 + 12 * 588 * (2 * 384 + 1)),
    ],
)
def test_info_counts_parameters(mixer, words, parameters) -> None:
    answer = mixer("info", *words, "--json")
    assert answer.status == 0
    assert answer.err == ""
    found = one_object(answer.out)
    assert found["parameters"] == parameters
    assert found["flops"] == 2 * found["macs"]
    assert found["activation_bytes"] > 0
    assert f"{parameters:,}" in mixer("info", *words).out


def test_info_of_a_weights_file(mixer, digits_run) -> None:
    weights = digits_run.out / "model.safetensors"
    found = one_object(mixer("info", weights, "--json").out)
    summary = one_object(digits_run.answer.out)
    assert found["parameters"] == summary["parameters"]
    assert found["classes"] == [str(i) for i in range(10)]
    assert found["hidden_dim"] == 16
    assert found["num_classes"] == 10
    assert found["provenance"]["test_top1"] == summary["test_top1"]
    assert found["provenance"]["recipe"] == json.loads((digits_run.out / "recipe.json").read_text())
    assert found["preprocessing"]["crop_ratio"] == 1.0
    shown = mixer("info", weights).out
    assert "classes: 0, 1, 2" in shown
    assert "test_top1" in shown


# as a library


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(
        AttributeError, match=r"no attribute 'lod'.*create, evaluate, features, finetune, load.*transform"
    ):
        allmlp.lod  # noqa: B018
    assert {"create", "load", "predict", "push_to_hub", "resize", "save"} <= set(dir(allmlp))


def test_nothing_but_the_run_is_written(mixer, color_weights, pictures, tmp_path, monkeypatch) -> None:
    data = pictures(tmp_path / "data", {"red": 2, "blue": 2})
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for words in (["predict", color_weights, data], ["evaluate", color_weights, "--data", data], ["info", "S/32"]):
        assert mixer(*words).status == 0
    assert list(Path.cwd().iterdir()) == []


def test_evaluate_shows_tables(mixer, digits_run) -> None:
    answer = mixer("evaluate", digits_run.out / "model.safetensors", "--data", "digits")
    assert answer.status == 0
    for words in ("364 images", "top-1", "95 % interval", "top-5", "recall", "confusion"):
        assert words in answer.out
