"""Put the command line's own help into the page of the verbs, and refuse pages that fetch anything from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
from mkdocs.exceptions import PluginError

from alignbench.cli.main import GROUPS, cli

MARK = "<!-- verbs -->"
FETCHED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="?((?:https?:)?//[^">\s]+)')
WIDTH = 80


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark with what ``alignbench VERB --help`` prints, for every verb in its group."""
    return markdown.replace(MARK, "\n\n".join(verbs())) if MARK in markdown else markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Return the page as it is. Raise PluginError if it loads a script, style or image over the network."""
    if found := FETCHED.findall(output):
        raise PluginError(f"{page.file.src_uri}: loads {found[0]}; keep the site free of other servers")
    return output


def verbs() -> Iterator[str]:
    """Yield headings and help texts. What all verbs have in common is said once, at the end."""
    top = click.Context(cli, info_name="alignbench", terminal_width=WIDTH)
    common = cli.get_help(top).split("\n\n")
    for title, group in GROUPS.items():
        yield f"## {title}"
        for verb in group:
            own = click.Context(verb, top, info_name=verb.name, terminal_width=WIDTH)
            said = [text for text in verb.get_help(own).split("\n\n") if text not in common]
            yield "\n\n".join([f"### {verb.name}", "```text", *said, "```"]).replace("```text\n\n", "```text\n")
    yield "\n\n".join(["## Common to all", "```text", *common[-2:], "```"])
