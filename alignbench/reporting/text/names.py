"""Names, order and decimals of measures as papers print them. Data files keep the machine names.

The order is that of LeapAlign's table 2 (arXiv 2604.15311). No unit is changed: papers print GenEval's tasks in per
cent, with two decimals, where ours are fractions with four.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from alignbench.reporting.text.table import DECIMALS

if TYPE_CHECKING:
    from alignbench.reporting.analysis.comparison import Measure


class Printed(NamedTuple):
    """A metric as it is printed."""

    name: str
    decimals: int


MEASURES = {  # metric -> as printed, in the papers' order of columns
    "hpsv2.1": Printed("HPSv2.1", 4),
    "hpsv3": Printed("HPSv3", 4),
    "pickscore": Printed("PickScore", 4),
    "ur_align_acs": Printed("UR-Align", 4),
    "ur_iq_acs": Printed("UR-IQ", 4),
    "ur_coherence_acs": Printed("UR-Coherence", 4),
    "ur_style_acs": Printed("UR-Style", 4),
    "ur_align_acs_2": Printed("UR-Align 2.0", 4),
    "ur_iq_acs_2": Printed("UR-IQ 2.0", 4),
    "ur_coherence_acs_2": Printed("UR-Coherence 2.0", 4),
    "ur_style_acs_2": Printed("UR-Style 2.0", 4),
    "ur_align_flowbp": Printed("UR-Align, FlowBP's prompt", 4),
    "ur_iq_flowbp": Printed("UR-IQ, FlowBP's prompt", 4),
    "ur_overall_final": Printed("UnifiedReward", 4),
    "imagereward": Printed("ImageReward", 4),
    "aesthetic": Printed("Aesthetic Score", 2),
    "clipscore": Printed("CLIPScore", 4),
    "geneval": Printed("GenEval", 4),
    "geneval_strict": Printed("GenEval strict", 4),
}
TASKS = {  # GenEval's, in the papers' order
    "single_object": "Single Obj.",
    "two_object": "Two Obj.",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Attr. Binding",
}
OVERALL = "Overall"


def measure_name(measure: Measure) -> str:
    """Return the measure's name as printed: ``HPSv2.1``, or ``HPSv2.1 (shapes)`` for the shapes world's own scorer.

    A name in brackets that an import added stays: ``HPSv2.1 (flowbp)``. A metric without an entry has its own name.
    """
    name, bracket, source = measure.name.partition(" (")
    known = MEASURES.get(name)
    shown = f"{known.name}{bracket}{source}" if known else measure.name
    return f"{shown} ({measure.world})" if measure.world else shown


def title(measure: Measure) -> str:
    """Return the measure's name as printed, marked if it is a mean of task means."""
    return measure_name(measure) + ", by task" * measure.by_task


def decimals(measure: Measure) -> int:
    """Return the decimals of the measure's means: those of the papers, else those of its unit."""
    known = MEASURES.get(measure.name.partition(" (")[0])
    return known.decimals if known else DECIMALS.get(measure.unit, 3)


def change_decimals(measure: Measure) -> int:
    """Return the decimals of the measure's changes: one more than its means have, up to four."""
    return max(decimals(measure), min(decimals(measure) + 1, 4))


def place(metric: str) -> int:
    """Return the metric's place among the papers' columns; metrics without an entry come after all others."""
    order = [*MEASURES]
    name = metric.partition(" (")[0]
    return order.index(name) if name in MEASURES else len(order)


def task_name(task: str) -> str:
    """Return the task's name as printed; a task without an entry has its own, with spaces."""
    return TASKS.get(task) or task.replace("_", " ")


def in_order(tasks: Iterable[str]) -> list[str]:
    """Return the tasks in the papers' order, then the others by name."""
    known = [*TASKS]
    return sorted(tasks, key=lambda task: (known.index(task) if task in TASKS else len(known), task))
