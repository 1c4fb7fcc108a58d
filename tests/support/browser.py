"""Chromium without a window, for the tests of the report's page: no network, every complaint of the page noted."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ALONE = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
ALONE += ("--disable-component-update", "--disable-sync")


def chromium() -> str:
    """The browser's path: CHROMIUM, or what is installed."""
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    found = next((path for path in named if path), None)
    if found is None:
        raise FileNotFoundError("no Chromium: `apt-get install chromium`, or set CHROMIUM to the path of one")
    return found


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=[*ALONE])
        yield opened
        opened.close()


def until(page: Any, expression: str, seconds: float = 60) -> None:
    """Wait for it to hold. Playwright's own waiting evaluates text in the page, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never: {expression}"
        time.sleep(0.05)


class Visit:
    """A page that was opened from a file. ``complaints``: console errors, exceptions, dialogs, requests elsewhere."""

    def __init__(self, opened: Any, path: Path, fragment: str = "", **context: Any) -> None:
        self.context = opened.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._answer)
        self.page.on("request", self._requested)
        self.page.goto(path.as_uri() + fragment)

    def _answer(self, dialog: Any) -> None:
        if dialog.type != "confirm":
            self.complaints.append(dialog.message)
        dialog.accept()

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(request.url)
