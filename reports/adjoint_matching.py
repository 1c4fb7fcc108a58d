"""Report of ``sweeps/adjoint_matching_lambda.yaml``: the reward's multiplier; published numbers: ``published/``."""

SWEEPS = {
    "adjoint_matching_lambda": {
        "title": "Adjoint Matching: the reward's multiplier lambda",
        "intro": """\
**Different models**: the published numbers are for Stable Diffusion 1.5, which is not a flow model; ours are for Stable
Diffusion 3 Medium. Only the trend with lambda is comparable: ImageReward and HPSv2.1 up, diversity down.""",
        "questions": (
            ("Adjoint Matching, lam=100.0", [f"Adjoint Matching, lam={lam}" for lam in (1.0, 10.0, 31.6228)]),
        ),
        "published": ("adjoint-matching-default", "adjoint-matching-finetuning"),
    }
}
