"""What the report of ``sweeps/quickstart.yaml`` asks: does the two-step gradient of LeapAlign pay off in this world?"""

TITLE = "Quickstart: six ways to align one small flow model"

INTRO = """\
All methods start from the same pretrained text-to-image model of coloured shapes, and train with the same reward on the
same prompts and noise. They are judged on prompts that no part of this world has seen: by that reward, by a scorer that
took no part in training, and by an exact checker that looks for what the prompt asks."""

# (method, rivals): LeapAlign's claim is about methods that train only steps near the image.
QUESTIONS = (("LeapAlign", ("ReFL", "DRaFT-LV", "DRTune")),)
