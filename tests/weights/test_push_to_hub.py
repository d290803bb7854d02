"""Uploading to the hub: the files, the model card, and the hub's errors as one line."""

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import huggingface_hub.errors as E
import pytest
import torch
from hub_errors import connection_error, of_status
from markdown_it import MarkdownIt
from random_models import assert_same_bits
from random_models import make as make_any

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


def make(provenance: dict[str, Any] | None = None, **options: Any) -> Mixer:
    model = make_any(**{"image_size": (8, 12)} | options)
    model.metadata = Metadata(provenance=provenance or {})
    return model


def trained(**more: Any) -> dict[str, Any]:
    """The provenance of weights that a run saved."""
    return {
        "recipe": to_json_object(digits()), "seed": 7, "command": "mixer train --epochs 60", "commit": "c0ffee" * 6,
        "versions": {"python": "3.11.7"}, "started": "2026-01-01T00:00:00+00:00", "data": "digits",
        "split": "the digits, 60 % to train", "epochs": 59.8, "val_top1": 0.9876, "test_top1": 0.9812,
    } | more  # fmt: skip


parsed: Any = huggingface_hub.ModelCard


def sections(text: str) -> dict[str, str]:
    """Of the Markdown below the metadata: heading → text, without Markdown's escapes."""
    body = re.sub(r"\\([^\w\s]|_)", r"\1", parsed(text).text)
    parts = re.split(r"^## (.*)$", body, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# The model card


def test_the_card_of_a_run_is_complete() -> None:
    model = make(gelu="erf")
    view = Preprocessing(mean=(0.1, 0.2, 0.3))
    model.metadata = Metadata(classes=("a", "b", "c"), preprocessing=view, provenance=trained())
    before = copy.deepcopy(model.metadata)
    text = model_card(model, REPO, "cc-by-4.0")
    assert model.metadata == before
    assert NOT_RECORDED not in text
    assert "License of the weights: cc-by-4.0" in text
    assert "# MLP-Mixer\n" in text
    optimization = trained()["recipe"]["optimization"]
    words = {
        "How to load": ['allmlp.load("hf-hub:owner/name")', "mixer predict hf-hub:owner/name"],
        "Model": [
            f"{cost(build_meta(model.config)).parameters:,} parameters", "8 × 12 px", "4 × 4 px", "erf GELU",
            "Classes: 3", "(0.1, 0.2, 0.3)",
            "num_blocks 2, hidden_dim 8, tokens_mlp_dim 5, channels_mlp_dim 6",
        ],
        "Data": ["Trained on: digits", "the digits, 60 % to train"],
        "Results": ["val top-1: 0.9876", "test top-1: 0.9812"],
        "Recipe": [
            "mixer train --epochs 60", "c0ffee", "seed: 7", "epochs: 59.8", "digits: ",
            *(f"{key} {value}" for key, value in optimization.items()),
        ],
    }  # fmt: skip
    found = sections(text)
    assert list(found) == list(words)
    assert [word for title in words for word in words[title] if word not in found[title]] == []
    metadata = parsed(text).data
    assert (metadata.license, metadata.library_name, metadata.model_name) == ("cc-by-4.0", "allmlp", "name")
    assert metadata.pipeline_tag == "image-classification"
    assert set(metadata.tags) == {"mlp-mixer", "image-classification"}
    assert {r.dataset_split: r.metric_value for r in metadata.eval_results} == {"validation": 0.9876, "test": 0.9812}
    for result in metadata.eval_results:
        kinds = (result.metric_type, result.dataset_name, result.task_type)
        assert kinds == ("accuracy", "digits", "image-classification")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    compile(code, "README.md", "exec")
    assert all(name in allmlp.__all__ for name in re.findall(r"allmlp\.(\w+)", code))


def test_what_is_not_known_is_said() -> None:
    text = model_card(make(), REPO, "other")
    found = sections(text)
    assert f"Trained on: {NOT_RECORDED}" in found["Data"]
    assert f"Accuracy: {NOT_RECORDED}" in found["Results"]
    assert NOT_RECORDED in found["Recipe"].lower()
    assert "None" not in text
    assert not parsed(text).data.eval_results
    one = model_card(make(trained(val_top1=0.0, test_top1=None)), REPO, "mit")
    assert [result.metric_value for result in parsed(one).data.eval_results] == [0.0]
    assert "test top-1" not in one
    beside = model_card(make(trained(test_majority=0.25)), REPO, "mit")
    assert "- test top-1: 0.9812 (always answering the commonest class: 0.2500)" in beside


def test_variants_heads_and_origins() -> None:
    with torch.device("meta"):
        model = allmlp.create("B/16")
    text = model_card(model, REPO, "apache-2.0")
    assert "# Mixer-B/16\n" in text
    assert "59,880,472" in text
    headless = model_card(make(num_classes=0), REPO, "mit")
    assert parsed(headless).data.pipeline_tag == "image-feature-extraction"
    assert parsed(headless).data.tags == ["mlp-mixer"]
    assert "features only" in headless
    assert "allmlp.predict" not in headless  # it refuses a model without a head
    source = {"file": "Mixer-B_16.npz", "layout": "the authors' layout", "hub": "timm/x", "revision": "abc123"}
    for provenance in ({"source": source}, {"started_from": {"weights": "b16.npz", "source": source}}):
        data = sections(model_card(make(provenance), REPO, "mit"))["Data"]
        assert all(words in data for words in ("Mixer-B_16.npz", "timm/x", "abc123"))
    assert "b16.npz" in model_card(make({"started_from": {"weights": "b16.npz"}}), REPO, "mit")
    resized = model_card(allmlp.resize(make(trained()), (16, 24)), REPO, "mit")
    assert "0.98" not in resized
    assert "Resized from" in resized


NASTY = [
    "a\n---\nlicense: evil\n---\n\n# Owned", "a\r\n\r\n## Results\r\n\r\n- test top-1: 1.0", '"quoted": {yaml: [',
    "```\n\n# Owned\n\n```", "<script>alert(1)</script>\n\n# Owned", "{{ jinja }} %TAG ! \t| > & * # no",
    "Äpfel 猫 \u2028# Owned",
]  # fmt: skip


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


@pytest.mark.parametrize("where", ["data", "split", "command", "recipe name", "weights", "source", "classes"])
def test_outside_text_cannot_change_the_structure(where: str) -> None:
    """Metadata and Markdown have the same structure as with harmless text, and no HTML."""
    harmless = parsed(card_with("x", where))
    blocks = MarkdownIt("commonmark").parse(harmless.text)
    for text in NASTY:
        card = parsed(card_with(text, where))
        assert card.data.license == "apache-2.0"
        assert sorted(result.metric_value for result in card.data.eval_results) == [0.9812, 0.9876]
        assert card.data.to_dict().keys() == harmless.data.to_dict().keys()
        tokens = MarkdownIt("commonmark").parse(card.text)
        assert [(token.type, token.tag) for token in tokens] == [(token.type, token.tag) for token in blocks]
        inlines = [token for token in tokens if token.type == "inline"]
        assert not [child for token in inlines for child in token.children or [] if child.type == "html_inline"]
        headings = ["MLP-Mixer", "How to load", "Model", "Data", "Results", "Recipe"]
        assert [token.content for token in inlines if token.content in headings] == headings


def test_any_json_is_accepted_as_provenance() -> None:
    """As by ``save``."""
    values: list[dict[str, Any]] = [
        {"recipe": "my own"}, {"recipe": None}, {"recipe": {"data": "digits"}}, {"recipe": {"optimization": "sgd"}},
        {"started_from": "somewhere"}, {"started_from": {"source": "my lab"}}, {"source": "my lab"}, {"source": ["a"]},
        {"val_top1": "high"}, {"test_top1": [1]}, {"data": {"a": 1}}, {"split": None}, {"seed": [1]},
    ]  # fmt: skip
    for provenance in values:
        assert parsed(model_card(make(provenance), REPO, "mit")).data.license == "mit"


# Uploading


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """In place of huggingface_hub.HfApi; what is uploaded is kept in ``hub.sent``. Temporary files go to a folder."""

    def upload_folder(*, folder_path: str, **_options: Any) -> Any:
        fake.sent = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return Mock(commit_url="https://huggingface.co/owner/name/commit/abc")

    fake = Mock()
    fake.return_value.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return fake


def test_weights_and_card_are_uploaded(hub: Mock, tmp_path: Path) -> None:
    model = make(trained())
    model.metadata = Metadata(classes=("a", "b", "c"), provenance=trained())
    address = allmlp.push_to_hub(model, REPO, license="cc-by-4.0", private=True, token="hf_x", message="Mine")
    assert address == "https://huggingface.co/owner/name/commit/abc"
    api = hub.return_value
    assert hub.call_args.kwargs["token"] == "hf_x"
    api.create_repo.assert_called_once_with(REPO, private=True, exist_ok=True)
    options = api.upload_folder.call_args.kwargs
    assert (options["repo_id"], options["commit_message"]) == (REPO, "Mine")
    assert hub.sent.keys() == {"model.safetensors", "README.md"}
    assert hub.sent["README.md"].decode() == model_card(model, REPO, "cc-by-4.0")
    assert list((tmp_path / "temporary").iterdir()) == []
    (tmp_path / "again.safetensors").write_bytes(hub.sent["model.safetensors"])
    again = load(tmp_path / "again.safetensors")
    assert again.metadata == model.metadata
    assert_same_bits(again, model)
    push_to_hub(make(), REPO, license="mit")
    api.create_repo.assert_called_with(REPO, private=False, exist_ok=True)
    with pytest.raises(TypeError, match="license"):
        push_to_hub(make(), REPO)  # pyright: ignore


ERRORS: list[tuple[Callable[[], Exception], type[Exception], str]] = [
    (of_status(401), UserError, r"no permission .*owner/name \(401.*\): log in with `hf auth login`"),
    (of_status(403), UserError, r"no permission .*owner/name \(403.*\): log in with `hf auth login`"),
    (of_status(404, E.RepositoryNotFoundError), UserError, "owner/name"),
    (of_status(503), RunError, r"owner/name could not be uploaded \(503.*\): try again"),
    (connection_error, RunError, "try again"),
    (lambda: ConnectionError("refused"), RunError, r"cannot be reached \(refused\): try again"),
    (lambda: E.OfflineModeIsEnabled("offline mode"), RunError, "cannot be reached"),
    (lambda: E.HFValidationError("Repo id must be in the form"), UserError, "give OWNER/NAME"),
    (lambda: E.LocalTokenNotFoundError("Token is required"), UserError, "log in with `hf auth login`"),
]


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_an_error_of_the_hub_is_one_line(hub: Mock, call: str, tmp_path: Path) -> None:
    for error, kind, words in ERRORS:
        getattr(hub.return_value, call).side_effect = error()
        with pytest.raises(kind, match=words) as caught:
            push_to_hub(make(), REPO, license="mit")
        assert str(caught.value).isprintable()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_cannot_be_saved_or_sent_is_not_uploaded(hub: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.metadata = Metadata(classes=("a", "b"))
    with pytest.raises(UserError, match=r"2 class names.* 3"):
        push_to_hub(model, REPO, license="mit")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'allmlp\[hub\]'"):
        push_to_hub(make(), REPO, license="mit")
    assert not hub.return_value.create_repo.called
