"""Three plain numbers that move when a reward is gamed: a grid at the patch period, saturation, brightness.

Users of reward fine-tuning report pictures with fine grids (at the period of the tokens), with strong colours, and
brighter pictures at an equal reward. No weights, and no opinion: no direction is better in itself.

- ``grid_energy``, from -1 to 1: of the luma's differences along rows, the power P at the frequencies (j / p, k / p),
  j = 0 ... p - 1 down and k = 1 ... p / 2 across, of the patch period p, against the mean N of the two bins on either
  side of each k: (P - N) / (P + N), summed over j and k before the division; the same along columns; the mean of both.
  0: nothing particular at that period, as for noise or a smooth picture (of a small one a little less: few bins, and
  a quotient); 1: all of it repeats with period p.
  Differences, because a photograph's spectrum falls with the square of the frequency, and theirs is flat: so no k
  outweighs the others.
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
    """Grid at the patch period, saturation, brightness. ``patch``: pixels; None: the sweep's model's, or else 16.

    A picture with fewer than two periods along a side cannot be scored.
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
        """One row per image."""
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
    """Of an (H, W) picture; nan if a side has fewer than two periods of ``patch`` pixels."""
    return (_along_rows(luma, patch) + _along_rows(luma.T, patch)) / 2


def _along_rows(luma: NDArray[np.float64], patch: int) -> float:
    import numpy as np

    down, periods = (side // patch for side in luma.shape)
    if min(down, periods) < 2:
        return float("nan")
    length = periods * patch  # whole periods: then the frequencies k / patch are bins of their own
    whole = luma[: down * patch, :length]
    spectrum = np.fft.fft2(whole - np.roll(whole, 1, axis=1))
    power = np.square(np.abs(spectrum[::down])).sum(0)
    harmonics = periods * np.arange(1, patch // 2 + 1)
    beside = [offset for offset in (1, 2) if 2 * offset <= max(periods - 1, 2)]  # no further than half-way to the next
    at = power[harmonics].sum()
    around = np.mean([power[(harmonics + sign * offset) % length].sum() for offset in beside for sign in (1, -1)])
    total = at + around
    return (
        float((at - around) / total) if total > 1e-12 * length**2 else 0.0
    )  # of an even picture only rounding is left
