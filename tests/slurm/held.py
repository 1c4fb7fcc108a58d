"""A plug-in whose methods can be made to wait, and log their batches, through files in ALIGNBENCH_TEST_HOLD.

``<tag>.log`` has a line for every batch that was started. While ``<tag>.hold-2`` exists, batch 2 waits; while
``<tag>.slow`` exists, a batch takes seconds. Without the variable the methods are like ``last``; ids stay the same.
"""

import os
import time
from pathlib import Path
from typing import ClassVar

import pandas as pd

from alignbench import AlignMethod, Evaluator, Loss, Metric
from alignbench.flow import integrate

SLOW = 15.0  # seconds


def note(name: str, line: str) -> Path | None:
    """Add a line to a log and return its folder; None if the variable is not set."""
    folder = os.environ.get("ALIGNBENCH_TEST_HOLD")
    if not folder:
        return None
    with (Path(folder) / f"{name}.log").open("a") as file:
        file.write(f"{line}\n")
    return Path(folder)


class Held(AlignMethod):
    """Method with the gradient of the last step only, whose batches can be made to wait."""

    name: ClassVar[str] = "held"
    tag: str
    steps: int = 2

    def loss(self, flow, reward, batch):
        if folder := note(self.tag, str(batch.step)):
            while (folder / f"{self.tag}.hold-{batch.step}").exists():
                time.sleep(0.05)
            began = time.monotonic()
            while (folder / f"{self.tag}.slow").exists() and time.monotonic() - began < SLOW:
                time.sleep(0.05)
        t = flow.sigmas(self.steps)
        x = integrate(flow, batch.noise, t[:-1], batch.cond)
        x_0 = x - t[-2] * flow.velocity(x, t[-2], batch.cond)
        score = reward(flow.decode(x_0), batch.prompts)
        return Loss(reward.loss(score).mean(), {"reward": score.detach().mean()})


class Limited(Held):
    """The same method under another name, so that it can have its own resources."""

    name: ClassVar[str] = "limited"


class Counted(Evaluator):
    """Evaluator of the mean of all pixels; logs every call, and fails while the file ``broken`` exists."""

    name: ClassVar[str] = "counted"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("level", "fraction"),)

    def score(self, images, prompts):
        import numpy as np

        folder = note("scored", str(len(images)))
        if folder and (folder / "broken").exists():
            raise RuntimeError("the judge is ill")
        return pd.DataFrame({"level": [(np.asarray(image) / 255).mean() for image in images]})
