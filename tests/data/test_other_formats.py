"""Images as cameras, satellites and other programs write them: less usual formats, bands, bits, texts and endings."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import WHOLE, make_folder, make_zip, picture

from allmlp.data import decode as decoder
from allmlp.data import formats, stores
from allmlp.data.decode import UnreadableImage, decode
from allmlp.data.formats import FORMATS, looks_like_image, may_be_image, recognize
from allmlp.data.sources import load_source
from allmlp.errors import UserError
from allmlp.inference.images import list_images


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(bands: int, bits: int, kind: int = 1, side: int = 4) -> bytes:
    """A TIFF of zeros; ``kind`` is its SampleFormat."""
    size = side * side * bands * bits // 8
    tags = {256: side, 257: side, 259: 1, 262: 1, 277: bands, 278: side, 279: size, 284: 1, 339: kind}
    head = 8 + 2 + 12 * (len(tags) + 2) + 4
    rows = {key: struct.pack("<HHII", key, 3, 1, value) for key, value in tags.items()}
    wide = bands > 2
    rows[258] = struct.pack("<HHI", 258, 3, bands) + (
        struct.pack("<I", head) if wide else struct.pack("<2H", *[bits] * bands, *[0] * (2 - bands))
    )
    rows[273] = struct.pack("<HHII", 273, 4, 1, head + 2 * bands * wide)
    directory = struct.pack("<H", len(rows)) + b"".join(rows[key] for key in sorted(rows)) + bytes(4)
    return (
        b"II*\0\x08\0\0\0"
        + directory
        + struct.pack(f"<{bands}H", *[bits] * bands) * wide
        + bytes(range(256))[:1] * size
    )


@pytest.mark.parametrize(
    ("bands", "bits", "kind", "said"),
    [
        (5, 8, 1, "a TIFF of 5 band(s) of 8 bits"),
        (13, 16, 1, "a TIFF of 13 band(s) of 16 bits"),
        (3, 32, 3, "a TIFF of 3 band(s) of 32 floating-point bits"),
        (2, 8, 1, "a TIFF of 2 band(s) of 8 bits"),
        (4, 16, 2, "a TIFF of 4 band(s) of 16 signed bits"),
    ],
)
def test_tiffs_of_other_bands_are_named(
    bands: int, bits: int, kind: int, said: str, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(UnreadableImage) as caught:
        decode(tiff(bands, bits, kind), "a.tif")
    assert str(caught.value) == f"a.tif cannot be read: it is {said}; {decoder.BANDS_REMEDY}"
    assert capfd.readouterr().err == ""  # no line of Pillow's


@pytest.mark.parametrize(("top", "white"), [(4095, 4095), (1000, 4095), (4096, 65535), (65535, 65535), (255, 65535)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_12_bits_in_16(top: int, white: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What needs no more than 12 bits counts as that, and it is said, once."""
    decoder.say_that_12_bits_are_assumed.cache_clear()
    values = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    for _ in range(2):
        found = np.asarray(decode(encode(Image.fromarray(values), kind), "a"))[..., 0]
        assert np.array_equal(found, np.rint(values * (255 / white)).astype(np.uint8))
    assert len(caplog.messages) == (white == 4095)
    assert all("4095 is white" in message for message in caplog.messages)


def test_12_bits_are_said_once_in_a_run(mixer, tmp_path: Path) -> None:
    decoder.say_that_12_bits_are_assumed.cache_clear()
    for i in range(24):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), 100 * i + 300, np.uint16)).save(path)
    sizes = ("--image-size", 16, "--patch-size", 8, "--num-blocks", 1, "--hidden-dim", 8, "--tokens-mlp-dim", 4)
    words = ("--channels-mlp-dim", 8, "--epochs", 2, "--global-batch-size", 8, "--compile", "off", "--workers", 2)
    answer = mixer("train", "--data", tmp_path / "data", *sizes, *words, "--out", tmp_path / "run")
    assert answer.status == 0, answer.err
    assert answer.err.count("4095 is white") == 1


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


LARGE = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + LARGE),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
        chunk(b"iCCP", b"profile\0\0" + LARGE),
        chunk(b"tEXt", b"Comment\0" + bytes(100)) * 3 + chunk(b"zTXt", b"x\0\0" + LARGE) * 40,
    ],
    ids=["zTXt", "iTXt", "iCCP", "many"],
)
def test_a_png_with_large_texts_or_profiles_is_read(extra: bytes) -> None:
    image = Image.effect_noise((8, 8), 90).convert("RGB")
    data = encode(image, "PNG")
    assert np.array_equal(decode(data[:33] + extra + data[33:], "a.png"), image)


# Formats and endings

KINDS = {
    ".jfif": ("JPEG", {}), ".jpe": ("JPEG", {}), ".ppm": ("PPM", {}), ".pgm": ("PPM", {}), ".pbm": ("PPM", {}),
    ".jp2": ("JPEG2000", {}), ".avif": ("AVIF", {"quality": 100}), ".heic": ("HEIF", {"quality": -1}),
}  # fmt: skip


@pytest.mark.parametrize("ending", KINDS)
def test_other_formats_are_read_everywhere(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = KINDS[ending]
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    mode = {".pgm": "L", ".pbm": "1"}.get(ending, "RGB")
    image = Image.linear_gradient("L").resize((16, 16)).convert(mode)
    data = encode(image, kind, **options)
    difference = np.asarray(decode(data, "a")).astype(int) - np.asarray(image.convert("RGB"))
    assert np.abs(difference).max() <= 8
    for name in (f"a/1{ending}", f"b/1{ending.upper()}"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    assert load_source(str(tmp_path), **WHOLE).classes == ("a", "b")
    for end in range(0, len(data), max(len(data) // 40, 1)):  # truncated: read or rejected, in one line
        try:
            decode(data[:end], "a")
        except UnreadableImage as error:
            assert str(error).isprintable()  # noqa: PT017


def test_heif_without_its_library_is_told_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "can_read_heif", lambda: False)
    monkeypatch.setattr("allmlp.data.dataset.can_read_heif", lambda: False)
    monkeypatch.setattr(decoder, "readable_extensions", lambda: formats.readable_extensions() - formats.HEIF_EXTENSIONS)
    start = b"\0\0\0\x18ftypheic" + bytes(99)
    with pytest.raises(UnreadableImage, match=r"it is a HEIF image .*pip install 'allmlp\[heif\]'"):
        decode(start, "a")
    folder = make_folder(tmp_path / "f", ["a/1.png", "b/1.png"])
    (folder / "a" / "2.heic").write_bytes(start)
    found = load_source(str(folder), **WHOLE)
    assert found.remarks() == ["1 files left out: 1 .heic (to read HEIF: pip install 'allmlp[heif]')"]
    (folder / "c").mkdir()
    (folder / "c" / "3.HEIC").write_bytes(start)
    with pytest.raises(UserError, match=r"'c' .*1 \.heic"):
        load_source(str(folder))


def test_files_are_known_by_content_where_the_ending_is_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a/plain", "a/1.jpg?w=100", "b/photo.large", "b/2.png", "b/x.bin"]
    others = {
        "a/README": b"text",
        "b/BMW": b"BM is how it begins",
        "a/notes.txt": picture("x"),
        "b/.hidden": picture("y"),
    }
    folder = make_folder(tmp_path / "f", names)
    for name, data in others.items():
        (folder / name).write_bytes(data)
    (folder / "a" / "pipe").symlink_to("/dev/zero")
    packed = make_zip(tmp_path / "f.zip", names)
    for source in (folder, packed):
        assert sorted(load_source(str(source), **WHOLE).split("train").names) == sorted(names)
        assert len(list(list_images(source))) == len(names)
    assert sum(load_source(str(folder)).left_out.values()) == len(others) + 1


def test_each_format_is_recognized_by_its_first_bytes() -> None:
    for kind in FORMATS:
        if kind == "HEIF":  # its library is not needed for this
            assert recognize(b"\0\0\0\x18ftypheic" + bytes(20)) == kind
            continue
        data = encode(Image.new("RGB", (16, 16)), kind)
        assert recognize(data[: formats.FIRST_BYTES]) == kind
        assert looks_like_image(data[: formats.FIRST_BYTES]) == (kind not in formats.FREQUENT_BY_CHANCE)
    assert not looks_like_image(b"")
    assert [may_be_image(name) for name in ("a", "a.jpg?x", "a.dat", "a.txt", "a.TXT", "a.json")] == [True] * 3 + [
        False
    ] * 3


def test_many_files_of_an_unknown_ending_are_not_all_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allmlp.data.folders.walk.MAX_PROBES", 3)
    folder, opened = make_folder(tmp_path, ["a/0.png", "b/0.png"]), []
    for i in range(10):
        (folder / "a" / f"{i}.weird").write_bytes(b"no image")
    head = stores.FolderStore.head
    monkeypatch.setattr(
        stores.FolderStore, "head", lambda self, name, size: opened.append(name) or head(self, name, size)
    )
    assert load_source(str(folder), **WHOLE).left_out == {".weird": 10}
    assert len(opened) == 3
