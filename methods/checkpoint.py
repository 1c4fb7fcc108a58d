"""Weights trained and published by others, as a row of the table.

The LeapAlign paper (arXiv 2604.15311) compares itself with ``xzyhku/flux_hpsv2.1_dancegrpo`` (DanceGRPO) and
``tulvgengenr/MixGRPO`` in this way. Departures from a row that is trained here:
1. There are no training costs and no training seeds: the cost and the spread over training runs are unknown.
2. ``steps`` has no meaning and is not part of the run id.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

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
    weights: str  # type: ignore[misc]  # a hub id, a folder or a .safetensors file; keyword-only, as all settings are
    revision: str | None = None  # revision of the hub id
    kind: Literal["transformer", "lora"] = "transformer"
    subfolder: str | None = None  # subfolder of the hub id or the folder

    def requirements(self) -> list[Requirement]:
        return [requirement(self.weights, "method.weights", shapes="model", revision=self.revision)]

    def files(self) -> list[Path]:
        return published(self.weights, "method.weights", revision=self.revision, subfolder=self.subfolder)

    def prepare(self, flow: Flow) -> None:
        loader = f"load_{self.kind}"
        what = f"this backend ({type(flow).__name__}) cannot load a published {self.kind}"
        require(hasattr(flow, loader), "method.kind", what, "choose the backend flux, sd3 or flux2, or another kind")
        getattr(flow, loader)(self.files())
