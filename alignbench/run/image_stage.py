"""Second stage of a run: the images of a target, each a whole file, and the manifest that marks them as complete."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import settings
from alignbench.prompts import Prompt, digest
from alignbench.run import provenance
from alignbench.run.session import RunSession
from alignbench.run.task import Target
from alignbench.store.files import read_json, write, write_frame, write_json
from alignbench.store.locks import Lock

if TYPE_CHECKING:
    from PIL.Image import Image


def generate(session: RunSession, target: Target) -> None:
    """Make the target's image set, unless the store has it."""
    images, group = session.images(target), session.group
    with session.making(images, target.run) as lock:
        if lock is None:
            return
        group.broadcast(lambda: session.check_unchanged(target))
        if group.is_main:
            write_json(images.folder / "protocol.json", _protocol(session, target, images.folder))
        _make_images(session, target, images.folder)
        group.barrier()
        if group.is_main:
            _finish(session, target, lock)


def _protocol(session: RunSession, target: Target, folder: Path) -> dict[str, Any]:
    """Return how the images are made, and with which code and machine: several entries if the work was resumed."""
    makers = (read_json(folder / "protocol.json") or {}).get("made_by", [])
    facts = {"run": target.run, "limit": target.evaluation.limit, "prompts_digest": digest(target.prompts)}
    return settings(target.protocol) | facts | {"made_by": [*makers, provenance.made_by(session.code)]}


def _wanted(target: Target) -> list[tuple[Prompt, int]]:
    return [(prompt, index) for prompt in target.prompts for index in range(target.protocol.images_per_prompt)]


def _file(folder: Path, prompt: Prompt, index: int) -> Path:
    return folder / f"{prompt.id}-{index}.png"


def _make_images(session: RunSession, target: Target, folder: Path) -> None:
    """Write every missing image, one whole file each; each of several ranks makes its share."""
    from alignbench.evaluation.images import generate

    wanted, group = _wanted(target), session.group
    whole = group.broadcast(lambda: [_is_whole(_file(folder, prompt, index)) for prompt, index in wanted])
    done = {(prompt.id, index) for (prompt, index), is_whole in zip(wanted, whole) if is_whole}
    if len(done) == len(wanted):
        return
    flow, shard, made = _flow(session, target), (group.rank, group.size), len(done)
    for prompt, index, image in generate(flow, target.prompts, target.protocol, done, shard=shard):
        write(_file(folder, prompt, index), _png(image))
        made = min(made + group.size, len(wanted))  # the other ranks have made about as many
        session.progress("images", made / len(wanted), f"{made} of {len(wanted)}")
        session.raise_if_stopped()


def _is_whole(file: Path) -> bool:
    """Return whether an image of an earlier attempt is there and undamaged: a PNG has checksums of its own."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.verify()
    except Exception:  # Pillow raises many types, depending on what the file contains
        return False
    return True


def _flow(session: RunSession, target: Target) -> Any:
    """Return the model with the target's weights."""
    flow = session.flow
    if target.trained:
        from alignbench.training.checkpoint import load_weights, read_weights

        update = target.update
        path = session.run.product if update is None else session.store.milestone(target.run, update)
        with session.reading(session.run, lambda: read_weights(path)):
            load_weights(flow, path, target.protocol.weights)
    else:
        session.registry.make("method", target.spec.method, "method").prepare(flow)
    return flow


def _png(image: Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _finish(session: RunSession, target: Target, lock: Lock) -> None:
    """Write the manifest. Called when all images exist."""
    import pandas as pd

    images = session.images(target)
    rows = [_row(images.folder, prompt, index, target.protocol.seed) for prompt, index in _wanted(target)]
    for leftover in images.folder.glob(".*.tmp"):  # from a process that was killed while writing
        leftover.unlink()
    lock.check()
    write_frame(images.product, pd.DataFrame(rows))
    images.status.unlink(missing_ok=True)  # recorded by an earlier failure


def _row(folder: Path, prompt: Prompt, index: int, seed: int) -> dict[str, Any]:
    file = _file(folder, prompt, index)
    return {
        "prompt_id": prompt.id,
        "tag": prompt.tag,
        "text": prompt.text,
        "index": index,
        "seed": seed,
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
