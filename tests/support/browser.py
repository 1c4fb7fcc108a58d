"""Headless Chromium for the tests of the report's page: no network, and every complaint of the page is recorded."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
OPTIONS += ("--disable-component-update", "--disable-sync")


def chromium() -> str:
    """Return the path in the variable CHROMIUM, or that of an installed Chromium; raise FileNotFoundError if none."""
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    path = next(filter(None, named), None)
    if path is None:
        raise FileNotFoundError("no Chromium: `apt-get install chromium`, or set CHROMIUM to the path of one")
    return path


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a running Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=[*OPTIONS])
        yield opened
        opened.close()


def until(page: Any, expression: str, seconds: float = 60) -> None:
    """Wait until ``expression`` holds. The page's policy forbids Playwright's own waiting, which evaluates text."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never: {expression}"
        time.sleep(0.05)


class Visit:
    """A page opened from a file. ``complaints``: console errors, exceptions, dialogs, requests to other addresses."""

    def __init__(self, opened: Any, path: Path, fragment: str = "", **context: Any) -> None:
        self.context = opened.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", self._logged)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._answer)
        self.page.on("request", self._requested)
        self.page.goto(path.as_uri() + fragment)

    def _logged(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _answer(self, dialog: Any) -> None:
        if dialog.type != "confirm":
            self.complaints.append(dialog.message)
        dialog.accept()

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(request.url)
