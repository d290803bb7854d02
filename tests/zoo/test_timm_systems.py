"""Comparison systems against timm: the same outputs on the same weights, and timm's state dicts read and written."""

from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_systems import SMALL
from torch import nn

import allmlp
from allmlp.errors import UserError
from allmlp.factory import create
from allmlp.weights.convert import save_as


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """All weights and statistics random, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            value = torch.randn(tensor.shape, generator=generator)
            scale = 1.7 * tensor.shape[1:].numel() ** -0.5 if tensor.ndim > 1 else 0.1
            tensor.copy_(value.abs() + 0.5 if name.endswith("running_var") else value * scale)
            if (tensor.ndim == 1 and name.endswith("weight")) or name.endswith("gain"):
                tensor.add_(1.0)
    return model.eval()


def in_timm(family: str) -> nn.Module:
    """timm's own model of the family's small form with 5 classes, made by timm's functions and documented arguments."""
    if family == "vit":
        return timm.create_model(
            "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, mlp_ratio=1.5,
            num_classes=5,
        )  # fmt: skip
    if family == "bit":
        return timm.create_model("resnetv2_50x1_bit", num_classes=5)
    if family == "nfnet":
        return timm.create_model("dm_nfnet_f0", num_classes=5, depths=(1, 1, 2, 1), width_factor=0.5, group_size=64)
    return timm.create_model("tf_efficientnet_b0", num_classes=5)


MATCHING = {  # our arguments for the models above
    "vit": {"image_size": 32, "gelu": "erf", **SMALL["vit"]},
    "bit": {"image_size": 64, "depths": (3, 4, 6, 3)},
    "nfnet": {
        "image_size": 64, "depths": (1, 1, 2, 1), "channels": (128, 256, 768, 768), "num_features": 1536,
        "stem_channels": 64, "group_size": 64,
    },
    "efficientnet": {"image_size": 64, "depths": (1, 2, 2, 3, 3, 4, 1)},
}  # fmt: skip


@pytest.mark.parametrize("family", MATCHING)
def test_outputs_are_timms_on_the_same_weights(family: str, tmp_path) -> None:
    theirs = randomized(in_timm(family))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    size = MATCHING[family]["image_size"]
    ours = allmlp.load(tmp_path / "timm.safetensors", image_size=None if family == "vit" else size)
    expected = create(family, num_classes=5, **MATCHING[family]).config
    derived = {"width", "groups"} if family == "nfnet" else set()
    assert {k: v for k, v in ours.config.items() if k not in derived} == {
        k: v for k, v in expected.items() if k not in derived
    }
    images = torch.randn(3, 3, size, size).double()
    theirs, ours = theirs.double(), ours.double()  # in float32 the order of sums alone makes a few millionths
    with torch.no_grad():
        wanted, found = theirs(images), ours(images)
        pre_logits = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    assert wanted.std(0).min() > 1e-3 * wanted.std()  # the images differ
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()
    assert (ours.features(images) - pre_logits).norm() <= 1e-6 * pre_logits.norm()
    theirs, ours, images = theirs.float(), ours.float(), images.float()
    save_as(ours, tmp_path / "back.safetensors", "timm")
    back, original = load_file(tmp_path / "back.safetensors"), theirs.state_dict()
    assert back.keys() == {name for name in original if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(back[name], original[name]) for name in back)
    in_timm(family).load_state_dict(back, strict=False)
    again = allmlp.load(tmp_path / "back.safetensors")
    assert again.config == ours.config
    state = ours.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def halonet_by_hand() -> nn.Module:
    """HaloNet's small form in the words of timm's ByobNet, written out stage by stage."""
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    attention = {"self_attn_kwargs": {"block_size": 4, "halo_size": 2, "num_heads": 2}}
    stages = (
        ByoBlockCfg(type="bottle", d=1, c=48, s=1, gs=0, br=1 / 3),
        ByoBlockCfg(type="bottle", d=1, c=96, s=2, gs=0, br=1 / 3),
        ByoBlockCfg(type="self_attn", d=2, c=192, s=2, gs=0, br=1 / 3, **attention),
        ByoBlockCfg(type="self_attn", d=1, c=384, s=2, gs=0, br=1 / 3, **attention),
    )
    sizes = ByoModelCfg(
        blocks=stages, stem_type="7x7", stem_pool="maxpool", stem_chs=16, num_features=64, act_layer="silu",
        self_attn_layer="halo",
    )  # fmt: skip
    return ByobNet(sizes, num_classes=5)


def botnet_by_hand() -> nn.Module:
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    excite = {"block_kwargs": {"attn_last": True}}
    stages = (
        ByoBlockCfg(type="bottle", d=1, c=64, s=1, gs=0, br=0.25, **excite),
        ByoBlockCfg(type="bottle", d=1, c=128, s=2, gs=0, br=0.25, **excite),
        ByoBlockCfg(type="bottle", d=1, c=256, s=2, gs=0, br=0.25, **excite),
        ByoBlockCfg(type="self_attn", d=2, c=512, s=1, gs=0, br=0.25, self_attn_kwargs={"num_heads": 2}),
    )
    sizes = ByoModelCfg(
        blocks=stages, stem_type="7x7", stem_pool="maxpool", stem_chs=16, act_layer="silu", attn_layer="se",
        attn_kwargs={"rd_ratio": 1 / 16}, self_attn_layer="bottleneck", fixed_input_size=True,
    )  # fmt: skip
    return ByobNet(sizes, num_classes=5, img_size=128)


@pytest.mark.parametrize(
    ("family", "by_hand"), [("halonet", halonet_by_hand), ("botnet", botnet_by_hand)], ids=["halonet", "botnet"]
)
def test_attention_networks_are_timms_modules_with_the_published_arguments(family: str, by_hand) -> None:
    theirs = randomized(by_hand())
    ours = create(family, num_classes=5, image_size=128, **(SMALL[family] | {"stem": "imagenet"})).eval()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    ours.load_state_dict({f"backbone.{n}".replace("backbone.head.fc", "head"): t for n, t in state.items()})
    images = torch.randn(2, 3, 128, 128).double()
    with torch.no_grad():
        wanted, found = theirs.double()(images), ours.double()(images)
    assert wanted.std() > 1e-3
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_vits_position_embeddings_are_resized_as_in_timm() -> None:
    theirs = randomized(in_timm("vit"))
    ours = create("vit", num_classes=5, **MATCHING["vit"])
    state = theirs.state_dict()
    ours.load_state_dict({n if n.startswith("head.") else f"backbone.{n}": t for n, t in state.items()})
    resized = allmlp.resize(ours, 64).eval()
    theirs.set_input_size(img_size=(64, 64))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(resized(images), theirs(images))


# Files


def saved(tmp_path, family: str, change=lambda state: state):
    path = tmp_path / "timm.safetensors"
    state = {n: t for n, t in in_timm(family).state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(change(state), path)
    return path


def without(state: dict, part: str) -> dict:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        (
            "vit",
            partial(without, part="pos_embed"),
            "looks like ViT in timm's layout, but lacks .* 'pos_embed'",
        ),
        ("vit", partial(without, part="blocks.1.mlp.fc2.bias"), "1 missing: blocks.1.mlp.fc2.bias"),
        ("vit", lambda state: state | {"dist_token": torch.zeros(1)}, "that are not of one class token"),
        ("bit", partial(without, part="stages.2.blocks.0"), "looks like BiT .* the blocks of stage 2"),
        ("bit", lambda state: state | {"norm.weight": torch.ones(3, 4)}, "a complete BiT: 152 wrong shape: stem.conv"),
        ("efficientnet", lambda s: s | {"conv_stem.weight": torch.zeros(31, 3, 3, 3)}, "31 channels in its stem"),
        ("vit", lambda state: state | {"head.bias": torch.full((5,), torch.nan)}, "head.bias contains numbers"),
    ],
)
def test_incomplete_files_are_refused_in_a_line(family: str, change, said: str, tmp_path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        allmlp.load(saved(tmp_path, family, change))
    assert "\n" not in str(caught.value)


def test_a_families_without_a_layout_here_are_named(tmp_path) -> None:
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "r.safetensors")
    with pytest.raises(UserError, match="another architecture's weights"):
        allmlp.load(tmp_path / "r.safetensors")


def test_a_checkpoint_in_a_wrapper_and_half_precision(tmp_path) -> None:
    state = {f"module.{n}": t.half() if t.is_floating_point() else t for n, t in in_timm("bit").state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    model = allmlp.load(tmp_path / "checkpoint.pth", image_size=64)
    assert model.config["depths"] == (3, 4, 6, 3)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_preprocessing_comes_from_timms_config(tmp_path) -> None:
    import json

    path = saved(tmp_path, "efficientnet")
    path = path.rename(tmp_path / "model.safetensors")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    config = {"architecture": "tf_efficientnet_b0", "num_classes": 5, "label_names": list("abcde")}
    config["pretrained_cfg"] = {
        "mean": mean, "std": std, "crop_pct": 0.9, "interpolation": "bicubic", "input_size": [3, 96, 96]
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = allmlp.load(tmp_path)
    assert model.image_size == (96, 96)
    assert model.metadata.classes == tuple("abcde")
    view = model.metadata.preprocessing
    assert (view.mean, view.std, view.crop_ratio, view.interpolation) == (tuple(mean), tuple(std), 0.9, "bicubic")


def test_npz_is_for_mixers(tmp_path) -> None:
    model = create("vit", num_classes=5, image_size=32, **SMALL["vit"])
    with pytest.raises(UserError, match=r"x.npz: .*a Mixer's, and this is none: give --to timm"):
        save_as(model, tmp_path / "x.npz", "npz")


def test_what_shapes_do_not_tell_comes_from_timms_config(tmp_path, caplog) -> None:
    import json

    theirs = randomized(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_heads=12, num_classes=5))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert allmlp.load(tmp_path).config["num_heads"] == 3  # as usual for this width
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 12}}))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(allmlp.load(tmp_path)(images), theirs(images), rtol=1e-4, atol=1e-4)
    narrow = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=96, num_heads=3, num_classes=5)
    save_file(narrow.state_dict(), tmp_path / "narrow.safetensors")
    (tmp_path / "config.json").unlink()
    allmlp.load(tmp_path / "narrow.safetensors")
    assert "does not say its number of attention heads: 1 are assumed" in caplog.text


def test_other_paddings_are_refused_or_told(tmp_path, caplog) -> None:
    import json

    path = saved(tmp_path, "efficientnet").rename(tmp_path / "model.safetensors")
    model = allmlp.load(path)
    assert "taken as one of TensorFlow's EfficientNets" in caplog.text
    assert model.metadata.preprocessing.mean == (0.485, 0.456, 0.406)
    assert "are assumed, as timm has for most EfficientNet" in caplog.text
    config = {"architecture": "efficientnet_b0", "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is efficientnet_b0, whose padding is not .* give tf_efficientnet_b0"):
        allmlp.load(path)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "position embeddings that are not of one class token"),
        ("deit3_small_patch16_224", {"depth": 1}, "position embeddings that are not of one class token"),
        (
            "mobilenetv3_small_100",
            {},
            "looks like EfficientNet in timm's layout, but .* the blocks of stage",
        ),
        ("swin_tiny_patch4_window7_224", {}, "another architecture's weights; give a Mixer's, or timm's of ViT, BiT"),
        ("resnet18", {}, "another architecture's weights; give a Mixer's, or timm's of ViT, BiT"),
    ],
)
def test_networks_like_these_are_refused_with_the_reason(name: str, options: dict, said: str, tmp_path) -> None:
    state = {n: t.contiguous() for n, t in timm.create_model(name, **options).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        allmlp.load(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)
