"""The reports of the sweeps in the shapes world, by their name: does every method do there what it is meant to?"""

QUICKSTART = """\
All methods start from the same pretrained text-to-image model of coloured shapes, and train with the same reward on the
same prompts and noise. They are judged on prompts that no part of this world has seen: by that reward, by a scorer that
took no part in training, and by an exact checker that looks for what the prompt asks."""

EVERY_METHOD = """\
All methods start from the same pretrained text-to-image model of coloured shapes, and train with the same reward on the
same prompts and noise, for 1,200 images. The question is not which one is best: settings were tuned for few of them,
and on a model of 2 M parameters. It is whether each, as implemented, raises the reward that it is trained on, on
prompts that no part of this world has seen (the interval of the paired change against Base excludes zero), and what
else rises or falls with it."""

CURVES = """\
ReFL and LeapAlign with twice the quickstart's learning rate and twice its images, looked at after every quarter of
training. At update 50 LeapAlign's means are ahead in the reward, PickScore and both checks. Then its training leaves
the model's neighbourhood (see the drift), the strict check and the training reward fall together, and its pictures
show a grid at the period of the model's tokens. A table of the end alone would call it the worse method; the course
says that this learning rate is too high for it. As the reward falls too, it is no reward hacking, and the report does
not call it so."""

# (method, rivals): LeapAlign's claim is about methods that train only steps near the image.
LATE_STEPS = (("LeapAlign", ("ReFL", "DRaFT-LV", "DRTune")),)

SWEEPS = {
    "quickstart": {
        "title": "Quickstart: six ways to align one small flow model",
        "intro": QUICKSTART,
        "questions": LATE_STEPS,
    },
    "shapes": {
        "title": "Shapes: six ways to align one small flow model, the longer run",
        "intro": QUICKSTART,
        "questions": LATE_STEPS,
    },
    "shapes_methods": {
        "title": "Shapes: every method on one small flow model",
        "intro": EVERY_METHOD,
        "questions": (
            ("LeapAlign", ("BPTT", "ReFL", "DRaFT-LV", "DRTune", "FlowBP-Sparse", "FlowBP-Bridge", "FlowBP-Lagrange")),
            ("MixGRPO", ("DanceGRPO", "Flow-GRPO", "MixGRPO-Flash")),
            ("VGG-Flow", ("VGG-Flow + value net", "Adjoint Matching", "ODE-AM")),
        ),
    },
    "shapes_curves": {"title": "The shapes world: what happens over the course of training", "intro": CURVES},
}
