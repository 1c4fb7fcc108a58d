"""Weights trained and published by others, as a row of the table.

The LeapAlign paper (arXiv 2604.15311) compares itself with ``xzyhku/flux_hpsv2.1_dancegrpo`` (DanceGRPO) and
``tulvgengenr/MixGRPO`` in this way. Departures from a row that is trained here:
1. There are no training costs and no training seeds: the cost and the spread over training runs are unknown.
2. ``steps`` has no meaning and is not part of the run id.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignbench.config import Requirement
from alignbench.method import AlignMethod, require
from alignbench.weights import published, requirement

if TYPE_CHECKING:
    from alignbench.flow import Flow


class Checkpoint(AlignMethod):
    """Published transformer, or published LoRA adapters, in place of training."""

    name: ClassVar[str] = "checkpoint"
    title: ClassVar[str] = "Published weights"
    trains: ClassVar[bool] = False
    omitted_unset: ClassVar[tuple[str, ...]] = ("file", "alpha", "scale")  # as in older run ids
    weights: str  # type: ignore[misc]  # a hub id, a folder or a .safetensors file; keyword-only, as all settings are
    revision: str | None = None  # revision of the hub id
    kind: Literal["transformer", "lora"] = "transformer"
    subfolder: str | None = None  # subfolder of the hub id or the folder
    file: str | None = None  # the file of several in it; or the index of a sharded one
    alpha: float | None = None  # of adapters, in place of what their files say; their strength is alpha / rank
    scale: float | None = None  # of adapters, in place of alpha / rank: what B A is multiplied with

    def __post_init__(self) -> None:
        given = [name for name in ("alpha", "scale") if getattr(self, name) is not None]
        require(len(given) < 2, "method.scale", "the strength is said twice, as alpha and as scale", "leave one out")
        for name in given:
            require(
                self.kind == "lora", f"method.{name}", "a transformer has no strength", "leave it out, or kind: lora"
            )
            require(getattr(self, name) > 0, f"method.{name}", f"{getattr(self, name)} is not positive", "choose more")

    def requirements(self) -> list[Requirement]:
        return [requirement(self.weights, "method.weights", shapes="model", revision=self.revision)]

    def files(self) -> list[Path]:
        place = {"revision": self.revision, "subfolder": self.subfolder, "file": self.file}
        return published(self.weights, "method.weights", **place)

    def fits(self, backend: Any) -> list[str]:
        """Return warnings about the weights for this backend. Raise UserError for weights that are not its model's."""
        check = getattr(backend, f"check_{self.kind}", None)
        return [] if check is None else check(self.files(), **self._strength) or []

    def prepare(self, flow: Flow) -> None:
        loader = f"load_{self.kind}"
        what = f"this backend ({type(flow).__name__}) cannot load a published {self.kind}"
        require(hasattr(flow, loader), "method.kind", what, "choose the backend flux, sd3 or flux2, or another kind")
        getattr(flow, loader)(self.files(), **self._strength)

    @property
    def _strength(self) -> dict[str, Any]:
        """How strong adapters are by this row, and whether it names their file; {} for a transformer."""
        if self.kind == "transformer":
            return {}
        named = self.file is not None or self.weights.endswith(".safetensors")
        return {"alpha": self.alpha, "scale": self.scale, "named": named}
