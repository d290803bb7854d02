"""Models of one channel take any image as gray; those of other numbers of channels say what they need."""

import numpy as np
import pytest
import torch
from PIL import Image

import allmlp
from allmlp.data.transforms import to_gray
from allmlp.errors import UserError
from allmlp.model import Mixer

SIZES = {"num_classes": 2, "image_size": 16, "patch_size": 8, "num_blocks": 1, "hidden_dim": 8}


def model(channels: int) -> Mixer:
    made = allmlp.create(**SIZES, tokens_mlp_dim=4, channels_mlp_dim=8, in_channels=channels)
    torch.nn.init.normal_(made.get_parameter("head.weight"))
    return made


def test_pixels_become_gray_as_in_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    gray = to_gray(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])[0, 0].numpy()
    assert np.array_equal(gray, np.asarray(Image.fromarray(pixels).convert("L")))


def test_a_gray_model_predicts_any_image(mixer, pictures, tmp_path) -> None:
    gray = model(1)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    found = allmlp.predict(gray, [picture, picture.convert("L")], device="cpu")
    (first, second), names = (dict(row.classes) for row in found), ("0", "1")
    assert [first[name] for name in names] == pytest.approx([second[name] for name in names], abs=0.01)
    assert allmlp.features(gray, picture, device="cpu").shape == (1, 8)
    assert allmlp.transform(gray)(picture).shape == (1, 16, 16)
    data = pictures(tmp_path / "data", {"red": 4, "blue": 4})
    allmlp.save(gray, tmp_path / "gray.safetensors", classes=["blue", "red"])
    weights = tmp_path / "gray.safetensors"
    for words in (("predict", weights, data), ("evaluate", weights, "--data", data)):
        answer = mixer(*words)
        assert answer.status == 0, answer.err
    assert mixer("finetune", weights, "--data", data).last.endswith("or train from scratch")


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_refused(channels: int) -> None:
    picture = Image.new("RGB", (16, 16))
    calls = (allmlp.predict, allmlp.features, lambda model, image: allmlp.transform(model))
    for call in calls:
        with pytest.raises(UserError, match=f"takes {channels} channels.*of your own"):
            call(model(channels), picture)
