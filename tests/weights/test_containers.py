"""Malicious, damaged and unrelated files: each is refused quickly, by one line that says why."""

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import Array, bfloat16, current, older, random_weights, timm
from safetensors.torch import save_file
from torch import Tensor, nn

import allmlp
from allmlp.errors import UserError
from allmlp.model import Mixer
from allmlp.weights import containers
from allmlp.weights.convert import save_as
from allmlp.weights.load import load

SECONDS, BYTES = 1.0, 200e6  # limits for refusing a file

# Words of the messages that tell the user what to do
REMEDIES = (
    "again", "refused; get", "save ", "give ", "name the file", "in it", "convert", "load it", "take an earlier",
    "resize", "where you trust", "update", "finetune", "train ",
)  # fmt: skip


def refused(path: Path, *words: str) -> str:
    """Checks that loading raises a one-line UserError with the file's path, these words and a remedy; returns it."""
    with pytest.raises(UserError) as caught:
        load(path)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    assert "\x1b" not in said
    rest = said.replace(str(path), "")
    for word in words:
        assert word in rest
    assert any(remedy in rest for remedy in REMEDIES), f"no remedy: {said}"
    return said


def outcome(path: Path) -> str:
    """ "loaded"; "refused", by a correct message; or else what happened."""
    try:
        load(path)
        return "loaded"
    except UserError as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def state(seed: int = 0, **sizes) -> dict[str, Tensor]:
    """Random weights in timm's names, float32."""
    return {k: torch.tensor(v, dtype=torch.float32) for k, v in timm(random_weights(seed, **sizes)).items()}


def header(shape: Any, descr: str = "<f4", version: int = 1, fortran: bool = False) -> bytes:
    """The header of a .npy member, valid or not."""
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def write_npz(path: Path, arrays: dict[str, Array], forged: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    """Writes an .npz of these arrays, with ``forged`` members added or replacing them."""
    members = {}
    for name, array in arrays.items():
        file = BytesIO()
        np.lib.format.write_array(file, np.asarray(array))
        members[f"{name}.npy"] = file.getvalue()
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in (members | forged).items():
            archive.writestr(name, data)
    return path


# A process with all imports done forks for each file that it is sent, so that only load itself is measured
MEASURE = """
import os, resource, sys, time
import torch
from allmlp.errors import UserError
from allmlp.weights.load import load

torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for line in sys.stdin:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        import signal
        signal.alarm(10)
        before, start = peak(), time.perf_counter()
        try:
            load(line[:-1])
            said = "LOADED"
        except UserError as error:
            said = str(error)
        except BaseException as error:
            said = type(error).__name__ + ": " + " ".join(str(error).split())
        print(time.perf_counter() - start, peak() - before, said, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(10, 0, "did not end by itself", flush=True)
"""
Measure = Callable[[Path], tuple[str, float, float]]


@pytest.fixture(scope="module")
def measured() -> Iterator[Measure]:
    """path → (message of load, seconds, peak memory in bytes beyond that of the imports)."""
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def measure(path: Path) -> tuple[str, float, float]:
            print(path, file=process.stdin)
            seconds, memory, said = process.stdout.readline().rstrip("\n").split(" ", 2)
            return said, float(seconds), float(memory)

        yield measure
        process.stdin.close()


@pytest.fixture(scope="module")
def cheap(measured: Measure) -> Callable[..., None]:
    """Checks that a file is refused with its name and these words, within the limits of time and memory."""

    def check(path: Path, *words: str) -> None:
        said, seconds, memory = measured(path)
        assert said.startswith(str(path)), said
        for word in words:
            assert word in said
        assert seconds < SECONDS, f"{seconds:.2f} s: {said}"
        assert memory < BYTES, f"{memory / 1e6:.0f} MB: {said}"

    return check


def test_measuring_works(measured: Measure, tmp_path: Path) -> None:
    """Loading a valid file of 40 MB takes about as much memory."""
    np.savez(tmp_path / "w.npz", **current(random_weights(width=1000, channels_mlp=2500)))
    said, seconds, memory = measured(tmp_path / "w.npz")
    assert said == "LOADED"
    assert 0 < seconds < 10
    assert 0.8 * (tmp_path / "w.npz").stat().st_size < memory < 4 * (tmp_path / "w.npz").stat().st_size


# Code in files


class Canary:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path: Path):
    path = tmp_path / "canary"
    yield Canary(path)
    assert not path.exists(), "code in a file was executed"


def test_the_canary_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "created")))
    assert (tmp_path / "created").is_dir()


@pytest.mark.parametrize("beside", [True, False])
def test_pickles_in_an_npz(tmp_path: Path, canary: Canary, beside: bool) -> None:
    arrays = current(random_weights()) if beside else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(tmp_path / "w.npz", **arrays, extra=np.array([canary, None], dtype=object))
    refused(tmp_path / "w.npz", "'extra'", "pickled Python objects, which can run code")
    forged = {"head/bias.npy": header((3,), "|O") + pickle.dumps(np.array([canary], dtype=object))}
    refused(write_npz(tmp_path / "w.npz", arrays, forged), "pickled Python objects")


def test_a_bare_pickle_inside_a_zip(tmp_path: Path, canary: Canary) -> None:
    write_npz(tmp_path / "w.npz", {}, {"head/bias.npy": pickle.dumps(canary)})
    refused(tmp_path / "w.npz", "no valid header")
    write_npz(tmp_path / "w.npz", {}, {"archive/data.pkl": pickle.dumps(canary), "archive/version": b"3\n"})
    refused(tmp_path / "w.npz")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "value", "key", "beside", "nested", "buried"])
def test_pickles_in_a_torch_file(tmp_path: Path, canary: Canary, zipped: bool, place: str) -> None:
    stored: Any = {
        "alone": canary,
        "value": state() | {"head.bias": canary},
        "key": state() | {canary: torch.zeros(1)},
        "beside": {"state_dict": state(), "args": canary},
        "nested": {"state_dict": state() | {"head.bias": [canary]}},
        "buried": {"model": {"module": {"state_dict": canary}}},
    }[place]
    torch.save(stored, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "w.pth", "which can run code", "save its state_dict() alone")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_plain_pickle(tmp_path: Path, canary: Canary, protocol: int) -> None:
    for stored in (canary, {"w": canary}):
        (tmp_path / "w.pt").write_bytes(pickle.dumps(stored, protocol))
        refused(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module(tmp_path: Path, zipped: bool) -> None:
    warnings.simplefilter("ignore")
    sizes = {"image_size": 8, "patch_size": 4, "num_blocks": 1, "hidden_dim": 4}
    model = Mixer(num_classes=2, **sizes, tokens_mlp_dim=4, channels_mlp_dim=4)
    for module in (nn.Linear(2, 2), model):
        torch.save(module, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        said = refused(tmp_path / "w.pt", "which can run code", "save its state_dict() alone")
        name = f"{type(module).__module__}.{type(module).__name__}"
        assert name in said, "the message should name what was refused, not torch's advice"
        assert "Weights only load failed" not in said


# Bombs


def test_an_npz_that_would_inflate_to_10_gb(tmp_path: Path, cheap: Callable[..., None]) -> None:
    """A small file whose directory claims 4 GB, or with zip64 10 GB."""
    size = 10 * 10**9
    path = tmp_path / "w.npz"
    arrays = {name: header(array.shape, "<f8") + array.tobytes() for name, array in current(random_weights()).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
        archive.writestr("embedding.npy", bytes(1000) * 1000)
    # the size in the directory is what is checked first, so no stream of that length is needed
    data = bytearray(path.read_bytes())
    place = data.rindex(b"embedding.npy") - 46  # of the entry in the central directory
    assert data[place : place + 4] == b"PK\x01\x02"
    data[place + 24 : place + 28] = struct.pack("<I", 4 * 10**9)
    path.write_bytes(data)
    cheap(path, "would inflate to 4,000", "refused; get the file from its authors")
    zip64 = tmp_path / "zip64.npz"
    forge_zip64(zip64, size)
    cheap(zip64, "would inflate to 10,000,000,000", "refused; get the file from its authors")


def forge_zip64(path: Path, size: int) -> None:
    """One member whose directory claims ``size`` bytes, as zip64 does."""
    name, body = b"stem/kernel.npy", bytes(1000)
    extra = struct.pack("<HHQ", 1, 8, size)
    common = struct.pack("<HHHHHI", 45, 0, 8, 0, 0x21, 0)
    local = b"PK\x03\x04" + common + struct.pack("<IIHH", len(body), 0xFFFFFFFF, len(name), len(extra))
    local += name + extra + body
    entry = b"PK\x01\x02" + struct.pack("<H", 45) + common + struct.pack("<II", len(body), 0xFFFFFFFF)
    entry += struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, 0) + name + extra
    path.write_bytes(local + entry + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0))


@pytest.mark.slow
def test_an_npz_that_inflates_to_10_gb(tmp_path: Path, cheap: Callable[..., None]) -> None:
    path, size = tmp_path / "w.npz", 10 * 10**9
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("stem/kernel.npy", "w", force_zip64=True) as file,
    ):
        file.write(header((size // 4,)))
        for _ in range(size // 10**7):
            file.write(bytes(10**7))
    assert path.stat().st_size < 20e6
    cheap(path, "would inflate to 10,000,000,", "refused")


def test_a_directory_that_understates_what_a_member_inflates_to(tmp_path: Path, measured: Measure) -> None:
    """300 MB of zeros whose entry claims only as many bytes as the header needs: no more than those are read."""
    path = tmp_path / "w.npz"
    arrays = current(random_weights())
    shape = arrays["head/kernel"].shape
    bomb = header(shape) + bytes(300 * 2**20)
    write_npz(path, arrays | {"head/kernel": np.zeros(1)}, {"head/kernel.npy": bomb}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"head/kernel.npy") - 46
    data[place + 24 : place + 28] = struct.pack("<I", len(header(shape)) + 4 * shape[0] * shape[1])
    path.write_bytes(data)
    said, seconds, memory = measured(path)
    assert seconds < SECONDS
    assert memory < BYTES
    assert said.startswith((str(path), "LOADED"))


def test_the_limits_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.npz"
    np.savez_compressed(path, **current(random_weights()))
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    monkeypatch.setattr(containers, "MAX_EXPANSION", 0)
    monkeypatch.setattr(containers, "ALWAYS_ALLOWED_SIZE", total)
    load(path)
    monkeypatch.setattr(containers, "ALWAYS_ALLOWED_SIZE", total - 1)
    refused(path, f"inflate to {total:,}")
    monkeypatch.setattr(containers, "MAX_EXPANSION", total // path.stat().st_size + 1)
    load(path)
    torch.save(state(), path)  # written by torch, also a zip
    load(path)
    monkeypatch.setattr(containers, "MAX_EXPANSION", 0)
    monkeypatch.setattr(containers, "ALWAYS_ALLOWED_SIZE", 0)
    refused(path, "inflate")


@pytest.mark.parametrize(
    ("shape", "size"),
    [((10**6, 10**6), 4), ((2**40,), 0), ((10**30, 4), 0), ((-2, -3), 24), ((-1, 5), 0), ((2**62, 8), 96), ((5,), 24)],
    ids=str,
)
@pytest.mark.parametrize("name", ["MixerBlock_0/token_mixing/Dense_0/kernel", "head/bias"])
def test_an_npy_header_with_a_wrong_shape(tmp_path: Path, shape: tuple, size: int, name: str) -> None:
    path = tmp_path / "w.npz"
    write_npz(path, current(random_weights()), {f"{name}.npy": header(shape) + bytes(size)})
    refused(path, repr(name))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2**62, 0), (10**30, 0)], ids=str)
def test_empty_arrays(tmp_path: Path, shape: tuple) -> None:
    for name in ("stem/kernel", "MixerBlock_1/token_mixing/Dense_0/kernel", "head/kernel", "more"):
        write_npz(tmp_path / "w.npz", current(random_weights()), {f"{name}.npy": header(shape)})
        refused(tmp_path / "w.npz", repr(name), str(shape))


def test_the_worst_headers_are_cheap_to_refuse(tmp_path: Path, cheap: Callable[..., None]) -> None:
    """A shape of 34 GB and a .npy header of 60 MB."""
    path = tmp_path / "w.npz"
    cheap(write_npz(path, current(random_weights()), {"head/bias.npy": header((2**33,)) + bytes(4)}), "34,359,738,368")
    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", 60_000_000) + b" " * 60_000_000
    cheap(write_npz(path, {}, {"head/bias.npy": long}, zipfile.ZIP_DEFLATED), "header")


def test_very_many_members(tmp_path: Path, cheap: Callable[..., None]) -> None:
    path = tmp_path / "w.npz"
    write_npz(path, {}, {f"{i}.npy": header((1,)) + bytes(4) for i in range(12_000)})
    cheap(path)


def test_a_safetensors_header_of_very_many_tensors(tmp_path: Path, cheap: Callable[..., None]) -> None:
    rows = {
        str(i): {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(50_000)
    }  # just below the limit of the header's length
    write_safetensors(tmp_path / "w.safetensors", rows, bytes(200_000))
    cheap(tmp_path / "w.safetensors")


def test_a_block_with_a_high_number(tmp_path: Path, cheap: Callable[..., None]) -> None:
    """A single tensor of "block 9999" implies 10,000 blocks."""
    path = tmp_path / "w.npz"
    np.savez(path, **current(random_weights()), **{"MixerBlock_9999/token_mixing/Dense_0/kernel": np.ones((9, 5))})
    cheap(path)
    refused(path)


@pytest.mark.parametrize("digits", ["9" * 5000, "9" * 300, "٣", "-1"])
def test_numbers_in_names(tmp_path: Path, digits: str) -> None:
    for name in (f"MixerBlock_1/LayerNorm_{digits}/scale", f"MixerBlock_{digits}/token_mixing/Dense_0/kernel"):
        write_npz(tmp_path / "w.npz", current(random_weights()) | {name: np.ones(8)}, {})
        refused(tmp_path / "w.npz")


def test_tensors_with_strides_of_zero(tmp_path: Path, cheap: Callable[..., None]) -> None:
    """By them a torch file of a few kB can contain tensors of any size."""
    big = {"width": 6000, "channels_mlp": 12000, "blocks": 1}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in shape_state(**big).items()}
    path = tmp_path / "w.pt"
    torch.save({name: torch.ones(1).expand(shape) for name, shape in shapes.items()}, path)
    assert path.stat().st_size < 10_000
    cheap(path, "stored")
    refused(path)


def test_tensors_that_share_one_storage(tmp_path: Path, measured: Measure) -> None:
    """60 blocks, all views of the same 3 MB of bfloat16, would take 720 MB in float32."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in shape_state(width=1000, channels_mlp=1500, blocks=60).items()}
    storage = torch.ones(1_500_000, dtype=torch.bfloat16)
    path = tmp_path / "w.pt"
    torch.save({name: storage[: shape.numel()].view(shape) for name, shape in shapes.items()}, path)
    assert path.stat().st_size < 7e6
    _, seconds, memory = measured(path)
    assert memory < BYTES, f"{memory / 1e6:.0f} MB"
    assert seconds < SECONDS


def shape_state(width: int, channels_mlp: int, blocks: int) -> dict[str, Tensor]:
    """A state dict with native names, of a Mixer with 2×2 patches; on the meta device it takes no memory."""
    sizes = {"num_classes": 2, "image_size": 8, "patch_size": 4, "tokens_mlp_dim": 4}
    return Mixer(**sizes, num_blocks=blocks, hidden_dim=width, channels_mlp_dim=channels_mlp).state_dict()


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_dictionary_that_contains_itself(tmp_path: Path, key: str, cheap: Callable[..., None]) -> None:
    recursive: dict[str, Any] = {"w": torch.zeros(1)}
    recursive[key] = {"module": recursive}
    torch.save(recursive, tmp_path / "w.pt")
    cheap(tmp_path / "w.pt")  # in another process, which can be ended if it loops forever


def test_deeply_nested_dictionaries(tmp_path: Path) -> None:
    stored: dict[str, Any] = state()
    for _ in range(200):
        stored = {"model": stored, "left": 1}
    torch.save(stored, tmp_path / "w.pt")
    assert outcome(tmp_path / "w.pt") in ("loaded", "refused")


# safetensors


def write_safetensors(path: Path, rows: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def row(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "rows",
    [
        {"a": row(0, 10**12, [250_000_000_000])},
        {"a": row(0, 8, [2]), "b": row(4, 12, [2])},
        {"a": row(0, 4, [1]), "b": row(8, 12, [1])},
        {"a": row(0, 8, [2])},
        {"a": row(8, 0, [2])},
        {"a": row(0, 12, [2])},
        {"a": row(0, 12, [2**62, 2**62])},
        {"a": row(-4, 8, [3])},
        {"a": row(0, 12, [-3])},
        {"a": row(0, 2**64, [3])},
        {"a": row(0, 12, [3], "X9")},
        {"a": row(0, 12, [3]) | {"dtype": 7}},
        {"a": {"dtype": "F32", "shape": [3]}},
        {"a": 5},
        {"__metadata__": {"format": 5}, "a": row(0, 12, [3])},
        b"{",
        b"{}",
        b'{"a":' * 5000,
        b"{\xff\xfe}",
        b'{"a":' + b"[" * 100_000,
    ],
    ids=lambda rows: str(rows)[:60],
)
def test_invalid_safetensors_headers(tmp_path: Path, rows: Any) -> None:
    refused(write_safetensors(tmp_path / "w.safetensors", rows, bytes(12)))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, containers.MAX_HEADER + 1])
def test_a_huge_safetensors_header(tmp_path: Path, length: int) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", b"{}", length=length)
    refused(path, f"{length:,} bytes", f"{containers.MAX_HEADER:,} is the limit")


def test_a_safetensors_header_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    (length,) = struct.unpack("<Q", (tmp_path / "w.safetensors").read_bytes()[:8])
    monkeypatch.setattr(containers, "MAX_HEADER", length)
    load(tmp_path / "w.safetensors")
    monkeypatch.setattr(containers, "MAX_HEADER", length - 1)
    refused(tmp_path / "w.safetensors", "is the limit")


def test_a_safetensors_header_length_beyond_the_file(tmp_path: Path) -> None:
    refused(write_safetensors(tmp_path / "w", b"{}" + bytes(50), length=1_000_000), "not a valid safetensors file")


# Damaged files


def sound_files(folder: Path) -> dict[str, Path]:
    """The same small Mixer in every kind of file that can be read."""
    weights = random_weights(classes=2, blocks=1)
    found = {}
    for name, kind in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED), ("lzma", zipfile.ZIP_LZMA)):
        found[f"{name}.npz"] = write_npz(folder / f"{name}.npz", current(weights), {}, kind)
    arrays = {name: torch.tensor(array) for name, array in timm(weights).items()}
    torch.save(arrays, folder / "zip.pt")
    torch.save(arrays, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(arrays, folder / "plain.safetensors")
    model = load(folder / "plain.safetensors")
    allmlp.save(model, folder / "native.safetensors", classes=["a", "é"])
    save_as(model, folder / "timm.safetensors", "timm")
    names = ("zip.pt", "legacy.pt", "plain.safetensors", "native.safetensors", "timm.safetensors")
    return found | {name: folder / name for name in names}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sound_files(tmp_path_factory.mktemp("sound"))


KINDS = (
    "stored.npz", "deflated.npz", "lzma.npz", "zip.pt", "legacy.pt", "plain.safetensors", "native.safetensors",
    "timm.safetensors",
)  # fmt: skip


def test_the_undamaged_files_load(sound: dict[str, Path]) -> None:
    assert tuple(sound) == KINDS
    for path in sound.values():
        assert load(path).config["num_classes"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files(tmp_path: Path, sound: dict[str, Path], kind: str) -> None:
    """Cut at each of the first and last bytes, and at 60 positions in between."""
    data, path = sound[kind].read_bytes(), tmp_path / "w"
    rng = random.Random(0)
    ends = [*range(20), *range(len(data) - 30, len(data)), *(rng.randrange(20, len(data) - 30) for _ in range(60))]
    for end in ends:
        path.write_bytes(data[:end])
        refused(path)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_in_any_file_give_a_model_or_one_line(tmp_path: Path, sound: dict[str, Path], kind: str) -> None:
    """A changed weight is detected in native files only, but no file causes any other exception."""
    data, path = sound[kind].read_bytes(), tmp_path / "w"
    rng = random.Random(1)
    places = [rng.randrange(len(data)) for _ in range(60)]
    places += [rng.randrange(min(1200, len(data))) for _ in range(60)]
    places += [len(data) - 1 - rng.randrange(min(1200, len(data))) for _ in range(60)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        found = outcome(path)
        assert found in ("loaded", "refused"), f"byte {place}, {data[place]:#x} → {damaged[place]:#x}: {found}"


# One flipped byte in a file that this package saved


def classes_of_bytes(data: bytes) -> dict[str, range]:
    """The positions of the length, the header's JSON, its padding, and each tensor in a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = data[8:start]
    found = {"length": range(8), "JSON": range(8, 8 + len(text.rstrip()))}
    if len(text.rstrip()) < len(text):
        found["padding"] = range(8 + len(text.rstrip()), start)
    for name, entry in json.loads(text).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = range(start + begin, start + end)
    return found


@pytest.mark.parametrize("to", ["native", "timm"])
def test_a_flipped_byte_in_a_saved_file_is_detected(tmp_path: Path, to: str) -> None:
    for classes in range(2, 14):  # some lengths of the header need padding
        weights = random_weights(classes=classes, blocks=1)
        save_file({k: torch.tensor(v) for k, v in timm(weights).items()}, tmp_path / "w.safetensors")
        save_as(load(tmp_path / "w.safetensors"), tmp_path / "sound.safetensors", to)  # type: ignore[arg-type]
        data = (tmp_path / "sound.safetensors").read_bytes()
        kinds = classes_of_bytes(data)
        if "padding" in kinds:
            break
    else:
        pytest.fail("no header was padded")
    rng = random.Random(2)
    places = [place for places in kinds.values() for place in (places[0], places[-1], rng.choice(places))]
    places += [*kinds["length"], *kinds["padding"], len(data) - 1, *rng.sample(kinds["JSON"], 150)]
    beside = data.find(b'"format":"pt"')
    places += range(beside, beside + 13) if beside > 0 else []
    path, silent = tmp_path / "damaged.safetensors", []
    for place in places:
        others = {data[place] ^ 1 << rng.randrange(8)}
        if place in kinds["padding"] or beside <= place < beside + 13:
            others |= {*b" \n\t}", rng.randrange(256)}
        for other in others - {data[place]}:
            damaged = bytearray(data)
            damaged[place] = other
            path.write_bytes(damaged)
            if (found := outcome(path)) != "refused":
                around = data[max(place - 8, 0) : place + 8]
                silent.append(f"{found}: byte {place}, {data[place]:#x} → {other:#x}, in {around!r}")
    assert not silent


def test_a_changed_config_is_detected(tmp_path: Path) -> None:
    """The SHA-256 covers the header as well as the tensors."""
    save_file(state(), tmp_path / "w.safetensors")
    save_as(load(tmp_path / "w.safetensors"), tmp_path / "sound.safetensors", "native")
    data = (tmp_path / "sound.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    rows = json.loads(data[8:start])
    rows["__metadata__"]["config"] = rows["__metadata__"]["config"].replace("erf", "tanh")
    refused(write_safetensors(tmp_path / "w.safetensors", rows, data[start:]), "SHA-256 differs")


# Numbers, names and types


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    for name in ("head.bias", "stem.proj.weight", "blocks.1.mlp_tokens.fc2.bias"):
        broken = {key: tensor.to(dtype) for key, tensor in state().items()}
        broken[name].view(-1)[-1] = value
        save_file(broken, tmp_path / "w.safetensors")
        torch.save(broken, tmp_path / "w.pt")
        for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
            refused(path, name, "not finite")


def test_values_that_are_not_finite_in_an_npz(tmp_path: Path) -> None:
    weights = random_weights()
    weights["blocks.0.norm1.bias"][3] = np.nan
    np.savez(tmp_path / "w.npz", **current(weights))
    refused(tmp_path / "w.npz", "MixerBlock_0/LayerNorm_0/bias", "not finite")
    arrays = {name: bfloat16(array.astype(np.float32))[0] for name, array in older(random_weights()).items()}
    arrays["head/bias"] = np.array([0x7F80, 0, 0], np.uint16).view("V2")
    np.savez(tmp_path / "w.npz", **arrays)
    refused(tmp_path / "w.npz", "head/bias", "not finite")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64, ">f4", "U3", "V3", "M8[s]"])
def test_other_types_in_an_npz(tmp_path: Path, dtype) -> None:
    np.savez(tmp_path / "w.npz", **current(random_weights()) | {"head/bias": np.zeros(3, dtype)})
    refused(tmp_path / "w.npz", "'head/bias'", "of type")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_other_types_in_torch_and_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    broken = state() | {"head.bias": torch.zeros(3, dtype=dtype)}
    torch.save(broken, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "'head.bias'", "of type")
    if dtype is not torch.complex64:
        save_file(broken, tmp_path / "w.safetensors")
        refused(tmp_path / "w.safetensors", "'head.bias'", "of type")


@pytest.mark.parametrize(
    "odd",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: torch.nested.nested_tensor([t[0], t[1]]),
    ],
    ids=["sparse", "meta", "nested"],
)
def test_sparse_meta_and_nested_tensors(tmp_path: Path, odd: Callable[[Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = state()
        torch.save(weights | {"head.weight": odd(weights["head.weight"])}, tmp_path / "w.pt")
    assert ".npz" not in refused(tmp_path / "w.pt")


def test_an_array_in_fortran_order(tmp_path: Path) -> None:
    arrays = current(random_weights())
    arrays["head/kernel"] = np.asfortranarray(arrays["head/kernel"])
    np.savez(tmp_path / "w.npz", **arrays)
    refused(tmp_path / "w.npz", "'head/kernel' is in Fortran order", "numpy.ascontiguousarray")


def test_two_members_with_one_name(tmp_path: Path) -> None:
    """Ambiguous: readers differ in which one they take."""
    path = tmp_path / "w.npz"
    np.savez(path, **current(random_weights()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("head/bias.npy", header((3,), "<f8") + bytes(24))
    refused(path, "head/bias")


def test_two_keys_with_one_name(tmp_path: Path) -> None:
    weights = state()
    torch.save(weights | {"module.head.bias": weights["head.bias"] + 1}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "head.bias")
    arrays = current(random_weights())
    np.savez(tmp_path / "w.npz", **arrays, **{"params/head/bias": arrays["head/bias"] + 1})
    refused(tmp_path / "w.npz", "head/bias")


@pytest.mark.parametrize("prefix", ["model/", "../", "/", "params/params/", "opt/", "a/b/"])
def test_names_with_an_unknown_prefix(tmp_path: Path, prefix: str) -> None:
    write_npz(tmp_path / "w.npz", {prefix + name: array for name, array in current(random_weights()).items()}, {})
    refused(tmp_path / "w.npz", "its first names")


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    evil = "\x1b[31m\nmixer: all is well"
    save_file(state() | {evil: torch.zeros(1)}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "all is well")
    torch.save(state() | {evil: torch.zeros(1)}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt")
    write_npz(tmp_path / "w.npz", current(random_weights()) | {evil: np.zeros(1)}, {})
    refused(tmp_path / "w.npz")


def test_control_characters_in_the_file_name_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.npz"
    for data in (b"", b"words, and more words", b"PK\x03\x04" + bytes(50), struct.pack("<Q", 2**50) + b"{" + bytes(9)):
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)


# Other files


def test_a_missing_file_a_folder_and_an_empty_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.npz", "does not exist")
    refused(tmp_path, "is a folder, not a weights file")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "is empty")


@pytest.mark.parametrize(
    "data",
    [b"x", b"not weights but a letter\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}", bytes(5000), b"\xff" * 500],
    ids=["a byte", "text", "PNG", "JSON", "zeros", "ones"],
)
def test_files_without_weights(tmp_path: Path, data: bytes) -> None:
    for name in ("w.npz", "w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "is not a weights file", "safetensors, .npz")


def test_a_zip_of_photographs(tmp_path: Path) -> None:
    write_npz(tmp_path / "w.npz", {}, {"train/cat/1.jpg": b"\xff\xd8\xff"})
    refused(tmp_path / "w.npz", "is a zip that contains 'train/cat/1.jpg'")
    write_npz(tmp_path / "w.npz", {}, {})
    refused(tmp_path / "w.npz")


@pytest.mark.parametrize("stored", [[1, 2], 3, "text", None, {}, torch.zeros(3), {"a": {"b": torch.zeros(1)}}], ids=str)
def test_torch_files_without_a_state_dict(tmp_path: Path, stored: Any) -> None:
    torch.save(stored, tmp_path / "w.pt")
    refused(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18", "resmlp_12_224", "gmixer_12_224", "gmlp_ti16_224"]
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_another_architectures_weights(tmp_path: Path, name: str, ending: str) -> None:
    library = pytest.importorskip("timm")
    with torch.device("meta"):
        shapes = library.create_model(name).state_dict()
    weights = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in shapes.items()}
    if ending == ".pth":
        torch.save(weights, tmp_path / "w.pth")
    else:
        save_file(weights, tmp_path / "w.safetensors")
    assert "another architecture" in refused(tmp_path / f"w{ending}")
