"""The report of ``sweeps/adjoint_matching_lambda.yaml``: the reward's multiplier; numbers in ``published/``."""

SWEEPS = {
    "adjoint_matching_lambda": {
        "title": "Adjoint Matching: the reward's multiplier lambda",
        "intro": """\
**Another model**: the published numbers are of Stable Diffusion 1.5, which is no flow; these are of Stable Diffusion 3
Medium. What may compare is how the scores move with lambda: ImageReward and HPSv2.1 up, diversity down.""",
        "questions": (
            ("Adjoint Matching, lam=100.0", [f"Adjoint Matching, lam={lam}" for lam in (1.0, 10.0, 31.6228)]),
        ),
        "published": ("adjoint-matching-default", "adjoint-matching-finetuning"),
    }
}
