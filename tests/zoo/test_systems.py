"""The comparison systems: published sizes, configurations, names, image sizes."""

import dataclasses

import pytest
import torch
from small_systems import SMALL

from allmlp.errors import UserError
from allmlp.factory import build_meta, create, describe_model, name_of, resized_config, resolve_name
from allmlp.flops import cost
from allmlp.zoo.families import FAMILIES
from allmlp.zoo.model import ZooModel
from allmlp.zoo.systems import SYSTEMS

# millions, with a head of 1000 classes and without; multiply-accumulates are those that the systems' papers print
PARAMETERS = {
    "ViT-B/32": (88.22, 87.46),
    "ViT-B/16": (86.57, 85.80),
    "ViT-L/32": (306.54, 305.51),
    "ViT-L/16": (304.33, 303.30),
    "ViT-H/14": (632.05, 630.76),
    "BiT-R50x1": (25.55, 23.50),
    "BiT-R50x2": (97.99, 93.89),
    "BiT-R152x1": (60.19, 58.14),
    "BiT-R152x2": (236.34, 232.24),
    "BiT-R152x4": (936.53, 928.34),
    "BiT-R200x3": (568.63, 562.49),
    "ResNet50x1": (25.55, 23.50),
    "NFNet-F4+": (525.04, 520.94),
    "EfficientNet-B6-Wide": (316.65, 310.25),
    "EfficientNet-L2": (468.60, 467.22),
    "HaloNet-H4": (69.83, 68.55),
    "BoTNet-T7": (69.18, 67.13),
}


def on_meta(name: str, **options) -> ZooModel:
    with torch.device("meta"):
        return create(name, **options)


@pytest.mark.parametrize("name", SYSTEMS)
def test_published_sizes_have_the_expected_parameters(name: str) -> None:
    for num_classes, millions in zip((1000, 0), PARAMETERS[name], strict=True):
        model = on_meta(name, num_classes=num_classes)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
        assert model.image_size == (SYSTEMS[name].image_size,) * 2
    assert name_of(model.config) == ("BiT-R50x1" if name == "ResNet50x1" else name)


def test_every_system_is_in_the_table() -> None:
    assert PARAMETERS.keys() == SYSTEMS.keys()


@pytest.mark.parametrize(("name", "gmacs"), [("ViT-B/16", 17.56), ("BoTNet-T7", 45.8), ("BiT-R50x1", 4.1)])
def test_operations_are_those_of_the_literature(name: str, gmacs: float) -> None:
    assert cost(on_meta(name)).macs / 1e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize("spelling", ["ViT-B/16", "vit-b/16", "VIT-B_16", "vit_b_16", " vit b/16"])
def test_spellings_are_equivalent(spelling: str) -> None:
    assert resolve_name(spelling) == "ViT-B/16"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("ViT-B/14", "ViT-B/16"), ("BiT-R50x3", "BiT-R50x1"), ("NFNet-F4", "NFNet-F4+"), ("vitt", "vit")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match="unknown model") as caught:
        create(name)
    assert nearest in str(caught.value)


@pytest.mark.parametrize("family", SMALL)
def test_small_forms_compute_logits_and_features_with_a_zero_head(family: str) -> None:
    model = create(family, num_classes=7, image_size=32, **SMALL[family]).eval()
    images = torch.randn(3, 3, 32, 32)
    features = model.features(images)
    assert features.shape == (3, model.num_features)
    assert features.std() > 0
    assert torch.equal(model(images), torch.zeros(3, 7))
    assert torch.equal(model.forward_head(model.forward_features(images), pre_logits=True), features)
    assert describe_model(model.config).startswith(FAMILIES[family].title)
    bare = create(family, num_classes=0, image_size=32, seed=3, **SMALL[family]).eval()
    assert bare(images).shape == features.shape


@pytest.mark.parametrize("family", SMALL)
def test_the_seed_determines_the_weights_on_the_meta_device_too(family: str) -> None:
    from allmlp.factory import init_weights

    torch.manual_seed(1)
    first = create(family, num_classes=4, image_size=32, seed=5, **SMALL[family])
    before = torch.get_rng_state()
    second = create(family, num_classes=4, image_size=32, seed=5, **SMALL[family])
    assert torch.equal(before, torch.get_rng_state())  # a seed leaves torch's generator alone
    other = create(family, num_classes=4, image_size=32, seed=6, **SMALL[family])
    filled = build_meta(first.config).to_empty(device="cpu")
    init_weights(filled, 5)
    states = [model.state_dict() for model in (first, second, filled, other)]
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:3] for name in states[0])
    assert not all(torch.equal(states[0][name], states[3][name]) for name in states[0])


@pytest.mark.parametrize("family", SMALL)
def test_masks_depend_on_the_sample_alone(family: str) -> None:
    """The same keys give the same masks in a batch of another order; other keys give others."""
    options = SMALL[family] | {"dropout": 0.3, "stochastic_depth": 0.5}
    model = create(family, num_classes=4, image_size=32, seed=1, **options).double().train()
    torch.nn.init.normal_(model.head.weight)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # else the result depends on the rest of the batch
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("skipinit_gain") or (parameter.ndim == 1 and not parameter.any()):
                parameter.fill_(0.7)  # branches that start at zero would hide their masks
    images, keys = torch.randn(6, 3, 32, 32).double(), torch.arange(6) + 100
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    with torch.no_grad():
        plain, shuffled = model(images, keys), model(images[order], keys[order])
        torch.testing.assert_close(shuffled, plain[order])
        assert torch.equal(model(images, keys), plain)
        assert not torch.allclose(model(images, keys + 1), plain)
        assert not torch.allclose(model.eval()(images), plain)


def test_frozen_backbones_keep_their_statistics() -> None:
    model = create("efficientnet", num_classes=3, image_size=32, **SMALL["efficientnet"])
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(torch.randn(4, 3, 32, 32))
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model.head.training


def test_reset_classifier_and_images_of_another_kind() -> None:
    model = create("vit", num_classes=3, image_size=32, in_channels=1, **SMALL["vit"])
    model.metadata = dataclasses.replace(model.metadata, classes=("a", "b", "c"), provenance={"test_top1": 0.9})
    model.reset_classifier(5)
    assert model.config["num_classes"] == model.get_classifier().out_features == 5
    assert model.metadata.classes is None
    assert model.metadata.provenance == {}
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    model.reset_classifier(0)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 128)
    with pytest.raises(UserError, match="this model takes"):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("family", SMALL)
def test_another_image_size(family: str) -> None:
    import allmlp

    model = create(family, num_classes=3, image_size=32, seed=1, **SMALL[family]).eval()
    torch.nn.init.normal_(model.head.weight)
    model.metadata = dataclasses.replace(model.metadata, provenance={"val_top1": 0.5})
    resized = allmlp.resize(model, (64, 96))
    assert resized.image_size == (64, 96)
    assert resized.config == resized_config(model.config, (64, 96))
    assert resized(torch.randn(2, 3, 64, 96)).shape == (2, 3)
    assert resized.metadata.provenance["resized_from"] == [[32, 32]]
    assert model.image_size == (32, 32)
    same = allmlp.resize(model, 32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(same(images), model(images))


def test_relative_positions_are_interpolated_around_distance_zero() -> None:
    import allmlp
    from allmlp.zoo.resolution import interpolated

    model = create("botnet", num_classes=3, image_size=32, seed=1, **SMALL["botnet"])
    resized = allmlp.resize(model, 64)
    pairs = [(a, dict(resized.named_parameters())[name]) for name, a in model.named_parameters() if "_rel" in name]
    assert pairs
    for before, after in pairs:
        assert len(after) == 2 * (len(before) + 1) - 1
        torch.testing.assert_close(after[len(after) // 2], before[len(before) // 2])
    line = torch.nn.Parameter(torch.arange(-3.0, 4.0)[:, None])
    torch.testing.assert_close(interpolated(line, 13).detach()[:, 0], torch.arange(-3.0, 3.1, 0.5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "ViT-B/16", "image_size": 230}, r"230×230.*multiples of 16.*224×224"),
        ({"variant": "vit", "image_size": 32}, "ViT without patch_size, num_blocks, hidden_dim, num_heads"),
        ({"variant": "ViT-B/16", "num_heads": 7}, r"num_heads = 7: must divide hidden_dim, 768; the nearest: .*8"),
        ({"variant": "ViT-B/16", "tokens_mlp_dim": 3}, "unknown option 'tokens_mlp_dim' of ViT"),
        ({"variant": "BiT-R50x1", "depths": (3, 4, 6)}, r"depths = \(3, 4, 6\): give 4 numbers"),
        ({"variant": "BiT-R50x1", "depths": (3, 4, 0, 1)}, "depths = 0: must be a whole number, at least 1"),
        ({"variant": "BiT-R50x1", "width": -1}, "width = -1: give a factor"),
        ({"variant": "bit", "depths": (1,) * 4, "width": 0.1, "image_size": 32}, "GroupNorm has one number"),
        (
            {"variant": "B/16", "depths": (1,)},
            "'depths' is no option of a Mixer, but of bit, halonet, nfnet, efficientnet",
        ),
        ({"variant": "BiT-R50x1", "image_size": 0}, "must be at least 1 pixel"),
        ({"variant": "B/16", "image_size": 0}, "at least 1 pixel"),
        ({"variant": "BiT-R50x1", "groups": 7}, "groups = 7: must divide the 64 channels"),
        ({"variant": "BiT-R50x1", "stem": "huge"}, "stem = 'huge': must be one of imagenet, small"),
        ({"variant": "HaloNet-H4", "image_size": 400}, "400×400: HaloNet needs multiples of 32"),
        (
            {"variant": "HaloNet-H4", "image_size": 384, "block_size": 5},
            "blocks of 5 needs multiples of 160.*block_size",
        ),
        ({"variant": "BoTNet-T7", "image_size": 390}, "390×390: BoTNet needs multiples of 16.*384×384"),
        ({"variant": "EfficientNet-L2", "last_conv": 3}, "last_conv = 3: must be True or False"),
        ({"variant": "NFNet-F4+", "group_size": 4096}, "group_size = 4096: the narrowest convolution has 192 channels"),
        ({"variant": "NFNet-F4+", "dropout": 1.5}, "dropout = 1.5: must be a probability"),
        ({"variant": "BiT-R50x1", "rescale": 2}, "rescale = 2: must be True or False"),
        ({"variant": "BiT-R50x1", "in_channels": 0}, "in_channels = 0: must be a whole number, at least 1"),
        ({"variant": "BoTNet-T7", "num_heads": 3}, "num_heads = 3: must divide"),
    ],
)
def test_bad_sizes_are_refused_in_a_line(options: dict, said: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=said) as caught:
        create(**options)
    assert "\n" not in str(caught.value)


def test_block_size_follows_the_image() -> None:
    sizes = {side: on_meta("HaloNet-H4", image_size=side).config["block_size"] for side in (224, 256, 384, 512)}
    assert sizes == {224: 7, 256: 8, 384: 12, 512: 8}
    with pytest.raises(UserError, match=r"blocks of 12 needs multiples of 384"):
        on_meta("HaloNet-H4").set_input_size(512)


REDUCED = {"vit": {"num_blocks": 1}, "efficientnet": {"depths": (1,) * 7}}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_published_width_computes_and_takes_a_step_with_fewer_blocks(name: str) -> None:
    from allmlp.api.bench import make_training_step
    from allmlp.throughput.subject import fill_with_noise

    system = SYSTEMS[name]
    options = REDUCED.get(system.family, {"depths": (1,) * 4})
    config = on_meta(name, num_classes=3, image_size=28 if name == "ViT-H/14" else 32, **options).config
    model = build_meta(config).to_empty(device="cpu")
    fill_with_noise(model)
    images = torch.rand(2, 3, *model.image_size)
    with torch.no_grad():
        logits = model.eval()(images)
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    before = model.head.weight.clone()
    make_training_step(model, torch.device("cpu"), torch.float32)(2)
    assert not torch.equal(model.head.weight, before)
    assert all(p.isfinite().all() for p in model.parameters())
