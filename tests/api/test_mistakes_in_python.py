"""A wrong argument of any public call: one UserError, in one line, that names value and remedy; nothing is left."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import allmlp
from allmlp.errors import UserError

SIZES: dict[str, Any] = {
    "num_blocks": 1, "hidden_dim": 8, "tokens_mlp_dim": 4, "channels_mlp_dim": 8, "patch_size": 8, "image_size": 16
}  # fmt: skip
FAST: dict[str, Any] = {"compile": "off", "workers": 0, "steps": 1, "device": "cpu"}
IMAGE = np.zeros((16, 16, 3), np.uint8)
NAN = float("nan")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> allmlp.Mixer:
    monkeypatch.chdir(tmp_path)
    model = allmlp.create(num_classes=10, **SIZES)
    nn.init.normal_(model.get_parameter("head.weight"))
    return model


def create(**options: Any) -> Any:
    return allmlp.create(**{"num_classes": 2, **SIZES, **options})


def fill(model: allmlp.Mixer, value: float) -> allmlp.Mixer:
    nn.init.constant_(model.get_parameter("head.weight"), value)
    return model


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    # create, and the model itself
    "no variant": (lambda m: allmlp.create(3), "model 3.*B/16"),
    "classes": (lambda m: create(num_classes="10"), "num_classes = '10'.*whole number"),
    "size": (lambda m: create(image_size=NAN), "nan.*pixels"),
    "dropout": (lambda m: create(dropout="a"), "dropout = 'a'.*probability"),
    "seed": (lambda m: create(seed=1.5), "seed = 1.5.*whole"),
    "rescale": (lambda m: create(rescale="yes"), "rescale = 'yes'.*True or False"),
    "option": (lambda m: create(depth=3), "'depth'.*nearest"),
    "images shape": (lambda m: m(torch.zeros(1, 3, 8, 8)), "3, 8, 8.*16, 16"),
    "images type": (lambda m: m(torch.zeros(1, 3, 16, 16).byte()), "uint8.*floats"),
    "images kind": (lambda m: m.features(np.zeros((1, 3, 16, 16))), "ndarray.*tensor"),
    "images device": (lambda m: m(torch.zeros(1, 3, 16, 16, device="meta")), "meta.*cpu"),
    "tokens": (lambda m: allmlp.MixerBlock(4, 8, 4, 8)(torch.zeros(1, 5, 8)), "1, 5, 8.*4, 8"),
    "tokens 2-D": (lambda m: allmlp.MixerBlock(4, 8, 4, 8)(torch.zeros(4, 8)), "4, 8"),
    "block": (lambda m: allmlp.MixerBlock(0, 8, 4, 8), "tokens = 0"),
    # files
    "load nothing": (lambda m: allmlp.load(None), "path = None.*give a path"),
    "load a state dict": (lambda m: allmlp.load(m.state_dict()), "OrderedDict.*give a path"),
    "save nothing": (lambda m: allmlp.save(m.state_dict(), "a.safetensors"), "OrderedDict.*give a Mixer"),
    "save nowhere": (lambda m: allmlp.save(m, None), "path = None"),
    "save names": (lambda m: allmlp.save(m, "a.safetensors", classes=3), "classes = 3.*list of strings"),
    "save provenance": (lambda m: allmlp.save(m, "a.safetensors", x={1}), "not JSON"),
    "save NaN": (lambda m: allmlp.save(fill(m, NAN), "a.safetensors"), "head.weight.*not finite"),
    "save meta": (lambda m: allmlp.save(m.to("meta"), "a.safetensors"), "meta device"),
    "push": (lambda m: allmlp.push_to_hub(m, 3, license="mit"), "repo = 3.*OWNER/NAME"),
    "resize another": (lambda m: allmlp.resize(nn.Linear(2, 2), 32), "Linear.*give a Mixer"),
    "set size": (lambda m: m.to("meta").set_input_size(32), "meta device"),
    "resize": (lambda m: allmlp.resize(m, 17), "17×17.*16×16"),
    # predict, features, transform
    "predict by a path": (lambda m: allmlp.predict("w.safetensors", IMAGE), r"'w.safetensors'.*allmlp\.load"),
    "predict another": (lambda m: allmlp.predict(nn.Linear(2, 2), IMAGE), "Linear"),
    "predict meta": (lambda m: allmlp.predict(m.to("meta"), IMAGE), "meta device"),
    "predict NaN": (lambda m: allmlp.predict(fill(m, NAN), IMAGE), "NaN.*precision float32"),
    "predict zero": (lambda m: allmlp.predict(fill(m, 0), IMAGE), "all zero.*train"),
    "predict none": (lambda m: allmlp.predict(m, [None]), "None.*PIL"),
    "predict gone": (lambda m: allmlp.predict(m, "gone.png"), "gone.png"),
    "predict empty": (lambda m: allmlp.predict(m, ""), "image = ''"),
    "predict floats": (lambda m: allmlp.predict(m, IMAGE / 255), "float64.*uint8"),
    "predict text": (lambda m: allmlp.predict(m, io.StringIO("a")), "mode 'rb'"),
    "top": (lambda m: allmlp.predict(m, IMAGE, top=1.5), "top = 1.5"),
    "batch": (lambda m: allmlp.predict(m, IMAGE, batch_size="a"), "batch_size = 'a'"),
    "pixels": (lambda m: allmlp.predict(m, IMAGE, max_pixels=0), "max_pixels = 0"),
    "device": (lambda m: allmlp.predict(m, IMAGE, device=None), "device None.*cpu"),
    "device name": (lambda m: allmlp.features(m, IMAGE, device="toaster"), "'toaster'.*cuda"),
    "no features": (lambda m: allmlp.features(m, []), "no images"),
    "transform": (lambda m: allmlp.transform(None), "model None"),
    "transform two": (lambda m: allmlp.transform(m)([IMAGE, IMAGE]), "2 images.*one"),
    # train, finetune, evaluate
    "keyword": (lambda m: allmlp.train(epoch=3), "'epoch'.*epochs"),
    "recipe": (lambda m: allmlp.train("digit"), "'digit'.*digits"),
    "no recipe": (lambda m: allmlp.train(3), "3.*recipe.json"),
    "model": (lambda m: allmlp.train(model=m), r"model = Mixer\(.*str"),
    "value": (lambda m: allmlp.train(decay="cubic"), "decay = 'cubic'.*'linear', 'cosine'"),
    "not a number": (lambda m: allmlp.train(learning_rate=NAN), "learning_rate.*nan"),
    "no out": (lambda m: allmlp.train(resume=True), "resume=True.*out"),
    "out": (lambda m: allmlp.train(out=3), "out = 3.*path"),
    "finetune nothing": (lambda m: allmlp.finetune(None, "digits"), "model None.*Mixer"),
    "finetune recipe": (lambda m: allmlp.finetune(m, "digits", 3), "recipe 3.*name"),
    "finetune keyword": (lambda m: allmlp.finetune(m, "digits", hidden_dim=3), "hidden_dim.*nearest"),
    "finetune near": (lambda m: allmlp.finetune(m, "digits", seed_count=3), "seed_count.*seed"),
    "no data": (lambda m: allmlp.finetune(m), "^no data: "),
    "data": (lambda m: allmlp.finetune(m, "digit", **FAST), "'digit'.*digits"),
    "rates": (lambda m: allmlp.finetune(m, "digits", learning_rates=0.1), "learning_rates = 0.1.*list"),
    "no rates": (lambda m: allmlp.finetune(m, "digits", learning_rates=[]), r"learning_rates = \[\].*learning_rate"),
    "sizes": (lambda m: allmlp.finetune(m, "digits", image_size=(1, 2, 3)), "1, 2, 3"),
    "evaluate a path": (lambda m: allmlp.evaluate("w.safetensors", "digits"), r"w.safetensors.*allmlp\.load"),
    "evaluate NaN": (lambda m: allmlp.evaluate(fill(m, NAN), "digits", workers=0, device="cpu"), "NaN"),
    "part": (lambda m: allmlp.evaluate(m, "digits", part="tset"), "tset.*test"),
    "precision": (lambda m: allmlp.evaluate(m, "digits", precision="half"), "half.*float32"),
    "evaluate data": (lambda m: allmlp.evaluate(m, 3), "3.*folder"),
    "workers": (lambda m: allmlp.evaluate(m, "digits", workers=1.5), "workers = 1.5"),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_error_says_what_is_wrong_and_leaves_nothing(model: allmlp.Mixer, name: str, tmp_path: Path) -> None:
    call, said = CALLS[name]
    with pytest.raises(UserError, match=said) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value), "options of the command"
    assert not list(tmp_path.iterdir())


def test_a_model_compiled_or_wrapped_is_saved_and_resized(model: allmlp.Mixer) -> None:
    expected = model.state_dict()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        allmlp.save(wrapped, "a.safetensors")  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(allmlp.load("a.safetensors").state_dict(), expected, rtol=0, atol=0)
        assert allmlp.resize(wrapped, 32).image_size == (32, 32)  # pyright: ignore[reportArgumentType]
