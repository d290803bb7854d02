"""Malicious, damaged and unrelated files: each is refused quickly, by one line that says why."""

import gzip
import json
import os
import pickle
import random
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import Array, bfloat16, current, older, random_weights
from random_models import make, refused, timm_state
from safetensors.torch import save_file
from torch import Tensor, nn

import allmlp
from allmlp.errors import UserError
from allmlp.metadata import Metadata
from allmlp.model import Mixer
from allmlp.weights import containers, native
from allmlp.weights.convert import save_as
from allmlp.weights.load import load

ARRAYS = current(random_weights())


def outcome(path: Path) -> str:
    """ "loaded"; "refused", by one line that names the file; or else what happened."""
    try:
        load(path)
        return "loaded"
    except UserError as error:
        return "refused" if str(path) in str(error) and str(error).isprintable() else f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def header(shape: Any, descr: str = "<f4") -> bytes:
    """The header of a .npy member, valid or not."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_npz(path: Path, arrays: dict[str, Array], forged: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    """Writes an .npz of these arrays, with ``forged`` members added or replacing them."""
    members = {}
    for name, array in arrays.items():
        file = BytesIO()
        np.lib.format.write_array(file, np.asarray(array))
        members[f"{name}.npy"] = file.getvalue()
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in (members | forged).items():
            archive.writestr(name, data)


def write_safetensors(path: Path, rows: Any, data: bytes = b"", length: int | None = None) -> None:
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + data)


# Code in files


class Canary:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))
    path.rmdir()  # it works
    yield Canary(path)
    assert not path.exists(), "code in a file was executed"


def test_pickles_in_an_npz(tmp_path: Path, canary: Canary) -> None:
    path = tmp_path / "w.npz"
    stored = pickle.dumps(np.array([canary], dtype=object))
    write_npz(path, ARRAYS, {"extra.npy": header((1,), "|O") + stored})
    refused(path, "'extra'", "can run code")
    write_npz(path, {}, {"head/bias.npy": pickle.dumps(canary)})
    refused(path, "no valid header")
    write_npz(path, {}, {"archive/data.pkl": pickle.dumps(canary), "archive/version": b"3\n"})
    refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_in_a_torch_file(tmp_path: Path, canary: Canary, zipped: bool) -> None:
    places: list[Any] = [
        canary, timm_state() | {"head.bias": canary}, timm_state() | {canary: torch.zeros(1)},
        {"state_dict": timm_state(), "args": canary}, {"model": {"module": {"state_dict": [canary]}}},
    ]  # fmt: skip
    for stored in places:
        torch.save(stored, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "w.pth", "can run code", "state_dict()")
    warnings.simplefilter("ignore")
    for protocol in (0, 1, 2, 5):
        (tmp_path / "w.pth").write_bytes(pickle.dumps({"w": canary}, protocol))
        refused(tmp_path / "w.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert "Weights only" not in refused(tmp_path / "w.pth", "torch.nn.modules.linear.Linear", "can run code")


# Bombs


def claim(path: Path, member: str, size: int) -> None:
    """Changes the size of a member in a zip's directory, which is what is checked first."""
    data = bytearray(path.read_bytes())
    place = data.rindex(member.encode()) - 46
    assert data[place : place + 4] == b"PK\x01\x02"
    data[place + 24 : place + 28] = struct.pack("<I", size)
    path.write_bytes(data)


def inflates_to_4_gb(path: Path) -> None:
    write_npz(path, ARRAYS, {"embedding.npy": bytes(1_000_000)}, zipfile.ZIP_DEFLATED)
    claim(path, "embedding.npy", 4 * 10**9)


def understated(path: Path) -> None:
    """300 MB of zeros whose entry claims only as many bytes as the header needs: no more than those are read."""
    start = header((8, 3))
    write_npz(path, ARRAYS, {"head/kernel.npy": start + bytes(300 * 2**20)}, zipfile.ZIP_DEFLATED)
    claim(path, "head/kernel.npy", len(start) + 4 * 24)


def native_shapes(**sizes: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = Mixer(num_classes=2, image_size=8, patch_size=4, tokens_mlp_dim=4, **sizes)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def strides_of_zero(path: Path) -> None:
    """By them a torch file of a few kB can contain tensors of any size."""
    shapes = native_shapes(num_blocks=1, hidden_dim=6000, channels_mlp_dim=12000)
    torch.save({name: torch.ones(1).expand(shape) for name, shape in shapes.items()}, path)
    assert path.stat().st_size < 10_000


def thousand_blocks(path: Path) -> None:
    """A native file, with a valid digest, whose config claims more blocks than there are tensors."""
    model = make()
    config, tensors = model.config | {"num_blocks": 1000}, model.state_dict()
    native.write(path, tensors, native.make_header(config, Metadata(), tensors))


def long_header(path: Path) -> None:
    data = b"\x93NUMPY\x02\x00" + struct.pack("<I", 60_000_000) + b" " * 60_000_000
    write_npz(path, {}, {"head/bias.npy": data}, zipfile.ZIP_DEFLATED)


FAR_BLOCK = {"MixerBlock_9999/token_mixing/Dense_0/kernel": np.ones((9, 5))}
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "4 GB": (inflates_to_4_gb, "would inflate to 4,000"),
    "understated": (understated, ""),
    "34 GB": (lambda p: write_npz(p, ARRAYS, {"head/bias.npy": header((2**33,)) + bytes(4)}), "34,359,738,368"),
    "npy header": (long_header, "header"),
    "arrays": (lambda p: write_npz(p, {}, {f"{i}.npy": header((1,)) + bytes(4) for i in range(12_000)}), "12,000"),
    "tensors": (lambda p: save_file({str(i): torch.zeros(1) for i in range(50_000)}, p), "50,000"),
    "block 9999": (lambda p: write_npz(p, ARRAYS | FAR_BLOCK, {}), "10000"),
    "config": (thousand_blocks, "1000 blocks"),
    "strides of zero": (strides_of_zero, "stored"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bomb_is_refused_within_limits(tmp_path: Path, name: str) -> None:
    path, (write, word) = tmp_path / "w", HOSTILE[name]
    write(path)
    tracemalloc.start()
    try:
        start = time.process_time()
        refused(path, word)
        assert time.process_time() - start < 4  # tracing included
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_the_limits_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.npz"
    np.savez_compressed(path, **{name: np.ones_like(array) for name, array in ARRAYS.items()})
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    times = (total - 1) // path.stat().st_size
    for expansion, always, allowed in (
        (0, total, True), (0, total - 1, False), (times, total - 1, False), (times + 1, 0, True),
    ):  # fmt: skip
        monkeypatch.setattr(containers, "MAX_EXPANSION", expansion)
        monkeypatch.setattr(containers, "ALWAYS_ALLOWED_SIZE", always)
        load(path) if allowed else refused(path, f"inflate to {total:,}")
    torch.save(timm_state(), path)  # written by torch, also a zip
    load(path)
    monkeypatch.setattr(containers, "MAX_EXPANSION", 0)
    monkeypatch.setattr(containers, "ALWAYS_ALLOWED_SIZE", 0)
    refused(path, "inflate")
    save_file(timm_state(), tmp_path / "w.safetensors")
    (length,) = struct.unpack("<Q", (tmp_path / "w.safetensors").read_bytes()[:8])
    for limit in (length, length - 1):
        monkeypatch.setattr(containers, "MAX_HEADER", limit)
        load(tmp_path / "w.safetensors") if limit == length else refused(tmp_path / "w.safetensors", f"{limit:,}")
    monkeypatch.undo()
    monkeypatch.setattr(containers, "MAX_TENSORS", len(timm_state()) - 1)
    refused(tmp_path / "w.safetensors", "tensors")


# Headers

SHAPES = [
    ((10**6, 10**6), 4), ((10**30, 4), 0), ((-2, -3), 24), ((-1, 5), 0), ((2**62, 8), 96), ((5,), 24), ((0,), 0),
    ((0, 5), 0), ((2**62, 0), 0),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_npy_headers_with_a_wrong_shape(tmp_path: Path, shape: tuple, size: int) -> None:
    for name in ("MixerBlock_0/token_mixing/Dense_0/kernel", "head/bias"):
        write_npz(tmp_path / "w.npz", ARRAYS, {f"{name}.npy": header(shape) + bytes(size)})
        refused(tmp_path / "w.npz", repr(name))


def test_invalid_safetensors_headers(tmp_path: Path) -> None:
    """That offsets, shapes and types fit together is the library's task; what it raises is one line."""
    wrong = {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}
    for rows in ({"a": wrong}, {"a": wrong | {"dtype": "X9"}}, {"a": 5}, b"{", b"{}", b'{"a":' * 5000, b"{\xff\xfe}"):
        write_safetensors(tmp_path / "w.safetensors", rows, bytes(12))
        refused(tmp_path / "w.safetensors")
    for length in (2**64 - 1, 10**12, containers.MAX_HEADER + 1):
        write_safetensors(tmp_path / "w.safetensors", b"{}", length=length)
        refused(tmp_path / "w.safetensors", f"{length:,} bytes", f"{containers.MAX_HEADER:,}")
    write_safetensors(tmp_path / "w", b"{}" + bytes(50), length=1_000_000)
    refused(tmp_path / "w", "safetensors")


# Damaged files


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small Mixer in every kind of file that can be read."""
    folder, sizes = tmp_path_factory.mktemp("sound"), {"classes": 2, "blocks": 1}
    for name, kind in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED), ("lzma", zipfile.ZIP_LZMA)):
        write_npz(folder / f"{name}.npz", current(random_weights(**sizes)), {}, kind)
    torch.save(timm_state(**sizes), folder / "zip.pt")
    torch.save(timm_state(**sizes), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(timm_state(**sizes), folder / "plain.safetensors")
    model = load(folder / "plain.safetensors")
    allmlp.save(model, folder / "native.safetensors", classes=["a", "é"])
    save_as(model, folder / "timm.safetensors", "timm")
    return {path.name: path for path in folder.iterdir()}


KINDS = [
    "stored.npz", "deflated.npz", "lzma.npz", "zip.pt", "legacy.pt", "plain.safetensors", "native.safetensors",
    "timm.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_and_flipped_bytes(tmp_path: Path, sound: dict[str, Path], kind: str) -> None:
    """A changed weight is detected in this package's files only (see below), but nothing raises any other exception."""
    assert sound.keys() == set(KINDS)
    assert load(sound[kind]).config["num_classes"] == 2
    data, path, rng = sound[kind].read_bytes(), tmp_path / "w", random.Random(0)
    for end in (*range(20), *range(len(data) - 30, len(data)), *rng.sample(range(20, len(data)), 40)):
        path.write_bytes(data[:end])
        refused(path)
    edge = min(1200, len(data))
    places = [*rng.sample(range(len(data)), 40), *rng.sample(range(edge), 50)]
    for place in (*places, *(len(data) - 1 - place for place in rng.sample(range(edge), 50))):
        damaged = bytearray(data)
        damaged[place] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        assert (found := outcome(path)) in ("loaded", "refused"), f"byte {place}: {found}"


@pytest.mark.parametrize("to", ["native", "timm"])
def test_every_kind_of_byte_of_a_saved_file_is_protected(tmp_path: Path, to: Any) -> None:
    """Of the header's length, JSON and padding, and of every tensor."""
    path = tmp_path / "w.safetensors"
    for classes in range(2, 14):  # some lengths of the header need padding
        save_file(timm_state(classes=classes, blocks=1), path)
        save_as(load(path), path, to)
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        text = data[8:start].rstrip()
        if padding := range(8 + len(text), start):
            break
    assert padding
    assert load(path)
    offsets = [row["data_offsets"] for name, row in json.loads(text).items() if name != "__metadata__"]
    rng, beside = random.Random(2), data.find(b'"format":"pt"')
    fixed = [*padding, *(range(beside, beside + 13) if beside > 0 else ())]  # not covered by the digest itself
    places = [*range(8), 8, *padding, len(data) - 1, *rng.sample(range(8, 8 + len(text)), 120), *fixed]
    places += [start + place for begin, end in offsets for place in (begin, end - 1, rng.randrange(begin, end))]
    for place in places:
        others = {data[place] ^ 1 << rng.randrange(8)} | ({*b" \n\t}", rng.randrange(256)} if place in fixed else set())
        for other in others - {data[place]}:
            damaged = bytearray(data)
            damaged[place] = other
            path.write_bytes(damaged)
            around = data[max(place - 8, 0) : place + 8]
            assert outcome(path) == "refused", f"byte {place}, {data[place]:#x} → {other:#x}, in {around!r}"


# Numbers, names and types


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_that_are_not_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "w"
    for name, value in (("head.bias", float("nan")), ("stem.proj.weight", float("inf")), ("norm.bias", -float("inf"))):
        broken = {key: tensor.to(dtype) for key, tensor in timm_state().items()}
        torch.save(broken, path)
        model = load(path)
        broken[name].view(-1)[-1] = value
        for write in (save_file, torch.save):
            write(broken, path)
            refused(path, name, "not finite")
        with torch.no_grad():
            model.head.bias[0] = value
        with pytest.raises(UserError, match=r"head\.bias contains numbers that are not finite"):
            allmlp.save(model, path.with_suffix(".safetensors"))
        tensors = model.state_dict()  # as earlier versions saved it
        native.write(path, tensors, native.make_header(model.config, model.metadata, tensors))
        refused(path, "head.bias", "not finite")
    arrays = {k: bfloat16(array.astype(np.float32))[0] for k, array in older(random_weights()).items()}
    np.savez(tmp_path / "w.npz", **arrays | {"head/bias": np.array([0x7F80, 0, 0], np.uint16).view("V2")})
    refused(tmp_path / "w.npz", "head/bias", "not finite")


def test_other_types(tmp_path: Path) -> None:
    for dtype in (np.int32, np.bool_, np.complex64, ">f4", "U3", "V3", "M8[s]"):
        np.savez(tmp_path / "w.npz", **ARRAYS | {"head/bias": np.zeros(3, dtype)})
        refused(tmp_path / "w.npz", "'head/bias'", "type")
    np.savez(tmp_path / "w.npz", **ARRAYS | {"head/kernel": np.asfortranarray(ARRAYS["head/kernel"])})
    refused(tmp_path / "w.npz", "'head/kernel'", "Fortran", "numpy.ascontiguousarray")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
        broken = timm_state() | {"head.bias": torch.zeros(3, dtype=dtype)}
        for write in (torch.save, save_file)[: 1 if dtype is torch.complex64 else 2]:
            write(broken, tmp_path / "w")
            refused(tmp_path / "w", "'head.bias'", "type")


ODD: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: torch.nested.nested_tensor([t[0], t[1]])
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_sparse_meta_and_nested_tensors(tmp_path: Path) -> None:
    for odd in ODD:
        torch.save(timm_state() | {"head.weight": odd(timm_state()["head.weight"])}, tmp_path / "w.pt")
        assert ".npz" not in refused(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice(tmp_path: Path) -> None:
    """Ambiguous: readers differ in which one they take."""
    path = tmp_path / "w"
    write_npz(path, ARRAYS, {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("head/bias.npy", header((3,), "<f8") + bytes(24))
    refused(path, "head/bias", "twice")
    write_npz(path, ARRAYS | {"params/head/bias": ARRAYS["head/bias"] + 1}, {})
    refused(path, "head/bias", "twice")
    torch.save(timm_state() | {"_orig_mod.head.bias": torch.ones(3)}, path)
    refused(path, "head.bias", "twice")
    torch.save(timm_state() | {"module.head.bias": torch.ones(3)}, path)
    refused(path, "1 unexpected: module.head.bias")


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    for prefix in ("model/", "../", "/", "params/params/", "opt/", "a/b/"):
        write_npz(path, {prefix + name: array for name, array in ARRAYS.items()}, {})
        load(path)
    for prefix in ("model", "x-", "Mixer"):
        write_npz(path, {prefix + name: array for name, array in ARRAYS.items()}, {})
        refused(path, "first names")
    for digits in ("9" * 5000, "9" * 300, "٣", "-1"):
        for name in (f"MixerBlock_1/LayerNorm_{digits}/scale", f"MixerBlock_{digits}/token_mixing/Dense_0/kernel"):
            write_npz(path, ARRAYS | {name: np.ones(8)}, {})
            refused(path)
    evil = "\x1b[31m\nmixer: all is well"
    write_npz(path, ARRAYS | {evil: np.zeros(1)}, {})
    refused(path, "all is well")
    for write in (torch.save, save_file):
        write(timm_state() | {evil: torch.zeros(1)}, path)
        refused(path, "all is well")
    path = tmp_path / "a\nb\x1b[31m.npz"
    for data in (b"", b"words, and more words", b"PK\x03\x04" + bytes(50), struct.pack("<Q", 2**50) + b"{" + bytes(9)):
        path.write_bytes(data)
        refused(path)


# Other files


OTHERS = {
    b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
    b"\n<!DOCTYPE html><html>": "web page",
    b"<head><title>Sign in": "web page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied': "XML",
    b'{"error": "not found"}': "JSON",
    b"{}": "JSON",
    gzip.compress(bytes(99)): "unpack it",
    bytes(257) + b"ustar" + bytes(99): "an archive",
    b"\x89HDF\r\n\x1a\n" + bytes(99): "Keras",
    b"GGUF\3\0\0\0": "GGUF",
    b"\x08\x08\x12\x07pytorch\x1a\x052.1.0": "ONNX",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_weights_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.npz", "does not exist", "hf-hub:")
    refused(tmp_path, "is a folder")
    path = tmp_path / "w.npz"
    path.touch()
    refused(path, "is empty")
    for data in (b"x", b"a letter\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(5000), b"\xff" * 500):
        for other in (path, tmp_path / "w.safetensors", tmp_path / "w.pth"):
            other.write_bytes(data)
            refused(other, "is not a weights file", "safetensors, .npz")
    for data, words in OTHERS.items():
        path.write_bytes(data)
        refused(path, words)
    write_npz(path, {}, {"train/cat/1.jpg": b"\xff\xd8\xff"})
    refused(path, "'train/cat/1.jpg'")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    refused(path, "TorchScript", "state_dict()")
    write_npz(path, {}, {})
    refused(path)
    nested: Any = {"a": {"b": torch.zeros(1)}}
    for stored in ([1, 2], 3, "text", None, {}, torch.zeros(3), nested):
        torch.save(stored, path)
        refused(path)
    for _ in range(200):
        nested = {"model": nested, "left": 1}
    itself: dict[str, Any] = {"w": torch.zeros(1)}
    itself["model"] = {"module": itself}
    for stored in (nested, itself):
        torch.save(stored, path)
        refused(path)


@pytest.mark.parametrize("name", ["resmlp_12_224", "gmixer_12_224"])
def test_another_architectures_weights(tmp_path: Path, name: str) -> None:
    library = pytest.importorskip("timm")
    with torch.device("meta"):
        shapes = library.create_model(name).state_dict()
    save_file({k: torch.zeros(v.shape, dtype=v.dtype) for k, v in shapes.items()}, tmp_path / "w")
    refused(tmp_path / "w", "another architecture")
