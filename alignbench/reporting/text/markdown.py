"""Conversion of the reports' small subset of markdown to HTML, the inverse of ``table.escape``.

Blocks: headings, lists, paragraphs and images. Inline: bold, italic, code, web links, backslash escapes and HTML
entities. Everything else is text, and all text is escaped, so nothing in it can become markup.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from typing import Any

_RULES = ["heading", "list", "emphasis", "backticks", "link", "image", "escape", "entity"]
_TARGET = re.compile(r"https?://.+|[^/:]+\.png")  # the web, or an image beside the report
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127, *range(0xD800, 0xE000)], "\ufffd")


def text(raw: str) -> str:
    """Return ``raw`` as HTML, for an element or an attribute; characters invalid in HTML become U+FFFD."""
    return html.escape(raw.translate(_CONTROLS))


def inline(markdown: str) -> str:
    """Return the HTML of one line, or of a paragraph's lines; an image becomes its alternative text."""
    return _parser().renderInline(markdown.translate(_CONTROLS), {"image": lambda words, file: text(words)})


def blocks(markdown: str, image: Callable[[str, str], str]) -> str:
    """Return the HTML of a section. ``image`` returns the HTML of an image, given its text and its file."""
    return _parser().render(markdown.translate(_CONTROLS), {"image": image}).strip()


@functools.cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    parser: Any = MarkdownIt("zero").enable(_RULES)
    parser.validateLink = lambda target: _TARGET.fullmatch(target) is not None
    parser.normalizeLink = str  # keep file names as they are on disk
    parser.add_render_rule("image", _image)
    parser.core.ruler.push("ours", _ours)
    return parser


def _image(renderer: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
    return env["image"](tokens[i].content, tokens[i].attrs["src"])


def _ours(state: Any) -> None:
    """Keep images out of paragraphs, mark paragraphs that are entirely bold, and send no referrer with links."""
    for i, token in enumerate(state.tokens):
        children = [child for child in token.children or () if child.content or child.type != "text"]
        for link in (child for child in children if child.type == "link_open"):
            link.attrSet("rel", "noopener noreferrer")
        kinds = [child.type for child in children]
        if kinds and state.tokens[i - 1].type == "paragraph_open":
            state.tokens[i - 1].hidden |= kinds == ["image"]
            state.tokens[i + 1].hidden |= kinds == ["image"]
            if kinds[0] == "strong_open" and kinds.index("strong_close") == len(kinds) - 1:
                state.tokens[i - 1].attrSet("class", "alarm")
