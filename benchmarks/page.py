"""Measure the report's page for ten methods and 400 prompts: seconds to build it, its size, and how soon it is shown.

    python benchmarks/page.py [--prompts 400] [--side 1024] [--different 40]

The store is made up (tests/support/photo_store.py), with images whose spectrum is that of photographs; ``--different``
of them differ, and the others are links to these, which saves disk and time but no decoding. Chromium opens the file
three times. Results go to benchmarks/results/page.json and .md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from arguments import parse  # noqa: E402
from support import photo_store  # noqa: E402  # beside the tests, not in the package
from support.browser import Visit, browser, until  # noqa: E402

from alignbench.reporting import report  # noqa: E402
from alignbench.reporting.analysis.comparison import analyse  # noqa: E402
from alignbench.reporting.html.page import build  # noqa: E402
from alignbench.store.files import write, write_json  # noqa: E402

METHODS = 10
OPENED = 3
TIMES = """() => {
  const [page] = performance.getEntriesByType("navigation");
  const [paint] = performance.getEntriesByName("first-contentful-paint");
  return {"first content": paint.startTime / 1000, "load event": page.loadEventEnd / 1000};
}"""


def opening(chrome: Any, path: Path) -> dict[str, float]:
    """Return the seconds until the page is loaded, until images show after a click, and until the last row shows."""
    visit = Visit(chrome, path)
    until(visit.page, "performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
    times = visit.page.evaluate(TIMES)
    start = time.monotonic()
    visit.page.click("nav >> text=Images")
    until(visit.page, "document.querySelector('.row img')?.complete")
    times["first row of pictures, after a click"] = time.monotonic() - start
    start = time.monotonic()
    visit.page.evaluate("document.querySelector('.row:last-child').scrollIntoView()")
    until(visit.page, "document.querySelector('.row:last-child img')?.complete")
    times["last row, after a jump to the end"] = time.monotonic() - start
    assert not visit.complaints, visit.complaints
    visit.context.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--different", type=int, default=40)
    arguments = parse(parser)
    load = os.getloadavg()[0]
    labels = ["base", *(f"method {i}" for i in range(1, METHODS))]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = {"prompts": arguments.prompts, "side": arguments.side, "different": arguments.different}
        given = photo_store.make(root / "store", labels=labels, seeds=(0,), **size)
        analysis = analyse(given.manifest, given.scores)
        sections = report.sections(given.manifest, given.costs, analysis)
        start, cpu = time.monotonic(), time.process_time()
        path = build(given, analysis, root / "outputs/made_up", sections=sections, hacked={})
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        with browser() as chrome:
            times = [opening(chrome, path) for _ in range(OPENED)]
            version = chrome.version
        megabytes = path.stat().st_size / 1e6
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    facts: dict[str, Any] = {"date": str(date.today()), "cpu": cpus[0].partition(": ")[2], "cores": os.cpu_count()}
    facts |= {"load before": round(load, 1), "python": platform.python_version(), "chromium": version}
    facts |= {"methods": METHODS, **size}
    rows = {"build, s": seconds, "build, s of CPU": cpu, "file, MB": megabytes}
    rows |= {f"{name}, s (median of {OPENED})": statistics.median(seen[name] for seen in times) for name in times[0]}
    text = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    table = "\n".join(f"| {name} | {value:.2f} |" for name, value in rows.items())
    head = f"# The report's page, {METHODS} methods x {arguments.prompts} prompts"
    page = f"{head}\n\n{text}\n\n| what | measured |\n|---|---:|\n{table}\n"
    write_json(arguments.out / "page.json", {**facts, **{name: round(value, 3) for name, value in rows.items()}})
    write(arguments.out / "page.md", page)
    print(page)


if __name__ == "__main__":
    main()
