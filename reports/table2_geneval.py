"""The report of ``sweeps/table2_geneval.yaml``: LeapAlign's table 2, its GenEval columns."""

TITLE = "LeapAlign's table 2: GenEval on FLUX.1-dev"

INTRO = """\
FLUX.1-dev, trained on HPSv2.1 with GenEval-style prompts, judged on GenEval's 553 test prompts, four pictures each."""

QUESTIONS = (("LeapAlign", ("ReFL", "DRaFT-LV", "DRTune")),)

PUBLISHED = ("leapalign-table2-geneval",)
