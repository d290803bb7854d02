"""Predictions: in order, for any number of images in constant memory, independent of the other images in a batch."""

import itertools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp
from allmlp.data.decode import UnreadableImage
from allmlp.errors import UserError
from allmlp.inference.batches import read_ahead
from allmlp.inference.images import find_images
from allmlp.inference.predict import predict, predict_stream

SIZES = {"patch_size": 4, "num_blocks": 1, "hidden_dim": 4, "tokens_mlp_dim": 2, "channels_mlp_dim": 4}


def small_model(classes: int = 3, head: bool = True):
    model = allmlp.create(num_classes=classes, image_size=8, seed=0, **SIZES)
    if head and classes:
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


class FakeStore:
    """Gray images by number; those named in ``bad`` cannot be read."""

    def __init__(self, bad: frozenset[str] = frozenset()) -> None:
        self.bad = bad
        self.lock, self.opened = threading.Lock(), 0

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        with self.lock:
            self.opened += 1
        if name in self.bad:
            raise UnreadableImage(f"{name} cannot be read: it is bad; replace it")
        return Image.new("RGB", (8, 8), (int(name) % 256, int(name) // 256 % 256, 0))


def test_any_number_of_images_in_constant_memory() -> None:
    store, batch_size, total = FakeStore(), 16, 20_000
    asked = consumed = most = 0

    def places():
        nonlocal asked
        for i in range(total):
            asked += 1
            yield store, str(i), str(i)

    options = {"top": 1, "batch_size": batch_size, "device": "cpu", "precision": "float32"}
    stream = predict_stream(small_model(), places(), **options)
    for consumed, prediction in enumerate(itertools.islice(stream, 2000), 1):  # the rest is never requested
        most = max(most, asked - consumed)
        assert prediction.image == str(consumed - 1)
    stream.close()
    assert consumed == 2000
    assert store.opened <= asked <= consumed + 3 * batch_size
    assert batch_size < most <= 3 * batch_size


def test_reading_stops_with_its_consumer() -> None:
    store = FakeStore()
    asked = 0

    def places():
        nonlocal asked
        while True:
            asked += 1
            yield store, str(asked), str(asked)

    stream = predict_stream(small_model(), places(), batch_size=4, device="cpu")
    assert next(stream).image == "1"
    stream.close()
    assert asked <= 12


def test_predictions_do_not_depend_on_the_batch() -> None:
    model, store = small_model(), FakeStore(frozenset({"5", "9"}))
    places = [(store, str(i), f"image {i}") for i in range(23)]
    options = {"top": 3, "device": "cpu", "precision": "float32"}
    one_by_one = list(predict_stream(model, places, batch_size=1, **options))
    for size in (4, 23, 100):
        together = list(predict_stream(model, places, batch_size=size, **options))
        for a, b in zip(one_by_one, together, strict=True):
            assert a.image == b.image
            assert a.problem == b.problem
            assert [name for name, _ in a.classes] == [name for name, _ in b.classes]
            assert [p for _, p in a.classes] == pytest.approx([p for _, p in b.classes], abs=1e-6)
    assert [p.image for p in one_by_one if p.problem] == ["image 5", "image 9"]
    assert all(sum(value for _, value in p.classes) == pytest.approx(1) for p in one_by_one if not p.problem)


def test_only_unreadable_images() -> None:
    store = FakeStore(frozenset({"0", "1"}))
    found = list(predict_stream(small_model(), [(store, "0", "0"), (store, "1", "1")], batch_size=1, device="cpu"))
    assert [p.problem for p in found] == [f"{i} cannot be read: it is bad; replace it" for i in "01"]
    assert list(predict_stream(small_model(), [], device="cpu")) == []


def test_agrees_with_the_model_itself() -> None:
    model = small_model().eval()
    pixels = torch.tensor([200.0, 3.0, 0.0])[:, None, None].expand(3, 8, 8)
    with torch.no_grad():
        expected = model((pixels[None] / 255 - 0.5) / 0.5).softmax(-1)[0]
    place = (FakeStore(), str(200 + 3 * 256), "x")
    (found,) = predict_stream(model, [place], top=3, device="cpu", precision="float32")
    order = expected.argsort(descending=True).tolist()
    assert [name for name, _ in found.classes] == [str(i) for i in order]  # classes without names are numbered
    assert [p for _, p in found.classes] == pytest.approx(expected[order].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (lambda: small_model(0), {}, "no head"),
        (lambda: small_model(head=False), {}, "all zero"),
        (small_model, {"top": 0}, "top = 0"),
        (small_model, {"batch_size": 0}, "batch_size = 0"),
        (small_model, {"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_refusals(model, options, said) -> None:
    with pytest.raises(UserError, match=said):
        list(predict_stream(model(), [(FakeStore(), "1", "1")], **options))


def test_a_head_is_judged_by_what_it_does() -> None:
    """A bias alone classifies nothing; a single weight does."""
    model, image = small_model(head=False), (FakeStore(), "1", "1")
    torch.nn.init.normal_(model.head.bias)
    with pytest.raises(UserError, match="all zero"):
        predict_stream(model, [image], device="cpu")
    with torch.no_grad():
        model.head.weight[0, 0] = 1
    assert len(list(predict_stream(model, [image], device="cpu"))) == 1


def test_paths_as_text_or_path(tmp_path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    model = small_model()
    assert predict(model, [str(path)], device="cpu") == predict(model, [path], device="cpu")
    with pytest.raises(UserError, match="no image at"):
        predict(model, [tmp_path / "none.png"])


def test_images_of_a_folder_are_found_in_order(tmp_path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a.webp", "notes.txt", "c/deep/er.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shown = [show for _, _, show in find_images(tmp_path)]
    assert shown == [f"{tmp_path}/{name}" for name in ("a.webp", "b/1.JPG", "b/2.png", "c/deep/er.tiff")]


def test_read_ahead_keeps_order_and_depth() -> None:
    asked: list[int] = []

    def items():
        for i in range(50):
            asked.append(i)
            yield i

    for seen, (item, squared) in enumerate(read_ahead(lambda i: i * i, items(), 7)):
        assert item == seen
        assert squared == seen * seen
        assert len(asked) <= seen + 7
