"""The command line: ``alignbench VERB``. Heavy modules load inside the verbs, so that help and lists come at once."""

from alignbench.cli.main import main

__all__ = ["main"]
