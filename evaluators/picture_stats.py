"""Three image statistics that move when a reward is hacked: a grid at the patch period, saturation, brightness.

Users of reward fine-tuning report images with fine grids (at the period of the tokens), strong colours, and more
brightness at an equal reward. The statistics need no weights, and neither direction is better in itself.

- ``grid_energy``, from -1 to 1, is the contrast (P - N) / (P + N) of two powers in the luma's differences along rows:
  P at the frequencies (j / p, k / p), j = 0 ... p - 1 down and k = 1 ... p / 2 across, of the patch period p; N, the
  mean of the two bins on either side of each k; both summed over j and k. It is averaged with the same along columns.
  0: nothing special at that period, as for noise or a smooth image (slightly less for a small one, with few bins in
  a quotient); 1: all power repeats with period p.
  It takes differences because their spectrum is flat, so that no k outweighs the others, while a photograph's own
  spectrum falls with the square of the frequency.
- ``saturation``, 0 to 1: the mean over pixels of max(R, G, B) - min(R, G, B), the chroma of HSV.
- ``brightness``, 0 to 1: the mean luma, 0.299 R + 0.587 G + 0.114 B (Rec. 601), of the stored values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from alignbench.evaluator import Evaluator, Metric

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from PIL.Image import Image

    from alignbench.prompts import Prompt

PATCH = 16  # pixels: an autoencoder's factor of 8 x 2 latents packed into a token, as in FLUX.1 and SD3
LUMA = (0.299, 0.587, 0.114)


class PictureStats(Evaluator):
    """Grid at the patch period, saturation, brightness. ``patch``: pixels; None: that of the sweep's model, or else 16.

    An image with fewer than two periods along a side cannot be scored.
    """

    name: ClassVar[str] = "picture_stats"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("grid_energy", "contrast", higher_is_better=None),
        Metric("saturation", "fraction", higher_is_better=None),
        Metric("brightness", "fraction", higher_is_better=None),
    )

    patch: Annotated[int, Meta(ge=2)] | None = None

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image."""
        import numpy as np
        import pandas as pd

        rows = []
        for image in images:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
            luma = pixels @ np.array(LUMA)
            chroma = pixels.max(-1) - pixels.min(-1)
            rows.append((grid_energy(luma, self.patch or PATCH), chroma.mean(), luma.mean()))
        return pd.DataFrame(rows, columns=[metric.name for metric in self.metrics], dtype="float64")


def grid_energy(luma: NDArray[np.float64], patch: int) -> float:
    """Return the grid energy of an (H, W) image; nan if a side has fewer than two periods of ``patch`` pixels."""
    return (_along_rows(luma, patch) + _along_rows(luma.T, patch)) / 2


def _along_rows(luma: NDArray[np.float64], patch: int) -> float:
    import numpy as np

    down, periods = (side // patch for side in luma.shape)
    if min(down, periods) < 2:
        return float("nan")
    length = periods * patch  # whole periods, so that each frequency k / patch is a bin
    whole = luma[: down * patch, :length]
    spectrum = np.fft.fft2(whole - np.roll(whole, 1, axis=1))
    power = np.square(np.abs(spectrum[::down])).sum(0)
    harmonics = periods * np.arange(1, patch // 2 + 1)
    offsets = [offset for offset in (1, 2) if 2 * offset <= max(periods - 1, 2)]  # at most half-way to the next
    at = power[harmonics].sum()
    around = np.mean([power[(harmonics + sign * offset) % length].sum() for offset in offsets for sign in (1, -1)])
    total = at + around  # rounding errors alone, if the image is uniform
    return float((at - around) / total) if total > 1e-12 * length**2 else 0.0
