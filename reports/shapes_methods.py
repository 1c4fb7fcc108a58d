"""The report of ``sweeps/shapes_methods.yaml``: does every method raise the reward that it is trained on?"""

TITLE = "Shapes: every method on one small flow model"

INTRO = """\
All methods start from the same pretrained text-to-image model of coloured shapes, and train with the same reward on the
same prompts and noise, for 1,200 images. The question is not which one is best: settings were tuned for few of them,
and on a model of 2 M parameters. It is whether each, as implemented, raises the reward that it is trained on, on
prompts that no part of this world has seen (the interval of the paired change against Base excludes zero), and what
else rises or falls with it."""

QUESTIONS = (
    ("LeapAlign", ("BPTT", "ReFL", "DRaFT-LV", "DRTune", "FlowBP-Sparse", "FlowBP-Bridge", "FlowBP-Lagrange")),
    ("MixGRPO", ("DanceGRPO", "Flow-GRPO", "MixGRPO-Flash")),
    ("VGG-Flow", ("VGG-Flow + value net", "Adjoint Matching", "ODE-AM")),
)
