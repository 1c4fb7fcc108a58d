"""The reports of FlowBP's tables (arXiv 2606.11075), by the name of their sweep. Its numbers lie in ``published/``."""

INTRO = """\
FlowBP's own protocol, which is not that of LeapAlign's table 2: 512 pixels, one picture per prompt, other settings of
DRTune and DRaFT-LV, and batches that differ between rows where the overrides say so."""

QUESTIONS = tuple(
    (f"FlowBP-{variant}", ("ReFL", "DRaFT-LV", "DRTune", "LeapAlign")) for variant in ("Sparse", "Bridge", "Lagrange")
)
MODELS = {
    "flux1": "FLUX.1-dev",
    "flux2": "FLUX.2-Klein-base 9B",
    "sd35": "Stable Diffusion 3.5 Medium",
    "geneval": "FLUX.1-dev: GenEval",
}
SWEEPS = {
    f"flowbp_{name}": {
        "title": f"FlowBP on {model}",
        "intro": INTRO,
        "questions": QUESTIONS,
        "published": (f"flowbp-{name}",),
    }
    for name, model in MODELS.items()
}
