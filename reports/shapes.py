"""The report of ``sweeps/shapes.yaml``: the quickstart's questions with more seeds."""

from alignbench.reports.quickstart import INTRO, QUESTIONS

__all__ = ["INTRO", "QUESTIONS", "TITLE"]

TITLE = "Shapes: six ways to align one small flow model, the longer run"
