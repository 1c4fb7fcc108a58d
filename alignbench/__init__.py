"""alignbench: fair comparison of methods that align flow-matching text-to-image models with human preferences.

``load`` and the most used names of plug-ins can be imported from here. Their modules load on first use, so that
``alignbench --help`` stays fast.
"""

from importlib import import_module

_HOME = {
    "AlignMethod": "method", "Loss": "method", "GatherBatch": "method",
    "Evaluator": "evaluator", "Metric": "evaluator", "Reward": "evaluator", "Term": "evaluator",
    "Flow": "flow", "Batch": "flow", "Cond": "flow", "Prompt": "prompts", "UserError": "config",
    "load": "reporting.data",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str):
    """Import a name of ``__all__`` from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'alignbench' has no attribute '{name}'")
    return getattr(import_module(f"alignbench.{_HOME[name]}"), name)
