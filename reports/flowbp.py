"""Reports of FlowBP's tables (arXiv 2606.11075), by the name of their sweep; published numbers: ``published/``."""

INTRO = """\
FlowBP's own protocol, which differs from that of LeapAlign's table 2: 512 pixels, one image per prompt, other settings
for DRTune and DRaFT-LV, and batch sizes that differ between rows, as listed in the overrides."""

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
