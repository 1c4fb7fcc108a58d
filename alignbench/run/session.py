"""State shared by the stages of a task: store, registry, processes, log, progress, and the model."""

from __future__ import annotations

import errno
import functools
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from alignbench.config import Interrupted, UserError, decode, settings
from alignbench.digests import content_id
from alignbench.experiment.ids import BASE, Parts, base_of, build, image_set_id, run_id
from alignbench.experiment.spec import Evaluation, RunSpec
from alignbench.plugins import Registry
from alignbench.prompts import load_prompts
from alignbench.run import provenance
from alignbench.run.process_group import STOPPED, OtherFailed, ProcessGroup
from alignbench.run.task import Failed, Progress, Target, Task
from alignbench.run.trackers import Shown, Trackers
from alignbench.store.artefacts import Artefact, Store, locked, milestone_expected, set_aside
from alignbench.store.files import Damaged, cannot_write
from alignbench.store.locks import Lock, LockLost

if TYPE_CHECKING:
    from accelerate import Accelerator

MEGABYTE = 2**20


class RunSession:
    """Execution of a task in this process. ``stop`` is polled wherever stopping loses no work.

    ``group.check`` is called after each piece of work is saved, so that a job makes progress however often it is
    requeued.
    """

    def __init__(self, task: Task, stop: Callable[[], bool]) -> None:
        self.task = task
        self.stop = stop
        self.store = Store(task.store)
        self.registry = Registry(task.plugins)
        self.code = task.code or provenance.code(task.plugins)
        self.spec = decode(RunSpec, task.spec, "spec")
        evaluation = decode(Evaluation, task.evaluation, "evaluation")
        self.end = Target(task.images, task.run, self.spec, task.trains, task.update, evaluation)
        self.run = self.store.run(task.run, task.trains)
        self.group = ProcessGroup(stop)
        self.progress = Progress(Path(task.progress) if self.group.is_main else None)
        self.failures: list[str] = []
        self.made: list[str] = []  # kinds of the artefacts made in this session
        self.damaged: list[str] = []  # finished files that were found damaged, each with the reason
        self._flow: Any = None

    @property
    def accelerator(self) -> Accelerator:
        return self.group.accelerator

    # -- image sets ---------------------------------------------------------------------------------------------------

    def milestones(self) -> list[Target]:
        """Return the image sets of the milestones that training reached; the same on all ranks."""
        store, run = self.store, self.task.run

        def reached() -> list[int]:
            return [update for update, _ in self.task.milestones if milestone_expected(store, run, update)]

        updates, evaluation = self.group.broadcast(reached), self.end.evaluation.at_milestones
        return [
            Target(images, run, self.spec, self.task.trains, update, evaluation)
            for update, images in self.task.milestones
            if update in updates
        ]

    @cached_property
    def base(self) -> Target | None:
        """Image set of the untrained model for the same prompts and noise; None if no evaluator compares with it."""
        images = next((score["base"] for score in self.task.scores if score.get("base")), None)
        if images is None:
            return None
        spec, parts, protocol = base_of(self.spec, self.parts(self.spec), self.end.protocol, self.registry)
        evaluation = structs.replace(self.end.evaluation, protocol=protocol)
        return Target(images, f"{BASE}-{run_id(spec, parts, self.registry, [])}", spec, False, None, evaluation)

    def images(self, target: Target) -> Artefact:
        return self.store.images(target.id)

    def check_unchanged(self, target: Target) -> None:
        """Raise UserError if a file that determines the target's ids has changed."""
        training = load_prompts(target.spec.prompts) if target.trained else []
        run = f"{target.spec.method['name']}-{run_id(target.spec, self.parts(target.spec), self.registry, training)}"
        images = image_set_id(run, target.trained, target.protocol, target.prompts, target.update)
        if (run, images) != (target.run, target.id):
            raise UserError("weights, prompts or a plug-in changed since the sweep was started; start it again")

    def _check_ranks(self) -> None:
        """Raise UserError if this rank has other code, packages or settings than rank 0."""
        if self.group.size == 1:
            return
        running, made_by = provenance.code(self.task.plugins), provenance.made_by(self.code)
        own = {
            "settings": content_id(self.task._asdict()),
            "code": running["digest"],
            "plug-ins": content_id(running["plugins"]),
            "python": made_by["python"],
            **made_by["packages"],
        }
        for name, first in self.group.broadcast(lambda: own).items():
            if own[name] != first:
                raise UserError(f"{name}: {own[name]}, but rank 0 has {first}; use the same on every node")

    def keep_threads(self, begun: Callable[[], dict[str, Any] | None]) -> None:
        """Compute with as many threads as something was begun with: their number decides how sums are rounded.

        ``begun``: returns what was recorded then; None if nothing was.
        """
        import torch

        threads = self.group.broadcast(lambda: (begun() or {}).get("threads"))
        if threads and threads != torch.get_num_threads():
            self.note(f"continues with {threads} threads, as it was begun, not with {torch.get_num_threads()}")
            torch.set_num_threads(threads)

    # -- the model ----------------------------------------------------------------------------------------------------

    @property
    def flow(self) -> Any:
        """Model, loaded on first use; callers that need other weights load them into it."""
        if self._flow is None:
            backend = self.backend()
            options = {"text": self._stored_text(backend)} if stores_embeddings(backend) else {}
            self.progress("loading the model")
            self._flow = backend.load(self.accelerator, **options)
        return self._flow

    def unload(self) -> None:
        """Drop the model, to make room for another one."""
        self._flow = None

    def backend(self) -> Any:
        return self.parts(self.spec).backend

    def parts(self, spec: RunSpec) -> Parts:
        """Return the backend, method and rewards of ``spec``, built anew, since a method may carry state."""
        return build(spec, self.registry)

    def _stored_text(self, backend: Any) -> Any:
        """Return an encoder that looks prompts up in the store. Rank 0 first makes the embeddings of this task."""
        from alignbench.backends import stored_embeddings
        from alignbench.training.batches import prompts_within_budget

        def prepare() -> str:
            prompts = [*self.end.prompts]
            if self.task.trains and not self.run.done:
                prompts += prompts_within_budget(load_prompts(self.spec.prompts), self.spec.training)
            texts = ["", *(prompt.text for prompt in prompts)]  # the empty text: for guidance in two branches
            source, device = self.registry.source("backend", backend.name), self.accelerator.device
            return stored_embeddings.prepare(
                self.store, backend, source, device, texts, self.progress, self.group.check
            )

        folder = self.store.embeddings / self.group.broadcast(prepare)
        return stored_embeddings.StoredEmbeddings(folder, self.accelerator.device)

    # -- making an artefact -------------------------------------------------------------------------------------------

    @contextmanager
    def making(self, artefact: Artefact, run: str) -> Iterator[Lock | None]:
        """Hold the artefact's lock; yield None if the artefact is done. Record a failure and raise it as Failed.

        ``run``: id of the run whose log describes a failure. With several ranks, rank 0 holds the lock and writes the
        record, and a failure of one is a failure of all.
        """
        with ExitStack() as held:
            lock = None
            try:
                self.group.join()
                lock = held.enter_context(self._held(artefact, run))
                self._check_ranks()
                yield lock
                self.group.barrier()
            except (Exception, SystemExit) as error:
                raise self._end(artefact, lock, error, run) from error
            if lock:
                self.made.append(artefact.stage.kind)

    @contextmanager
    def _held(self, artefact: Artefact, run: str) -> Iterator[Lock | None]:
        """Yield the lock, held by rank 0 for all ranks; None if the artefact is done."""
        with ExitStack() as stack:
            own = stack.enter_context(locked(artefact, self._wait)) if self.group.is_main else None
            token = self.group.broadcast(lambda: own and own.token)
            lock = Lock(artefact.lock, token) if token and own is None else own
            self.group.on_deadlock = functools.partial(self._record, artefact, lock, run)
            yield lock

    @contextmanager
    def reading(self, artefact: Artefact, check: Callable[[], Any]) -> Iterator[None]:
        """Read a finished artefact in a ``with`` block. If it is damaged, mark it as not done and raise Damaged.

        ``check`` raises Damaged for all of it.
        """
        if not artefact.done:
            raise UserError(f"it needs {artefact.id}, which is missing: {artefact.failure or 'not made yet'}")
        try:
            yield
        except Damaged as damage:
            if self.group.is_main:
                self.damaged.append(damage.what)
                self.warn(damage.what)
                set_aside(artefact, check)
            raise

    def _wait(self, holder: str) -> None:
        self.progress(f"waiting for {holder}")
        self.group.check()

    def _end(self, artefact: Artefact, lock: Lock | None, error: BaseException, run: str) -> Exception:
        """Tell the other ranks why this one ends, and record a failure. Return the exception that ends the stage.

        A stop is not a failure, so nothing is recorded: the next attempt resumes.
        """
        if isinstance(error, Interrupted):
            reason = self.group.abort(STOPPED)
        elif isinstance(error, OtherFailed):
            reason = self.group.abort(str(error))
        else:
            rank = f"rank {self.group.rank}: " if self.group.size > 1 else ""
            # anything but a UserError may be a connection that broke because another rank has ended
            reason = self.group.abort(rank + _reason(error, self.store.root), certain=isinstance(error, UserError))
            self.note(traceback.format_exc(), run)
        if reason == STOPPED:
            return Interrupted()
        self._record(artefact, lock, run, reason)
        return Failed(f"{artefact.stage.noun}: {reason}")

    def _record(self, artefact: Artefact, lock: Lock | None, run: str, reason: str) -> None:
        """Record a failure, unless another process has taken over. If rank 0 has ended, another rank acts for it."""
        if self.group.size > 1:
            self.note(reason, run)
        if artefact.done or not (self.group.is_main or self.group.main_ended):
            return
        with suppress(UserError, LockLost):  # on a full disk not even this can be written
            if lock is not None:
                lock.check()
            artefact.fail(f"{artefact.stage.noun}: {reason}", str(self.store.run(run, True).folder / "log.txt"))
        if lock is not None:
            lock.release()

    # -- the log ------------------------------------------------------------------------------------------------------

    def log(self, run: str) -> Path:
        """Return this process's log of ``run``; other ranks than 0 have their own."""
        name = "log.txt" if self.group.is_main else f"log.rank{self.group.rank}.txt"
        return self.store.run(run, True).folder / name

    def note(self, text: str, run: str | None = None) -> None:
        """Write a line to the log of ``run``, by default the task's run."""
        log = self.log(run or self.task.run)
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")

    def warn(self, text: str) -> None:
        """Write a warning to the run's log and, with the progress, to whoever started the run."""
        self.note(f"warning: {text}")
        self.progress.warn(text)

    @cached_property
    def trackers(self) -> Trackers:
        """The requested trackers of this run; none on ranks other than 0."""
        spec, names = self.spec, self.task.track if self.group.is_main else ()
        title = f"{spec.label}, seed {spec.training.seed}" if self.task.trains else spec.label
        shown = Shown(self.run.id, title, self.task.sweep, settings(spec))
        return Trackers(names, self.store.root, shown, self.warn)


def stores_embeddings(backend: Any) -> bool:
    """Return whether the backend reads prompt embeddings from the store."""
    return getattr(backend, "embeddings", None) == "stored"


def _reason(error: BaseException, store: Path) -> str:
    """Return the reason of a failure in one line. Checks for a full disk, which torch and parquet report obscurely."""
    with suppress(OSError):  # the store is gone, or was never made
        if shutil.disk_usage(store).free < MEGABYTE:
            error = OSError(errno.ENOSPC, "", str(store))
    if isinstance(error, OSError) and error.errno is not None:
        return cannot_write(error.filename or "store", error)
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
