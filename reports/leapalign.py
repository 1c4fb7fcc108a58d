"""Reports of the LeapAlign paper's tables and figures (arXiv 2604.15311v2), by the name of their sweep.

Its printed numbers are in ``published/``; each sweep's first lines say what the paper leaves open.
"""

from __future__ import annotations

import csv
from pathlib import Path

from alignbench.reporting.text.table import Cell, Column, Table

BEATS = (("LeapAlign", ("ReFL", "DRaFT-LV", "DRTune")),)


def ticks() -> str:
    """Return table 1 as measured by ``python -m alignbench.planning.gradient_paths table2``, kept beside this file."""
    with Path(__file__).with_name("measured-table1.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    names = list(dict.fromkeys(line["metric"] for line in lines))
    values = {(line["method"], line["metric"]): line["value"] for line in lines}
    methods = list(dict.fromkeys(line["method"] for line in lines))
    rows = [[Cell(method), *(Cell(values[method, name]) for name in names)] for method in methods]
    return Table([Column("method"), *map(Column, names)], rows).markdown()


TABLE_1 = """\
The paper's table 1, measured: does the reward's gradient reach steps of the first half; does it flow from one trained
step into another through the network's input; does it leap over sampling steps; is more than one step trained?"""
FIGURE_1B = """\
Figure 1b shows the labels of three of these rows, rounded: HPSv2.1, ImageReward and UR-IQ from the sweep table2,
PickScore from table3_pickscore, HPSv3 from table3_hpsv3."""


def ablation(figure: str, question: str, subject: str, *rivals: str) -> dict:
    """Return the words for a figure of section 6.3, where the paper prints few numbers and the claims are shown."""
    return {
        "title": f"LeapAlign's figure {figure}",
        "intro": f"Only what the figure varies differs from LeapAlign as published. The question: {question}.",
        "questions": ((subject, rivals),),
        "published": (f"leapalign-fig{figure}",),
    }


SWEEPS = {
    "table2": {
        "title": "LeapAlign's table 2: general preference on FLUX.1-dev",
        "intro": f"{TABLE_1}\n\n{ticks()}\n\n{FIGURE_1B}",
        "questions": (("LeapAlign", ("ReFL", "DRaFT-LV", "DRTune", "DanceGRPO", "MixGRPO")),),
        "published": ("leapalign-table2",),
    },
    "table2_geneval": {
        "title": "LeapAlign's table 2: GenEval on FLUX.1-dev",
        "intro": "Trained on GenEval-style prompts with HPSv2.1. Figure 1a shows the training reward of LeapAlign and "
        "DRTune in these runs, figure 1c the six tasks.",
        "questions": (("LeapAlign", ("ReFL", "DRaFT-LV", "DRTune", "DanceGRPO", "MixGRPO")),),
        "published": ("leapalign-table2-geneval",),
        "curves": ("leapalign-fig1a",),
    },
    "table3_pickscore": {
        "title": "LeapAlign's table 3: trained on PickScore",
        "intro": FIGURE_1B,
        "questions": BEATS,
        "published": ("leapalign-table3-pickscore",),
    },
    "table3_hpsv3": {
        "title": "LeapAlign's table 3: trained on HPSv3",
        "intro": FIGURE_1B,
        "questions": BEATS,
        "published": ("leapalign-table3-hpsv3",),
    },
    "table4": {
        "title": "LeapAlign's table 4: Stable Diffusion 3.5 Medium",
        "intro": "The comparison of table 2 on another model, with fewer updates and smaller images.",
        "questions": BEATS,
        "published": ("leapalign-table4",),
    },
    "table5": {
        "title": "LeapAlign's table 5: the threshold lambda",
        "intro": "An image that scores below two margins has the same gradient with both; with one seed, "
        "differences between 0.55, 0.75 and 0.95 may be chance.",
        "questions": (("LeapAlign, margin=0.55", [f"LeapAlign, margin={value}" for value in (0.35, 0.75, 0.95)]),),
        "published": ("leapalign-table5",),
    },
    "fig4a": ablation(
        *("4a", "which share alpha of the nested gradient to keep"),
        *("LeapAlign", "LeapAlign, alpha 0", "LeapAlign, alpha 1"),
    ),
    "fig4b": ablation(
        *("4b", "whether a third leap is worth its memory, and what a single leap does"),
        *("LeapAlign", "LeapAlign, 1 leap", "LeapAlign, 3 leaps"),
    ),
    "fig4c": ablation(
        *("4c", "whether the reward should look at the sampler's image or at the leap's prediction"),
        *("LeapAlign", "LeapAlign, leap weighed by d_j", "LeapAlign, leap weighed by both"),
    ),
    "fig4d": ablation(
        *("4d", "which distances between leaps and trajectory should weigh a sample"),
        *("LeapAlign", "LeapAlign, d_j alone", "LeapAlign, d_0 alone", "LeapAlign, no weight"),
    ),
    "fig4e": ablation(
        *("4e", "whether the difference comes from training early steps"),
        *("LeapAlign", "LeapAlign, steps in [0, 1/2]"),
    ),
    "fig4f": ablation(
        *("4f", "whether k and j should be drawn at random or kept at a fixed distance"),
        *("LeapAlign", "LeapAlign, distance 1/2"),
    ),
    "fig5": {
        "title": "LeapAlign's figure 5: GenEval over training",
        "intro": "The training runs of table2_geneval, evaluated every 20 updates.",
        "questions": BEATS,
        "published": ("leapalign-table2-geneval",),
        "curves": ("leapalign-fig5",),
    },
    "fig6": ablation(
        *("6", "what the nested gradient does if it alone reaches step k (`grad_norm` in the records is its norm)"),
        *("Nested alone, alpha 0.3", "Nested alone, alpha 0", "Nested alone, alpha 1"),
    ),
}
