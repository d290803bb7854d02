"""The configuration of a comparison system: checked, completed, and recognized as a published one."""

import difflib
from collections.abc import Mapping
from typing import Any

from allmlp.errors import UserError
from allmlp.zoo.families import FAMILIES
from allmlp.zoo.family import REQUIRED, check_common
from allmlp.zoo.systems import SYSTEMS

DERIVED = ("gelu", "block_size", "group_size")  # from the weights, the image size or the width
COMMON = ("num_classes", "image_size", "in_channels", "dropout", "stochastic_depth", "rescale")


def complete(system: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration of a family's model, with its defaults, in a fixed order.

    Raises:
        UserError: an unknown family or argument (with the nearest), or a missing or invalid one.
    """
    if system not in FAMILIES:
        raise UserError(f"unknown family {system!r} of comparison systems: there are {', '.join(FAMILIES)}")
    family = FAMILIES[system]
    valid = [*COMMON, *family.sizes]
    given = {name: value for name, value in arguments.items() if name != "system"}
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 3)
            raise UserError(
                f"unknown option {name!r} of {family.title}: the nearest are {', '.join(near or family.sizes)}"
            )
    sizes = {name: given.get(name, default) for name, default in family.sizes.items()}
    if missing := [name for name, value in sizes.items() if value is REQUIRED]:
        raise UserError(f"{family.title} without {', '.join(missing)}: add them, or name a published system")
    config = {"system": system, **{name: given[name] for name in COMMON}, **sizes}
    return family.check(check_common(config))


def name_of_system(config: Mapping[str, Any]) -> str | None:
    """The name of the published system with these sizes; None for others. Any image size is the same system."""
    for system in SYSTEMS.values():
        if config["system"] != system.family:
            continue
        sizes = dict(FAMILIES[system.family].sizes) | dict(system.sizes)
        if all(config[name] == value for name, value in sizes.items() if name not in DERIVED):
            return system.name
    return None
