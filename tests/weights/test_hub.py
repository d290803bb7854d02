"""Weights from the Hugging Face hub: with a simulated cache, without network, and the hub's errors as one line."""

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file

import allmlp
from allmlp.errors import RunError, UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.weights.convert import save_as
from allmlp.weights.load import load
from allmlp.weights.native import save
from allmlp.weights.published import class_names

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
REPO, ADDRESS = "owner/name", "hf-hub:owner/name"
Files = dict[str, bytes]


def make(seed: int = 0, **options: Any) -> Mixer:
    """A small Mixer whose every parameter is random."""
    sizes = {"num_classes": 3, "image_size": 8, "patch_size": 4, "num_blocks": 1, "hidden_dim": 8, "gelu": "erf"}
    model = Mixer(**sizes | {"tokens_mlp_dim": 5, "channels_mlp_dim": 6} | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.eval()


def timm_file(folder: Path, model: Mixer) -> bytes:
    """A file as timm uploads it, without this package's header."""
    path = folder / "timm.safetensors"
    save_as(model, path, "timm")
    save_file(load_file(path), path, {"format": "pt"})
    return path.read_bytes()


def native_file(folder: Path, model: Mixer) -> bytes:
    save(model, folder / "ours.safetensors")
    return (folder / "ours.safetensors").read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An empty cache, without network; returns a function that adds a repository's files to it."""
    root = tmp_path / "cache"
    root.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(socket.socket, "connect", no_network)

    def put(
        repo: str, files: Files, commit: str = COMMIT, ref: str | None = "main", absent: tuple[str, ...] = ()
    ) -> Path:
        folder = root / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for name, content in files.items():
            blob = folder / "blobs" / f"{commit[:8]}{name}"
            blob.write_bytes(content)
            (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
        for name in absent:
            (folder / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
            (folder / ".no_exist" / commit / name).touch()
        if ref:
            (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
        return snapshot

    return put


def no_network(*_args: object) -> NoReturn:
    raise AssertionError("a test tried to use the network")


def as_json(config: Any) -> bytes:
    return json.dumps(config).encode()


def same(found: Mixer, expected: Mixer) -> bool:
    before, after = expected.state_dict(), found.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


# From the cache


@pytest.mark.parametrize("write", [native_file, timm_file])
def test_a_repository_in_the_cache_loads_offline(cache: Callable, tmp_path: Path, write: Callable) -> None:
    model = make()
    cache(REPO, {"model.safetensors": write(tmp_path, model), "config.json": b"{}"})
    again = allmlp.load(ADDRESS)
    assert same(again, model)
    assert not again.training
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(images), model(images))
    assert again.metadata.provenance["source"]["hub"] == REPO
    assert again.metadata.provenance["source"]["revision"] == COMMIT


@pytest.mark.parametrize(("write", "missed"), [(native_file, False), (timm_file, True)], ids=["ours", "timm's"])
def test_weights_load_without_a_config(
    cache: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Callable, missed: bool
) -> None:
    """Whether or not the cache knows that there is none; if it does not, a warning says so if it matters."""
    model = make()
    content = write(tmp_path, model)
    cache(REPO, {"model.safetensors": content}, absent=("config.json",))
    cache("owner/other", {"model.safetensors": content})
    assert same(load(ADDRESS), model)
    assert "config.json" not in warnings_of(caplog)
    assert same(load("hf-hub:owner/other"), model)
    assert ("config.json" in warnings_of(caplog)) == missed  # native files contain their preprocessing


def test_metadata_of_native_files_is_kept(cache: Callable, tmp_path: Path) -> None:
    model = make(num_classes=2)
    view = Preprocessing(crop="resize", crop_ratio=0.7, mean=(0.1, 0.2, 0.3))
    model.metadata = Metadata(
        classes=("a", "b"), preprocessing=view, provenance={"seed": 1, "source": {"file": "x.npz"}}
    )
    other = {"num_classes": 2, "label_names": ["c", "d"], "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    cache(REPO, {"model.safetensors": native_file(tmp_path, model), "config.json": as_json(other)})
    metadata = load(ADDRESS).metadata
    assert (metadata.classes, metadata.preprocessing) == (("a", "b"), view)
    assert metadata.provenance == {"seed": 1, "source": {"file": "x.npz", "hub": REPO, "revision": COMMIT}}


def test_a_source_that_is_text_is_accepted(cache: Callable, tmp_path: Path) -> None:
    """``save`` accepts any JSON value as provenance."""
    save(make(), tmp_path / "m.safetensors", source="my own pictures")
    cache(REPO, {"model.safetensors": (tmp_path / "m.safetensors").read_bytes()}, absent=("config.json",))
    assert load(ADDRESS).metadata.provenance["source"]["revision"] == COMMIT


def test_pytorch_model_bin(cache: Callable, tmp_path: Path) -> None:
    model = make()
    save_as(model, tmp_path / "m.safetensors", "timm")
    torch.save(load_file(tmp_path / "m.safetensors"), tmp_path / "m.bin")
    files = {"pytorch_model.bin": (tmp_path / "m.bin").read_bytes()}
    cache(REPO, files, absent=("model.safetensors", "config.json"))
    assert same(load(ADDRESS), model)
    cache("owner/unknown", files)  # the cache does not say whether there is a model.safetensors
    assert same(load("hf-hub:owner/unknown"), model)


def test_safetensors_are_preferred_to_a_pickle(cache: Callable, tmp_path: Path) -> None:
    model = make()
    files = {"model.safetensors": native_file(tmp_path, model), "pytorch_model.bin": b"\x80\x04never read"}
    cache(REPO, files, absent=("config.json",))
    assert same(load(ADDRESS), model)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return self.path.touch, ()


def test_code_in_a_pickle_from_the_hub_is_not_run(cache: Callable, tmp_path: Path) -> None:
    torch.save({"state_dict": Canary(tmp_path / "canary")}, tmp_path / "m.bin")
    cache(REPO, {"pytorch_model.bin": (tmp_path / "m.bin").read_bytes()}, absent=("model.safetensors", "config.json"))
    with pytest.raises(UserError, match="which can run code, so it is refused"):
        load(ADDRESS)
    assert not (tmp_path / "canary").exists()


# Revisions


def test_each_revision_has_its_weights_and_its_config(cache: Callable, tmp_path: Path) -> None:
    old, new = make(seed=1), make(seed=2)
    for model, commit, ref, names in (
        (old, OTHER, "v1.0", ["a", "b", "c"]), (new, COMMIT, "main", ["x", "y", "z"]),
    ):  # fmt: skip
        config = {"num_classes": 3, "label_names": names}
        cache(REPO, {"model.safetensors": timm_file(tmp_path, model), "config.json": as_json(config)}, commit, ref)
    for revision, model, commit, names in (
        ("", new, COMMIT, ("x", "y", "z")),
        ("@main", new, COMMIT, ("x", "y", "z")),
        ("@v1.0", old, OTHER, ("a", "b", "c")),
        (f"@{OTHER}", old, OTHER, ("a", "b", "c")),
    ):
        found = load(ADDRESS + revision)
        assert same(found, model)
        assert found.metadata.classes == names
        assert found.metadata.provenance["source"]["hub"] == REPO
        assert found.metadata.provenance["source"]["revision"] == commit  # not a branch or tag, which may move


def test_a_branch_with_a_slash(cache: Callable, tmp_path: Path) -> None:
    model = make()
    cache(REPO, {"model.safetensors": native_file(tmp_path, model)}, OTHER, "refs/pr/1", absent=("config.json",))
    assert load(f"{ADDRESS}@refs/pr/1").metadata.provenance["source"]["revision"] == OTHER


@pytest.mark.parametrize("write", [native_file, timm_file])
def test_the_revision_is_saved_with_the_weights(cache: Callable, tmp_path: Path, write: Callable) -> None:
    cache(REPO, {"model.safetensors": write(tmp_path, make()), "config.json": b"{}"})
    model = load(ADDRESS)
    save(model, tmp_path / "m.safetensors")
    save_as(allmlp.resize(model, 16), tmp_path / "n.safetensors", "timm")
    for path in (tmp_path / "m.safetensors", tmp_path / "n.safetensors"):
        source = load(path).metadata.provenance["source"]
        assert (source["hub"], source["revision"]) == (REPO, COMMIT)


# timm's config.json


TIMM_CONFIG = {
    "architecture": "mixer_b16_224",
    "num_classes": 3,
    "num_features": 8,
    "label_names": ["n01", "n02", "n03"],
    "label_descriptions": {"n01": "tench", "n03": "shark"},
    "pretrained_cfg": {
        "tag": "mine",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.95,
        "interpolation": "nearest",
        "crop_mode": "squash",
    },
}


def carded(cache: Callable, tmp_path: Path, config: bytes, repo: str = REPO, **options: Any) -> Metadata:
    cache(repo, {"model.safetensors": timm_file(tmp_path, make(**options)), "config.json": config})
    return load(f"hf-hub:{repo}").metadata


def test_preprocessing_and_classes_of_timms_config(cache: Callable, tmp_path: Path) -> None:
    metadata = carded(cache, tmp_path, as_json(TIMM_CONFIG))
    assert metadata.classes == ("tench", "n02", "shark")
    assert metadata.preprocessing == Preprocessing(
        crop="resize",
        crop_ratio=0.95,
        interpolation="nearest",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    save(load(ADDRESS), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").metadata == load(ADDRESS).metadata


def test_fields_missing_in_the_config_are_those_of_the_layout(cache: Callable, tmp_path: Path) -> None:
    config = {"num_classes": 3, "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    metadata = carded(cache, tmp_path, as_json(config))
    assert metadata.preprocessing == Preprocessing(interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    assert metadata.classes is None


@pytest.mark.parametrize("mode", ["center", "border", None, 3])
def test_only_squash_changes_the_aspect(cache: Callable, tmp_path: Path, mode: Any) -> None:
    assert carded(cache, tmp_path, as_json({"pretrained_cfg": {"crop_mode": mode}})).preprocessing.crop == "resmall"


@pytest.mark.parametrize(
    "config",
    [
        b"[]", b"null", b"3", b'"text"', b"{}", b'{"pretrained_cfg": null}', b'{"pretrained_cfg": "mine"}',
        b'{"pretrained_cfg": []}', b'{"pretrained_cfg": {"mean": null, "std": null, "crop_pct": null}}',
        b'{"label_names": null}', b'{"label_names": "abc"}', b'{"label_names": {"a": 1}}', b'{"label_descriptions": 3}',
        b'{"num_classes": "three"}', b'{"num_classes": null, "architecture": ["resnet50"]}',
    ],
)  # fmt: skip
def test_a_config_of_other_types_is_ignored(cache: Callable, tmp_path: Path, config: bytes) -> None:
    metadata = carded(cache, tmp_path, config)
    assert metadata.preprocessing == Preprocessing(interpolation="bicubic")
    assert metadata.classes is None
    save(load(ADDRESS), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interpolation", "lanczos"), ("interpolation", 3), ("interpolation", ["bicubic"]), ("crop_pct", "0.9"),
        ("crop_pct", 0), ("crop_pct", -1), ("crop_pct", 1e400), ("mean", "0.5"), ("mean", 0.5), ("mean", []),
        ("mean", ["a", "b", "c"]), ("mean", [float("nan")] * 3), ("std", [0.5, 0.5]), ("std", [1, 1, 0]),
        ("std", [1, 1, -1]), ("std", {"r": 1}), ("mean", [0.5] * 4), ("mean", [0.5] * 7),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_preprocessing_is_ignored_with_a_warning(
    cache: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any
) -> None:
    config = {"num_classes": 3, "label_names": ["a", "b", "c"], "pretrained_cfg": {key: value}}
    metadata = carded(cache, tmp_path, as_json(config))
    assert metadata.preprocessing == Preprocessing(interpolation="bicubic")
    assert metadata.classes == ("a", "b", "c")
    assert "config.json" in warnings_of(caplog)


@pytest.mark.parametrize(
    "config",
    [
        {"num_classes": 4, "label_names": ["a", "b", "c", "d"]}, {"label_names": ["a", "b"]},
        {"num_classes": 3, "label_names": ["a", "b"]}, {"num_classes": 2, "label_names": ["a", "b"]},
        {"num_classes": 3, "label_names": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_number_of_class_names_is_ignored(cache: Callable, tmp_path: Path, config: dict) -> None:
    assert carded(cache, tmp_path, as_json(config)).classes is None
    save(load(ADDRESS), tmp_path / "m.safetensors")


def test_class_names_without_a_head_are_ignored(cache: Callable, tmp_path: Path) -> None:
    config = {"num_classes": 0, "label_names": ["a", "b", "c"]}
    assert carded(cache, tmp_path, as_json(config), num_classes=0).classes is None


def test_names_that_are_numbers_become_text(cache: Callable, tmp_path: Path) -> None:
    config = {"num_classes": 3, "label_names": [1, None, "c"], "label_descriptions": {"1": "one", "c": 3}}
    names = carded(cache, tmp_path, as_json(config)).classes
    assert names is not None
    assert (names[0], names[2], [type(name) for name in names]) == ("one", "3", [str] * 3)


@pytest.mark.parametrize(
    "config", [b"", b"{", b"not json", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' * 100_000], ids=lambda c: str(c[:10])
)
def test_an_invalid_config_is_one_line(cache: Callable, tmp_path: Path, config: bytes) -> None:
    cache(REPO, {"model.safetensors": timm_file(tmp_path, make()), "config.json": config})
    with pytest.raises(UserError, match=r"^hf-hub:owner/name: its config\.json is not valid JSON \(.*\): ") as caught:
        load(ADDRESS)
    assert "\n" not in str(caught.value)


def test_a_mean_of_another_number_of_channels_is_ignored(cache: Callable, tmp_path: Path) -> None:
    config = {"pretrained_cfg": {"mean": [0.1] * 4, "std": [0.2] * 4}}
    assert len(carded(cache, tmp_path, as_json(config)).preprocessing.mean) in (1, 3)


def test_a_config_of_one_channel(cache: Callable, tmp_path: Path) -> None:
    config = {"pretrained_cfg": {"mean": [0.1], "std": [0.2]}}
    view = carded(cache, tmp_path, as_json(config), in_channels=1).preprocessing
    assert (view.mean, view.std) == ((0.1,), (0.2,))


# timm's own repositories


WRONG_NAME = "timm/mixer_b16_224.goog_in21k_ft_in1k"


def published_config(num_classes: int, mean: float, std: float, interpolation: str) -> bytes:
    """As in timm's own repositories: without class names."""
    view = {"mean": [mean] * 3, "std": [std] * 3, "crop_pct": 0.875, "interpolation": interpolation}
    return as_json({"architecture": "mixer_b16_224", "num_classes": num_classes, "pretrained_cfg": view})


@pytest.mark.parametrize("model", ["mixer_b16_224", "mixer_l16_224"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_misleading_name_gives_a_warning(
    cache: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, with_config: bool, model: str
) -> None:
    repo = f"timm/{model}.goog_in21k_ft_in1k"
    files = {"model.safetensors": timm_file(tmp_path, make(num_classes=1000))}
    config = {"config.json": published_config(1000, 0.5, 0.5, "bicubic")} if with_config else {}
    cache(repo, files | config, absent=() if with_config else ("config.json",))
    metadata = load(f"hf-hub:{repo}").metadata
    said = warnings_of(caplog)
    assert repo in said
    assert "not fine-tuned from ImageNet-21k" in said
    assert "from-scratch ImageNet weights" in said
    assert metadata.provenance["source"]["known_as"] == repo
    assert metadata.preprocessing == Preprocessing(interpolation="bicubic")
    assert metadata.classes == class_names(1000)


@pytest.mark.parametrize(("name", "classes"), [("miil_in21k", 11221), ("miil_in21k_ft_in1k", 1000)])
@pytest.mark.parametrize("with_config", [True, False])
def test_miils_weights_take_pixels_from_0_to_1(
    cache: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, classes: int, with_config: bool
) -> None:
    repo = f"timm/mixer_b16_224.{name}"
    files = {"model.safetensors": timm_file(tmp_path, make(num_classes=classes))}
    config = {"config.json": published_config(classes, 0.0, 1.0, "bilinear")} if with_config else {}
    cache(repo, files | config, absent=() if with_config else ("config.json",))
    metadata = load(f"hf-hub:{repo}").metadata
    assert metadata.preprocessing == Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
    assert metadata.classes == class_names(classes)
    assert "not fine-tuned" not in warnings_of(caplog)


def test_the_same_name_of_another_owner_is_not_timms(
    cache: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo = "someone/mixer_b16_224.goog_in21k_ft_in1k"
    cache(repo, {"model.safetensors": timm_file(tmp_path, make())}, absent=("config.json",))
    load(f"hf-hub:{repo}")
    assert "from-scratch" not in warnings_of(caplog)


# Errors


@pytest.mark.parametrize(
    "address",
    [
        "hf-hub:", "hf-hub:name", "hf-hub:owner/", "hf-hub:/name", "hf-hub:owner/name/more", "hf-hub:owner/na me",
        "hf-hub:owner/name@", "hf-hub:owner/name@a@b", "hf-hub: owner/name", "hf-hub:owner/name\n", "hf-hub:a//b",
    ],
)  # fmt: skip
def test_an_invalid_address(cache: Callable, address: str) -> None:
    with pytest.raises(UserError, match=r"give hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION") as caught:
        load(address)
    assert repr(address) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "repo", ["owner/..", "../name", "owner/-name", "owner/name.git", "a--b/c", f"owner/{'x' * 200}", "owner/.name"]
)
def test_a_name_that_the_hub_does_not_allow(cache: Callable, repo: str) -> None:
    with pytest.raises(UserError, match=r"(check the name|give hf-hub:OWNER/NAME)") as caught:
        load(f"hf-hub:{repo}")
    assert repo in str(caught.value)


@pytest.mark.parametrize("revision", ["..", "../../other/snapshots/x", "/etc/passwd", "main/../../.."])
def test_a_revision_cannot_escape_the_repository(cache: Callable, tmp_path: Path, revision: str) -> None:
    cache(REPO, {"model.safetensors": native_file(tmp_path, make())})
    with pytest.raises((UserError, RunError), match="owner/name"):
        load(f"{ADDRESS}@{revision}")


def test_not_in_the_cache_and_offline(cache: Callable) -> None:
    with pytest.raises(RunError, match=r"^owner/name: .*model\.safetensors.* not in the cache, and the hub cannot be "):
        load(ADDRESS)
    with pytest.raises(RunError, match="connect once, or give a local file"):
        load(ADDRESS)


def test_a_revision_that_is_not_cached(cache: Callable, tmp_path: Path) -> None:
    cache(REPO, {"model.safetensors": native_file(tmp_path, make())})
    with pytest.raises(RunError, match="not in the cache, and the hub cannot be reached"):
        load(f"{ADDRESS}@{OTHER}")


def test_a_repository_without_weights(cache: Callable) -> None:
    cache(REPO, {"config.json": b"{}"}, absent=("model.safetensors", "pytorch_model.bin"))
    with pytest.raises(UserError, match=r"^hf-hub:owner/name has neither model\.safetensors nor pytorch_model\.bin: "):
        load(ADDRESS)


def test_a_repository_of_another_architecture(cache: Callable, tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    cache(REPO, {"model.safetensors": (tmp_path / "m.safetensors").read_bytes(), "config.json": b"{}"})
    with pytest.raises(UserError, match="another architecture's weights"):
        load(ADDRESS)


def response(status: int) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


def connection_error() -> Exception:
    """An error of the HTTP library that huggingface_hub uses; in newer versions it is not an OSError."""
    library = sys.modules[huggingface_hub.errors.HTTPError.__module__.partition(".")[0]]
    return library.ConnectError("[Errno -2] Name or service not known")


E = huggingface_hub.errors


@pytest.mark.parametrize(
    ("error", "kind", "telling"),
    [
        (lambda: E.RepositoryNotFoundError("404 Client Error.\n\nmore", response=response(404)), UserError,
         r"owner/name is not on the hub, or it is private \(404 Client Error\.\): check the name, or log in with"),
        (lambda: E.GatedRepoError("403.", response=response(403)), UserError, "log in with `hf auth login`"),
        (lambda: E.RevisionNotFoundError("404.", response=response(404)), UserError, r"owner/name.* is not on the hub"),
        (lambda: E.HfHubHTTPError("500 Server Error", response=response(500)), RunError,
         r"owner/name: model\.safetensors could not be downloaded \(500 Server Error\): try again later"),
        (lambda: E.LocalEntryNotFoundError("cannot find the requested files"), RunError,
         "not in the cache, and the hub cannot be reached"),
        (lambda: OSError(28, "No space left on device"), RunError, "No space left on device"),
        (connection_error, RunError, "try again|connect"),
    ],
    ids=["no repository", "gated", "no revision", "server", "offline", "disk", "connection"],
)  # fmt: skip
def test_an_error_of_the_hub_is_one_line(
    cache: Callable, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], kind: type, telling: str
) -> None:
    def failing(*_args: Any, **_options: Any) -> NoReturn:
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    with pytest.raises(kind, match=telling) as caught:
        load(ADDRESS)
    assert "\n" not in str(caught.value)


def test_an_unknown_revision_is_named(cache: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any, **_options: Any) -> NoReturn:
        raise E.RevisionNotFoundError("404.", response=response(404))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    with pytest.raises(UserError, match="owner/name@v9 is not on the hub"):
        load(f"{ADDRESS}@v9")


def test_files_are_requested_in_order(cache: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.safetensors, then pytorch_model.bin, then config.json at the commit of the weights."""
    snapshot, asked = tmp_path / "snapshots" / COMMIT, []
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").write_bytes(native_file(tmp_path, make()))

    def hub(repo: str, name: str, *, revision: str | None = None, **_options: Any) -> str:
        asked.append((repo, name, revision))
        if (snapshot / name).exists():
            return str(snapshot / name)
        raise E.RemoteEntryNotFoundError("404 Entry not found", response=response(404))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert same(load(ADDRESS), make())
    assert asked == [
        (REPO, "model.safetensors", None), (REPO, "pytorch_model.bin", None), (REPO, "config.json", COMMIT),
    ]  # fmt: skip


def test_a_lost_connection_after_the_weights_is_tolerated(
    cache: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache(REPO, {"model.safetensors": native_file(tmp_path, make())})

    def hub(repo: str, name: str, **_options: Any) -> str:
        if name == "model.safetensors":
            return str(snapshot / name)
        raise E.LocalEntryNotFoundError("cannot find the requested files")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert same(load(ADDRESS), make())


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"the package huggingface_hub is not installed: pip install 'allmlp\[hub\]'"):
        load(ADDRESS)


def test_local_files_need_no_library(tmp_path: Path) -> None:
    """huggingface_hub is imported only for the hub."""
    save(make(), tmp_path / "m.safetensors")
    program = (
        "import sys; sys.modules['huggingface_hub'] = None; import allmlp;"
        f"print(allmlp.load({str(tmp_path / 'm.safetensors')!r}).config['num_classes'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_the_prefix_always_means_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(make(), tmp_path / "m.safetensors")
    assert same(load("m.safetensors"), make())
    with pytest.raises(UserError, match="give hf-hub:OWNER/NAME"):
        load("hf-hub:m.safetensors")
