"""The report of ``sweeps/table2.yaml``: LeapAlign's table 2, general preference."""

TITLE = "LeapAlign's table 2: general preference on FLUX.1-dev"

INTRO = """\
FLUX.1-dev, trained on HPSv2.1 with 50,000 prompts of HPDv2; judged on the 400 test prompts of HPDv2, four pictures
each. What the paper does not state is listed in `sweeps/table2.yaml`, with what stands here instead."""

QUESTIONS = (("LeapAlign", ("ReFL", "DRaFT-LV", "DRTune")),)

PUBLISHED = ("leapalign-table2",)
