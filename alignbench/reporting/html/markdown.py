"""HTML of the little markdown that our own reports are written in: the other way round than ``table.escape``.

Blocks: headings, lists, paragraphs and images. In a line: bold, italic, code, web links, backslash escapes and HTML
entities. Everything else is text, and every text is escaped, so nothing in it can become markup.
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
    """Return ``raw`` as HTML, in an element or an attribute; what no HTML file may hold becomes U+FFFD."""
    return html.escape(raw.translate(_CONTROLS))


def inline(markdown: str) -> str:
    """Return the HTML of one line, or of a paragraph's lines; an image is its words."""
    return _parser().renderInline(markdown.translate(_CONTROLS), {"picture": lambda words, file: text(words)})


def blocks(markdown: str, picture: Callable[[str, str], str]) -> str:
    """Return the HTML of a section. ``picture`` makes the HTML of an image from its words and its file."""
    return _parser().render(markdown.translate(_CONTROLS), {"picture": picture}).strip()


@functools.cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    parser: Any = MarkdownIt("zero").enable(_RULES)
    parser.validateLink = lambda target: _TARGET.fullmatch(target) is not None
    parser.normalizeLink = str  # files have the names that they have on disk
    parser.add_render_rule("image", _image)
    parser.core.ruler.push("ours", _ours)
    return parser


def _image(renderer: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
    return env["picture"](tokens[i].content, tokens[i].attrs["src"])


def _ours(state: Any) -> None:
    """Keep images out of paragraphs, mark a paragraph that is bold as a whole, and send no referrer along links."""
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
