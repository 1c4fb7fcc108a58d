"""Work of several ranks: ``python -m support.rank_process WHAT FOLDER [words]``, run in processes by ``together``."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

WORDS = 16
PATIENCE = 900  # seconds, for a machine that is busy with something else
CASES = [("full", "leapalign"), ("lora", "leapalign"), ("lora", "dancegrpo")]
HALVES = ("master", "stochastic")
GUIDED = [
    ("sd3", "stop"),
    ("flux2", "full"),
    ("sit", "full"),
]  # other families, and the gradient of their second branch


def together(what: str, folder: Path, *words: str, ranks: int = 2, fail: bool | Sequence[bool] = False) -> list[Any]:
    """Run ``what`` in ``ranks`` processes, and return what each of them noted. ``fail``: those that are to fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "support.rank_process", what, str(folder), *words]
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        log = (folder / f"{what}{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env=os.environ | shared | own, stdout=log, stderr=log))
    try:
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"{what}{rank}.log").read_text() for rank in range(ranks)]
    assert [code != 0 for code in codes] == ([fail] * ranks if isinstance(fail, bool) else [*fail]), "\n".join(logs)
    notes = [folder / f"{what}{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) if path.exists() else None for path in notes]


class Sent(TorchDispatchMode):
    """A count of the collective operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # count the operations on its shards instead
        if op.namespace == "c10d":
            self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def note(what: str, folder: Path, result: Any) -> None:
    """Save what this rank has to report."""
    (folder / f"{what}{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


def flow(folder: Path, tune: str, accelerator=None, dtype: str = "float32", guided: tuple[str, str] | None = None):
    from alignbench.plugins import Registry
    from alignbench.rehearsal.tiny_backends import backend

    wanted: dict[str, Any] = {"name": "flux", "model": str(folder / "flux"), "max_sequence_length": WORDS}
    if guided:
        family, gradient = guided
        wanted = {"name": family, **backend(family, folder), "guidance": 3.0, "negative_gradient": gradient}
        if family == "sit":  # its prompts are class names
            (folder / "classes.txt").write_text("\n".join(f"prompt number {i}" for i in range(1000)))
            wanted["classes"] = str(folder / "classes.txt")
    made = Registry().make("backend", {**wanted, "size": 32, "dtype": dtype, "tune": tune, "lora_rank": 4}, "backend")
    loaded = made.load(accelerator)
    if tune == "lora":  # while B is zero, A has no gradient
        with torch.no_grad():
            for i, p in enumerate(loaded.parameters()):
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return loaded


def method(name: str):
    from alignbench.methods.dancegrpo import DanceGRPO
    from alignbench.methods.leapalign import LeapAlign

    if name == "dancegrpo":
        return DanceGRPO(steps=4, group=2, updates_per_rollout=2)
    return LeapAlign(steps=4)


def training(batches: int, **more):
    from alignbench.experiment.spec import Budget, Optimizer, Training

    optimizer = Optimizer(lr=1e-3, clip=0.5, ema=0.9, **more.pop("optimizer", {}))
    given = {"batch": 4, "micro_batch": 2, "drift_every": 1, "checkpoint_every": 1, "optimizer": optimizer}
    given |= {"milestones": (1,)}
    return Training(budget=Budget(images=4 * batches), **given | more)


def trained(
    folder: Path, ranks, parallel: str, tune: str, name: str, kept: Path, batches: int = 2, guided=None,
    dtype: str = "float32", **more,
) -> dict:  # fmt: skip
    """Train; return the records and the count of collective operations of each batch.

    ``kept``: folder of the checkpoints. ``more``: settings of training.
    """
    from alignbench.analytic import PROMPTS, QuadraticReward
    from alignbench.testing.method_contract import unclocked
    from alignbench.training import loop, state

    collectives: list[dict[str, int]] = []
    train_batch = state.TrainState.train_batch

    def counted(self, *args):
        with Sent() as sent:
            records = list(train_batch(self, *args))
        collectives.append(sent.counts)
        return iter(records)

    model = flow(folder, tune, ranks.accelerator, dtype, guided)
    parts = method(name), model, QuadraticReward(0.5), PROMPTS, training(batches, **more)
    options = {"accelerator": ranks.accelerator, "checkpoints": kept, "milestones": kept, "sharded": parallel == "fsdp"}
    state.TrainState.train_batch = counted
    try:
        records = list(loop.train(*parts, **options))
    finally:
        state.TrainState.train_batch = train_batch
    return {"records": unclocked(records), "collectives": collectives}


def halved(folder: Path, ranks, kind: str, kept: Path) -> list[dict]:
    """Return the records of two batches with weights in bfloat16."""
    options = {"dtype": "bfloat16", "optimizer": {"weights": kind}}
    return trained(folder, ranks, "ddp", "full", "leapalign", kept, **options)["records"]


def train(folder: Path) -> None:
    """Train every case with DDP and FSDP, and resume the checkpoint of one process."""
    from alignbench.run.process_group import ProcessGroup

    ranks, results = ProcessGroup(), {}
    for tune, name in CASES:
        for parallel in ("ddp", "fsdp"):
            kept = folder / f"{tune}-{name}-{parallel}"
            results[kept.name] = trained(folder, ranks, parallel, tune, name, kept)
    for tune in ("full", "lora"):
        results[f"{tune}-resumed"] = trained(folder, ranks, "fsdp", tune, "leapalign", folder / f"{tune}-stopped")
    for batches in (1, 2):  # the second resumes the first
        trained(folder, ranks, "fsdp", "full", "leapalign", folder / "full-host", batches, ema_on_host=True)
    for kind in HALVES:
        results[kind] = halved(folder, ranks, kind, folder / f"{kind}-two")
    results["sliced"] = trained(folder, ranks, "fsdp", "lora", "leapalign", folder / "sliced", reward_slice=1)
    note("train", folder, results)
    ranks.close()


def guide(folder: Path) -> None:
    """Train all weights of the other families with FSDP and guidance."""
    from alignbench.run.process_group import ProcessGroup

    ranks, results = ProcessGroup(), {}
    for guided in GUIDED:
        kept = folder / f"{guided[0]}-fsdp"
        results[guided[0]] = trained(folder, ranks, "fsdp", "full", "leapalign", kept, guided=guided)["records"]
    note("guide", folder, results)
    ranks.close()


def execute(folder: Path, where: str = "", how: str = "", rank: str = "") -> None:
    """Execute the task in task.json. ``how`` trouble comes ``where``, on one rank; see ``TROUBLE`` and ``PLACES``."""
    from alignbench.run import process_group, worker
    from alignbench.run.slurm_job import Signals

    process_group.GRACE, process_group.ROLL_CALL, process_group.SILENT = 5.0, 5.0, 10
    if where == "starting":  # the others wait in vain
        process_group.START = 10.0
    stop = Signals()
    if rank == os.environ.get("RANK"):
        PLACES[where](TROUBLE[how])
    result = worker.execute(json.loads((folder / "task.json").read_text()), stop)
    note("execute", folder, result)
    os._exit(result["state"] != "done")  # as a job does


def fail() -> None:
    raise RuntimeError("fell over")


def spoil() -> None:
    from alignbench.config import UserError

    raise UserError("the reward is not finite")


TROUBLE = {
    "fails": fail,
    "spoils": spoil,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGUSR2),
}


def second_call(owner: Any, name: str, trouble: Callable[[], Any], nth: int = 2) -> None:
    """Make trouble before the n-th call of a function."""
    function, calls = getattr(owner, name), itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            trouble()
        return function(*args, **kwargs)

    setattr(owner, name, called)


def while_training(trouble: Callable[[], Any]) -> None:
    from alignbench.training.meter import MeteredReward

    second_call(MeteredReward, "__call__", trouble)  # between two collectives of FSDP


def while_saving(trouble: Callable[[], Any]) -> None:
    from alignbench.training import checkpoint

    second_call(checkpoint, "_replace", trouble)


def while_generating(trouble: Callable[[], Any]) -> None:
    from alignbench.run import image_stage

    second_call(image_stage, "_png", trouble)


def while_scoring(trouble: Callable[[], Any]) -> None:
    from alignbench.run.score_stage import _Judge

    second_call(_Judge, "_score_rows", trouble, nth=1)


def while_starting(trouble: Callable[[], Any]) -> None:
    from alignbench.run.process_group import ProcessGroup

    second_call(ProcessGroup, "join", trouble, nth=1)


PLACES = {
    "starting": while_starting,
    "training": while_training,
    "saving": while_saving,
    "generating": while_generating,
    "scoring": while_scoring,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
