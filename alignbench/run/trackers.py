"""Optional experiment trackers: a copy of records and scores goes to TensorBoard, Weights & Biases or trackio.

The store remains the source of truth: no id, result or failure depends on a tracker.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, did_you_mean, flatten
from alignbench.store.files import read_json, write_json
from alignbench.store.locks import create

NAMES = ("tensorboard", "wandb", "trackio")  # as in pip
PROJECT = "alignbench"
FOLDER = "tensorboard"  # in the store; has a folder per run
FILE = "tracker.json"  # in a run's folder: the name that trackers know the run by, and the last update of each


def check(names: Sequence[str]) -> None:
    """Raise UserError unless every tracker is known, installed and logged in."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"--track: there is no tracker '{name}'{did_you_mean(name, NAMES, 'trackers')}")
        module = importlib.util.find_spec(name)
        if module is None or module.origin is None:  # a folder of that name, as wandb makes, has no origin
            raise UserError(f"--track {name}: {name} is not installed; run `pip install {name}`")
        {"wandb": _check_wandb, "trackio": _check_trackio}.get(name, lambda: None)()


def _check_wandb() -> None:
    if os.environ.get("WANDB_RUN_ID"):
        raise UserError("WANDB_RUN_ID: would draw all runs as one; unset it")
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return
    import wandb

    try:
        wandb.login()  # asks for the key on a terminal
    except Exception as error:  # of whatever class, it would recur in every run
        instead = "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
        raise UserError(f"--track wandb: {_line(error)}; {instead}") from None


def _check_trackio() -> None:
    from huggingface_hub import get_token

    space, server = os.environ.get("TRACKIO_SPACE_ID"), os.environ.get("TRACKIO_SERVER_URL", "")
    if space and get_token() is None:
        raise UserError(f"--track trackio: TRACKIO_SPACE_ID={space} needs a key; run `hf auth login`, or set HF_TOKEN")
    if server and not space and "write_token=" not in server and not os.environ.get("TRACKIO_WRITE_TOKEN"):
        raise UserError("--track trackio: TRACKIO_SERVER_URL needs a key; set TRACKIO_WRITE_TOKEN")


class Shown(NamedTuple):
    """A run as trackers show it."""

    id: str  # run id
    title: str  # label and seed
    group: str  # the sweep
    config: Mapping[str, Any]  # its settings


class Trackers:
    """Trackers of one run. One that fails is reported once, through ``warn``, and no longer used.

    They know the run by a name that is drawn once and kept in its folder: a resumed run continues under it, and the
    same run in another store is another one.
    """

    def __init__(self, names: Sequence[str], store: Path, run: Shown, warn: Callable[[str], Any]) -> None:
        self.names, self.store, self.run, self.warn = list(dict.fromkeys(names)), store, run, warn
        self._open: dict[str, Any] = {}
        self._told: list[str] = []
        self._file = store / "runs" / run.id / FILE
        self._known = (names and self._kept()) or {"id": f"{run.id}-{uuid.uuid4().hex[:8]}", "updates": {}}

    def record(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of an update once, although a resumed run repeats the updates since its checkpoint."""
        update, last = record["update"], self._known["updates"]
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        for name in list(self.names):
            with self._harmless(name):
                tracker = self._tracker(name, update)
                if update > last.get(name, -1) or name == "tensorboard":  # which replaces what is repeated
                    tracker.log(numbers, update)
                    last[name] = update
                    write_json(self._file, self._known)

    def scores(self, means: Mapping[str, float], updates: int) -> None:
        """Log the mean scores by one evaluator of the weights after ``updates`` updates."""
        numbers = {f"score/{measure}": mean for measure, mean in means.items()}
        for name in list(self.names):
            with self._harmless(name):
                self._tracker(name).log(numbers, updates)

    def close(self) -> None:
        for name in list(self._open):
            with self._harmless(name):
                self._open.pop(name).finish()

    def _kept(self) -> dict[str, Any] | None:
        """Return what the run's folder keeps; None if there is nothing, or nothing that can be used."""
        known = read_json(self._file) or {}
        return known if isinstance(known.get("id"), str) and isinstance(known.get("updates"), dict) else None

    def _agree(self) -> None:
        """Keep the name in the run's folder, or take the one that another job of the run has kept meanwhile."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            create(self._file, json.dumps(self._known))
        if (known := self._kept()) is None:
            write_json(self._file, self._known)
        else:
            self._known["id"] = known["id"]

    def _tracker(self, name: str, update: int | None = None) -> Any:
        """Return the tracker, started on first use. ``update``: at which training begins or resumes; None: scores."""
        if name not in self._open:
            if name == "tensorboard":
                self._open[name] = TensorBoard(self.store / FOLDER / self.run.id, self.run.config, update)
            else:
                self._agree()
                self._open[name] = (WandB if name == "wandb" else Trackio)(self.run, self._known["id"], self.store)
        return self._open[name]

    @contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        """Turn what a tracker raises, and each new thing that it warns of, into a warning of the run."""
        caught: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                yield
        except (Exception, SystemExit) as error:  # whatever a tracker raises, the run continues
            self.names.remove(name)
            self._open.pop(name, None)
            self.warn(f"{name} failed and is no longer used: {_line(error)}")
        for text in (f"{name}: {_line(warning.message)}" for warning in caught):
            if text not in self._told:
                self._told.append(text)
                self.warn(text)


class TensorBoard:
    """Event files in the store."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first: int | None) -> None:
        """Open the files; what an interrupted attempt logged at update ``first`` or later is hidden."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=first)
        plain = bool | int | float | str  # the only types that it takes
        named = {key: value if isinstance(value, plain) else str(value) for key, value in flatten(config)}
        for part in hparams(named, {}):
            self.writer._get_file_writer().add_summary(part)

    def log(self, numbers: Mapping[str, float], update: int) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, update)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases. Its own environment variables override project, name, group and folder."""

    def __init__(self, run: Shown, id: str, store: Path) -> None:
        import wandb

        own = {
            "WANDB_PROJECT": {"project": PROJECT},
            "WANDB_NAME": {"name": f"{run.title} ({id})"},
            "WANDB_RUN_GROUP": {"group": run.group},
            "WANDB_DIR": {"dir": str(store)},
        }
        chosen = {key: value for name, pair in own.items() if not os.environ.get(name) for key, value in pair.items()}
        self.run = wandb.init(id=id, resume="allow", config=dict(run.config), **chosen)
        self.run.define_metric("*", step_metric="update")  # its own steps only grow, and milestones are scored late

    def log(self, numbers: Mapping[str, float], update: int) -> None:
        self.run.log({**numbers, "update": update})

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, which knows it by its name."""

    def __init__(self, run: Shown, id: str, store: Path) -> None:
        import trackio

        name = f"{run.title} ({id})"
        self.run = trackio.init(PROJECT, name=name, group=run.group, config=dict(run.config), resume="allow")

    def log(self, numbers: Mapping[str, float], update: int) -> None:
        named = {"batch" if key == "step" else key: value for key, value in numbers.items()}  # it has steps of its own
        self.run.log(named, step=update)

    def finish(self) -> None:
        self.run.finish()


def _line(error: BaseException | str) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
