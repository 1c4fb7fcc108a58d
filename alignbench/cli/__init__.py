"""The command line: ``alignbench VERB``. Verbs import heavy modules themselves, so that help and lists are fast."""

from alignbench.cli.main import main

__all__ = ["main"]
