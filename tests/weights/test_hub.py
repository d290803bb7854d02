"""Weights from the Hugging Face hub: with a simulated cache, without network, and the hub's errors as one line."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors as E
import pytest
import torch
from hub_errors import connection_error, of_status
from random_models import assert_same_bits, warnings_of
from random_models import make as make_any
from safetensors.torch import load_file, save_file

import allmlp
from allmlp.errors import RunError, UserError
from allmlp.metadata import Metadata, Preprocessing
from allmlp.model import Mixer
from allmlp.weights import foreign_metadata
from allmlp.weights.convert import save_as
from allmlp.weights.load import load
from allmlp.weights.native import save
from allmlp.weights.published import CHECKPOINTS, MIIL, MIIL_CLASSES, class_names

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
REPO, ADDRESS = "owner/name", "hf-hub:owner/name"


def make(seed: int = 0, **options: Any) -> Mixer:
    return make_any(seed, **{"image_size": 8, "num_blocks": 1, "gelu": "erf"} | options)


def timm_file(folder: Path, model: Mixer) -> bytes:
    """A file as timm uploads it, without this package's header."""
    path = folder / "timm.safetensors"
    save_as(model, path, "timm")
    save_file(load_file(path), path, {"format": "pt"})
    return path.read_bytes()


def native_file(folder: Path, model: Mixer) -> bytes:
    save(model, folder / "ours.safetensors")
    return (folder / "ours.safetensors").read_bytes()


def no_network(*_args: object) -> NoReturn:
    raise AssertionError("a test tried to use the network")


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
        files: dict[str, bytes], repo: str = REPO, commit: str = COMMIT, ref: str = "main", absent: str = ""
    ) -> Path:
        folder = root / f"models--{repo.replace('/', '--')}"
        snapshot, reference = folder / "snapshots" / commit, folder / "refs" / ref
        for made in (snapshot, folder / "blobs", folder / ".no_exist" / commit, reference.parent):
            made.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            blob = folder / "blobs" / f"{commit[:8]}{name}"
            blob.write_bytes(content)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
        for name in absent.split():
            (folder / ".no_exist" / commit / name).touch()
        reference.write_text(commit)
        return snapshot

    return put


# From the cache


@pytest.mark.parametrize("write", [native_file, timm_file])
def test_a_repository_in_the_cache_loads_offline(
    cache: Any, tmp_path: Path, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With a config.json or without, whether or not the cache knows that there is none."""
    model = make()
    weights = {"model.safetensors": write(tmp_path, model), "pytorch_model.bin": b"\x80\x04never read"}
    cache(weights | {"config.json": b"{}"})
    cache(weights, "owner/without", absent="config.json")
    cache(weights, "owner/unknown")
    for repo in (REPO, "owner/without", "owner/unknown"):
        again = allmlp.load(f"hf-hub:{repo}")
        assert_same_bits(again, model)
        assert not again.training
        source = again.metadata.provenance["source"]
        assert (source["hub"], source["revision"]) == (repo, COMMIT)
        missed = repo == "owner/unknown" and write is timm_file  # native files contain their preprocessing
        assert ("config.json" in "".join(warnings_of(caplog))) == missed
    save(again, tmp_path / "m.safetensors")
    save_as(allmlp.resize(again, 16), tmp_path / "n.safetensors", "timm")
    for name in ("m.safetensors", "n.safetensors"):
        assert load(tmp_path / name).metadata.provenance["source"] == source


def test_metadata_of_native_files_is_kept(cache: Any, tmp_path: Path) -> None:
    model = make(num_classes=2)
    view = Preprocessing(crop="resize", crop_ratio=0.7, mean=(0.1, 0.2, 0.3))
    provenance = {"seed": 1, "source": {"file": "x.npz"}}
    model.metadata = Metadata(classes=("a", "b"), preprocessing=view, provenance=provenance)
    other = {"num_classes": 2, "label_names": ["c", "d"], "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    cache({"model.safetensors": native_file(tmp_path, model), "config.json": json.dumps(other).encode()})
    metadata = load(ADDRESS).metadata
    assert (metadata.classes, metadata.preprocessing) == (("a", "b"), view)
    assert metadata.provenance == {"seed": 1, "source": {"file": "x.npz", "hub": REPO, "revision": COMMIT}}
    model.metadata.provenance["source"] = "my own pictures"  # any JSON value
    cache({"model.safetensors": native_file(tmp_path, model)}, "owner/text", absent="config.json")
    assert load("hf-hub:owner/text").metadata.provenance["source"]["revision"] == COMMIT


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_pytorch_model_bin(cache: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "m.bin", make()
    save_as(model, tmp_path / "m.safetensors", "timm")
    torch.save(load_file(tmp_path / "m.safetensors"), path)
    cache({"pytorch_model.bin": path.read_bytes()}, absent="model.safetensors config.json")
    cache({"pytorch_model.bin": path.read_bytes()}, "owner/unknown")  # whether there is a model.safetensors
    for repo in (REPO, "owner/unknown"):
        assert_same_bits(load(f"hf-hub:{repo}"), model)
    torch.save({"state_dict": Canary(tmp_path / "canary")}, path)
    cache({"pytorch_model.bin": path.read_bytes()}, "owner/evil", absent="model.safetensors config.json")
    with pytest.raises(UserError, match="can run code"):
        load("hf-hub:owner/evil")
    assert not (tmp_path / "canary").exists()


def test_each_revision_has_its_weights_and_its_config(cache: Any, tmp_path: Path) -> None:
    old, new = make(seed=1), make(seed=2)
    for model, commit, ref, names in ((old, OTHER, "refs/pr/1", list("abc")), (new, COMMIT, "main", list("xyz"))):
        config = json.dumps({"num_classes": 3, "label_names": names}).encode()
        cache({"model.safetensors": timm_file(tmp_path, model), "config.json": config}, REPO, commit, ref)
    for revision, model, commit, names in (
        ("", new, COMMIT, "xyz"), ("@main", new, COMMIT, "xyz"), ("@refs/pr/1", old, OTHER, "abc"),
        (f"@{OTHER}", old, OTHER, "abc"),
    ):  # fmt: skip
        found = load(ADDRESS + revision)
        assert_same_bits(found, model)
        assert found.metadata.classes == tuple(names)
        assert found.metadata.provenance["source"]["revision"] == commit  # not a branch or tag, which may move


# timm's config.json

TIMM_CONFIG = {
    "architecture": "mixer_b16_224", "num_classes": 3, "num_features": 8, "label_names": ["n01", "n02", 3],
    "label_descriptions": {"n01": "tench", "3": 5},
    "pretrained_cfg": {
        "tag": "mine", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.95,
        "interpolation": "nearest", "crop_mode": "squash",
    },
}  # fmt: skip
MEAN_STD = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DEFAULT = Preprocessing(interpolation="bicubic")


@pytest.fixture
def configured(cache: Any, tmp_path: Path) -> Callable[..., Metadata]:
    """The metadata of timm's weights beside a config.json, in JSON or as bytes; it can be saved."""

    def metadata(config: Any, **options: Any) -> Metadata:
        content = config if isinstance(config, bytes) else json.dumps(config).encode()
        cache({"model.safetensors": timm_file(tmp_path, make(**options)), "config.json": content})
        model = load(ADDRESS)
        save(model, tmp_path / "m.safetensors")
        assert load(tmp_path / "m.safetensors").metadata == model.metadata
        return model.metadata

    return metadata


def test_preprocessing_and_classes_of_timms_config(configured: Any) -> None:
    metadata = configured(TIMM_CONFIG)
    assert metadata.classes == ("tench", "n02", "5")
    assert metadata.preprocessing == Preprocessing(crop="resize", crop_ratio=0.95, interpolation="nearest", **MEAN_STD)
    partial = configured({"pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "crop_mode": "center"}})
    assert partial.preprocessing == Preprocessing(interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    assert partial.classes is None
    gray = configured({"pretrained_cfg": {"mean": [0.1], "std": [0.2]}}, in_channels=1).preprocessing
    assert (gray.mean, gray.std) == ((0.1,), (0.2,))
    assert configured({"num_classes": 0, "label_names": ["a", "b", "c"]}, num_classes=0).classes is None


def test_a_config_of_other_types_is_ignored(configured: Any) -> None:
    for config in (
        b"[]", b"null", b'"text"', b"{}", b'{"pretrained_cfg": null}', b'{"pretrained_cfg": "mine"}',
        b'{"pretrained_cfg": []}', b'{"pretrained_cfg": {"mean": null, "std": null, "crop_pct": null}}',
        b'{"label_names": "abc"}', b'{"label_names": {"a": 1}}', b'{"label_descriptions": 3}', b'{"num_classes": "3"}',
        b'{"num_classes": null, "architecture": ["resnet50"]}', b'{"pretrained_cfg": {"crop_mode": 3}}',
        b'{"num_classes": 4, "label_names": ["a", "b", "c", "d"]}', b'{"label_names": ["a", "b"]}',
        b'{"num_classes": 3, "label_names": ["a", "b"]}', b'{"num_classes": 3, "label_names": []}',
    ):  # fmt: skip
        metadata = configured(config)
        assert (metadata.preprocessing, metadata.classes) == (DEFAULT, None), config


def test_invalid_preprocessing_is_ignored_with_a_warning(configured: Any, caplog: pytest.LogCaptureFixture) -> None:
    for view in (
        {"interpolation": "lanczos"}, {"interpolation": 3}, {"crop_pct": "0.9"}, {"crop_pct": 0}, {"crop_pct": 1e400},
        {"mean": "0.5"}, {"mean": []}, {"mean": ["a", "b", "c"]}, {"mean": [float("nan")] * 3}, {"std": [0.5, 0.5]},
        {"std": [1, 1, 0]}, {"std": {"r": 1}}, {"mean": [0.5] * 4, "std": [0.2] * 4},
    ):  # fmt: skip
        caplog.clear()
        metadata = configured({"num_classes": 3, "label_names": ["a", "b", "c"], "pretrained_cfg": view})
        assert (metadata.preprocessing, metadata.classes) == (DEFAULT, ("a", "b", "c"))
        assert "config.json" in "".join(warnings_of(caplog)), view


def test_an_invalid_config_is_one_line(configured: Any) -> None:
    for config in (b"", b"not json", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' * 100_000):
        with pytest.raises(UserError, match=r"^hf-hub:owner/name: its config\.json is not valid JSON") as caught:
            configured(config)
        assert str(caught.value).isprintable()


# timm's own repositories


@pytest.mark.parametrize(
    ("name", "classes", "mean", "std"),
    [
        ("mixer_b16_224.goog_in21k_ft_in1k", 1000, 0.5, 0.5), ("mixer_l16_224.goog_in21k_ft_in1k", 1000, 0.5, 0.5),
        ("mixer_b16_224.miil_in21k", 11221, 0.0, 1.0), ("mixer_b16_224.miil_in21k_ft_in1k", 1000, 0.0, 1.0),
    ],
)  # fmt: skip
def test_timms_repositories(
    cache: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, classes: int, mean: float, std: float
) -> None:
    """A misleading name is corrected, and MIIL's pixels lie in [0, 1], with and without a config.json."""
    content = timm_file(tmp_path, make(num_classes=classes))
    interpolation = "bicubic" if mean else "bilinear"
    view = {"mean": [mean] * 3, "std": [std] * 3, "crop_pct": 0.875, "interpolation": interpolation}
    config = json.dumps({"architecture": "mixer", "num_classes": classes, "pretrained_cfg": view}).encode()
    for files in ({"config.json": config}, {}):
        cache({"model.safetensors": content} | files, f"timm/{name}", absent="" if files else "config.json")
        caplog.clear()
        metadata = load(f"hf-hub:timm/{name}").metadata
        expected = Preprocessing(interpolation=interpolation, mean=(mean,) * 3, std=(std,) * 3)
        assert (metadata.preprocessing, metadata.classes) == (expected, class_names(classes))
        assert metadata.provenance["source"]["known_as"] == f"timm/{name}"
        said = "".join(warnings_of(caplog))
        assert all(
            (words in said) == bool(mean) for words in (f"timm/{name}", "not fine-tuned", "from-scratch ImageNet")
        )
        (tmp_path / "cache" / f"models--timm--{name}" / "snapshots" / COMMIT / "config.json").unlink(missing_ok=True)
    cache({"model.safetensors": timm_file(tmp_path, make())}, f"someone/{name}", absent="config.json")
    caplog.clear()
    assert "known_as" not in load(f"hf-hub:someone/{name}").metadata.provenance["source"]
    assert not warnings_of(caplog)


def test_local_files_in_timms_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are identified by their digest or number of classes; else a warning says what is assumed, and of which."""
    (tmp_path / "w.safetensors").write_bytes(timm_file(tmp_path, make(num_classes=MIIL_CLASSES)))
    assert load(tmp_path / "w.safetensors").metadata.preprocessing == MIIL
    save_as(make(), tmp_path / "m.safetensors", "timm")
    torch.save(load_file(tmp_path / "m.safetensors"), tmp_path / "w.pth")
    monkeypatch.setattr(foreign_metadata, "candidates", lambda config, authors: [] if authors else list(CHECKPOINTS))
    assert load(tmp_path / "w.pth").metadata.preprocessing == DEFAULT
    (said,) = warnings_of(caplog)
    assert all(words in said for words in ("which of timm's weights", "MIIL", "--mean 0 --std 1"))
    caplog.clear()
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    misnamed = next(one for one in CHECKPOINTS if one.sha256 and one.note)
    monkeypatch.setattr(foreign_metadata, "CHECKPOINTS", [replace(misnamed, sha256=digest[:8])])
    assert load(tmp_path / "w.pth").metadata.provenance["source"]["known_as"] == misnamed.file
    (said,) = warnings_of(caplog)
    assert misnamed.note in said


# Errors


def test_addresses_that_the_hub_does_not_have(cache: Any, tmp_path: Path) -> None:
    for address in (
        "", "name", "owner/", "/name", "owner/name/more", "owner/na me", "owner/name@", "owner/name@a@b", " owner/name",
        "owner/name\n", "a//b", "m.safetensors",
    ):  # fmt: skip
        with pytest.raises(UserError, match="hf-hub:OWNER/NAME@REVISION") as caught:
            load(f"hf-hub:{address}")
        assert repr(f"hf-hub:{address}") in str(caught.value)
    for repo in ("owner/..", "../name", "owner/-name", "owner/name.git", "a--b/c", f"owner/{'x' * 200}", "owner/.name"):
        with pytest.raises(UserError, match=r"check the name|give hf-hub:OWNER/NAME") as caught:
            load(f"hf-hub:{repo}")
        assert repo in str(caught.value)
    cache({"model.safetensors": native_file(tmp_path, make())})
    for revision in ("..", "../../other/snapshots/x", "/etc/passwd", "main/../../.."):
        with pytest.raises((UserError, RunError), match="owner/name"):
            load(f"{ADDRESS}@{revision}")
    for missing in (f"{ADDRESS}@{OTHER}", "hf-hub:owner/none"):
        with pytest.raises(RunError, match=r"owner/n.*: model\.safetensors .*not in the cache.*connect once"):
            load(missing)
    cache({"config.json": b"{}"}, "owner/empty", absent="model.safetensors pytorch_model.bin")
    with pytest.raises(UserError, match=r"hf-hub:owner/empty .*model\.safetensors.*pytorch_model\.bin"):
        load("hf-hub:owner/empty")


ERRORS: list[tuple[Callable[[], Exception], type[Exception], str]] = [
    (of_status(404, E.RepositoryNotFoundError), UserError, r"owner/name is not on the hub.*\(404 .*check the name"),
    (of_status(403, E.GatedRepoError), UserError, "`hf auth login`"),
    (of_status(500), RunError, r"owner/name: model\.safetensors could not be downloaded \(500.*try again"),
    (lambda: E.LocalEntryNotFoundError("cannot find"), RunError, "hub cannot be reached"),
    (lambda: OSError(28, "No space left on device"), RunError, "No space left on device"),
    (connection_error, RunError, "try again|connect"),
]


def test_an_error_of_the_hub_is_one_line(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Callable[[], Exception]) -> Any:
        def download(*_args: Any, **_options: Any) -> NoReturn:
            raise error()

        return download

    for error, kind, words in ERRORS:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
        with pytest.raises(kind, match=words) as caught:
            load(ADDRESS)
        assert str(caught.value).isprintable()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(of_status(404, E.RevisionNotFoundError)))
    with pytest.raises(UserError, match="owner/name@v9 is not on the hub"):
        load(f"{ADDRESS}@v9")


@pytest.mark.parametrize("server", ["refuses", "says nothing"])
def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, server: str) -> None:
    """The library alone would ask twelve times, for 50 seconds, and tell each time."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "says nothing":
            listening.listen()
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{listening.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        variables |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_OFFLINE": "", "NO_PROXY": "*"}
        program = "import sys; from allmlp.cli import main; sys.exit(main(sys.argv[1:]))"
        words = [sys.executable, "-c", program, "info", ADDRESS]
        started = time.monotonic()
        done = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 20
    assert done.returncode == 1
    assert re.fullmatch(
        r"mixer: owner/name: model.safetensors is not in the cache, and the hub cannot be reached \(.+\): connect "
        r"once, or give a local file\n",
        done.stderr,
    )


def test_files_are_requested_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.safetensors, then pytorch_model.bin, then config.json at the commit of the weights, if it can be had."""
    snapshot, asked = tmp_path / "snapshots" / COMMIT, []
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").write_bytes(native_file(tmp_path, make()))

    def download(repo: str, name: str, *, revision: str | None = None, **_options: Any) -> str:
        asked.append((repo, name, revision))
        if name == "config.json":
            raise E.LocalEntryNotFoundError("the connection was lost")
        if (snapshot / name).exists():
            return str(snapshot / name)
        raise of_status(404, E.RemoteEntryNotFoundError)()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_args, **_options: None)
    assert_same_bits(load(ADDRESS), make())
    assert asked == [
        (REPO, "model.safetensors", None),
        (REPO, "pytorch_model.bin", None),
        (REPO, "config.json", COMMIT),
    ]


def test_the_library_is_needed_for_the_hub_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make(), tmp_path / "m.safetensors")
    program = (
        "import sys; sys.modules['huggingface_hub'] = None; import allmlp;"
        f"print(allmlp.load({str(tmp_path / 'm.safetensors')!r}).config['num_classes'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub .*pip install 'allmlp\[hub\]'"):
        load(ADDRESS)
