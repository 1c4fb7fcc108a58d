"""Reports of the sweeps in the shapes world, by their name: does every method do what it is meant to do there?"""

QUICKSTART = """\
All methods start from the same pretrained text-to-image model of coloured shapes and train with the same reward on the
same prompts and noise. They are judged on prompts that no model or scorer of this world has seen: by that reward, by a
held-out scorer, and by an exact checker of what the prompt asks for."""

EVERY_METHOD = """\
All methods start from the same pretrained text-to-image model of coloured shapes and train with the same reward on the
same prompts and noise, for 1,200 images. The question is not which is best: the model has 2 M parameters, and settings
were tuned for few of the methods. It is whether each method, as implemented, raises the reward that it trains on, on
prompts that no model or scorer of this world has seen (the interval of the paired change against Base excludes zero),
and what else rises or falls with it."""

CURVES = """\
ReFL and LeapAlign with twice the quickstart's learning rate and twice its images, evaluated after every quarter of
training. At update 50 LeapAlign's means are ahead in the reward, PickScore and both checks. Then training leaves the
neighbourhood of the base model (see the drift), the strict check and the training reward fall together, and images
show a grid with the period of the model's tokens. The final scores alone would make it the worse method; the learning
curves show that this learning rate is too high for it. Since the reward falls as well, this is not reward hacking, and
the report does not call it that."""

# (method, rivals): LeapAlign's claim is against methods that train only steps near the image.
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
