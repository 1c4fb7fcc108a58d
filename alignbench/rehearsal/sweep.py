"""Rehearsals: a whole sweep in minutes, with its rows, stages, evaluators and launcher, but small models.

A rehearsal is a function of the sweep's document alone. Methods keep their settings; models, prompts, sizes and budgets
become small, and evaluators get small random checkpoints. All outputs are named REHEARSAL: their numbers mean nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from alignbench.config import UserError
from alignbench.experiment.document import Document, decoded
from alignbench.rehearsal import tiny_backends, tiny_evaluators

STAMP = "REHEARSAL"
SIZE, BATCH, PROMPTS, RANK = 32, 24, 6, 4  # pixels; images; evaluation prompts; LoRA rank
IMAGES_PER_PROMPT = 2
LR, EMA = 1e-3, 0.5  # large, so that a few updates visibly change the images
BATCHES = 2  # the budget of most rows
BACKENDS = ("flux", *tiny_backends.BUILDERS)
REMOTE = ("revision", "base_revision", "clip_revision", "server", "served_model", "engine", "processor", "architecture")


def rehearse(document: Document, store: Path) -> Document:
    """Return the sweep's rehearsal. Small checkpoints that are missing are made in ``store/rehearsal``."""
    backend = decoded(document).base.backend
    if backend.get("name") not in BACKENDS:
        what = f"only the backends {', '.join(BACKENDS)} have a small model"
        raise UserError(f"{document.path}: --rehearse: {what}, not {backend.get('name')}")
    shrink = Shrink(document, store / "rehearsal")
    return replace(
        document,
        data=shrink.data(),
        run_sets=[(path, shrink(path, value)) for path, value in document.run_sets if not shrink.drops(path)],
        command=f"{document.command} --rehearse",
        rehearsal=True,
    )


class Shrink:
    """A function from a run's setting, by its dotted path, to its value in the rehearsal."""

    def __init__(self, document: Document, folder: Path) -> None:
        self.document, self.folder = document, folder
        data = document.data
        family = data["base"]["backend"]["name"]
        model = tiny_backends.backend(family, folder)
        self.prompts = [tiny_backends.PROMPTS.get(family, f"shapes/{split}") for split in ("train", "test")]
        self.backend = {**model, "size": SIZE, "dtype": "float32"}
        # the base model's weights, in place of published ones
        self.published = {"weights": model["model"], "subfolder": "transformer", "kind": "transformer"}
        sets = [override.get("set", {}) for override in data.get("overrides", [])]
        axes = [{axis: value} for axis, values in data.get("grid", {}).items() for value in values]
        parts = [{"training": data["base"].get("training", {})}, *sets, *axes, dict(document.run_sets)]
        micro = [n for part in parts for n in _values(part, "training.micro_batch") if isinstance(n, int) and n]
        self.batch = 2 * max(micro) if micro else BATCH  # two micro-batches of the largest
        self.budget = {kind: n for kind, n in data["base"].get("training", {}).get("budget", {}).items() if n}

    def data(self) -> dict[str, Any]:
        """Return the rehearsal's document."""
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
                override | {"set": self.override(override.get("set", {}))} for override in data["overrides"]
            ]
        data["evaluation"] = self.evaluation(data.get("evaluation", {}))
        return data

    def override(self, values: dict[str, Any]) -> dict[str, Any]:
        return {path: self(path, value) for path, value in values.items() if not self.drops(path)}

    def evaluation(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        protocol = self("evaluation.protocol", evaluation.get("protocol", {}))
        protocol |= {
            "size": SIZE,
            "images_per_prompt": min(IMAGES_PER_PROMPT, protocol.get("images_per_prompt", IMAGES_PER_PROMPT)),
        }
        evaluators = [self.evaluator(plain) for plain in evaluation.get("evaluators", [])]
        limit = min(PROMPTS, evaluation.get("limit") or PROMPTS)
        return evaluation | {"protocol": protocol, "evaluators": evaluators, "limit": limit}

    def evaluator(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the evaluator with a small checkpoint. Those of the shapes world stay, plug-ins keep their files."""
        name = plain.get("name")
        known = isinstance(name, str) and (name in tiny_evaluators.PACKAGED or name in tiny_evaluators.BUILDERS)
        if "shapes" in plain.values() or not known:
            return plain
        kept = {key: value for key, value in plain.items() if key not in REMOTE}
        shorter = {"max_new_tokens": 8} if name == "unifiedreward" else {}
        return kept | tiny_evaluators.checkpoint(str(name), self.folder) | shorter

    def drops(self, path: str) -> bool:
        """Return whether the setting belongs to an evaluator or a repository that the rehearsal replaces."""
        return ".evaluator." in path or path in ("backend.revision", "method.revision")

    def __call__(self, path: str, value: Any, i: int = 0) -> Any:
        """Return the setting's value in the rehearsal.

        ``i``: index of the value on its axis of the grid, where different values must stay different.
        """
        if isinstance(value, list) and path == "reward":
            return [self(path, part, i) for part in value]
        if isinstance(value, dict):
            if path.endswith("evaluator"):
                return self.evaluator(value)
            if path == "method" and value.get("name") == "checkpoint":
                return {key: part for key, part in value.items() if key != "revision"} | self.published
            return {key: self(f"{path}.{key}", part, i) for key, part in value.items()}
        if path.startswith("training.budget."):
            return self.budget_limit(path.rpartition(".")[2], value)
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
        }.get(path, value)

    def budget_limit(self, kind: str, value: Any) -> Any:
        """Return a budget in proportion to the base's: a row with three times the budget still has three times."""
        small = {"images": BATCHES * self.batch, "updates": BATCHES, "nfe": BATCHES * self.batch * 25, "gpu_seconds": 5}
        if kind not in small or not isinstance(value, int | float):
            return value
        minimum = BATCHES if kind == "updates" else 1  # so that a milestone comes before the end
        return max(minimum, round(small[kind] * value / self.budget.get(kind, value)))


def _values(settings: dict[str, Any], path: str) -> list[Any]:
    """Return the values of ``path`` in settings that are written as nested mappings, dotted paths, or both."""
    values = []
    for key, value in settings.items():
        if key == path:
            values.append(value)
        elif path.startswith(f"{key}.") and isinstance(value, dict):
            values += _values(value, path.removeprefix(f"{key}."))
    return values
