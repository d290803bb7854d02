"""Table 1: the seven Mixers, counted."""

from typing import Any

from allmlp.reproduce.published import read_table
from allmlp.reproduce.systems import config_at, cost_at
from allmlp.reproduce.tables.table import Column, Table, View, decimals, integer

SIZES = {  # key of a row → header of the published table, option of a Mixer
    "layers": ("num_layers", "num_blocks"),
    "patch": ("patch_size_px", "patch_size"),
    "channels": ("hidden_size_C", "hidden_dim"),
    "tokens": ("sequence_length_S_at_224", None),
    "channels_mlp_dim": ("mlp_dim_DC", "channels_mlp_dim"),
    "tokens_mlp_dim": ("mlp_dim_DS", "tokens_mlp_dim"),
}
JFT_CLASSES = 18_291  # Sun et al. 2017, arXiv:1707.02968; the paper says 18k

COLUMNS = (
    Column(key="model", name="model", short="model"),
    *(
        Column(key=key, name=name, short=short, unit=unit, source=source, form=integer)
        for source in ("published", "computed")
        for key, name, short, unit in (
            (f"{source}_layers", "layers", "layers", ""),
            (f"{source}_patch", "patch resolution", "patch", "pixels"),
            (f"{source}_channels", "hidden size C", "C", ""),
            (f"{source}_tokens", "sequence length S", "S", ""),
            (f"{source}_channels_mlp_dim", "MLP dimension D_C", "D_C", ""),
            (f"{source}_tokens_mlp_dim", "MLP dimension D_S", "D_S", ""),
        )
    ),
    Column(key="preprint_millions", name="parameters in the preprint", short="preprint", unit="millions",
           source="published", form=integer),
    Column(key="published_millions", name="parameters without head", short="published", unit="millions",
           source="published", form=integer),
    Column(key="parameters", name="parameters without head", short="ours", source="computed", form=integer),
    Column(key="parameters_1000", name="parameters with a head of 1000 classes", short="1000 classes",
           source="computed", form=integer),
    Column(key="gmacs_224", name="cost of an image of 224 pixels", short="224 px", unit="GMAC", source="computed",
           form=decimals(3)),
    Column(key="gmacs_448", name="cost of an image of 448 pixels", short="448 px", unit="GMAC", source="computed",
           form=decimals(3)),
)  # fmt: skip
VIEWS = (
    View(
        title="sizes, as published and as built",
        columns=("model", *(f"computed_{key}" for key in SIZES)),
    ),
    View(
        title="parameters: published in millions without head, and ours",
        columns=("model", "preprint_millions", "published_millions", "parameters", "parameters_1000"),
    ),
    View(
        title="GMAC per image, ours (the paper prints none); 448: D_S × 4", columns=("model", "gmacs_224", "gmacs_448")
    ),
)


def table1() -> Table:
    """Table 1 beside our models, built on the meta device."""
    rows = [row_of(published) for published in read_table(1)]
    return Table(
        name="table1",
        title="Table 1: the Mixer architectures",
        columns=COLUMNS,
        rows=rows,
        views=VIEWS,
        notes=[compare_sizes(rows), compare_parameters(rows), explain_preprint(rows)],
    )


def row_of(published: Any) -> dict[str, Any]:
    model = published["model"]
    config = config_at(model)
    height, width = config["image_size"]
    ours = {key: config[option] for key, (_, option) in SIZES.items() if option is not None}
    ours["patch"] = ours["patch"][0]
    ours["tokens"] = (height // ours["patch"]) * (width // ours["patch"])
    return {
        "model": model,
        **{f"published_{key}": int(published[header]) for key, (header, _) in SIZES.items()},
        **{f"computed_{key}": ours[key] for key in SIZES},
        "preprint_millions": int(published["params_v1_millions"]),
        "published_millions": int(published["params_v2_millions"]),
        "parameters": cost_at(model, num_classes=0).parameters,
        "parameters_1000": cost_at(model).parameters,
        "gmacs_224": cost_at(model).macs / 1e9,
        "gmacs_448": cost_at(model, 448).macs / 1e9,
    }


def compare_sizes(rows: list[dict[str, Any]]) -> str:
    different = [
        f"{row['model']}'s {key} ({row[f'published_{key}']} published, {row[f'computed_{key}']} here)"
        for row in rows
        for key in SIZES
        if row[f"published_{key}"] != row[f"computed_{key}"]
    ]
    return f"Sizes that differ: {', '.join(different)}." if different else "All sizes are the published ones."


def compare_parameters(rows: list[dict[str, Any]]) -> str:
    different = [row["model"] for row in rows if round(row["parameters"] / 1e6) != row["published_millions"]]
    if different:
        return f"Parameters, rounded to millions, that are not the published ones: {', '.join(different)}."
    return "Parameters without head, rounded to the nearest million, equal the published column in every cell."


def explain_preprint(rows: list[dict[str, Any]]) -> str:
    """What the preprint's column of parameters shows, by arithmetic on these rows."""
    low, high = preprint_offset(rows)
    per_channel = [
        (row["parameters"] - 1e6 * row["preprint_millions"]) / 1e3 / row["published_channels"] for row in rows
    ]
    text = (
        "The preprint (arXiv v1) printed other parameter counts, which no architecture of these sizes has: they are "
        f"too small, in millions, by {describe_gaps(rows)}. For each of the C channels that is about the same number, "
        f"{min(per_channel):.1f} to {max(per_channel):.1f} thousand, whatever the number of layers and patches, as if "
        "by a linear layer on the C features."
    )
    if low <= high:
        text += (
            f" A classifier of JFT-300M's {JFT_CLASSES:,} classes has {JFT_CLASSES:,} · C weights. Subtracting it from "
            f"counts that never included it, and adding {low:.2f} to {high:.2f} million to each, gives all seven "
            "numbers after rounding. So a head seems to have been subtracted from counts without one; what the "
            "remainder is, the paper does not tell. The published version (v2) corrects the column."
        )
    return text


def describe_gaps(rows: list[dict[str, Any]]) -> str:
    """The missing millions of each C: "8 to 9 (C = 512), …"."""
    gaps: dict[int, list[float]] = {}
    for row in rows:
        gaps.setdefault(row["published_channels"], []).append(row["parameters"] / 1e6 - row["preprint_millions"])
    parts = []
    for channels, found in gaps.items():
        span = " to ".join(dict.fromkeys(f"{gap:.1f}" for gap in sorted(found)))
        parts.append(f"{span} (C = {channels})")
    return ", ".join(parts)


def preprint_offset(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Millions that, added to the counts less the weights of a JFT-300M head, give the preprint's after rounding."""
    rests = [
        row["preprint_millions"] - (row["parameters"] - JFT_CLASSES * row["published_channels"]) / 1e6 for row in rows
    ]
    return max(rests) - 0.5, min(rests) + 0.5
