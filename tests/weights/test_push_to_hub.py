"""Uploading to the hub: the files, the model card, and the hub's errors as one line."""

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

import allmlp
from allmlp.config.serialize import to_json_object
from allmlp.errors import RunError, UserError
from allmlp.factory import build_meta
from allmlp.flops import cost
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.recipes.digits import digits
from allmlp.weights.load import load
from allmlp.weights.push_to_hub import NOT_RECORDED, model_card, push_to_hub

REPO = "owner/name"
E = huggingface_hub.errors


def make(provenance: dict[str, Any] | None = None, **options: Any) -> Mixer:
    sizes = {"num_classes": 3, "image_size": (8, 12), "patch_size": 4, "num_blocks": 2, "hidden_dim": 8}
    model = Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 6, "seed": 0} | options)
    model.metadata = Metadata(provenance=provenance or {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def trained(**more: Any) -> dict[str, Any]:
    """The provenance of weights that a run saved."""
    return {
        "recipe": to_json_object(digits()),
        "seed": 7,
        "command": "mixer train --epochs 60",
        "commit": "c0ffee" * 6,
        "versions": {"python": "3.11.7"},
        "started": "2026-01-01T00:00:00+00:00",
        "data": "digits",
        "split": "the digits, 60 % to train",
        "epochs": 59.8,
        "val_top1": 0.9876,
        "test_top1": 0.9812,
    } | more


def parsed(text: str) -> Any:
    return huggingface_hub.ModelCard(text)


def sections(text: str) -> dict[str, str]:
    """Of the Markdown below the metadata: heading → text, without Markdown's escapes."""
    body = re.sub(r"\\([^\w\s]|_)", r"\1", parsed(text).text)
    parts = re.split(r"^## (.*)$", body, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str) -> list[Token]:
    return MarkdownIt("commonmark").parse(text)


# The model card


def test_the_card_of_a_run_is_complete() -> None:
    model = make(trained(), image_size=(8, 12), gelu="erf")
    model.metadata = Metadata(
        classes=("a", "b", "c"), preprocessing=Preprocessing(mean=(0.1, 0.2, 0.3)), provenance=trained()
    )
    text = model_card(model, REPO, "cc-by-4.0")
    found = sections(text)
    assert list(found) == ["How to load", "Model", "Data", "Results", "Recipe"]
    assert NOT_RECORDED not in text
    assert "License of the weights: cc-by-4.0" in text
    assert 'allmlp.load("hf-hub:owner/name")' in found["How to load"]
    assert "mixer predict hf-hub:owner/name" in found["How to load"]
    for words in (
        f"{cost(build_meta(model.config)).parameters:,} parameters",
        "8 × 12 px",
        "4 × 4 px",
        "erf GELU",
        "Classes: 3",
    ):
        assert words in found["Model"], words
    for key in ("num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"):
        assert f"{key} {model.config[key]}" in found["Model"]
    assert "(0.1, 0.2, 0.3)" in found["Model"]
    assert "Trained on: digits" in found["Data"]
    assert "the digits, 60 % to train" in found["Data"]
    assert "val top-1: 0.9876" in found["Results"]
    assert "test top-1: 0.9812" in found["Results"]
    for words in ("mixer train --epochs 60", "c0ffee", "seed: 7", "epochs: 59.8", "digits: ", "learning_rate 0.003"):
        assert words in found["Recipe"], words
    for key, value in trained()["recipe"]["optimization"].items():
        assert f"{key} {value}" in found["Recipe"]


def test_the_cards_metadata_is_valid() -> None:
    metadata = parsed(model_card(make(trained()), REPO, "apache-2.0"))
    assert metadata.data.license == "apache-2.0"
    assert metadata.data.library_name == "allmlp"
    assert metadata.data.pipeline_tag == "image-classification"
    assert {"mlp-mixer", "image-classification"} == set(metadata.data.tags)
    results = {result.dataset_split: result for result in metadata.data.eval_results}
    assert {split: result.metric_value for split, result in results.items()} == {"validation": 0.9876, "test": 0.9812}
    for result in results.values():
        assert (result.metric_type, result.dataset_name, result.task_type) == (
            "accuracy", "digits", "image-classification",
        )  # fmt: skip
    assert metadata.data.model_name == "name"


def test_the_example_of_the_card_is_python() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", model_card(make(), REPO, "mit"), flags=re.DOTALL)
    compile(code, "README.md", "exec")
    for name in re.findall(r"allmlp\.(\w+)", code):
        assert name in allmlp.__all__


@pytest.mark.parametrize("name", ["B/16", "S/32"])
def test_a_variant_of_table_1_is_named(name: str) -> None:
    with torch.device("meta"):
        model = allmlp.create(name)
    text = model_card(model, REPO, "apache-2.0")
    assert f"# Mixer-{name}\n" in text
    assert f"{cost(build_meta(model.config)).parameters:,}" in text
    assert "# MLP-Mixer\n" in model_card(make(), REPO, "apache-2.0")


def test_missing_information_is_marked() -> None:
    """Of an untrained model."""
    text = model_card(make(), REPO, "other")
    found = sections(text)
    assert f"Trained on: {NOT_RECORDED}" in found["Data"]
    assert f"Accuracy: {NOT_RECORDED}" in found["Results"]
    assert NOT_RECORDED in found["Recipe"].lower()
    assert "None" not in text
    metadata = parsed(text)
    assert not metadata.data.eval_results
    assert metadata.data.license == "other"


def test_the_card_names_the_origin_of_weights() -> None:
    source = {"file": "Mixer-B_16.npz", "layout": "the authors' layout", "hub": "timm/x", "revision": "abc123"}
    for provenance in ({"source": source}, {"started_from": {"weights": "b16.npz", "source": source}}):
        text = sections(model_card(make(provenance), REPO, "apache-2.0"))["Data"]
        for words in ("Mixer-B_16.npz", "timm/x", "abc123"):
            assert words in text
    assert "b16.npz" in sections(model_card(make({"started_from": {"weights": "b16.npz"}}), REPO, "mit"))["Data"]


def test_a_run_without_a_test_split_has_one_result() -> None:
    metadata = parsed(model_card(make(trained(test_top1=None)), REPO, "mit"))
    assert [result.dataset_split for result in metadata.data.eval_results] == ["validation"]
    assert "test top-1" not in model_card(make(trained(test_top1=None)), REPO, "mit")
    zero = parsed(model_card(make(trained(val_top1=0.0, test_top1=None)), REPO, "mit"))
    assert [result.metric_value for result in zero.data.eval_results] == [0.0]


def test_a_model_without_a_head_has_another_tag_and_example() -> None:
    text = model_card(make(num_classes=0), REPO, "mit")
    metadata = parsed(text)
    assert metadata.data.pipeline_tag == "image-feature-extraction"
    assert "features only" in text
    assert "image-classification" not in metadata.data.tags
    assert "allmlp.predict" not in text  # it refuses a model without a head


def test_the_model_is_not_modified() -> None:
    model = make(trained())
    before = copy.deepcopy(model.metadata)
    model_card(model, REPO, "mit")
    assert model.metadata == before


NASTY = [
    "a\n---\nlicense: evil\n---\n\n# Owned",
    "a\r\n\r\n## Results\r\n\r\n- test top-1: 1.0",
    '"quoted": {yaml: [',
    "```\n\n# Owned\n\n```",
    "<script>alert(1)</script>\n\n# Owned",
    "{{ jinja }} %TAG ! \t| > & * # no",
    "Äpfel 猫 \u2028# Owned",
]


def card_with(text: str, where: str) -> str:
    provenance = trained()
    if where == "recipe name":
        provenance["recipe"]["name"] = text
    elif where == "weights":
        provenance["started_from"] = {"weights": text}
    elif where == "source":
        provenance["source"] = {"file": text, text: "x"}
    elif where != "classes":
        provenance[where] = text
    model = make(provenance)
    if where == "classes":
        model.metadata = Metadata(classes=(text, "b", "c"), provenance=provenance)
    return model_card(model, REPO, "apache-2.0")


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
@pytest.mark.parametrize("where", ["data", "split", "command", "recipe name", "weights", "source", "classes"])
def test_outside_text_cannot_change_the_structure(text: str, where: str) -> None:
    """Metadata and Markdown have the same structure as with harmless text, and no HTML."""
    metadata, harmless = parsed(card_with(text, where)), parsed(card_with("x", where))
    assert metadata.data.license == "apache-2.0"
    assert sorted(result.metric_value for result in metadata.data.eval_results) == [0.9812, 0.9876]
    assert metadata.data.to_dict().keys() == harmless.data.to_dict().keys()
    assert [(token.type, token.tag) for token in blocks(metadata.text)] == [
        (token.type, token.tag) for token in blocks(harmless.text)
    ]
    inlines = [token for token in blocks(metadata.text) if token.type == "inline"]
    assert not [child for token in inlines for child in token.children or [] if child.type == "html_inline"]
    headings = ["MLP-Mixer", "How to load", "Model", "Data", "Results", "Recipe"]
    assert [token.content for token in inlines if token.content in headings] == headings


@pytest.mark.parametrize(
    "provenance",
    [
        {"recipe": "my own"}, {"recipe": None}, {"recipe": {"data": "digits"}}, {"recipe": {"optimization": "sgd"}},
        {"started_from": "somewhere"}, {"started_from": None}, {"source": "my lab"}, {"source": ["a"]},
        {"started_from": {"source": "my lab"}}, {"val_top1": "high"}, {"test_top1": [1]}, {"data": {"a": 1}},
        {"split": None}, {"seed": [1, 2]}, {"val_top1": True},
    ],
    ids=str,
)  # fmt: skip
def test_any_json_is_accepted_as_provenance(provenance: dict[str, Any]) -> None:
    """As by ``save``."""
    assert parsed(model_card(make(provenance), REPO, "mit")).data.license == "mit"


# Uploading


class Hub:
    """A fake huggingface_hub.HfApi that records its calls, or fails."""

    def __init__(self, failing: dict[str, Callable[[], Exception]]) -> None:
        self.failing = failing
        self.made: list[dict[str, Any]] = []
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.sent: dict[str, bytes] = {}
        self.uploads: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> "Hub":
        self.made.append(options)
        return self

    def create_repo(self, repo: str, **options: Any) -> None:
        if "create_repo" in self.failing:
            raise self.failing["create_repo"]()
        self.created.append((repo, options))

    def upload_folder(self, *, folder_path: str | Path, **options: Any) -> Any:
        if "upload_folder" in self.failing:
            raise self.failing["upload_folder"]()
        self.uploads.append(options | {"folder_path": Path(folder_path)})
        self.sent = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url="https://huggingface.co/owner/name/commit/abc")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub({})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_weights_and_card_are_uploaded(hub: Hub, tmp_path: Path) -> None:
    model = make(trained())
    model.metadata = Metadata(classes=("a", "b", "c"), provenance=trained())
    address = push_to_hub(model, REPO, license="cc-by-4.0", private=True, token="hf_x", message="Mine")
    assert address == "https://huggingface.co/owner/name/commit/abc"
    assert hub.made[0]["token"] == "hf_x"
    assert hub.created == [(REPO, {"private": True, "exist_ok": True})]
    assert [upload["repo_id"] for upload in hub.uploads] == [REPO]
    assert hub.uploads[0]["commit_message"] == "Mine"
    assert not hub.uploads[0]["folder_path"].exists()
    assert hub.sent.keys() == {"model.safetensors", "README.md"}
    assert hub.sent["README.md"].decode() == model_card(model, REPO, "cc-by-4.0")
    (tmp_path / "again.safetensors").write_bytes(hub.sent["model.safetensors"])
    again = load(tmp_path / "again.safetensors")
    assert again.metadata == model.metadata
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_repository_is_public_by_default(hub: Hub) -> None:
    push_to_hub(make(), REPO, license="mit")
    assert hub.created[0][1]["private"] is False
    assert hub.made[0]["token"] is None


def test_a_licence_is_required() -> None:
    with pytest.raises(TypeError, match="license"):
        push_to_hub(make(), REPO)  # pyright: ignore


def response(status: int) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


def of_status(status: int) -> Callable[[], Exception]:
    return lambda: E.HfHubHTTPError(f"{status} Client Error: for url\nmore", response=response(status))


def connection_error() -> Exception:
    """An error of the HTTP library that huggingface_hub uses; in newer versions it is not an OSError."""
    return sys.modules[E.HTTPError.__module__.partition(".")[0]].ConnectError("Name or service not known")


ERRORS = {
    "401": (of_status(401), UserError, r"no permission to write to owner/name \(401.*\): log in with `hf auth login`"),
    "403": (of_status(403), UserError, r"no permission to write to owner/name \(403.*\): log in with `hf auth login`"),
    "404": (lambda: E.RepositoryNotFoundError("404 none", response=response(404)), UserError, "owner/name"),
    "500": (of_status(500), RunError, r"owner/name could not be uploaded \(500.*\): try again later"),
    "503": (of_status(503), RunError, r"owner/name could not be uploaded \(503.*\): try again later"),
    "connection": (connection_error, RunError, "try again later"),
    "os": (lambda: ConnectionError("refused"), RunError, r"the hub cannot be reached \(refused\): try again later"),
    "offline": (lambda: E.OfflineModeIsEnabled("offline mode"), RunError, "cannot be reached"),
    "name": (lambda: E.HFValidationError("Repo id must be in the form"), UserError, "give OWNER/NAME"),
    "token": (lambda: E.LocalTokenNotFoundError("Token is required"), UserError, "log in with `hf auth login`"),
}


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(("error", "kind", "telling"), ERRORS.values(), ids=ERRORS)
def test_an_error_of_the_hub_is_one_line(
    hub: Hub, call: str, error: Callable[[], Exception], kind: type, telling: str
) -> None:
    hub.failing[call] = error
    with pytest.raises(kind, match=telling) as caught:
        push_to_hub(make(), REPO, license="mit")
    assert "\n" not in str(caught.value)


def test_the_temporary_folder_is_removed_after_a_failure(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupted() -> Exception:
        raise KeyboardInterrupt

    hub.failing["upload_folder"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        push_to_hub(make(), REPO, license="mit")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_saved_are_not_uploaded(hub: Hub) -> None:
    model = make()
    model.metadata = Metadata(classes=("a", "b"))
    with pytest.raises(UserError, match="2 class names for a head of 3"):
        push_to_hub(model, REPO, license="mit")
    assert hub.created == []


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    def never(*_args: object, **_options: object) -> NoReturn:
        raise AssertionError("weights were written")

    monkeypatch.setattr("allmlp.weights.push_to_hub.save", never)
    with pytest.raises(UserError, match=r"pip install 'allmlp\[hub\]'"):
        push_to_hub(make(), REPO, license="mit")


def test_the_name_in_the_package() -> None:
    assert allmlp.push_to_hub is push_to_hub


def test_a_resized_model_does_not_claim_the_scores_of_its_old_size() -> None:
    model = allmlp.create(
        num_classes=2, image_size=8, patch_size=4, num_blocks=1, hidden_dim=4, tokens_mlp_dim=2, channels_mlp_dim=4
    )
    model.metadata.provenance.update(data="flowers", test_top1=0.625)
    assert "0.6250" in model_card(model, "me/flowers", "mit")
    resized = allmlp.resize(model, 16)
    metadata = model_card(resized, "me/flowers", "mit")
    assert "0.625" not in metadata
    assert "Resized from" in metadata
    assert resized.metadata.provenance["before_resize"] == {"image_size": [8, 8], "test_top1": 0.625}
