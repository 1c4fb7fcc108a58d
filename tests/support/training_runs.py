"""Training runs on analytic flows, started, stopped and compared."""

from __future__ import annotations

import multiprocessing

import torch
from accelerate import Accelerator

from alignbench.analytic import PROMPTS, AffineFlow, QuadraticReward
from alignbench.experiment.spec import Budget, Optimizer, Training
from alignbench.methods.dancegrpo import DanceGRPO
from alignbench.methods.leapalign import LeapAlign
from alignbench.testing.method_contract import unclocked
from alignbench.training import loop
from alignbench.training.checkpoint import FINAL, read_state, saved_states

PROCESSES = multiprocessing.get_context("forkserver")  # separate processes that share one import of torch
PROCESSES.set_forkserver_preload(["alignbench.testing.method_contract", "torch._dynamo"])

STEPS, BATCH = 4, 8
LEAP = LeapAlign(steps=STEPS)
GRPO = DanceGRPO(steps=STEPS, group=4, updates_per_rollout=2)


def settings(batches=6, **changes):
    """Return settings for six batches of eight with a checkpoint after each, or with ``changes``."""
    optimizer = Optimizer(lr=0.03, **changes.pop("optimizer", {}))
    given = {"budget": Budget(images=batches * BATCH), "batch": BATCH, "checkpoint_every": 1} | changes
    return Training(optimizer=optimizer, **given)


def run(method, training=None, folder=None, flow=None, reward=None, **more):
    """Train; return (flow, records)."""
    flow = flow or AffineFlow(STEPS)
    stream = loop.train(
        method,
        flow,
        reward or QuadraticReward(),
        PROMPTS,
        training or settings(),
        accelerator=Accelerator(cpu=True),
        checkpoints=folder,
        **more,
    )
    return flow, list(stream)


def newest(folder):
    """Return the folder's last training state."""
    return read_state(saved_states(folder)[0])


def same_run(folder, flow, undisturbed, records):
    """Assert that a resumed run has bitwise the weights, averages and records of an undisturbed one."""
    state, whole = newest(folder / "resumed"), newest(folder / "whole")
    assert unclocked(records) == unclocked(undisturbed)
    assert torch.equal(flow.bias, whole["flow"]["bias"])
    assert torch.equal(state["flow"]["bias"], whole["flow"]["bias"])
    assert torch.equal(state["ema"][0], whole["ema"][0])
    for slot, values in whole["optimizer"]["state"].items():
        assert all(torch.equal(v, state["optimizer"]["state"][slot][name]) for name, v in values.items())
    assert (folder / "resumed" / FINAL).read_bytes() == (folder / "whole" / FINAL).read_bytes()


class CtrlC(AffineFlow):
    """A flow that raises KeyboardInterrupt in the last of ``left`` network calls."""

    left = 0

    def velocity(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().velocity(*args, **kwargs)
