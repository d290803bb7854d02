"""What the documents say of published files is what the code says."""

from pathlib import Path

from mlp_mixer.weights.known import CHECKPOINTS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_published_file_is_in_the_table() -> None:
    rows = [line for line in (DOCS / "weights.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for known in CHECKPOINTS:
        (row,) = [row for row in rows if row.startswith(f"| {known.file} |")]
        top1 = "–" if known.top1 is None else f"{known.top1 * 100:.4g} %"
        assert row == (
            f"| {known.file} | Mixer-{known.variant} | {known.data} | {known.classes:,} | {top1} | {known.source} |"
        )
