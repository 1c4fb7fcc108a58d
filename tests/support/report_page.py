"""A report's page as tests read it, and texts that try to break it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
from msgspec import structs
from support.report_tables import with_runs

from alignbench.reporting import report, tables
from alignbench.reporting.analysis.comparison import analyse
from alignbench.reporting.html import page
from alignbench.store.manifest import ManifestNote

NASTY = (
    'a "quoted" | b `c`',
    "</script><script>alert(1)</script>",
    "<!-- <script> --> <img src=x onerror=alert(1)>",
    "שלום עולם, a circle",
    "emoji 🙂 \u202egnp.exe",
    "$x^2$ \\frac{1}{2} 100 % & more_ _so_ *on*",
    "'; -- ${7*7} {{x}}",
    "",
)


class Reader(HTMLParser):
    """Parser of a page: its text outside scripts and styles, and every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._silent = 0
        self.feed(text)
        self.text = " ".join("".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")
        self.parts.append(" " * (tag not in ("code", "strong", "em", "bdi")))

    def handle_data(self, data):
        if not self._silent:
            self.parts.append(data)


def built(given, out: Path) -> str:
    """The page of a store; nothing else of its report."""
    analysis = analyse(given.manifest, given.scores)
    hacked = {label: tables.hacked(analysis, label) for label in analysis.trained}
    sections = report.sections(given.manifest, given.costs, analysis)
    return page.build(given, analysis, out / "out", sections=sections, hacked=hacked).read_text()


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def spoil(given, root) -> None:
    """Nasty prompts, labels and reasons; a method with other prompts, one that failed, a file that is no image."""
    renamed = {"ReFL": NASTY[1], "DRTune": 'x" onmouseover="alert(1)', "DanceGRPO": NASTY[3]}
    notes = [ManifestNote({"a": NASTY[2]}, NASTY[0] + "\x00\ud800")]
    plan = with_runs(given.manifest, lambda run: {"label": renamed.get(run.label, run.label), "notes": notes})
    given.manifest = structs.replace(plan, cases=[renamed.get(label, label) for label in plan.cases])
    given.scores["label"] = given.scores["label"].replace(renamed)
    given.costs["label"] = given.costs["label"].replace(renamed)
    given.costs.loc[given.costs["run"] == "DRTune-0", ["state", "reason"]] = ["failed", NASTY[1]]
    given.scores.loc[::7, "score"] = np.nan
    for path in sorted(root.glob("images/*/manifest.parquet")):
        frame = pd.read_parquet(path)
        frame["text"] = [NASTY[i % len(NASTY)] for i in range(len(frame))]
        frame["tag"] = [NASTY[2] if i % 9 == 0 else tag for i, tag in enumerate(frame["tag"])]
        if path.parent.name.startswith("LeapAlign"):
            frame["prompt_id"] = "other" + frame["prompt_id"]
        frame.to_parquet(path)
    (root / "images/DRTune0/manifest.parquet").unlink()
    (root / "images/DanceGRPO0/3.png").write_text("no image")
