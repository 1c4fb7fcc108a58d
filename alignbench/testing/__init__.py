"""Contract tests for methods and evaluators, and the analytic flows that they use.

Subclass a contract in a test file, set what it tests, and run pytest::

    class TestMine(MethodContract):
        method = Mine(steps=8)
"""

from alignbench.analytic import AffineFlow, CallLog, GaussianFlow, Quadratic, QuadraticReward, Toy
from alignbench.testing.evaluator_contract import EvaluatorContract
from alignbench.testing.method_contract import MethodContract
from alignbench.training.batches import make_batch

__all__ = [
    "AffineFlow",
    "CallLog",
    "EvaluatorContract",
    "GaussianFlow",
    "MethodContract",
    "Quadratic",
    "QuadraticReward",
    "Toy",
    "make_batch",
]
