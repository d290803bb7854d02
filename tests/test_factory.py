"""Models by name: what ``create`` accepts and refuses, and models without memory."""

import pytest
import torch

from allmlp.errors import UserError
from allmlp.factory import build_meta, create, resolve_name
from allmlp.model import Mixer
from allmlp.variants import VARIANTS


def on_meta(variant: str | None, **options) -> Mixer:
    with torch.device("meta"):
        return create(variant, **options)


@pytest.mark.parametrize(
    "name", ["B/16", "b/16", "B_16", "b_16", "Mixer-B/16", "mixer-b/16", "Mixer-B_16", "mixer_b_16"]
)
def test_spellings_of_a_variant_are_equivalent(name: str) -> None:
    assert resolve_name(name) == "B/16"
    assert on_meta(name).config == on_meta("B/16").config


def test_defaults_are_the_papers() -> None:
    config = on_meta("B/16").config
    assert config["image_size"] == (224, 224)
    assert config["num_classes"] == 1000
    assert config["in_channels"] == 3
    assert config["gelu"] == "tanh"
    assert config["dropout"] == config["stochastic_depth"] == 0


def test_options_override_the_variants_sizes_unless_none() -> None:
    plain = on_meta("B/16").config
    model = on_meta("B/16", num_classes=10, image_size=(32, 48), num_blocks=2, hidden_dim=None, gelu="erf")
    changes = {"num_classes": 10, "image_size": (32, 48), "num_blocks": 2, "gelu": "erf"}
    assert model.config == plain | changes
    assert len(model.blocks) == 2
    assert model.grid == (2, 3)
    assert VARIANTS["B/16"]["num_blocks"] == 12  # the table itself does not change


def test_custom_sizes_need_no_variant() -> None:
    sizes = {"num_blocks": 2, "patch_size": 4, "hidden_dim": 8, "tokens_mlp_dim": 6, "channels_mlp_dim": 12}
    options = {"num_classes": 3, "image_size": 8, "in_channels": 1, "seed": 4}
    model, direct = create(**sizes, **options), Mixer(**sizes, **options)
    assert model.config == direct.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), direct.parameters(), strict=True))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_missing_sizes_are_named() -> None:
    with pytest.raises(UserError, match=r"no variant .* hidden_dim, channels_mlp_dim missing: .* 'B/16'"):
        create(num_blocks=2, patch_size=4, tokens_mlp_dim=6)
    with pytest.raises(UserError, match="num_blocks, patch_size, hidden_dim, tokens_mlp_dim, channels_mlp_dim missing"):
        create()


@pytest.mark.parametrize(
    ("name", "nearest"), [("B/61", "B/16"), ("B16", "B/16"), ("H/16", "H/14"), ("mixer-l/14", "L/16")]
)
def test_an_unknown_variant_is_refused_with_the_nearest_and_all_names(name: str, nearest: str) -> None:
    listed = "`mixer models` lists all, such as S/32, .*H/14"
    with pytest.raises(UserError, match=rf"unknown model '{name}'; the nearest: [^;]*{nearest}.*; {listed}"):
        create(name)


@pytest.mark.parametrize(
    ("option", "nearest"), [("hiden_dim", "hidden_dim"), ("drop_out", "dropout"), ("blocks", "num_blocks")]
)
def test_an_unknown_option_is_refused_with_the_nearest(option: str, nearest: str) -> None:
    with pytest.raises(
        UserError, match=rf"unknown option '{option}' of a Mixer: the nearest are {nearest}(, \w+){{0,2}}$"
    ):
        create("S/32", **{option: 1})


def test_build_meta_has_the_shapes_and_the_config_but_no_memory_and_draws_nothing() -> None:
    sizes = {"num_blocks": 2, "patch_size": 4, "hidden_dim": 8, "tokens_mlp_dim": 6, "channels_mlp_dim": 12}
    model = Mixer(**sizes, num_classes=3, image_size=8, gelu="erf", stochastic_depth=0.5, seed=0)
    before = torch.get_rng_state()
    built = build_meta(model.config)
    assert torch.equal(torch.get_rng_state(), before)
    assert built.config == model.config
    assert all(parameter.is_meta for parameter in built.parameters())
    built.load_state_dict(model.state_dict(), assign=True)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(built.eval()(images), model.eval()(images))


def test_create_is_a_function_of_the_package_whatever_was_imported() -> None:
    import allmlp

    assert allmlp.create is create


def test_a_variant_unlike_all_others_is_refused_with_all_names() -> None:
    with pytest.raises(
        UserError, match=r"'zzz'; `mixer models` lists all, such as S/32, S/16, B/32, B/16, L/32, L/16, H/14"
    ):
        create("zzz")


def test_an_option_unlike_all_others_is_refused_with_all_names() -> None:
    with pytest.raises(UserError, match=r"unknown option 'zzz' .*channels_mlp_dim, .*stochastic_depth, tokens_mlp_dim"):
        create("S/32", zzz=1)
