"""Reports of VGG-Flow's comparisons (arXiv 2512.05116), by name of the sweep; published numbers: ``published/``."""

INTRO = """\
The claim is about a trade-off: VGG-Flow gains less reward than ReFL and DRaFT, and keeps more of the base model's
diversity. Diversity and the distance from the base model are measured on CLIP features here, on DreamSim and Inception
features in the paper: compare the order of the rows, not the values. The prompts, and most settings of the baselines,
differ from the paper's."""

SWEEPS = {
    f"vggflow_{reward}": {
        "title": f"VGG-Flow on Stable Diffusion 3 Medium: {name}",
        "intro": INTRO,
        "questions": (("VGG-Flow", ("ReFL", "DRaFT", "Adjoint Matching")),),
        "published": (f"vggflow-{reward}",),
    }
    for reward, name in (("aesthetic", "Aesthetic Score"), ("hpsv2", "HPSv2.1"), ("pickscore", "PickScore"))
}
