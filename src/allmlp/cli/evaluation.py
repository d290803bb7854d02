"""What evaluate and fewshot share on the command line: how images are computed, and on which processes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from allmlp.api.recipe import height_and_width
from allmlp.cli.docstrings import help_from_docstrings

if TYPE_CHECKING:
    from allmlp.api.evaluate import EvaluationOptions
    from allmlp.factory import Model
    from allmlp.metadata import Crop

Part = Literal["test", "val", "train", "all"]


@dataclass(frozen=True, kw_only=True)
@help_from_docstrings
class ComputeOptions:
    image_size: tuple[int, ...] = ()
    """Resize the weights to this size in pixels, one number, or height and width; by default, their own size."""
    crop_ratio: float | None = None
    """Image size / size before the central crop, 0.875 in the paper; None: as for the weights."""
    exclude: str | None = None
    """A file that lists images to leave out, one name a line or CSV, such as mixer data dedup writes."""
    processes: int = 1
    """Number of processes on this machine, one per GPU, that share the images."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int | None = None
    """Processes that load images; None: chosen from the number of images and CPU cores."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it."""
    max_pixels: int = 64_000_000
    """Largest image that is read, in pixels; larger ones count as unreadable."""

    def options(self, part: Part, crop: "Crop | None") -> "EvaluationOptions":
        """As the functions take them."""
        from allmlp.api.evaluate import EvaluationOptions

        return EvaluationOptions(
            part=part,
            crop=crop,
            crop_ratio=self.crop_ratio,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            precision=self.precision,
            max_pixels=self.max_pixels,
            exclude=self.exclude,
        )

    def load(self, weights: str) -> "Model":
        """The model of a WEIGHTS argument, resized if an --image-size is given."""
        from allmlp.weights.load import load
        from allmlp.weights.resize import resize

        model = load(weights)
        return resize(model, height_and_width(self.image_size)) if self.image_size else model
