"""Batches: order and pixels depend on the seed alone, not on the workers; unreadable images keep their position."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import NOISY, recipe, replace_data, state, train
from small_runs import same as same_weights

from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import PADDING, Batch, UnreadableImages, default_workers, evaluation_batches, training_batches
from allmlp.data.randaugment import RandAugment
from allmlp.data.sources import load_source
from allmlp.data.stores import ArrayStore, FolderStore
from allmlp.data.transforms import EvaluationTransform, TrainingTransform
from allmlp.errors import RunError, UserError
from allmlp.metadata import Preprocessing

EXACT = Preprocessing(crop_ratio=1.0)
EVALUATION = EvaluationTransform(image_size=(4, 4), preprocessing=EXACT)
PLAIN = TrainingTransform(image_size=(6, 6), preprocessing=EXACT, crop="none", crop_padding=0, flip=False)
RANDOM = TrainingTransform(
    image_size=(24, 32),
    preprocessing=Preprocessing(),
    crop="inception",
    crop_padding=0,
    flip=True,
    randaugment=RandAugment(layers=2, magnitude=15),
    color_jitter=0.4,
)


class Holes(ArrayStore):
    """A store in which image 4 cannot be read."""

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        if name == "4.png":
            raise UnreadableImage(f"{name} is a hole")
        return super().open(name, max_pixels, min_side)


def dataset_of(n: int, store: type[ArrayStore] = ArrayStore) -> ImageDataset:
    names = tuple(f"{i}.png" for i in range(n))
    pixels = np.random.default_rng(0).integers(1, 256, (n, 6, 6, 3), dtype=np.uint8)
    return ImageDataset(store=store(pixels, names), names=names, labels=np.arange(n) % 3, classes=("a", "b", "c"))


def training(n: int, seed: int = 5, workers: int = 0, transform=RANDOM, store=ArrayStore, **options) -> list[Batch]:
    options = {"batch_size": 4, "steps": 6} | options
    return list(training_batches(dataset_of(n, store), transform, seed=seed, workers=workers, **options))


def samples(batches: list[Batch]) -> list[tuple[int, bytes]]:
    return [(int(i), image.numpy().tobytes()) for b in batches for i, image in zip(b.indices, b.images, strict=True)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True)) and a.problems == b.problems


def test_order_and_pixels_are_functions_of_the_seed() -> None:
    """Not of workers, micro-batches, the step that a run begins with, or global generators."""
    whole = training(10, store=Holes)
    torch.manual_seed(2)
    np.random.seed(7)  # noqa: NPY002
    for workers in (1, 2):
        assert all(map(same, whole, training(10, workers=workers, store=Holes)))
    assert all(map(same, whole[4:], training(10, store=Holes, first_step=4)))
    for size in (1, 6, 24):
        assert samples(training(10, store=Holes, batch_size=size, steps=24 // size)) == samples(whole)
    other = training(10, seed=6, store=Holes)
    assert [i for i, _ in samples(other)] != [i for i, _ in samples(whole)]
    assert not {view for _, view in samples(whole) if any(view)} & {view for _, view in samples(other)}


def test_every_sample_is_augmented_independently() -> None:
    """Of one epoch, of several, and of seeds; a batch larger than the dataset continues with the next epoch."""
    (batch,) = training(8, batch_size=24, steps=1)
    epochs = [batch.indices[i : i + 8].tolist() for i in (0, 8, 16)]
    assert [sorted(order) for order in epochs] == [list(range(8))] * 3
    assert len(set(map(tuple, epochs))) == 3  # each epoch has another order
    equal = dataset_of(1)
    equal = replace(equal, names=tuple(equal.names) * 16, labels=np.zeros(16, np.int64))
    views = [view for s in (1, 2) for _, view in samples(training(1, seed=s))]
    views += [view for _, view in samples(list(training_batches(equal, RANDOM, batch_size=16, steps=1, seed=0)))]
    assert len(set(views)) > 60  # of 64


def test_pixels_and_labels_are_those_of_the_index() -> None:
    dataset = dataset_of(10)
    for batch in training(10, transform=PLAIN):
        assert batch.images.dtype == torch.uint8
        assert batch.valid.all()
        assert batch.labels.tolist() == dataset.labels[batch.indices].tolist()
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(dataset.read(index)))


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2), (5, 0), (64, 2)])
def test_evaluation_covers_each_image_once_in_order(batch_size: int, workers: int) -> None:
    dataset = dataset_of(10)
    batches = list(evaluation_batches(dataset, EVALUATION, batch_size=batch_size, workers=workers))
    assert torch.cat([batch.indices[batch.valid] for batch in batches]).tolist() == list(range(10))
    assert torch.cat([batch.labels[batch.valid] for batch in batches]).tolist() == dataset.labels.tolist()
    assert {len(batch.images) for batch in batches} == {min(batch_size, 10)}  # the last is padded
    assert all((batch.indices[~batch.valid] == PADDING).all() and not batch.problems for batch in batches)
    assert torch.equal(torch.cat([batch.images for batch in batches])[7], EVALUATION(dataset.read(7)))


def test_invalid_sizes_and_an_empty_dataset() -> None:
    assert list(evaluation_batches(dataset_of(0), EVALUATION, batch_size=4, workers=0)) == []
    with pytest.raises(UserError, match=r"batch size 0: .*1"):
        evaluation_batches(dataset_of(1), EVALUATION, batch_size=0)
    with pytest.raises(UserError, match=r"-1 workers: .*0"):
        training(1, workers=-1)


def test_an_unreadable_image_keeps_its_position_and_changes_no_other(tmp_path: Path) -> None:
    pairs = list(zip(training(10), training(10, store=Holes), strict=True))
    whole = (evaluation_batches(dataset_of(9, store), EVALUATION, batch_size=9) for store in (ArrayStore, Holes))
    pairs += zip(*whole, strict=True)
    for sound, holed in pairs:
        assert torch.equal(holed.indices, sound.indices)
        assert torch.equal(holed.labels, sound.labels)
        assert torch.equal(holed.valid, holed.indices != 4)
        assert (holed.images[~holed.valid] == 0).all()
        assert torch.equal(holed.images[holed.valid], sound.images[holed.valid])
        assert holed.problems == [(4, "4.png is a hole")] * int((~holed.valid).sum())
    gone = replace(dataset_of(2), store=FolderStore(tmp_path))
    (batch,) = evaluation_batches(gone, EVALUATION, batch_size=2)
    assert [index for index, reason in batch.problems if "No such file" in reason] == [0, 1]
    with pytest.raises(KeyError):  # other errors are not hidden
        list(evaluation_batches(replace(dataset_of(2), names=("0.png", "no such")), EVALUATION, batch_size=2))


def test_unreadable_images_count_once_each_up_to_a_limit() -> None:
    unreadable = UnreadableImages(dataset_of(10), limit=0.3)
    assert unreadable.add([(7, "7 is broken"), (2, "2 is broken")]) == ["7 is broken", "2 is broken"]
    assert unreadable.add([(2, "2 is broken")]) == unreadable.add([]) == []
    assert unreadable.add([(2, ""), (5, "5 is broken"), (7, "")]) == ["5 is broken"]
    assert unreadable.names == ["2.png", "5.png", "7.png"]
    with pytest.raises(UserError, match=r"4 of 10 images .* 0\.3 .*--max-unreadable-fraction; the last: 9 is broken"):
        unreadable.add([(5, ""), (9, "9 is broken")])
    with pytest.raises(UserError, match="1 of 1000 images"):
        UnreadableImages(dataset_of(1000), limit=0).add([(3, "")])


@pytest.mark.parametrize("loss", ["renamed", "deleted", "emptied", "replaced", "a class"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_goes_away_is_a_failure_and_no_mistake(
    tmp_path: Path, pictures: Any, loss: str, workers: int
) -> None:
    """Each image fails alike, but it is the folder that is told of, and no limit that could be raised."""
    root = pictures(tmp_path / "data", {"red": 4, "blue": 4})
    splits = load_source(str(root), val_fraction=0, test_fraction=0)
    dataset = splits.split("train")
    assert dataset.read(0)
    match loss:
        case "renamed":
            root.rename(tmp_path / "other")
        case "deleted":
            shutil.rmtree(root)
        case "replaced":  # as by unmounting: there is a folder, but another one
            root.rename(tmp_path / "other")
            root.mkdir()
        case "emptied":
            for path in root.rglob("*.png"):
                path.unlink()
        case "a class":
            shutil.rmtree(root / "red")
            shutil.rmtree(root / "blue")

    def read_all() -> None:
        for batch in evaluation_batches(dataset, EVALUATION, batch_size=4, workers=workers):
            UnreadableImages(dataset, limit=0.1).add(batch.problems)

    said = "was deleted meanwhile: put them back" if loss == "emptied" else "is gone: put it back, and repeat or resume"
    with pytest.raises(RunError, match=said):
        read_all()


def test_one_deleted_image_is_left_out_and_a_broken_link_is_a_mistake(tmp_path: Path, pictures: Any) -> None:
    root = pictures(tmp_path / "data", {"red": 4, "blue": 4})
    (root / "red" / "link.png").symlink_to(tmp_path / "nowhere.png")
    dataset = load_source(str(root), val_fraction=0, test_fraction=0).split("train")
    (root / "blue" / "000.png").unlink()
    (batch,) = evaluation_batches(dataset, EVALUATION, batch_size=16, workers=0)
    assert len(UnreadableImages(dataset, limit=0.5).add(batch.problems)) == 2
    link = [(index, text) for index, text in batch.problems if "link.png" in text]
    with pytest.raises(UserError, match="--max-unreadable-fraction"):
        UnreadableImages(dataset, limit=0.1).add(link)


def test_images_in_memory_or_few_need_no_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def workers(store: ArrayStore | FolderStore, images: int, cores: int, processes: int = 1) -> int:
        monkeypatch.setattr("allmlp.data.loader.available_cores", lambda: cores)
        names = ("a",) * images
        dataset = ImageDataset(store=store, names=names, labels=np.zeros(images, np.int64), classes=("a",))
        return default_workers(dataset, processes)

    folder = FolderStore(tmp_path)
    assert workers(ArrayStore(np.zeros((1, 1, 1, 3), np.uint8), ["a"]), 5000, 8) == workers(folder, 99, 8) == 0
    assert [workers(folder, 100, cores) for cores in (1, 2, 8, 256)] == [1, 2, 8, 8]
    assert [workers(folder, 100, 8, processes) for processes in (2, 16)] == [4, 1]


def test_a_training_run_is_a_function_of_its_seed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of workers or global generators, with everything random: augmentation, mixing, dropout, stochastic depth."""
    replace_data(monkeypatch)
    augmentation = {"train_crop": "inception", "randaugment": 15.0, "color_jitter": 0.4}
    options = NOISY | augmentation | {"micro_batch_size": 6, "steps": 3, "epochs": None}

    def weights(workers: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
        return state(train(recipe(**options, workers=workers, seed=seed), tmp_path / f"{workers}-{seed}").model)

    first = weights()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert same_weights(weights(workers=2), first)
    other = weights(seed=2)
    assert not any(torch.equal(other[name], tensor) for name, tensor in first.items())
