"""Batches: order and pixels depend on the seed alone, not on the workers; unreadable images keep their position."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allmlp.config.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, RunRecipe
from allmlp.data.dataset import ImageDataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.loader import (
    PADDING,
    Batch,
    TrainingOrder,
    TransformedDataset,
    UnreadableImages,
    default_workers,
    evaluation_batches,
    make_loader,
    training_batches,
)
from allmlp.data.randaugment import RandAugment
from allmlp.data.sources import load_source
from allmlp.data.stores import ArrayStore, FolderStore
from allmlp.data.transforms import EvaluationTransform, TrainingTransform
from allmlp.errors import UserError
from allmlp.evaluation.classification import classify
from allmlp.metadata import Preprocessing
from allmlp.training.run import train

EXACT = Preprocessing(crop_ratio=1.0)
EVALUATION = EvaluationTransform(image_size=(4, 4), preprocessing=EXACT)
TRAINING = TrainingTransform(image_size=(4, 4), preprocessing=EXACT, crop="inception", crop_padding=0, flip=True)


@dataclass
class Holes:
    """A store in which some images cannot be read."""

    inner: ArrayStore
    holes: frozenset[str]
    in_memory = False

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        if name in self.holes:
            raise UnreadableImage(f"{name} cannot be read: it is a hole")
        return self.inner.open(name, max_pixels, min_side)


def dataset_of(n: int, holes: tuple[int, ...] = ()) -> ImageDataset:
    names = tuple(f"{i}.png" for i in range(n))
    pixels = np.random.default_rng(0).integers(1, 256, (n, 6, 6, 3), dtype=np.uint8)
    store = ArrayStore(pixels, names)
    labels = np.arange(n) % 3
    if not holes:
        return ImageDataset(store=store, names=names, labels=labels, classes=("a", "b", "c"))
    holed = Holes(store, frozenset(f"{i}.png" for i in holes))
    return ImageDataset(store=holed, names=names, labels=labels, classes=("a", "b", "c"))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True)) and a.problems == b.problems


def indices(images: int, batch_size: int, steps: int, seed: int = 0, first_step: int = 0) -> list[tuple[int, int]]:
    return [key for keys in TrainingOrder(images, batch_size, steps, seed, first_step) for key in keys]


# The order


@pytest.mark.parametrize(("images", "batch_size"), [(12, 4), (10, 4), (7, 3), (1, 2), (3, 8)])
def test_every_epoch_is_a_permutation(images: int, batch_size: int) -> None:
    keys = indices(images, batch_size, 5 * images)[: 5 * images // images * images]
    for epoch in range(len(keys) // images):
        row = keys[epoch * images : (epoch + 1) * images]
        assert {e for e, _ in row} == {epoch}
        assert sorted(i for _, i in row) == list(range(images))


def test_all_batches_are_full_and_as_many_as_steps() -> None:
    order = TrainingOrder(10, 4, 7, 0)
    assert [len(keys) for keys in order] == [4] * 7
    assert len(order) == 7


def test_epochs_and_seeds_differ() -> None:
    rows = [tuple(i for _, i in indices(50, 50, 3, seed)[e * 50 : e * 50 + 50]) for seed in range(3) for e in range(3)]
    assert len(set(rows)) == 9
    assert tuple(range(50)) not in rows


def test_the_batch_size_does_not_change_the_order() -> None:
    assert indices(10, 4, 15) == indices(10, 6, 10) == indices(10, 60, 1)


@pytest.mark.parametrize("first_step", [0, 1, 2, 5, 6])
def test_an_order_can_start_at_any_step(first_step: int) -> None:
    whole = list(TrainingOrder(10, 4, 7, 3))
    rest = TrainingOrder(10, 4, 7, 3, first_step)
    assert list(rest) == whole[first_step:]
    assert len(rest) == 7 - first_step
    assert list(rest) == list(rest)


# Training batches


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    dataset = dataset_of(10, holes=(4,))
    options = {"batch_size": 4, "steps": 6, "seed": 5}
    alone = list(training_batches(dataset, TRAINING, workers=0, **options))
    together = list(training_batches(dataset, TRAINING, workers=workers, **options))
    assert len(alone) == len(together) == 6
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_batches_are_the_same_when_started_at_another_step() -> None:
    dataset = dataset_of(10)
    whole = list(training_batches(dataset, TRAINING, batch_size=4, steps=6, seed=5, workers=0))
    rest = list(make_loader(TransformedDataset(dataset, TRAINING, 5), TrainingOrder(10, 4, 6, 5, first_step=4), 0))
    assert len(rest) == 2
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_global_generators_of_torch_and_numpy_have_no_effect() -> None:
    def batches() -> list[Batch]:
        return list(training_batches(dataset_of(10), TRAINING, batch_size=4, steps=5, seed=1, workers=0))

    torch.manual_seed(1)
    first = batches()
    torch.manual_seed(2)
    np.random.seed(7)  # noqa: NPY002
    assert all(same(a, b) for a, b in zip(first, batches(), strict=True))


def test_augmentation_differs_between_epochs_and_seeds() -> None:
    views = {
        batch.images[0].numpy().tobytes()
        for seed in (1, 2)
        for batch in training_batches(dataset_of(1), TRAINING, batch_size=1, steps=8, seed=seed, workers=0)
    }
    assert len(views) > 12


def test_images_of_one_epoch_are_augmented_independently() -> None:
    dataset = dataset_of(1)
    same_image = ImageDataset(
        store=dataset.store, names=tuple(dataset.names) * 16, labels=np.zeros(16, np.int64), classes=dataset.classes
    )
    (batch,) = training_batches(same_image, TRAINING, batch_size=16, steps=1, seed=0, workers=0)
    assert len({image.numpy().tobytes() for image in batch.images}) > 12


def test_pixels_and_labels_are_those_of_the_index() -> None:
    dataset = dataset_of(10)
    plain = TrainingTransform(image_size=(6, 6), preprocessing=EXACT, crop="none", crop_padding=0, flip=False)
    for batch in training_batches(dataset, plain, batch_size=4, steps=5, seed=0, workers=0):
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.valid.all()
        for image, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(dataset.read(int(index))))
            assert label == dataset.labels[index]


def test_a_batch_larger_than_the_dataset_continues_with_the_next_epoch() -> None:
    (batch,) = training_batches(dataset_of(3), TRAINING, batch_size=8, steps=1, seed=0, workers=0)
    assert batch.images.shape == (8, 3, 4, 4)
    assert sorted(batch.indices[:3].tolist()) == sorted(batch.indices[3:6].tolist()) == [0, 1, 2]
    assert len({image.numpy().tobytes() for image in batch.images}) == 8  # augmented differently in the second epoch


# Evaluation batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 64])
def test_evaluation_covers_each_image_once_in_order(batch_size: int, workers: int) -> None:
    dataset = dataset_of(10)
    batches = list(evaluation_batches(dataset, EVALUATION, batch_size=batch_size, workers=workers))
    assert torch.cat([batch.indices[batch.valid] for batch in batches]).tolist() == list(range(10))
    assert torch.cat([batch.labels[batch.valid] for batch in batches]).tolist() == dataset.labels.tolist()
    assert {len(batch.images) for batch in batches} == {min(batch_size, 10)}  # the last is padded
    padding = [index for batch in batches for index in batch.indices[~batch.valid].tolist()]
    assert padding == [PADDING] * (len(batches) * min(batch_size, 10) - 10)
    assert not any(batch.problems for batch in batches)
    assert torch.equal(torch.cat([batch.images for batch in batches])[7], EVALUATION(dataset.read(7)))


def test_an_empty_dataset_gives_no_batches() -> None:
    assert list(evaluation_batches(dataset_of(10).subset(np.arange(0)), EVALUATION, batch_size=4, workers=0)) == []


# Unreadable images


def test_an_unreadable_image_keeps_its_position_and_moves_no_other() -> None:
    (sound,) = evaluation_batches(dataset_of(6), EVALUATION, batch_size=6, workers=0)
    (holed,) = evaluation_batches(dataset_of(6, holes=(1, 4)), EVALUATION, batch_size=6, workers=0)
    assert holed.valid.tolist() == [True, False, True, True, False, True]
    assert (holed.images[~holed.valid] == 0).all()
    assert torch.equal(holed.images[holed.valid], sound.images[holed.valid])
    assert torch.equal(holed.labels, sound.labels)
    assert torch.equal(holed.indices, sound.indices)
    assert holed.problems == [
        (1, "1.png cannot be read: it is a hole"),
        (4, "4.png cannot be read: it is a hole"),
    ]
    assert sound.valid.all()
    assert sound.problems == []


def test_an_unreadable_image_changes_nothing_of_the_others_in_training() -> None:
    options = {"batch_size": 4, "steps": 5, "seed": 0, "workers": 0}
    pairs = zip(
        training_batches(dataset_of(10), TRAINING, **options),
        training_batches(dataset_of(10, holes=(3,)), TRAINING, **options),
        strict=True,
    )
    lost = 0
    for sound, holed in pairs:
        assert torch.equal(sound.indices, holed.indices)
        assert torch.equal(sound.images[holed.valid], holed.images[holed.valid])
        lost += int((~holed.valid).sum())
    assert lost == 2


def test_a_file_that_disappears_is_an_unreadable_image(tmp_path: Path) -> None:
    dataset = dataset_of(2)
    gone = ImageDataset(
        store=FolderStore(tmp_path), names=dataset.names, labels=dataset.labels, classes=dataset.classes
    )
    (batch,) = evaluation_batches(gone, EVALUATION, batch_size=2, workers=0)
    assert not batch.valid.any()
    assert [index for index, _ in batch.problems] == [0, 1]
    assert "0.png cannot be read: No such file" in batch.problems[0][1]


def test_other_errors_are_not_hidden() -> None:
    dataset = dataset_of(2)
    broken = ImageDataset(
        store=dataset.store, names=("0.png", "no such"), labels=dataset.labels, classes=dataset.classes
    )
    with pytest.raises(KeyError):
        list(evaluation_batches(broken, EVALUATION, batch_size=2, workers=0))


def problems_of(*indices: int) -> list[tuple[int, str]]:
    """In the format of ``Batch.problems``."""
    return [(i, f"{i}.png is broken") for i in indices]


def test_unreadable_images_count_once_each() -> None:
    unreadable = UnreadableImages(dataset_of(10), limit=0.3)
    assert unreadable.add(problems_of(7, 2)) == ["7.png is broken", "2.png is broken"]
    assert unreadable.add(problems_of(2)) == []
    assert unreadable.add(problems_of(2, 5, 7)) == ["5.png is broken"]
    assert unreadable.names == ["2.png", "5.png", "7.png"]


def test_more_unreadable_images_than_allowed_stop_the_run() -> None:
    unreadable = UnreadableImages(dataset_of(10), limit=0.3)
    unreadable.add(problems_of(0, 1, 2))
    message = (
        r"4 of 10 images cannot be read, more than the limit of 0\.3 of them: repair or remove them, or raise "
        r"--max-unreadable-fraction; the last: 9\.png is broken"
    )
    with pytest.raises(UserError, match=message):
        unreadable.add(problems_of(1, 9))


def test_a_limit_of_zero_allows_none() -> None:
    unreadable = UnreadableImages(dataset_of(1000), limit=0)
    assert unreadable.add(problems_of()) == []
    with pytest.raises(UserError, match="1 of 1000 images"):
        unreadable.add(problems_of(3))


# Workers


def test_images_in_memory_or_few_need_no_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def on_disk(n: int) -> ImageDataset:
        names = tuple(map(str, range(n)))
        return ImageDataset(store=FolderStore(tmp_path), names=names, labels=np.zeros(n, np.int64), classes=("a",))

    def chosen(dataset: ImageDataset, cores: int | None) -> int:
        monkeypatch.setattr("os.cpu_count", lambda: cores)
        return default_workers(dataset)

    assert chosen(dataset_of(5000), 8) == 0
    assert chosen(on_disk(99), 8) == 0
    assert [chosen(on_disk(100), cores) for cores in (None, 1, 2, 8, 256)] == [1, 1, 2, 8, 8]


def test_a_generator_for_each_sample_is_independent_of_the_order() -> None:
    views = TransformedDataset(dataset_of(10), TRAINING, 0)
    forward = [views[(e, i)][0] for e in range(2) for i in range(5)]
    backward = [views[(e, i)][0] for e in (1, 0) for i in reversed(range(5))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert len(list(islice(forward, 10))) == 10


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of 30 JPEGs in two classes: noise on gradients."""
    path, rng = tmp_path_factory.mktemp("jpegs") / "images.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(30):
            across = np.linspace(0, 200, 60)[None, :, None] * rng.random(3)
            noisy = across + rng.integers(0, 50, (45, 60, 3))
            file = io.BytesIO()
            Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG")
            archive.writestr(f"{'ab'[i % 2]}/{i:02d}.jpg", file.getvalue())
    return path


@pytest.fixture(scope="session")
def samples(jpegs: Path) -> Callable[..., list[tuple[int, str]]]:
    """The (index, hash of the pixels) of 60 samples (two epochs) with every kind of augmentation."""
    dataset = load_source(str(jpegs), val_fraction=0, test_fraction=0).splits["train"]
    view = TrainingTransform(
        image_size=(24, 32),
        preprocessing=Preprocessing(),
        crop="inception",
        crop_padding=0,
        flip=True,
        randaugment=RandAugment(layers=2, magnitude=15),
        color_jitter=0.4,
    )

    @cache
    def made(workers: int = 0, batch_size: int = 12, seed: int = 1) -> list[tuple[int, str]]:
        batches = training_batches(
            dataset, view, batch_size=batch_size, steps=60 // batch_size, seed=seed, workers=workers
        )
        return [
            (int(index), hashlib.sha256(image.numpy().tobytes()).hexdigest())
            for batch in batches
            for index, image in zip(batch.indices, batch.images, strict=True)
        ]

    return made


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on a machine with few cores
@pytest.mark.parametrize(("workers", "batch_size"), [(2, 12), (4, 12), (2, 4)])
def test_order_and_pixels_are_the_same_for_any_number_of_workers(
    workers: int, batch_size: int, samples: Callable[..., list[tuple[int, str]]]
) -> None:
    assert samples(workers, batch_size) == samples(0, 12)


def test_order_and_pixels_are_the_same_in_micro_batches(samples: Callable[..., list[tuple[int, str]]]) -> None:
    """A step of 12 is three of 4, or twelve of 1."""
    assert len(samples()) == 60
    assert samples(0, 4) == samples(0, 1) == samples(0, 12)


def test_order_and_pixels_are_another_seeds_own(samples: Callable[..., list[tuple[int, str]]]) -> None:
    first, second = samples(seed=1), samples(seed=2)
    assert [index for index, _ in first] != [index for index, _ in second]
    assert len({pixels for _, pixels in first}) == 60  # each image differs in the second epoch
    assert not {pixels for _, pixels in first} & {pixels for _, pixels in second}


class Silence:
    def update(self, done: int, total: int, text: str) -> None:
        pass


@pytest.fixture(scope="session")
def trained(jpegs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """The weights of a run of five steps with everything random: augmentation, mixing, dropout, stochastic depth."""

    def weights(workers: int = 0, seed: int = 1) -> dict[str, bytes]:
        sizes = {"patch_size": 8, "num_blocks": 2, "hidden_dim": 8, "tokens_mlp_dim": 6, "channels_mlp_dim": 16}
        recipe = Recipe(
            model=ModelRecipe(image_size=16, dropout=0.1, stochastic_depth=0.2, **sizes),
            data=DataRecipe(
                data=str(jpegs),
                val_fraction=0,
                test_fraction=0,
                randaugment=15,
                color_jitter=0.4,
                mixup=0.2,
                cutmix=1.0,
                mix_group_size=4,
                workers=workers,
            ),
            optimization=OptimizationRecipe(steps=5, global_batch_size=12, micro_batch_size=4, warmup_steps=0),
            run=RunRecipe(seed=seed, device="cpu", precision="float32", compile="off"),
        )
        model = train(recipe, tmp_path_factory.mktemp("run") / "run", classify, Silence()).model
        return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}

    return weights


def test_a_training_run_is_a_function_of_its_seed_bit_for_bit(trained: Callable[..., dict[str, bytes]]) -> None:
    first = trained(workers=0)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert trained(workers=2) == first
    assert trained(workers=0) == first
    other = trained(workers=0, seed=2)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)
