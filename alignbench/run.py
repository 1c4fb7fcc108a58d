"""One run from nothing to scores: train, generate, score; each stage is skipped when the store has its result.

``execute`` is what a worker process gets: plain data in, plain data out. It never raises for a failed stage: it records
the reason in the store and says so, and later stages or other evaluators that do not depend on it still run.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from alignbench import provenance
from alignbench.config import Interrupted, UserError, decode, settings
from alignbench.plugins import Registry
from alignbench.prompts import Prompt, digest, load_prompts
from alignbench.ranks import STOPPED, OtherFailed, Ranks
from alignbench.spec import BASE, Evaluation, RunSpec, base_of, build, evaluator_content, image_set_id, run_id
from alignbench.store import (
    Artefact,
    Lock,
    LockLost,
    Store,
    alive,
    cannot_write,
    locked,
    reached,
    read_json,
    write,
    write_frame,
    write_json,
)

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator
    from PIL.Image import Image

MEGABYTE = 2**20


class Task(NamedTuple):
    """What crosses the process boundary, as plain data (``_asdict``)."""

    store: str
    run: str  # ids of the run and of its image set
    images: str
    trains: bool
    spec: dict[str, Any]  # RunSpec
    evaluation: dict[str, Any]
    scores: list[dict[str, Any]]  # evaluators: settings, name, version, file, metrics, role
    plugins: list[str]
    threads: int
    progress: str  # file that says how far this is
    command: list[str]
    parallel: str = "ddp"  # how several ranks share the model in training: or "fsdp"
    stages: Sequence[str] = ("run", "images", "scores")
    own_log: bool = False  # does what is printed go to the run's log?
    launcher: int | None = None  # pid without which a local worker ends
    code: dict[str, Any] | None = None  # ``provenance.code()`` where the sweep was started; None: asked here
    track: Sequence[str] = ()  # of ``trackers.NAMES``
    milestones: Sequence[Sequence[Any]] = ()  # (update, id of its image set)
    update: int | None = None  # of the milestone of which ``images`` are; None: they are of the end


class Failed(Exception):
    """A stage failed, its reason is on record."""


def execute(task: dict[str, Any], stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """The task's stages of one run. ``stop`` is asked wherever ending loses nothing.

    Returns {"state": "done" | "failed" | "interrupted", "reason", "made": what was not there before}.
    """
    try:
        work = Work(Task(**task), stop)
    except UserError as error:  # a plug-in that changed under the sweep
        return {"state": "failed", "reason": str(error), "made": []}
    stages = {"run": work.train, "images": work.generate, "scores": work.score}
    state = "done"
    with _process(work.task, work.log):
        try:
            for stage in work.task.stages:
                stages[stage]()
        except Interrupted:
            state = "interrupted"
        except Failed:
            pass
        work.ranks.close()  # not where something unforeseen ends this process: it must not wait for the others
    state = "failed" if work.failures else state
    return {"state": state, "reason": "; ".join(work.failures), "made": work.made}


class Work:
    """The stages of one task, and the models they share, loaded on first use."""

    def __init__(self, task: Task, stop: Callable[[], bool]) -> None:
        self.task = task
        self.stop = stop
        self.store = Store(task.store)
        self.registry = Registry(task.plugins)
        self.code = task.code or provenance.code(task.plugins)
        self.spec = decode(RunSpec, task.spec, "spec")
        self.evaluation = decode(Evaluation, task.evaluation, "evaluation")
        self.run = self.store.run(task.run, task.trains)
        self.images = self.store.images(task.images)
        self.log = self.run.folder / "log.txt"
        self.ranks = Ranks()
        self.progress = Progress(Path(task.progress) if self.ranks.first else None)
        self.failures: list[str] = []
        self.made: list[str] = []
        self.judges: dict[str, Any] = {}  # of the evaluator whose turn it is: file -> itself, its model loaded
        self.end: Work | None = None  # of which this is a milestone

    @property
    def accelerator(self) -> Accelerator:
        return self.ranks.accelerator

    @cached_property
    def flow(self) -> Any:
        backend = self.registry.make("backend", self.spec.backend, "backend")
        given = {"text": self.stored_text(backend)} if _stored(backend) else {}
        self.progress("loading the model")
        return backend.load(self.accelerator, **given)

    def stored_text(self, backend: Any) -> Any:
        """Encodes prompts by the store's embeddings. Those that this task can ask for are made first, by one rank."""
        from alignbench import embeddings
        from alignbench.train import drawn

        def prepare() -> str:
            prompts = [*self.prompts]
            if self.task.trains and not self.run.done:
                prompts += drawn(load_prompts(self.spec.prompts), self.spec.training)
            texts = ["", *(prompt.text for prompt in prompts)]  # the empty one: of guidance in two branches
            source, device = self.registry.source("backend", backend.name), self.accelerator.device
            return embeddings.prepare(self.store, backend, source, device, texts, self.progress, self.may_stop)

        return embeddings.Stored(self.store.embeddings / self.ranks.tell(prepare), self.accelerator.device)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Those of the evaluation."""
        return load_prompts(self.evaluation.protocol.prompts)[: self.evaluation.limit]

    @contextmanager
    def making(self, artefact: Artefact) -> Iterator[Lock | None]:
        """Hold the artefact's lock; None if it is there. A failure is put on record, with the log to read.

        Of several ranks the first holds the lock and keeps the record; a failure of one is a failure of all.
        """
        try:
            with self._held(artefact) as lock:
                yield lock
                self.ranks.meet()
                if lock:
                    self.made.append(artefact.kind)
        except Interrupted:  # no failure, and nothing to put on record: the next attempt goes on
            self.ranks.fail(STOPPED)
            raise
        except Exception as error:
            if isinstance(error, OtherFailed) and str(error) == STOPPED:
                raise Interrupted from error
            mine = _reason(artefact.kind, error, self.store.root)
            reason = self.ranks.fail(str(error) if isinstance(error, OtherFailed) else mine)
            self.note(traceback.format_exc())
            self._failed(artefact, reason, recorded=not isinstance(error, LockLost))  # lost: it is the other's record
            raise Failed from error

    @contextmanager
    def _held(self, artefact: Artefact) -> Iterator[Lock | None]:
        """The lock, held by the first rank for all; None if the artefact is there."""
        if not self.ranks.first:
            yield Lock(artefact.lock) if self.ranks.tell(lambda: None) else None
            return
        with locked(artefact, lambda holder: self.progress(f"waiting for {holder}")) as lock:

            def give_up(reason: str) -> None:
                self._failed(artefact, reason, recorded=reason != STOPPED)
                if lock:
                    lock.release()

            self.ranks.stuck = give_up
            self.ranks.tell(lambda: lock is not None)
            yield lock

    def _failed(self, artefact: Artefact, reason: str, recorded: bool) -> None:
        self.failures.append(reason)
        if recorded and self.ranks.first:
            with suppress(UserError):  # on a full disk not even this can be written
                artefact.fail(reason, str(self.log))

    def check_unchanged(self) -> None:
        """UserError if a file that the ids were made from has changed since."""
        training = load_prompts(self.spec.prompts) if self.task.trains else []
        parts = build(self.spec, self.registry)
        run = f"{self.spec.method['name']}-{run_id(self.spec, parts, self.registry, training)}"
        images = image_set_id(run, self.task.trains, self.evaluation.protocol, self.prompts, self.task.update)
        if (run, images) != (self.task.run, self.task.images):
            raise UserError("weights, prompts or a plug-in changed since the sweep was started; start it again")

    def may_stop(self) -> None:
        """Called after each piece of work that is saved: a job that is queued again and again always gets on."""
        if self.stop():
            raise Interrupted
        self.ranks.check()

    def note(self, text: str) -> None:
        """A line in the run's log."""
        with suppress(OSError):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")

    def warn(self, text: str) -> None:
        """A line in the run's log, and for whoever started it."""
        self.note(f"warning: {text}")
        if self.task.launcher is None:  # a worker's stderr is the log
            print(f"alignbench: {self.spec.label}: {text}", file=sys.stderr)

    # -- train --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        with self.making(self.run) as lock:
            if lock is None:
                return
            self.ranks.tell(self.check_unchanged)
            started = time.time()
            if self.ranks.first:
                plain = settings(self.spec)
                write(self.run.folder / "spec.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
                provenance.begin(self.run.folder, started, self.provenance(), self.code, self.registry)
            facts = self._train(lock) if self.task.trains else {}
            if self.ranks.first:
                provenance.end(self.run.folder, started)
                self.run.succeed(**facts)
                shutil.rmtree(self.run.folder / "checkpoints", ignore_errors=True)

    def _train(self, lock: Lock) -> dict[str, Any]:
        """Records to train.parquet, weights to weights.safetensors; resumes from the checkpoint if there is one.

        Returns what the status says beside "done".
        """
        import pandas as pd

        from alignbench import checkpoint
        from alignbench.evaluator import Reward
        from alignbench.train import spent, train

        self.check_room()
        _, method, rewards = build(self.spec, self.registry)
        reward = Reward(*rewards)
        prompts, training = load_prompts(self.spec.prompts), self.spec.training
        checkpoints = self.run.folder / "checkpoints"
        flow = self.flow
        records = train(
            method, flow, reward, prompts, training,
            accelerator=self.accelerator, checkpoints=checkpoints, milestones=self.run.folder, stop=self.stop,
            sharded=self.task.parallel == "fsdp", warn=self.warn,
        )  # fmt: skip
        for record in self.tracked(records):
            share = spent(training.budget, record, self.accelerator.num_processes)
            shown = f", reward {record['reward_mean']:.3f}" if "reward_mean" in record else ""
            shown += ", every hinge closed" if record.get("hinge_closed") == 1 else ""
            self.progress("training", share, f"update {record['update'] + 1}{shown}")
        if self.task.parallel == "fsdp":
            del self.flow, flow, records  # in parts; images are made with the whole model, so it is loaded again
        if not self.ranks.first:
            return {}
        lock.check()
        frame = pd.DataFrame(checkpoint.load_records(checkpoints))
        write_frame(self.run.folder / "train.parquet", frame)
        final, updates = checkpoints / checkpoint.FINAL, int(frame["update"].iloc[-1]) + 1
        kept = [self.store.milestone(self.task.run, update) for update in training.milestones if update <= updates]
        for path in (final, *kept):
            path.chmod((self.run.folder / "train.parquet").stat().st_mode)  # safetensors' own would shut out a group
        final.replace(self.run.product)
        for update in training.milestones[len(kept) :]:
            self.warn(f"the milestone of update {update} is not there: training ended after {updates} updates")
        return {"updates": updates}

    def check_room(self) -> None:
        """Before the model is loaded: UserError if training cannot fit into this GPU, a warning if it may not."""
        import torch

        device = self.accelerator.device
        if device.type != "cuda":
            return
        from alignbench.fitting import Group, check_room

        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of this process' last run
        with torch.random.fork_rng(devices=[]):  # the method is watched on a toy: training must not see that
            ranks = Group(self.accelerator.num_processes, self.task.parallel)
            warning = check_room(self.spec, self.registry, ranks, free + cached, total)
        if warning and self.ranks.first:
            self.warn(warning)

    def tracked(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same records, each shown to the trackers that were asked for."""
        from alignbench.trackers import Trackers

        title = f"{self.spec.label}, seed {self.spec.training.seed}"
        names = self.task.track if self.accelerator.is_main_process else ()
        trackers = Trackers(names, self.store.root, self.task.run, title, settings(self.spec), self.note)
        try:
            for record in records:
                trackers(record)
                yield record
        finally:
            trackers.close()

    def provenance(self) -> dict[str, Any]:
        """What is recorded and not hashed: with what command, code, files and machine the weights are made."""
        backend, method, rewards = build(self.spec, self.registry)
        made: list[Any] = [backend, method, *(term.evaluator for term in rewards if self.task.trains)]
        return {
            "command": self.task.command,
            **provenance.made_by(self.code),
            **provenance.machine(self.accelerator.num_processes),
            "parallel": self.task.parallel,
            "weights": {part.name: provenance.weights(files) for part in made if (files := part.files())},
            "prompts": digest(load_prompts(self.spec.prompts)) if self.task.trains else None,
            "embeddings": self._embeddings(backend),
        }

    def _embeddings(self, backend: Any) -> str | None:
        """The name of the folder that they are in; None if they are computed."""
        from alignbench import embeddings

        source, device = self.registry.source("backend", backend.name), self.accelerator.device
        return embeddings.name(backend, source, device) if _stored(backend) else None

    # -- generate -----------------------------------------------------------------------------------------------------

    def generate(self) -> None:
        """The pictures of the end, then those of the milestones."""
        self._generate_set()
        for work in self.milestones(self.ranks.tell(self.reached)):
            work._generate_set()

    def _generate_set(self) -> None:
        with self.making(self.images) as lock:
            if lock is None:
                return
            self.ranks.tell(self.check_unchanged)
            if self.ranks.first:
                write_json(self.images.folder / "protocol.json", self._protocol())
            self._generate()
            self.ranks.meet()
            if self.ranks.first:
                self._finish_images(lock)

    def _finish_images(self, lock: Lock) -> None:
        """The manifest, once all images are there."""
        import pandas as pd

        rows = [self._image_row(prompt, index) for prompt in self.prompts for index in self._indices]
        for half in self.images.folder.glob(".*.tmp"):  # of a process that was killed while writing
            half.unlink()
        lock.check()
        write_frame(self.images.product, pd.DataFrame(rows))
        self.images.status.unlink(missing_ok=True)  # of an earlier failure

    def reached(self) -> list[int]:
        """The milestones that training came to."""
        return [update for update, _ in self.task.milestones if reached(self.store, self.task.run, update)]

    def milestones(self, updates: Sequence[int]) -> Iterator[Work]:
        """The pictures and scores after ``updates``, by the code that makes the end's, and with its model."""
        evaluation = settings(self.evaluation.at_milestones)
        for update, images in self.task.milestones:
            if update in updates:
                task = self.task._replace(images=images, update=update, evaluation=evaluation, milestones=())
                work = Work(task, self.stop)
                work.end, work.ranks, work.judges = self, self.ranks, self.judges
                work.failures, work.made = self.failures, self.made
                yield work

    def generate_base(self) -> None:
        """For paired evaluators: the base model's pictures, by the very code that makes them as a row of their own."""
        if self.base is None:
            return
        self.__dict__.pop("flow", None)  # not two models at once; scoring needs neither
        with suppress(Failed):  # the scores that lack them say so
            self.base.generate()
        self.base.__dict__.pop("flow", None)
        self.made += self.base.made

    @cached_property
    def base(self) -> Work | None:
        """The untrained model's pictures of the same prompts and noise; None if no evaluator compares with them."""
        images = next((score["base"] for score in self.task.scores if score.get("base")), None)
        if images is None:
            return None
        parts = build(self.spec, self.registry)
        spec, parts, protocol = base_of(self.spec, parts, self.evaluation.protocol, self.registry)
        evaluation = settings(self.evaluation) | {"protocol": settings(protocol)}
        task = self.task._replace(
            run=f"{BASE}-{run_id(spec, parts, self.registry, [])}", images=images, trains=False, scores=[]
        )
        work = Work(task._replace(spec=settings(spec), evaluation=evaluation), self.stop)
        work.ranks = self.ranks  # of which the first alone is left
        return work

    def _protocol(self) -> dict[str, Any]:
        """How the images are made, and by whom: several times if the work went on elsewhere."""
        makers = (read_json(self.images.folder / "protocol.json") or {}).get("made_by", [])
        facts = {"run": self.task.run, "limit": self.evaluation.limit, "prompts_digest": digest(self.prompts)}
        made_by = [*makers, provenance.made_by(self.code)]
        return settings(self.evaluation.protocol) | facts | {"made_by": made_by}

    @property
    def _indices(self) -> range:
        return range(self.evaluation.protocol.images_per_prompt)

    def _file(self, prompt: Prompt, index: int) -> Path:
        return self.images.folder / f"{prompt.id}-{index}.png"

    def _generate(self) -> None:
        """Write every image that is not there, one whole file each; of several ranks each makes its share."""
        from alignbench.generate import generate

        wanted = [(prompt, index) for prompt in self.prompts for index in self._indices]
        there = self.ranks.tell(lambda: [self._file(prompt, index).exists() for prompt, index in wanted])
        done = {(prompt.id, index) for (prompt, index), is_there in zip(wanted, there) if is_there}
        if len(done) == len(wanted):
            return
        flow, shard, made = self.evaluated_flow(), (self.ranks.rank, self.ranks.size), len(done)
        for prompt, index, image in generate(flow, self.prompts, self.evaluation.protocol, done, shard=shard):
            write(self._file(prompt, index), _png(image))
            made = min(made + self.ranks.size, len(wanted))  # the others are about as far
            self.progress("images", made / len(wanted), f"{made} of {len(wanted)}")
            self.may_stop()

    def evaluated_flow(self) -> Any:
        """The flow with the weights that the protocol asks for."""
        flow = (self.end or self).flow
        if self.task.trains:
            from alignbench.checkpoint import load_weights

            update = self.task.update
            path = self.run.product if update is None else self.store.milestone(self.task.run, update)
            load_weights(flow, path, self.evaluation.protocol.weights)
        else:
            self.registry.make("method", self.spec.method, "method").prepare(flow)
        return flow

    def _image_row(self, prompt: Prompt, index: int) -> dict[str, Any]:
        file = self._file(prompt, index)
        return {
            "prompt_id": prompt.id,
            "tag": prompt.tag,
            "text": prompt.text,
            "index": index,
            "seed": self.evaluation.protocol.seed,
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }

    # -- score --------------------------------------------------------------------------------------------------------

    def score(self) -> None:
        """Every evaluator; one that fails does not stop the others. Work of the first rank; the others are through."""
        self.ranks.close()
        if not self.ranks.first:
            return
        self.generate_base()
        sets = [self, *self.milestones(self.reached())]
        for score in self.task.scores:
            for work in sets:
                with suppress(Failed):
                    work._score(score)
            self.judges.clear()  # not two evaluators' models at once

    def _score(self, score: dict[str, Any]) -> None:
        artefact = self.store.scores(self.task.images, score["file"])
        with self.making(artefact) as lock:
            if lock is None:
                return
            frame = self._scored(score, artefact)
            lock.check()
            write_json(artefact.product.with_suffix(".json"), self._judged(score))
            write_frame(artefact.product, frame)
            artefact.status.unlink(missing_ok=True)
            shutil.rmtree(_parts(artefact), ignore_errors=True)

    def _judged(self, score: dict[str, Any]) -> dict[str, Any]:
        """Who scored, with which weights and which code."""
        evaluator = self.registry.make("evaluator", score["settings"], "evaluator")
        content = evaluator_content(evaluator, self.registry) | {"name": evaluator.name}
        files = provenance.weights(evaluator.files())
        return {"evaluator": content, "weights": files, "made_by": provenance.made_by(self.code)}

    def _scored(self, score: dict[str, Any], artefact: Artefact) -> pd.DataFrame:
        """One row per image, in the order of the manifest; computed in parts, those that are there are read."""
        import pandas as pd

        from alignbench.scoring import passes

        if score["file"] not in self.judges:
            self.judges[score["file"]] = self.registry.make("evaluator", score["settings"], "evaluator")
        evaluator = self.judges[score["file"]]
        base = (self.end or self).base if score.get("base") else None
        if base is not None and not base.images.done:
            raise UserError(f"the base model's pictures are missing: {base.images.failure or 'not made yet'}")
        images = pd.read_parquet(self.images.product)
        frames = []
        for here in passes(list(images["prompt_id"])):  # one file each: what a killed run has scored is not lost
            part = _parts(artefact) / f"{here.start}.parquet"
            if not part.exists():
                write_frame(part, self._score_rows(evaluator, images.iloc[here], base))
                self.may_stop()
            frames.append(pd.read_parquet(part))
            self.progress(f"scoring, {score['name']}", here.stop / len(images))
        return pd.concat(frames, ignore_index=True)

    def _score_rows(self, evaluator: Any, rows: pd.DataFrame, base: Work | None) -> pd.DataFrame:
        from alignbench.scoring import score_rows

        prompts = {prompt.id: prompt for prompt in self.prompts}
        pictures = [work.pictures(rows) for work in (self, base) if work is not None]
        found = score_rows(evaluator, pictures[0], [prompts[id] for id in rows["prompt_id"]], *pictures[1:])
        return rows[["prompt_id", "tag", "index"]].reset_index(drop=True).join(found)

    def pictures(self, rows: pd.DataFrame) -> list[Image]:
        """This run's pictures of the prompts and indices of ``rows``, in their order."""
        import pandas as pd

        from alignbench.scoring import in_threads

        place = ["prompt_id", "index"]
        mine = rows[place].merge(pd.read_parquet(self.images.product), on=place, how="left", validate="1:1")
        return list(in_threads(self._picture, mine["file"], mine["sha256"]))

    def _picture(self, file: str, sha256: str) -> Image:
        """The image, if it is still the one that was made."""
        from PIL import Image

        path = self.images.folder / file
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{path}: not the picture that was made; delete {self.images.folder} to make them again")
        return Image.open(io.BytesIO(data)).convert("RGB")


def _stored(backend: Any) -> bool:
    return getattr(backend, "embeddings", None) == "stored"


def _parts(artefact: Artefact) -> Path:
    return artefact.product.with_suffix(".parts")


def _png(image: Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _reason(stage: str, error: Exception, store: Path) -> str:
    """One line. A full disk is told by looking: torch and parquet each have their own words for it."""
    kind = {"run": "training", "images": "generation", "scores": "scoring"}[stage]
    if shutil.disk_usage(store).free < MEGABYTE:
        error = OSError(errno.ENOSPC, "", str(store))
    if isinstance(error, OSError) and error.errno is not None:
        return f"{kind}: {cannot_write(error.filename or 'store', error)}"
    text = " ".join(str(error).split())[:300]
    return f"{kind}: {text}" if isinstance(error, UserError) else f"{kind}: {type(error).__name__}: {text}"


# -- the worker process -----------------------------------------------------------------------------------------------


class Progress:
    """Says in a small file how far a run is; whoever shows it reads that."""

    def __init__(self, path: Path | None) -> None:
        self.path = path  # None: somebody else says it
        self._last = 0.0

    def __call__(self, stage: str, share: float | None = None, detail: str = "") -> None:
        """``share``: of this stage, 0 to 1. At most three times a second reach the disk."""
        now = time.time()
        if self.path is None or (now - self._last < 0.3 and share is not None and share < 1):
            return
        self._last = now
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):  # progress is worth no failure
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"stage": stage, "share": share, "detail": detail, "time": now}))
            temporary.replace(self.path)


@contextmanager
def _process(task: Task, log: Path) -> Iterator[None]:
    """Threads; output to the run's log, if it is to be there; a local worker ends when its launcher is gone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if task.own_log:
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.dup2(handle, sys.stdout.fileno())
            os.dup2(handle, sys.stderr.fileno())
    if task.launcher is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the sweep is a shell's background job
        threading.Thread(target=_end_with, args=(task.launcher,), daemon=True).start()
    import torch

    torch.set_num_threads(task.threads)
    yield


def _end_with(launcher: int, every: float = 1.0, ended: Callable[[int], bool] = lambda pid: not alive(pid)) -> None:
    """Interrupt this process when ``launcher`` has died: nobody would collect its result."""
    while not ended(launcher):
        time.sleep(every)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10 * every)
    os._exit(130)
