"""The whole of a sweep in minutes: its rows, stages, evaluators and launcher, with the shapes world and small models.

A function of the sweep's document alone. Methods keep their settings; the model, prompts, sizes and budgets become
small, and evaluators get small random checkpoints. Everything is named REHEARSAL: no number of it means anything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from alignbench.config import UserError
from alignbench.experiment.document import Document
from alignbench.rehearsal import tiny_backends, tiny_evaluators

STAMP = "REHEARSAL"
SIZE, BATCH, PROMPTS, PICTURES, RANK = 32, 24, 6, 2, 4  # pixels; images; of evaluation; each; of adapters
LR, EMA = 1e-3, 0.5  # large, so that a few updates show in the pictures: else nobody saw which weights made them
BATCHES = 2  # that a budget lasts in most rows
BACKENDS = ("flux", *tiny_backends.MADE)
REMOTE = ("revision", "base_revision", "clip_revision", "server", "served_model", "engine", "processor", "architecture")


def rehearse(document: Document, store: Path) -> Document:
    """The sweep's rehearsal. Small checkpoints are made below ``store/rehearsal`` where they are not there yet."""
    backend = document.data.get("base", {}).get("backend", {})
    if backend.get("name") not in BACKENDS:
        has = f"only the backends {', '.join(BACKENDS)} have a small model"
        raise UserError(f"{document.path}: --rehearse: {has}, not {backend.get('name')}")
    smaller = Smaller(document, store / "rehearsal")
    return replace(
        document,
        data=smaller.data(),
        run_sets=[(place, smaller(place, value)) for place, value in document.run_sets if not smaller.drops(place)],
        command=f"{document.command} --rehearse",
        rehearsal=True,
    )


class Smaller:
    """Settings of a run, by their dotted path, as the rehearsal has them."""

    def __init__(self, document: Document, folder: Path) -> None:
        self.document, self.folder = document, folder
        data = document.data
        family = data["base"]["backend"]["name"]
        model = tiny_backends.backend(family, folder)
        self.prompts = [tiny_backends.PROMPTS.get(family, f"shapes/{split}") for split in ("train", "test")]
        self.backend = {**model, "size": SIZE, "dtype": "float32"}
        # in place of somebody's weights: the base model's
        self.published = {"weights": model["model"], "subfolder": "transformer", "kind": "transformer"}
        sets = [override.get("set", {}) for override in data.get("overrides", [])]
        axes = [{axis: value} for axis, values in data.get("grid", {}).items() for value in values]
        places = [{"training": data["base"].get("training", {})}, *sets, *axes, dict(document.run_sets)]
        micro = [value for place in places for value in _all(place, "training.micro_batch") if value]
        self.batch = 2 * max(micro) if micro else BATCH  # two micro-batches of the largest
        self.budget = {kind: n for kind, n in data["base"].get("training", {}).get("budget", {}).items() if n}

    def data(self) -> dict[str, Any]:
        """The document's."""
        data = dict(self.document.data)
        data["name"] = f"{data.get('name', 'sweep')}-{STAMP}"
        data["base"] = {part: self(part, value) for part, value in data["base"].items()}
        backend = {key: value for key, value in data["base"]["backend"].items() if key != "revision"}
        data["base"]["backend"] = (
            backend | self.backend | ({"lora_rank": RANK} if backend.get("tune") == "lora" else {})
        )
        training = data["base"].get("training", {})
        optimizer = training.get("optimizer", {})
        moving = {"lr": LR} | ({"ema": EMA} if optimizer.get("ema", EMA) is not None else {})
        batch = self("training.batch", training.get("batch"))
        data["base"]["training"] = training | {"batch": batch, "checkpoint_every": 1, "optimizer": optimizer | moving}
        data["cases"] = [case | {"method": self("method", case.get("method"))} for case in data.get("cases", [])]
        if "grid" in data:
            data["grid"] = {
                axis: [self(axis, value, i) for i, value in enumerate(values)] for axis, values in data["grid"].items()
            }
        if "overrides" in data:
            data["overrides"] = [
                override | {"set": self.set(override.get("set", {}))} for override in data["overrides"]
            ]
        data["evaluation"] = self.evaluation(data.get("evaluation", {}))
        return data

    def set(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {place: self(place, value) for place, value in wanted.items() if not self.drops(place)}

    def evaluation(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        protocol = self("evaluation.protocol", evaluation.get("protocol", {}))
        protocol |= {"size": SIZE, "images_per_prompt": min(PICTURES, protocol.get("images_per_prompt", PICTURES))}
        evaluators = [self.evaluator(plain) for plain in evaluation.get("evaluators", [])]
        limit = min(PROMPTS, evaluation.get("limit") or PROMPTS)
        return evaluation | {"protocol": protocol, "evaluators": evaluators, "limit": limit}

    def evaluator(self, plain: dict[str, Any]) -> dict[str, Any]:
        """With a small checkpoint. The shapes world's are small already; plug-ins have their own files or none."""
        name = plain.get("name")
        if "shapes" in plain.values() or (name not in tiny_evaluators.PACKAGED and name not in tiny_evaluators.MADE):
            return plain
        kept = {key: value for key, value in plain.items() if key not in REMOTE}
        words = {"max_new_tokens": 8} if name == "unifiedreward" else {}
        return kept | tiny_evaluators.checkpoint(str(name), self.folder) | words

    def drops(self, place: str) -> bool:
        """Is this a setting of an evaluator or of a repository that the rehearsal has replaced?"""
        return ".evaluator." in place or place in ("backend.revision", "method.revision")

    def __call__(self, place: str, value: Any, i: int = 0) -> Any:
        """``i``: of the value on its axis of the grid, where different values must stay different."""
        if isinstance(value, list) and place == "reward":
            return [self(place, part, i) for part in value]
        if isinstance(value, dict):
            if place.endswith("evaluator"):
                return self.evaluator(value)
            if place == "method" and value.get("name") == "checkpoint":
                return {key: part for key, part in value.items() if key != "revision"} | self.published
            return {key: self(f"{place}.{key}", part, i) for key, part in value.items()}
        if place.startswith("training.budget."):
            return self.spent(place.rpartition(".")[2], value)
        return {
            **{f"backend.{key}": value for key, value in self.backend.items()},
            "backend.size": SIZE * (i + 1),
            "backend.compile": False,
            "backend.attention": "native",
            "prompts": self.prompts[0],
            "training.batch": self.batch * (i + 1),
            "training.checkpoint_every": 1,
            "training.milestones": [1] if value else [],
            "training.optimizer.warmup": 0,
            "training.optimizer.lr": LR * (i + 1),
            "training.optimizer.ema": None if value is None else EMA / (i + 1),
            "method.weights": self.published["weights"],
            "evaluation.protocol.prompts": self.prompts[1],
            "evaluation.protocol.size": SIZE,
        }.get(place, value)

    def spent(self, kind: str, value: Any) -> Any:
        """A budget in the same proportion to the sweep's own as there: a row with three times as much keeps that."""
        least = {"images": BATCHES * self.batch, "updates": BATCHES, "nfe": BATCHES * self.batch * 25, "gpu_seconds": 5}
        if kind not in least or not isinstance(value, int | float):
            return value
        few = BATCHES if kind == "updates" else 1  # a milestone stands before the end
        return max(few, round(least[kind] * value / self.budget.get(kind, value)))


def _all(place: dict[str, Any], path: str) -> list[Any]:
    """The values of ``path`` in settings written as nested parts, as dotted paths, or as both."""
    found = []
    for key, value in place.items():
        if key == path:
            found.append(value)
        elif path.startswith(f"{key}.") and isinstance(value, dict):
            found += _all(value, path.removeprefix(f"{key}."))
    return found
