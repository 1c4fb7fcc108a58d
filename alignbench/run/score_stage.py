"""Third stage of a run: the scores of stored images by every evaluator, each score file whole or absent."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignbench.config import UserError
from alignbench.digests import content_id
from alignbench.evaluation.reading import read_image
from alignbench.evaluation.scoring import Kept, in_threads, kept_beside, score_kept, score_rows, write_scores
from alignbench.experiment.ids import score_content
from alignbench.prompts import digest
from alignbench.run import provenance
from alignbench.run.session import RunSession
from alignbench.run.task import Failed, Target
from alignbench.store.artefacts import Artefact, check_images
from alignbench.store.files import Damaged, read_frame, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

T = TypeVar("T")


def score(session: RunSession, targets: Sequence[Target]) -> None:
    """Score every target with every evaluator of the task. An evaluator that fails does not stop the others."""
    for entry in session.task.scores:
        judge = _Judge(session, entry)  # freed before the next: two evaluators' models are never held at once
        for target in targets:
            try:
                judge.score(target)
            except Failed as failure:
                session.failures.append(str(failure))


class _Judge:
    """Evaluator of a task, with its model once that is loaded."""

    def __init__(self, session: RunSession, entry: dict[str, Any]) -> None:
        self.session, self.entry = session, entry
        self.base = session.base if entry.get("base") else None
        self._evaluator: Any = None

    def score(self, target: Target) -> None:
        """Make the target's score file, unless the store has it."""
        artefact = self.session.store.scores(target.id, self.entry["file"])
        with self.session.making(artefact, target.run) as lock:
            if lock is None:
                return
            self._check_unchanged(target)
            table = self._scored(target, kept_beside(artefact))
            self._check_unchanged(target)
            lock.check()
            if again := write_scores(artefact, table, self._made_by(), str(self.session.log(target.run))):
                raise UserError(f"{self.entry['name']}: {again}")
            self._track(target, table)

    def _track(self, target: Target, frame: pd.DataFrame) -> None:
        """Show the mean scores to the requested trackers, at the update whose weights made the images."""
        from alignbench.reporting.score_summary import means

        if self.session.trackers.names:
            trained = (read_json(self.session.run.status) or {}).get("updates", 0)  # none if the run trains nothing
            self.session.trackers.scores(means(self._evaluator, frame), target.update or trained)

    def _make(self) -> Any:
        return self.session.registry.make("evaluator", self.entry["settings"], "evaluator")

    def _made_by(self) -> dict[str, Any]:
        """Return the evaluator's content, weights and code, to be recorded beside its scores."""
        evaluator = self._make()
        content = score_content(evaluator, self.session.registry) | {"name": evaluator.name}
        files = provenance.weights(evaluator.files())
        return {"evaluator": content, "weights": files, "made_by": provenance.made_by(self.session.code)}

    def _check_unchanged(self, target: Target) -> None:
        """Raise UserError if the evaluator, or the prompts of the images, are not those that name the score file."""
        evaluator = self._make()
        made = read_json(self.session.images(target).folder / "protocol.json") or {}
        prompts = digest(target.prompts)
        if content_id(score_content(evaluator, self.session.registry)) not in self.entry["file"]:
            raise UserError(
                f"{evaluator.name}: its weights or code changed since the sweep was started; start it again"
            )
        if made.get("prompts_digest", prompts) != prompts:
            raise UserError("the prompts or their metadata changed since the images were made; start the sweep again")

    def _scored(self, target: Target, kept: Kept) -> pd.DataFrame:
        """Return one row per image, in the order of the manifest; computed in passes, reusing those in ``kept``."""
        if self._evaluator is None:
            self._evaluator = self._make()
        self._check_base()
        self.session.keep_threads(lambda: read_json(kept.folder / "made_by.json"))
        write_json(kept.folder / "made_by.json", provenance.made_by(self.session.code))
        images = self._read(target, lambda images: read_frame(images.product))
        sides = [target] if self.base is None else [target, self.base]
        listed = [self._read(side, lambda made: _listed(made, images)) for side in sides]

        def scored(rows: list[int]) -> pd.DataFrame:
            files = [self._read(side, partial(_images, part.iloc[rows])) for side, part in zip(sides, listed)]
            return self._score_rows(target, images.iloc[rows], files)

        def after(share: float) -> None:
            self.session.group.check()
            self.session.progress(f"scoring, {self.entry['name']}", share)

        return score_kept(
            self._evaluator,
            keys=[f"{prompt}-{index}" for prompt, index in zip(images["prompt_id"], images["index"])],
            prompts=list(images["prompt_id"]),
            files=list(zip(*(part["file"] for part in listed))),
            kept=kept,
            score=scored,
            after=after,
        )

    def _read(self, target: Target, read: Callable[[Artefact], T]) -> T:
        """Return what ``read`` gives for a target's image set."""
        images = self.session.images(target)
        with self.session.reading(images, lambda: check_images(images)):
            return read(images)

    def _check_base(self) -> None:
        if self.base is not None and not (images := self.session.images(self.base)).done:
            raise UserError(f"the base model's images are missing: {images.failure or 'not made yet'}")

    def _score_rows(self, target: Target, rows: pd.DataFrame, images: Sequence[list[Image | str]]) -> pd.DataFrame:
        """Score ``images``: those of ``rows`` of the image set's manifest and, if paired, the base model's."""
        prompts = {prompt.id: prompt for prompt in target.prompts}
        scores = score_rows(self._evaluator, images[0], [prompts[id] for id in rows["prompt_id"]], *images[1:])
        return rows[["prompt_id", "tag", "index"]].reset_index(drop=True).join(scores)


def _listed(images: Artefact, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the paths (``file``) and hashes of the images of a set that match the prompts and indices of ``rows``."""

    keys = ["prompt_id", "index"]
    listed = rows[keys].merge(read_frame(images.product), on=keys, how="left", validate="1:1")
    return listed.assign(file=[images.folder / file for file in listed["file"]])


def _images(listed: pd.DataFrame, _: Artefact) -> list[Image | str]:
    return list(in_threads(_image, listed["file"], listed["sha256"]))


def _image(file: Path, sha256: str) -> Image | str:
    """Read an image as ``read_image`` does. Raise Damaged if the file is not what was made."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise Damaged(file, why="it is missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(file)
    return read_image(io.BytesIO(data))
