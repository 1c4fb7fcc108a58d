"""Contract tests for methods and evaluators: subclass one, name your class, run pytest."""

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
