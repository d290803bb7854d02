"""What other programs put around the names of a model's tensors: wrappers of modules, and the path to the model."""

import re
from collections.abc import Iterable

from allmlp.errors import UserError, printable
from allmlp.weights.layouts import LAYOUTS, NAMES
from allmlp.weights.timm_systems import MARKS

WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's, anywhere
TOKEN_MIXING = next(row for row in NAMES if row[0] == "blocks.{i}.token_mixing.dense_0.weight")
FIRST_KERNELS = tuple(TOKEN_MIXING[layout.column].format(i=0, b=2) for layout in LAYOUTS)


def without_prefix(names: Iterable[str], file_name: str) -> dict[str, str]:
    """The names of the model's tensors → their names in the file; of a model below a prefix, only what is below it.

    PyTorch Lightning, DataParallel, averaged models and many training programs store a model below "model.", "module.",
    "net." or the like.

    Raises:
        UserError: two models, below two prefixes, or one name twice.
    """
    plain: dict[str, str] = {}
    for stored in names:
        name = WRAPPERS.sub("", stored)
        if name in plain:
            raise UserError(
                f"{file_name} contains {printable(name)!r} twice, with and without a prefix: save one of them"
            )
        plain[name] = stored
    prefixes = find_prefixes(plain)
    if len(prefixes) > 1:
        listed = " and ".join(repr(printable(prefix)) for prefix in sorted(prefixes))
        raise UserError(
            f"{file_name} holds {len(prefixes)} models, below the prefixes {listed}: save one of them alone"
        )
    prefix = prefixes.pop() if prefixes else ""
    return {name.removeprefix(prefix): stored for name, stored in plain.items() if name.startswith(prefix)}


def find_prefixes(names: Iterable[str]) -> set[str]:
    """What stands before the first token-mixing kernel of each Mixer, or the mark of each comparison system.

    Other architectures have such marks within them, at the top or below numbered layers: these are no prefixes.
    """
    names = list(names)
    systems = before(names, tuple(MARKS.values()))
    within = len(systems) > 1 and any(not prefix or re.search(r"(?:^|[./])\d+[./]", prefix) for prefix in systems)
    return before(names, FIRST_KERNELS) or (set() if within else systems)


def before(names: Iterable[str], kernels: tuple[str, ...]) -> set[str]:
    """What stands before these names."""
    found: set[str] = set()
    for name in names:
        for kernel in kernels:
            prefix = name.removesuffix(kernel)
            if prefix != name and (not prefix or prefix[-1] in "./"):
                found.add(prefix)
    return found
