"""The average on the host follows beside the computation, and is the one that follows at once."""

import threading
import time

import pytest
import torch
from support.half_flow import HalfFlow
from support.training_runs import GRPO, LEAP, STEPS, CtrlC, run, settings

from alignbench.analytic import AffineFlow
from alignbench.training.checkpoint import FINAL
from alignbench.training.ema import EMA

KINDS = ("float32", "master", "stochastic")


@pytest.fixture
def late(monkeypatch):
    """A thread that has not begun while the loop goes on, unless the loop waits for it."""
    lerp = EMA._lerp

    def slowly(self, *arguments):
        time.sleep(0.02)
        lerp(self, *arguments)

    monkeypatch.setattr(EMA, "_lerp", slowly)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [LEAP, GRPO], ids=lambda m: m.name)
@pytest.mark.usefixtures("late")
def test_an_average_that_comes_late_is_the_same(kind, method, tmp_path):
    """Bit by bit the files of an average beside the weights, also of a run that was resumed: nothing changes a weight,
    or reads the average, before it has followed.
    """
    flow = AffineFlow if kind == "float32" else HalfFlow
    changes = {"optimizer": {"weights": kind, "ema": 0.9}, "checkpoint_every": 2}
    run(method, settings(3, **changes), tmp_path / "beside", flow=flow(STEPS))
    run(method, settings(3, **changes, ema_on_host=True), tmp_path / "host", flow=flow(STEPS))
    for batches in (2, 3):
        run(method, settings(batches, **changes, ema_on_host=True), tmp_path / "resumed", flow=flow(STEPS))
    ends = [(tmp_path / name / FINAL).read_bytes() for name in ("beside", "host", "resumed")]
    assert ends[0] == ends[1] == ends[2]


def test_training_does_not_wait_for_the_average(monkeypatch):
    """Training continues while the thread is held up; reading the average waits for it."""
    held, lerp = threading.Event(), EMA._lerp

    def until_told(self, *arguments):
        assert held.wait(60)
        lerp(self, *arguments)

    monkeypatch.setattr(EMA, "_lerp", until_told)
    weight = torch.zeros(3)
    average = EMA([weight], 0.75, on_host=True)
    weight += 4
    average.update()
    assert average._tensors[0].tolist() == [0, 0, 0]
    held.set()
    assert average.tensors[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("folder", [False, True])
def test_what_goes_wrong_in_the_thread_ends_the_run(folder, tmp_path, monkeypatch):
    """With its own error, also where it happened in the last update and nothing is saved."""
    calls = []

    def fails(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room for the average")

    monkeypatch.setattr(EMA, "_lerp", fails)
    with pytest.raises(MemoryError, match="no room for the average"):
        run(LEAP, settings(3, ema_on_host=True), tmp_path if folder else None)
    assert not (tmp_path / FINAL).exists()


@pytest.mark.usefixtures("late")
def test_a_run_that_is_interrupted_does_not_wait(tmp_path):
    """Ctrl-C while the average follows: the run ends, and the next goes on bitwise from its last checkpoint."""
    flow = CtrlC(STEPS)
    flow.left = 30
    with pytest.raises(KeyboardInterrupt):
        run(LEAP, settings(ema_on_host=True), tmp_path / "resumed", flow=flow)
    run(LEAP, settings(ema_on_host=True), tmp_path / "resumed")
    run(LEAP, settings(), tmp_path / "whole")
    assert (tmp_path / "resumed" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
