"""The base model without training: the row that every other row is compared with."""

from __future__ import annotations

from typing import ClassVar

from alignbench.method import AlignMethod


class Base(AlignMethod):
    """The model as released, without training."""

    name: ClassVar[str] = "base"
    title: ClassVar[str] = "Base model"
    trains: ClassVar[bool] = False
