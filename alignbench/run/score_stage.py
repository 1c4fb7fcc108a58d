"""Third stage of a run: the scores of stored images by every evaluator, each score file whole or absent."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignbench.config import UserError
from alignbench.experiment.ids import score_content
from alignbench.run import provenance
from alignbench.run.session import RunSession
from alignbench.run.task import Failed, Target
from alignbench.store.artefacts import Artefact, check_images
from alignbench.store.files import Damaged, is_whole, read_frame, write_frame, write_json

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
            frame = self._scored(target, artefact)
            lock.check()
            write_json(artefact.product.with_suffix(".json"), self._made_by())
            write_frame(artefact.product, frame)
            artefact.status.unlink(missing_ok=True)
            shutil.rmtree(_parts(artefact), ignore_errors=True)

    def _make(self) -> Any:
        return self.session.registry.make("evaluator", self.entry["settings"], "evaluator")

    def _made_by(self) -> dict[str, Any]:
        """Return the evaluator's content, weights and code, to be recorded beside its scores."""
        evaluator = self._make()
        content = score_content(evaluator, self.session.registry) | {"name": evaluator.name}
        files = provenance.weights(evaluator.files())
        return {"evaluator": content, "weights": files, "made_by": provenance.made_by(self.session.code)}

    def _scored(self, target: Target, artefact: Artefact) -> pd.DataFrame:
        """Return one row per image, in the order of the manifest; computed in parts, reusing those on disk."""
        import pandas as pd

        from alignbench.evaluation.scoring import passes

        if self._evaluator is None:
            self._evaluator = self._make()
        self._check_base()
        images = self._read(target, lambda images: read_frame(images.product))
        frames = []
        for rows in passes(list(images["prompt_id"])):  # one file each, so that a killed run keeps its scores
            part = _parts(artefact) / f"{rows.start}.parquet"
            if not is_whole(part):
                write_frame(part, self._score_rows(target, images.iloc[rows]))
                self.session.raise_if_stopped()
            frames.append(read_frame(part))
            self.session.progress(f"scoring, {self.entry['name']}", rows.stop / len(images))
        return pd.concat(frames, ignore_index=True)

    def _read(self, target: Target, read: Callable[[Artefact], T]) -> T:
        """Return what ``read`` gives for a target's image set."""
        images = self.session.images(target)
        with self.session.reading(images, lambda: check_images(images)):
            return read(images)

    def _check_base(self) -> None:
        if self.base is not None and not (images := self.session.images(self.base)).done:
            raise UserError(f"the base model's images are missing: {images.failure or 'not made yet'}")

    def _score_rows(self, target: Target, rows: pd.DataFrame) -> pd.DataFrame:
        from alignbench.evaluation.scoring import score_rows

        prompts = {prompt.id: prompt for prompt in target.prompts}
        sides = [self._read(side, lambda set: _images(set, rows)) for side in (target, self.base) if side is not None]
        scores = score_rows(self._evaluator, sides[0], [prompts[id] for id in rows["prompt_id"]], *sides[1:])
        return rows[["prompt_id", "tag", "index"]].reset_index(drop=True).join(scores)


def _parts(artefact: Artefact) -> Path:
    return artefact.product.with_suffix(".parts")


def _images(images: Artefact, rows: pd.DataFrame) -> list[Image]:
    """Read the images of a set that match the prompts and indices of ``rows``, in the order of ``rows``."""

    from alignbench.evaluation.scoring import in_threads

    keys = ["prompt_id", "index"]
    listed = rows[keys].merge(read_frame(images.product), on=keys, how="left", validate="1:1")
    return list(in_threads(lambda file, sha256: _image(images.folder, file, sha256), listed["file"], listed["sha256"]))


def _image(folder: Path, file: str, sha256: str) -> Image:
    """Read an image. Raise Damaged if the file is not what was made."""
    from PIL import Image

    try:
        data = (folder / file).read_bytes()
    except FileNotFoundError:
        raise Damaged(folder / file, why="it is missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(folder / file)
    return Image.open(io.BytesIO(data)).convert("RGB")
