"""How a resize changes the costs of a model, for the commands info and resize."""

from dataclasses import asdict
from typing import Any

COUNTS = ("parameters", "macs", "flops", "activation_bytes")


def compare_costs(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Sizes and costs of two model configurations, and the ratios of the costs."""
    from allmlp.factory import build_meta
    from allmlp.flops import cost

    keys = [key for key in ("image_size", "tokens_mlp_dim") if key in before]
    old, new = asdict(cost(build_meta(before))), asdict(cost(build_meta(after)))
    return {
        "from": {key: before[key] for key in keys} | old,
        "to": {key: after[key] for key in keys} | new,
        "times": {key: new[key] / old[key] for key in COUNTS},
    }


def print_comparison(costs: dict[str, Any]) -> None:
    old, new, times = costs["from"], costs["to"], costs["times"]
    sizes = " → ".join("×".join(map(str, one["image_size"])) for one in (old, new))
    counts = f"parameters {old['parameters']:,} → {new['parameters']:,} (× {times['parameters']:.2f})"
    more = f"FLOPs × {times['flops']:.2f}, activations × {times['activation_bytes']:.2f}"
    widths = f", D_S {old['tokens_mlp_dim']} → {new['tokens_mlp_dim']}" if "tokens_mlp_dim" in old else ""
    print(f"  resized {sizes} px: {counts}, {more}{widths}")
