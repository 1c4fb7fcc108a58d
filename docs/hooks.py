"""Put the command line's own help into the page of the verbs, so that the two cannot differ."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

MARK = re.compile(r"<!-- help: ([\w -]*?) ?-->")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace every mark such as ``<!-- help: sweep -->`` with what ``alignbench sweep --help`` prints."""
    return MARK.sub(lambda found: f"```text\n{help_of(*found[1].split())}\n```", markdown)


def help_of(*words: str) -> str:
    """Return the help of a verb, or of the whole command line. Raise CalledProcessError for an unknown verb."""
    command = [sys.executable, "-m", "alignbench.cli", *words, "--help"]
    plain = os.environ | {"COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout.rstrip()
