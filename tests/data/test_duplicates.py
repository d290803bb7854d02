"""Signatures of images and what is matched by them: by file, by pixels, by looks."""

import io
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from trees import WHOLE, write_tree

from allmlp.data.dataset import ImageDataset
from allmlp.data.duplicates import matching
from allmlp.data.duplicates.matching import Match, alike, clusters, difference, matches_between, matches_within
from allmlp.data.duplicates.signatures import DIGEST, Signatures, digest, sign_all
from allmlp.data.sources import load_source
from allmlp.data.stores import ArrayStore, FolderStore
from allmlp.errors import RunError, UserError

pytest.importorskip("imagehash")

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def photograph(seed: int, side: int = 48) -> Image.Image:
    """Random, with the amplitudes of photographs: in inverse proportion to the frequency, colors much alike."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    spectrum = np.fft.fft2(rng.normal(size=(3, side, side))) / np.maximum(frequency, 1 / side)
    planes = np.fft.ifft2(spectrum).real
    planes = 0.3 * planes + planes[:1]
    planes = 128 + rng.normal(0, 20, (3, 1, 1)) + planes * 50 / planes.std()
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def in_memory(images: list[Image.Image] | np.ndarray, labels: list[int] | None = None) -> ImageDataset:
    pixels = np.stack([np.asarray(image) for image in images])
    names = [str(i) for i in range(len(pixels))]
    given = np.array(labels or [0] * len(names))
    return ImageDataset(store=ArrayStore(pixels, names), names=names, labels=given, classes=("a", "b"))


def sign_files(path: Path, files: dict[str, bytes]) -> Signatures:
    return sign_all(load_source(str(write_tree(path, files)), **WHOLE).split("train"))


def table_of(codes: np.ndarray, thumbnails: np.ndarray) -> Signatures:
    """A table of images that have different files and pixels."""
    size = len(codes)
    digests = np.array([digest(bytes([i % 256, i // 256])) for i in range(size)], dtype=f"S{DIGEST}")
    return Signatures(
        dataset=in_memory(np.zeros((size, 2, 2, 3), np.uint8)),
        indices=np.arange(size),
        files=digests,
        pixels=digests,
        codes=codes,
        thumbnails=thumbnails,
        sizes=np.full((size, 2), 2),
        kinds=["PNG, RGB"] * size,
        unreadable={},
    )


def named(table: Signatures, matches: list[Match], other: Signatures | None = None) -> set[tuple[str, str, str]]:
    return {(table.name(one.first), (other or table).name(one.second), one.kind) for one in matches}


PHOTO, OTHER, THIRD = (photograph(seed) for seed in range(3))


# Signatures


@pytest.mark.parametrize("form", ["data", "data.zip"])
def test_a_signature_is_of_the_upright_pixels(form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide = PHOTO.resize((40, 30))
    files = {
        "a/1.png": encoded(wide),
        "a/2.bmp": encoded(wide, "BMP"),
        "a/3.png": encoded(wide.transpose(Image.Transpose.ROTATE_90), exif=exif),
        "b/4.jpg": encoded(wide.convert("L"), "JPEG"),
        "b/5.png": encoded(wide.quantize(16)),
    }
    table = sign_files(tmp_path / form, files)
    assert [table.name(row) for row in range(5)] == sorted(files)
    assert table.labels.tolist() == [0, 0, 0, 1, 1]
    assert table.kinds == ["PNG, RGB", "BMP, RGB", "PNG, RGB", "JPEG, L", "PNG, P"]
    assert table.sizes.tolist() == [[40, 30]] * 5
    assert len(set(table.files.tolist())) == 5
    assert len(set(table.pixels.tolist())) == 3
    assert table.pixels[0] == table.pixels[1] == table.pixels[2]
    assert not table.unreadable


def test_the_same_bytes_in_another_shape_are_other_pixels() -> None:
    shapes = [np.zeros(shape, np.uint8) for shape in ((4, 9, 3), (9, 4, 3), (6, 6, 3))]
    assert len({sign_all(in_memory(image[None])).pixels[0] for image in shapes}) == 3


def test_files_and_arrays_of_the_same_pixels(tmp_path: Path) -> None:
    files = sign_files(tmp_path / "data", {"a/1.png": encoded(PHOTO), "b/2.png": encoded(OTHER)})
    arrays = sign_all(in_memory([THIRD, OTHER]))
    assert arrays.kinds == ["in memory, RGB"] * 2
    assert arrays.files.tolist() == [b"", b""]  # which match nothing
    assert named(arrays, matches_between(arrays, files), files) == {("1", "b/2.png", "same pixels")}
    assert matches_within(arrays) == []


def test_digests_survive_an_array_whatever_zeros_they_hold() -> None:
    digests = [digest(i.to_bytes(2, "little")) for i in range(3000)]
    assert any(0 in one[:-1] for one in digests)
    assert any(one[0] == 0 for one in digests)
    assert np.array(digests, dtype=f"S{DIGEST}").tolist() == digests
    assert len(set(digests)) == 3000


@pytest.mark.parametrize("form", ["data", "data.zip"])
def test_unreadable_images_are_counted_with_their_reasons(
    form: str, tmp_path: Path, bad_picture: tuple[str, bytes, str]
) -> None:
    name, data, reason = bad_picture
    files = {f"a/{i}.png": encoded(photograph(i)) for i in range(3)} | {f"a/0 {name}": data, f"b/{name}": data}
    done: list[tuple[int, int]] = []
    dataset = load_source(str(write_tree(tmp_path / form, files | {"b/1.png": files["a/1.png"]})), **WHOLE).split("all")
    table = sign_all(dataset, lambda *progress: done.append(progress))
    assert set(table.unreadable) == {f"a/0 {name}", f"b/{name}"}
    assert all(reason in said and "\n" not in said for said in table.unreadable.values())
    assert len(table) + len(table.unreadable) == len(dataset) == done[-1][0] == done[-1][1]
    assert named(table, matches_within(table)) == {("a/1.png", "b/1.png", "same file")}  # rows, not positions


def test_files_that_are_lost(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", {f"{c}/{i}.png": encoded(photograph(i)) for c in "ab" for i in range(2)})
    dataset = load_source(str(root), **WHOLE).split("train")
    (root / "a/1.png").unlink()
    table = sign_all(dataset)
    assert list(table.unreadable) == ["a/1.png"]
    assert table.indices.tolist() == [0, 2, 3]
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is gone"):
        sign_all(dataset)


def test_nothing_and_one_image() -> None:
    one = sign_all(in_memory([PHOTO]))
    nothing = sign_all(in_memory([PHOTO]).subset(np.array([], dtype=np.int64)))
    assert len(nothing) == 0
    assert matches_within(nothing) == matches_within(one) == []
    assert matches_between(nothing, one) == matches_between(one, nothing) == []
    assert clusters([], 0) == []


def test_without_imagehash_the_remedy_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(UserError, match=r"need imagehash: pip install 'allmlp\[inspect\]'"):
        sign_all(in_memory([PHOTO]))


# What is planted is found, and nothing else


@pytest.mark.parametrize("form", ["data", "data.zip"])
def test_exact_copies_are_told_by_file_then_by_pixels_and_paired_with_the_first(form: str, tmp_path: Path) -> None:
    files = {
        "a/1.png": encoded(PHOTO),
        "a/2.png": encoded(PHOTO),
        "a/3.png": encoded(PHOTO, compress_level=0),
        "b/4.png": encoded(PHOTO, compress_level=0),  # the same file as 3, and the pixels of 1
        "b/5.jpg": encoded(PHOTO, "JPEG", quality=80),
        "b/6.png": encoded(OTHER),
    }
    table = sign_files(tmp_path / form, files)
    matches = matches_within(table)
    assert named(table, matches) == {
        ("a/1.png", "a/2.png", "same file"),
        ("a/1.png", "a/3.png", "same pixels"),
        ("a/1.png", "b/4.png", "same pixels"),
        ("a/1.png", "b/5.jpg", "looks the same"),
    }
    assert clusters(matches, len(table)) == [[0, 1, 2, 3, 4]]
    two_classes = [one for one in matches if table.labels[one.first] != table.labels[one.second]]
    assert {table.name(one.second) for one in two_classes} == {"b/4.png", "b/5.jpg"}


def test_copies_that_are_encoded_anew_or_resized() -> None:
    rng = np.random.default_rng(0)
    originals = [photograph(seed) for seed in range(150)]
    copies = [encoded(image, "JPEG", quality=int(rng.integers(50, 96))) for image in originals[:50]]
    for image in originals[50:100]:
        small = image.resize((int(rng.integers(24, 128)),) * 2, FILTERS[rng.integers(3)])
        copies.append(encoded(small, *rng.choice(["PNG", "JPEG"], 1)))
    decoded = [Image.open(io.BytesIO(data)).convert("RGB") for data in copies]
    tables = [sign_all(in_memory([image])) for image in decoded]
    others = sign_all(in_memory(originals))
    found = [matches_between(table, others) for table in tables]
    assert [[one.second for one in matches] for matches in found] == [[i] for i in range(100)]


def test_different_images_do_not_match() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (150, 32, 32, 3)).astype(np.uint8)
    photographs = np.stack([photograph(seed, 32) for seed in range(300)])
    plain = np.broadcast_to(np.arange(0, 256, 8, np.uint8)[:, None, None, None], (32, 32, 32, 3))
    ramps = np.stack([np.rot90(np.mgrid[:32, :32][0] * 8, turn) for turn in range(4)]).astype(np.uint8)
    everything = np.concatenate([noise, photographs, plain, np.repeat(ramps[..., None], 3, 3)])
    assert matches_within(sign_all(in_memory(everything))) == []


def test_of_two_tables_each_image_has_its_nearest_match(tmp_path: Path) -> None:
    ours = {
        "a/file.png": encoded(PHOTO),
        "a/look.jpg": encoded(THIRD, "JPEG", quality=90),
        "a/none.png": encoded(photograph(5)),
        "b/pixels.bmp": encoded(OTHER, "BMP"),
    }
    theirs = {
        "a/1.png": encoded(PHOTO, compress_level=0),
        "a/2.png": encoded(PHOTO),
        "a/3.jpg": encoded(OTHER, "JPEG", quality=95),
        "b/4.png": encoded(OTHER),
        "b/5.jpg": encoded(THIRD, "JPEG", quality=30),
        "b/6.png": encoded(THIRD),
        "b/7.png": encoded(THIRD),
    }
    table, other = sign_files(tmp_path / "ours", ours), sign_files(tmp_path / "theirs.zip", theirs)
    matches = matches_between(table, other)
    assert [one.first for one in matches] == [0, 1, 3]
    assert named(table, matches, other) == {
        ("a/file.png", "a/2.png", "same file"),
        ("a/look.jpg", "b/6.png", "looks the same"),
        ("b/pixels.bmp", "b/4.png", "same pixels"),
    }


# How it is computed


def by_brute_force(codes: np.ndarray, thumbnails: np.ndarray, other: np.ndarray, theirs: np.ndarray) -> set:
    found = set()
    for i, (code, small) in enumerate(zip(codes.tolist(), thumbnails.astype(float), strict=True)):
        for j, (their_code, their_small) in enumerate(zip(other.tolist(), theirs.astype(float), strict=True)):
            if (code ^ their_code).bit_count() <= matching.MAX_BITS:
                distance = np.sqrt(((small - their_small) ** 2).mean())
                if distance < matching.MAX_DIFFERENCE * (min(small.std(), their_small.std()) + matching.NOISE):
                    found.add((i, j))
    return found


def crowded(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and thumbnails in groups, of which members are near one another, on both sides of the limits."""
    rng, base = np.random.default_rng(seed), np.random.default_rng(0)
    group = rng.integers(0, 10, size)
    codes = base.integers(0, 2**64, 10, dtype=np.uint64)[group]
    for _ in range(4):
        codes ^= np.uint64(1) << rng.integers(0, 64, size, dtype=np.uint64)
    noise = rng.normal(size=(size, 192)) * rng.uniform(5, 30, (size, 1))
    return codes, (base.integers(0, 256, (10, 192))[group] + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("block", [256, 5000, 1 << 22])
def test_pairs_are_those_of_brute_force_whatever_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "BLOCK", block)
    ours, theirs = crowded(1, 90), crowded(2, 70)
    expected = by_brute_force(*ours, *theirs)
    assert 50 < len(expected) < 90 * 7 / 1.3
    between = alike(*ours, *theirs)
    assert len(between) == len(set(between))
    assert set(between) == expected
    best = {one.first: one.second for one in matches_between(table_of(*ours), table_of(*theirs)) if one.kind[0] == "l"}
    within = {(i, j) for i, j in by_brute_force(*ours, *ours) if i < j}
    assert set(alike(*ours, *ours, same=True)) == within
    assert [one[:2] for one in matches_within(table_of(*ours))] == sorted(within)
    distances = np.array([[difference(a[None], b[None])[0] for b in theirs[1]] for a in ours[1]])
    for i, j in best.items():
        assert distances[i, j] == min(distances[i, k] for at, k in expected if at == i)


def test_difference_is_symmetric_and_relative_to_contrast() -> None:
    a, b = (np.random.default_rng(seed).integers(0, 100, (9, 192)).astype(np.uint8) for seed in (0, 1))
    np.testing.assert_array_equal(difference(a, b), difference(b, a))
    np.testing.assert_array_equal(difference(a, a), 0)
    assert (difference(2 * a, 2 * b) > difference(a, b)).all()  # noise counts less in more contrast
    assert (difference(2 * a, 2 * b) < 1.3 * difference(a, b)).all()


def test_memory_does_not_grow_with_the_number_of_pairs_that_are_compared() -> None:
    rng = np.random.default_rng(0)
    codes, others = rng.integers(0, 2**64, (2, 20_000), dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (20_000, 192)).astype(np.uint8)
    others[:50], tracked = codes[:50], []
    for run in (
        lambda: alike(codes, thumbnails, others, thumbnails),
        lambda: alike(np.concatenate([codes[:19_950], codes[:50]]), thumbnails, codes, thumbnails, same=True),
    ):
        tracemalloc.start()
        tracked.append(len(run()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 150e6  # all 400,000,000 differences would take 3.2 GB
    assert tracked[0] == 50


def test_of_many_images_that_look_the_same_some_pairs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the frames of a film: every image still has its nearest one, and memory does not grow with the square."""
    size, kept = 700, 3
    monkeypatch.setattr(matching, "MAX_ALIKE", kept)
    thumbnails = np.random.default_rng(0).integers(0, 8, (size, 192)) + np.arange(192) % 100
    table = table_of(np.zeros(size, np.uint64), thumbnails.astype(np.uint8))
    square = np.stack([difference(np.broadcast_to(row, (size, 192)), table.thumbnails) for row in table.thumbnails])
    assert square.max() < matching.MAX_DIFFERENCE  # all look the same
    np.fill_diagonal(square, np.inf)
    for block in (1 << 14, 1 << 22):
        monkeypatch.setattr(matching, "BLOCK", block)
        matches = matches_within(table)
        pairs = {one[:2] for one in matches}
        assert len(pairs) == len(matches) <= 2 * kept * size
        nearest = square.argmin(1)
        assert all((min(i, j), max(i, j)) in pairs for i, j in enumerate(nearest.tolist()))
        between = matches_between(table_of(table.codes[:50], table.thumbnails[:50]), table)
        assert [one[:2] for one in between] == [(i, i) for i in range(50)]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_clusters_are_connected_components(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    size, pairs = drawn
    pairs = [(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]]
    found = clusters([Match(i, j, "same file") for i, j in pairs], size)
    rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
    _, component = connected_components(coo_array((np.ones(len(pairs)), (rows, columns)), (size, size)), directed=False)
    groups = [np.flatnonzero(component == k).tolist() for k in range(component.max() + 1)]
    assert found == sorted(group for group in groups if len(group) > 1)


def test_a_zip_is_read_by_several_threads(tmp_path: Path) -> None:
    """As many images as several threads sign at a time, compared with one at a time from a folder."""
    files = {f"{c}/{i}.png": encoded(photograph(i, 16)) for c in "ab" for i in range(200)}
    zipped = sign_files(tmp_path / "data.zip", files)
    root = write_tree(tmp_path / "data", files)
    dataset = ImageDataset(
        store=FolderStore(root), names=list(zipped.dataset.names), labels=zipped.labels, classes=("a", "b")
    )
    for index in range(0, 400, 37):
        alone = sign_all(dataset.subset(np.array([index])))
        for field in ("files", "pixels", "codes"):
            assert getattr(alone, field)[0] == getattr(zipped, field)[index]
    assert len(matches_within(zipped)) == 200
