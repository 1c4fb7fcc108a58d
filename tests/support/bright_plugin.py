"""A plug-in file as a user would write it: a reward for bright images, and methods that fail on demand."""

import os
from typing import ClassVar

import pandas as pd

from alignbench import AlignMethod, Evaluator, Loss, Metric, UserError
from alignbench.flow import integrate


class Bright(Evaluator):
    """The mean of all pixels of an image."""

    name: ClassVar[str] = "bright"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("brightness", "fraction"),)
    differentiable: ClassVar[bool] = True

    power: float = 1.0

    def score(self, images, prompts):
        import numpy as np

        return pd.DataFrame({"brightness": [(np.asarray(image) / 255).mean() ** self.power for image in images]})

    def reward(self, pixels, prompts):
        return pixels.mean((1, 2, 3))


class Broken(Evaluator):
    """An evaluator that fails while ALIGNBENCH_TEST_BROKEN is set."""

    name: ClassVar[str] = "broken"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("worth", "points"),)

    def score(self, images, prompts):
        if os.environ.get("ALIGNBENCH_TEST_BROKEN"):
            raise RuntimeError("the judge is ill")
        return pd.DataFrame({"worth": [1.0, float("nan"), *[2.0] * (len(images) - 2)]})


class Away(Evaluator):
    """A judge that says how many images it was shown, and is away for the first ALIGNBENCH_TEST_AWAY of them."""

    name: ClassVar[str] = "away"
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("worth", "points"),)

    def score(self, images, prompts):
        away = [i < int(os.environ.get("ALIGNBENCH_TEST_AWAY", "0")) for i in range(len(images))]
        worth = [float("nan") if it else 1.0 for it in away]
        errors = ["nobody is there" if it else None for it in away]
        return pd.DataFrame({"worth": worth, "raw": f"shown {len(images)}", "error": errors, "passing": away})


class Last(AlignMethod):
    """A method that differentiates the last step only."""

    name: ClassVar[str] = "last"
    steps: int = 2

    def loss(self, flow, reward, batch):
        t = flow.sigmas(self.steps)
        x = integrate(flow, batch.noise, t[:-1], batch.cond)
        x_0 = x - t[-2] * flow.velocity(x, t[-2], batch.cond)
        score = reward(flow.decode(x_0), batch.prompts)
        return Loss(reward.loss(score).mean(), {"reward": score.detach().mean()})


class Stopped(Last):
    """``last``, but ALIGNBENCH_TEST_STOP raises an error in a batch: "3:KeyboardInterrupt", "0:RuntimeError"."""

    name: ClassVar[str] = "stopped"

    def loss(self, flow, reward, batch):
        step, _, error = os.environ.get("ALIGNBENCH_TEST_STOP", "").partition(":")
        if step == str(batch.step):
            raise {"KeyboardInterrupt": KeyboardInterrupt, "RuntimeError": RuntimeError, "UserError": UserError}[error](
                "stopped on demand"
            )
        return super().loss(flow, reward, batch)
