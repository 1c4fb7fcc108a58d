"""Small random checkpoints of the built-in evaluators, in the official layouts, for rehearsals, the doctor and tests.

Their scores mean nothing, but every line of code between an image and its score runs, with the official files' names
and tensors. They are the same on every machine: random numbers are PCG64's raw bits, which numpy promises to keep,
seeded by each tensor's name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignbench.config import UserError, did_you_mean
from alignbench.rehearsal.random_weights import make, source_digest
from alignbench.rehearsal.tiny_clip import HEAD_FILE, aesthetic_folder, clip_folder
from alignbench.rehearsal.tiny_imagereward import imagereward_folder
from alignbench.rehearsal.tiny_mask2former import DETECTOR_FILE, geneval_folder
from alignbench.rehearsal.tiny_qwen import hpsv3_folder, qwen_vl_folder


def checkpoint(evaluator: str, folder: Path) -> dict[str, Any]:
    """Return settings that point the built-in ``evaluator`` at its small checkpoint.

    If missing, it is made in its own folder within ``folder``, completely or not at all. ``hpsv2`` and ``pickscore``
    have packaged checkpoints, trained for the shapes world. GenEval's is Mask2Former with its CLIP; its shapes detector
    has no weights. Raise UserError, with all names, for any other evaluator: plug-ins have no small checkpoint.
    """
    if evaluator in PACKAGED:
        return {"weights": "shapes"}
    if evaluator not in BUILDERS:
        known = did_you_mean(evaluator, sorted({*PACKAGED, *BUILDERS}), "they exist for")
        raise UserError(f"there is no small checkpoint for the evaluator '{evaluator}'{known}")
    made = folder.resolve() / f"{evaluator}-{source_digest()[:8]}"
    if not made.exists():
        make(BUILDERS[evaluator], made)
    return _settings(evaluator, made)


def _settings(evaluator: str, made: Path) -> dict[str, Any]:
    """Return the settings for a checkpoint in the folder ``made``."""
    paths = {
        "imagereward": {"weights": made, "tokenizer": made},
        "hpsv3": {"weights": made, "base": made},
        "aesthetic": {"weights": made / HEAD_FILE, "clip": made / "clip"},
        "geneval": {"detector": made / DETECTOR_FILE, "clip": made / "clip"},
    }
    return {name: str(path) for name, path in paths.get(evaluator, {"weights": made}).items()}


PACKAGED = ("hpsv2", "pickscore")
BUILDERS: dict[str, Callable[[Path], Any]] = {
    "aesthetic": aesthetic_folder,
    "clipscore": clip_folder,
    "diversity": clip_folder,
    "base_distance": clip_folder,
    "geneval": geneval_folder,
    "hpsv3": hpsv3_folder,
    "imagereward": imagereward_folder,
    "unifiedreward": qwen_vl_folder,
}
