"""One image in every format decodes to the same pixels; anything else is rejected with a message of one line."""

import io
import pickle
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features

from allmlp.data.decode import MAX_PIXELS, UnreadableImage, decode, is_image_name
from allmlp.data.formats import FORMATS, can_read_heif

READABLE = [kind for kind in FORMATS if kind != "HEIF" or can_read_heif()]
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
ORIENTATION = 0x0112


def quarters(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Four colors and unequal sides: every rotation and flip of it differs."""
    image = Image.new("RGB", size, RED)
    width, height = size
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(YELLOW, (width // 2, height // 2, width, height))
    return image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes, **options) -> np.ndarray:
    image = decode(data, "photo", **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def first_pixel(data: bytes) -> tuple[int, ...]:
    return tuple(pixels(data)[0, 0].tolist())


def assert_same(data: bytes, expected: Image.Image, within: int = 0) -> None:
    actual, wanted = pixels(data).astype(int), np.asarray(expected).astype(int)
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= within


def rejection(data: bytes, name: str = "photos/a.jpg", **options) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(data, name, **options)
    message = str(caught.value)
    assert message.isprintable()  # so without a newline
    assert "0x" not in message
    assert message.startswith(f"{name} cannot be read: ")
    assert "; " in message  # the remedy
    return message


def png(size: tuple[int, int], bits: int, color: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Encodes a PNG that Pillow cannot write. ``rows``: each with its leading filter byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0))
    body = b"".join(chunk(*one) for one in extra) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def tiff(width: int, strip: bytes, bits: tuple[int, ...], photometric: int, **extra: tuple[int, ...]) -> bytes:
    """Encodes a TIFF of one row that Pillow cannot write, little-endian, uncompressed. ``extra``: tag_N=values."""
    tags = {256: (width,), 257: (1,), 258: bits, 259: (1,), 262: (photometric,), 277: (len(bits),), 278: (1,)}
    tags |= {279: (len(strip),), 273: (200,)} | {int(name.removeprefix("tag_")): value for name, value in extra.items()}
    entries, tail = b"", strip
    for tag, values in sorted(tags.items()):
        body = struct.pack(f"<{len(values)}H", *values).ljust(4, b"\0")
        if len(body) > 4:
            body, tail = struct.pack("<I", 200 + len(tail)), tail + body
        entries += struct.pack("<HHI", tag, 3, len(values)) + body
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + tail


# Orientation (EXIF 2.32, tag 0x0112) → how to store an upright image so that this orientation restores it
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # displayed after a quarter turn clockwise, so stored turned counter-clockwise
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
SHARP = {"quality": 95, "subsampling": 0}  # a JPEG within 4 levels
OTHERS = {"save_all": True, "append_images": [Image.new("RGB", (48, 32), c) for c in ("black", "white")]}
ENCODINGS = [  # format, options
    *[("JPEG", SHARP | more) for more in ({}, {"progressive": True})],
    *[("PNG", more) for more in ({}, OTHERS)],
    *[("WEBP", {"lossless": True} | more) for more in ({}, OTHERS)],
    *[("TIFF", more) for more in ({}, {"compression": "tiff_lzw"}, {"big_tiff": True}, OTHERS)],
    *[("GIF", more) for more in ({}, OTHERS)],
    ("BMP", {}),
    ("MPO", SHARP | OTHERS),
]


@pytest.mark.parametrize(("kind", "options"), ENCODINGS)
def test_every_format_gives_the_same_upright_image(kind: str, options: dict) -> None:
    """Of several frames the first; its orientation is applied once."""
    within, several = 4 if kind in ("JPEG", "MPO") else 0, "save_all" in options and kind != "MPO"
    data = encode(quarters(), kind, **options)
    assert_same(data, quarters(), within)
    if several:
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    for size in ((1, 1), (1, 7), (7, 1)):
        assert decode(encode(Image.new("RGB", size), kind), "dot").size == size
    for orientation, store in {}.items() if kind in ("GIF", "BMP") or several else STORED.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(np.asarray(quarters()))))
        data = encode(stored, kind, exif=exif, **options)
        assert_same(data, quarters(), within)
        assert ORIENTATION not in decode(data, "photo").getexif()


def test_modes() -> None:
    """CMYK is inverted in JPEG (by Adobe and Pillow), not inverted in TIFF."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for image in (Image.new("L", (2, 1)), Image.new("I;16", (2, 1))):
        image.putpixel((1, 0), 255 if image.mode == "L" else 65535)
        assert pixels(encode(image, "PNG", exif=exif))[:, 0, 0].tolist() == [0, 255]
    assert_same(encode(quarters().convert("CMYK"), "JPEG", quality=95), quarters(), within=4)
    assert_same(encode(quarters().convert("CMYK"), "TIFF"), quarters())
    assert_same(encode(quarters().convert("YCbCr"), "TIFF", compression="raw"), quarters(), within=2)
    if features.check("littlecms2"):
        gray = Image.new("RGB", (4, 4), (119, 119, 119))
        assert_same(encode(Image.new("LAB", (4, 4), (127, 128, 128)), "TIFF"), gray, within=3)
    bits = Image.new("1", (9, 3), 0)
    bits.putpixel((8, 2), 1)
    for image in (quarters().quantize(4), Image.linear_gradient("L"), bits):
        for kind in ("PNG", "BMP", "TIFF", "GIF"):
            assert_same(encode(image, kind), image.convert("RGB"))


def test_transparency_over_white() -> None:
    """Alpha, transparent palette entries, and the tRNS chunk of PNGs at every depth."""
    half = (255, 127, 127)  # 255 · (1 − 128/255) = 127
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        assert first_pixel(encode(Image.new("RGBA", (3, 2), (*RED, 128)), kind, **options)) == half
        assert first_pixel(encode(Image.new("RGBA", (3, 2), (0, 0, 0, 0)), kind, **options)) == (255, 255, 255)
    assert first_pixel(encode(Image.new("LA", (3, 2), (0, 128)), "PNG")) == (127, 127, 127)
    assert first_pixel(tiff(1, bytes([64, 128]), (8, 8), 1, tag_338=(1,))) == (191, 191, 191)  # premultiplied: 64 + 127
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert pixels(encode(palette, kind, transparency=1))[0].tolist() == [list(RED), [255, 255, 255]]
    table = [0] * 768  # all reds, all greens, all blues, in 16 bits
    table[0], table[512 + 1] = 65535, 65535
    beside = tiff(2, bytes([0, 255, 1, 51]), (8, 8), 3, tag_320=tuple(table), tag_338=(2,))  # index, alpha, …
    for data in (encode(palette, "PNG", transparency=bytes([255, 51])), beside):
        assert pixels(data)[0].tolist() == [list(RED), [204, 204, 255]]  # blue at 51/255: 0.2 · 0 + 0.8 · 255
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 8)
    assert pixels(encode(gray, "PNG", transparency=7))[0, :, 0].tolist() == [255, 8]
    red_blue = Image.new("RGB", (2, 1), RED)
    red_blue.putpixel((1, 0), BLUE)
    assert pixels(encode(red_blue, "PNG", transparency=RED))[0].tolist() == [[255] * 3, list(BLUE)]
    assert first_pixel(encode(Image.new("1", (2, 1), 0), "PNG", transparency=0)) == (255, 255, 255)
    four_bits = png((2, 1), 4, 0, b"\0\x35", (b"tRNS", struct.pack(">H", 3)))
    assert pixels(four_bits)[0, :, 0].tolist() == [255, 5 * 17]
    wide = png((3, 1), 16, 0, b"\0" + struct.pack(">3H", 514, 513, 65535), (b"tRNS", struct.pack(">H", 514)))
    assert pixels(wide)[0, :, 0].tolist() == [255, 2, 255]
    key = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    rgb = png((2, 1), 16, 2, b"\0" + key + struct.pack(">3H", 0x3400, 0x7800, 0xBC00), (b"tRNS", key))
    assert pixels(rgb)[0].tolist() == [[255, 255, 255], [0x34, 0x78, 0xBC]]


SIXTEEN = np.array([[0, 257, 32896, 65535, 128, 129]], dtype=np.uint16)
EIGHT = [0, 1, 128, 255, 0, 1]


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    image = Image.fromarray(SIXTEEN)
    wide = Image.fromarray(SIXTEEN.astype(np.int32))
    big_endian = Image.frombytes("I;16B", image.size, SIXTEEN.astype(">u2").tobytes())
    for data in (encode(image, "PNG"), encode(image, "TIFF"), encode(image, "TIFF", compression="tiff_lzw")):
        assert pixels(data)[0].tolist() == [[value] * 3 for value in EIGHT]
    assert pixels(encode(big_endian, "TIFF"))[0, :, 0].tolist() == EIGHT
    assert pixels(encode(wide, "TIFF"))[0, :, 0].tolist() == EIGHT
    ends_first = tiff(6, SIXTEEN.astype("<u2").tobytes(), (16,), 0)  # white is zero
    assert pixels(ends_first)[0, :, 0].tolist() == [255 - value for value in EIGHT]
    twelve = tiff(2, bytes([0xFF, 0xF8, 0x08]), (12,), 1)  # 4095 and 2056
    assert pixels(twelve)[0, :, 0].tolist() == [255, 128]


def test_16_bit_color() -> None:
    color = png((2, 1), 16, 2, b"\0" + struct.pack(">6H", 0, 32896, 65535, 65535, 257, 0))
    assert pixels(color)[0].tolist() == [[0, 128, 255], [255, 1, 0]]
    with_alpha = png((1, 1), 16, 6, b"\0" + struct.pack(">4H", 65535, 0, 0, 32896))
    assert first_pixel(with_alpha) == (255, 127, 127)
    gray_with_alpha = png((1, 1), 16, 4, b"\0" + struct.pack(">2H", 0, 32896))
    assert first_pixel(gray_with_alpha) == (127, 127, 127)


def test_image_names() -> None:
    assert all(
        is_image_name(name)
        for name in ("a.jpg", "A.JPEG", "dir.x/b.Png", "c.tif", "d.TIFF", "b.bmp", "e.webp", "f.gif")
    )
    assert not any(is_image_name(name) for name in ("jpg", "a.txt", "a.jpg.txt", "notes", ".jpg", "a.svg", "a.jpg/b"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow warns about the tags of a truncated TIFF
def test_truncated() -> None:
    for kind in READABLE:
        data = encode(Image.effect_noise((64, 64), 90), kind)
        *_, half = [rejection(data[:length]) for length in (1, 4, 13, 25, len(data) // 2)]
        assert (
            kind in ("WEBP", "TIFF", "JPEG2000", "HEIF", "AVIF")
            or "the file is truncated; replace it or remove it" in half
        )


def test_what_is_no_image_is_rejected_with_its_reason() -> None:
    flipped = bytearray(encode(quarters(), "PNG"))
    flipped[17] ^= 1  # in the header, which a checksum guards
    for data, reason in (
        (b"", "empty"),
        (b"hello, this is text", "none of JPEG, PNG"),
        (encode(quarters(), "ICO"), "none of JPEG, PNG"),
        (png((4, 4), 8, 2, b"\0" * 52).replace(b"IDAT", b"IDAX"), "PNG is damaged"),
        (bytes(flipped), "PNG is damaged"),
        (encode(Image.new("F", (2, 2), 0.5), "TIFF"), "floats of unknown range; save it with 8 or 16 bits"),
        (encode(Image.new("I", (2, 2), -1), "TIFF"), "65535; save it with 8 or 16 bits"),
        (encode(Image.new("I", (2, 2), 65536), "TIFF"), "65535; save it with 8 or 16 bits"),
    ):
        assert reason in rejection(data)


def test_names_with_odd_characters_stay_on_one_line() -> None:
    with pytest.raises(UnreadableImage, match=r"^été\\n\\x1b\[2J\\udcff\.jpg cannot be read") as caught:
        decode(b"", "été\n\x1b[2J\udcff.jpg")
    copy = pickle.loads(pickle.dumps(caught.value))  # as a worker process sends it
    assert (type(copy), str(copy)) == (UnreadableImage, str(caught.value))


def test_size_is_checked_before_decoding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started = time.process_time()
        for size in ((30_000, 30_000), (10_000, 10_000)):  # above Pillow's limits for an error and for a warning
            message = rejection(png(size, 8, 2, b""), "bomb.png")
            assert f"{size[0]} × {size[1]} pixels, above the limit of {MAX_PIXELS:,}; --max-pixels N" in message
        canvas = struct.pack("<I", 30_000 - 1)[:3]
        body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + canvas
        message = rejection(b"RIFF" + struct.pack("<I", len(body)) + body)
        assert f"above the limit of {MAX_PIXELS:,}; --max-pixels N" in message
        assert time.process_time() - started < 0.2


@pytest.mark.parametrize("kind", READABLE)
def test_limit_is_the_callers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, before = encode(quarters((4, 4)), kind), Image.MAX_IMAGE_PIXELS
    assert "4 × 4 pixels, above the limit of 15;" in rejection(data, max_pixels=15)
    assert decode(data, "photo", max_pixels=16).size == (4, 4)
    assert before == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # Pillow raises an error at twice this number
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data, "photo", max_pixels=16).size == (4, 4)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\3",
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\x09\0\0\0\0\0\0",  # orientation 9
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\2\0\0\0\3up\0\0\0\0\0\0",  # orientation "up"
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_invalid_exif_is_ignored(exif: bytes) -> None:
    for kind, options in (("JPEG", SHARP), ("PNG", {}), ("WEBP", {"lossless": True})):
        assert_same(encode(quarters(), kind, exif=exif, **options), quarters(), within=4)


@pytest.mark.parametrize("kind", [*READABLE, "MPO", "LZW"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_data_decodes_or_is_rejected_in_one_line(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {"save_all": True, "append_images": [quarters((8, 8))]} if kind in ("MPO", "GIF", "WEBP") else {}
    options |= {} if kind in ("BMP", "GIF") else {"exif": exif}
    options |= {"compression": "tiff_lzw"} if kind == "LZW" else {}
    whole = encode(quarters((8, 8)), kind.replace("LZW", "TIFF"), **options)
    rng, outcomes = random.Random(kind), set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):  # mostly at the front, where the headers are
            data[min(rng.randrange(len(data)), rng.randrange(len(data)))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        try:
            outcomes.add(decode(bytes(data), "fuzz", max_pixels=1_000_000).mode)
        except UnreadableImage as error:
            text = str(error)
            outcomes.add("rejected" if text.isprintable() and "object at" not in text else text)
    assert outcomes == {"RGB", "rejected"}  # some of the damage is harmless, and some is not
