"""The reports of FlowBP's tables (arXiv 2606.11075), by the name of their sweep. Its numbers lie in ``published/``."""

QUESTIONS = tuple(
    (f"FlowBP-{variant}", ("ReFL", "DRaFT-LV", "DRTune", "LeapAlign")) for variant in ("Sparse", "Bridge", "Lagrange")
)
INTRO = """\
FlowBP's own protocol, which is not that of LeapAlign's table 2: 512 pixels, one picture per prompt, other settings of
DRTune and DRaFT-LV, and batches of two sizes, as the overrides below say."""


def words(model: str, table: str, intro: str = INTRO) -> dict:
    return {"title": f"FlowBP on {model}", "intro": intro, "questions": QUESTIONS, "published": (table,)}


SWEEPS = {
    "flowbp_flux1": words("FLUX.1-dev", "flowbp-flux1"),
    "flowbp_flux2": words("FLUX.2-Klein-base 9B", "flowbp-flux2", INTRO.replace("batches of two sizes", "a batch of 32")
                          .replace(", as the overrides below say", "")),
    "flowbp_sd35": words("Stable Diffusion 3.5 Medium", "flowbp-sd35"),
    "flowbp_geneval": words("FLUX.1-dev: GenEval", "flowbp-geneval"),
}  # fmt: skip
