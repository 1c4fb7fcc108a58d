"""First stage of a run: record its settings and provenance, and train its weights if its method trains."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import yaml

from alignbench.config import settings
from alignbench.prompts import digest, load_prompts
from alignbench.run import provenance
from alignbench.run.session import RunSession, stores_embeddings
from alignbench.store.files import Damaged, move, read_frame, write, write_frame
from alignbench.store.locks import Lock


def train(session: RunSession) -> None:
    """Make the run, unless the store has it; a run that trains nothing consists of its records."""
    run, group = session.run, session.group
    with session.making(run, run.id) as lock:
        if lock is None:
            return
        group.broadcast(lambda: session.check_unchanged(session.end))
        if session.task.trains and (facts := group.broadcast(lambda: _results(session))) is not None:
            if group.is_main:
                run.succeed(**facts)
            return
        started = time.time()
        if group.is_main:
            plain = settings(session.spec)
            write(run.folder / "spec.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
            provenance.begin(run.folder, started, _origin(session), session.code, session.registry)
        facts = make_weights(session, lock) if session.task.trains else {}
        if group.is_main:
            provenance.end(run.folder, started)
            run.succeed(**facts)
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def _results(session: RunSession) -> dict[str, Any] | None:
    """Return the facts for the status if only the status is missing or damaged, since all results are there; else None.

    Training moves its weights into the run's folder when it has ended.
    """
    from alignbench.training.checkpoint import read_weights

    folder, facts = session.run.folder, {}
    with suppress(Damaged):  # then its costs are lost, which is no reason to train again
        facts = {"updates": int(read_frame(folder / "train.parquet")["update"].iloc[-1]) + 1}
    reached = [n for n in session.spec.training.milestones if n <= facts.get("updates", n)]
    try:
        for path in (session.run.product, *(session.store.milestone(session.run.id, update) for update in reached)):
            read_weights(path)
    except Damaged:
        return None
    session.note("status.json was missing or damaged; the results of training are whole")
    return facts


def _origin(session: RunSession) -> dict[str, Any]:
    """Return what is recorded but not hashed: the command, code, files and machine that make the weights."""
    (backend, method, rewards), trains = session.parts(session.spec), session.task.trains
    used: list[Any] = [backend, method, *(term.evaluator for term in rewards if trains)]
    return {
        "command": session.task.command,
        **provenance.made_by(session.code),
        **provenance.machine(session.accelerator.num_processes),
        "parallel": session.task.parallel,
        "weights": {part.name: provenance.weights(files) for part in used if (files := part.files())},
        "prompts": digest(load_prompts(session.spec.prompts)) if trains else None,
        "embeddings": _embeddings(session, backend),
    }


def _embeddings(session: RunSession, backend: Any) -> str | None:
    """Return the name of the folder of stored embeddings; None if embeddings are computed on the fly."""
    from alignbench.backends import stored_embeddings

    source, device = session.registry.source("backend", backend.name), session.accelerator.device
    return stored_embeddings.folder_name(backend, source, device) if stores_embeddings(backend) else None


def make_weights(session: RunSession, lock: Lock) -> dict[str, Any]:
    """Train, resuming from the last checkpoint if there is one; write train.parquet and weights.safetensors.

    Return the facts to record in the status; empty on ranks other than 0.
    """
    from alignbench.evaluator import Reward
    from alignbench.training.loop import train

    check_room(session)
    spec, folder = session.spec, session.run.folder
    _, method, rewards = session.parts(spec)
    prompts, sharded = load_prompts(spec.prompts), session.task.parallel == "fsdp"
    records = train(
        method, session.flow, Reward(*rewards), prompts, spec.training,
        accelerator=session.accelerator, checkpoints=folder / "checkpoints", milestones=folder, stop=session.stop,
        sharded=sharded, warn=session.warn,
    )  # fmt: skip
    _follow(session, records)
    if sharded:
        session.unload()  # it is sharded; images are made with the whole model, which is loaded again
    return _finish(session, lock) if session.group.is_main else {}


def check_room(session: RunSession) -> None:
    """Raise UserError if training cannot fit on this GPU, and warn if it might not. Needs no model."""
    import torch

    device = session.accelerator.device
    if device.type != "cuda":
        return
    from alignbench.planning import fit_page

    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by this process's last run
    with torch.random.fork_rng(devices=[]):  # the method is observed on a toy, which must not affect training
        ranks = fit_page.Group(session.accelerator.num_processes, session.task.parallel)
        warning = fit_page.check_room(session.spec, session.registry, ranks, free + cached, total)
    if warning and session.group.is_main:
        session.warn(warning)


def _follow(session: RunSession, records: Iterable[dict[str, Any]]) -> None:
    """Train, by consuming the records, and report progress."""
    from alignbench.training.state import budget_share

    for record in _tracked(session, records):
        share = budget_share(session.spec.training.budget, record, session.accelerator.num_processes)
        shown = f", reward {record['reward_mean']:.3f}" if "reward_mean" in record else ""
        shown += ", every hinge closed" if record.get("hinge_closed") == 1 else ""
        session.progress("training", share, f"update {record['update'] + 1}{shown}")


def _tracked(session: RunSession, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the records, after passing each to the requested trackers."""
    from alignbench.run.trackers import Trackers

    spec = session.spec
    title = f"{spec.label}, seed {spec.training.seed}"
    names = session.task.track if session.accelerator.is_main_process else ()
    trackers = Trackers(names, session.store.root, session.run.id, title, settings(spec), session.note)
    try:
        for record in records:
            trackers(record)
            yield record
    finally:
        trackers.close()


def _finish(session: RunSession, lock: Lock) -> dict[str, Any]:
    """Move the results of training from its checkpoints to the run's folder, and return the facts for the status.

    Raise LockLost if another process took the run over.
    """
    import pandas as pd

    from alignbench.training import checkpoint

    folder, milestones = session.run.folder, session.spec.training.milestones
    lock.check()
    frame = pd.DataFrame(checkpoint.load_records(folder / "checkpoints"))
    write_frame(folder / "train.parquet", frame)
    final, updates = folder / "checkpoints" / checkpoint.FINAL, int(frame["update"].iloc[-1]) + 1
    kept = [session.store.milestone(session.run.id, update) for update in milestones if update <= updates]
    for path in (final, *kept):
        path.chmod((folder / "train.parquet").stat().st_mode)  # safetensors' default would deny access to the group
    move(final, session.run.product)
    for update in milestones[len(kept) :]:
        session.warn(f"there is no milestone at update {update}: training ended after {updates} updates")
    return {"updates": updates}
