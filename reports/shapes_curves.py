"""The report of ``sweeps/shapes_curves.yaml``."""

from __future__ import annotations

from collections.abc import Sequence

TITLE = "The shapes world: what happens over the course of training"
INTRO = """
ReFL and LeapAlign with twice the quickstart's learning rate and twice its images, looked at after every quarter of
training. At update 50 LeapAlign's means are ahead in the reward, PickScore and both checks. Then its training leaves
the model's neighbourhood (see the drift), the strict check and the training reward fall together, and its pictures
show a grid at the period of the model's tokens. A table of the end alone would call it the worse method; the course
says that this learning rate is too high for it. As the reward falls too, it is no reward hacking, and the report does
not call it so.
"""
QUESTIONS: Sequence[tuple[str, Sequence[str]]] = ()
