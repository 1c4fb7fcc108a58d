"""HTML of the little markdown that our own reports are written in: the other way round than ``table.escape``.

Blocks: headings, flat lists, paragraphs and pictures, with empty lines between them. In a line: bold, italic, code, web
links, backslash escapes and HTML entities. Every text is escaped, so nothing in it can become markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

_INLINE = re.compile(
    r"\\(?P<escaped>[!-/:-@\[-`{-~])"
    r"|`(?P<code>[^`]+)`"
    r"|\*\*(?P<strong>(?:\\.|(?!\*\*)[^\\])+)\*\*"
    r"|\*(?P<em>(?:\\.|[^*\\\s])(?:\\.|[^*\\])*)\*"
    r"|\[(?P<words>(?:\\.|[^\]\\])+)\]\((?P<link>https?://[^\s)]+)\)",
    re.DOTALL,
)
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127, *range(0xD800, 0xE000)], "\ufffd")
_PICTURE = re.compile(r"!\[(?P<words>[^\]]*)\]\((?P<file>[^)]+)\)")


def text(raw: str) -> str:
    """``raw`` as HTML, in an element or an attribute; what no HTML file may hold becomes U+FFFD."""
    return html.escape(raw.translate(_CONTROLS))


def inline(markdown: str) -> str:
    """The HTML of one line, or of a paragraph's lines."""
    parts, end = [], 0
    for match in _INLINE.finditer(markdown):
        parts += [text(html.unescape(markdown[end : match.start()])), _element(match)]
        end = match.end()
    return "".join([*parts, text(html.unescape(markdown[end:]))])


def blocks(markdown: str, picture: Callable[[str, str], str] = lambda words, file: "") -> str:
    """The HTML of a section. ``picture``: makes the HTML of a picture from its words and its file."""
    return "\n".join(_block(block, picture) for block in re.split(r"\n\s*\n", markdown.strip()) if block)


def _element(match: re.Match[str]) -> str:
    kind = match.lastgroup
    if kind == "escaped":
        return text(match["escaped"])
    if kind == "link":
        return f'<a href="{text(match["link"])}" rel="noopener noreferrer">{inline(match["words"])}</a>'
    return f"<{kind}>{text(match['code']) if kind == 'code' else inline(match[kind or ''])}</{kind}>"


def _block(block: str, picture: Callable[[str, str], str]) -> str:
    if heading := re.match(r"(#{1,6}) (.*)", block):
        level, rest = len(heading[1]), block[heading.end() :].strip()
        return f"<h{level}>{inline(heading[2])}</h{level}>" + (f"\n{_block(rest, picture)}" if rest else "")
    if found := _PICTURE.fullmatch(block):
        return picture(found["words"], found["file"])
    if block.startswith("- "):
        items = re.split(r"\n(?=- )", block)
        return "<ul>\n" + "\n".join(f"<li>{inline(item[2:])}</li>" for item in items) + "\n</ul>"
    alarm = re.fullmatch(r"\*\*(?:\\.|(?!\*\*)[^\\])+\*\*", block)  # a paragraph that is bold as a whole
    return ('<p class="alarm">' if alarm else "<p>") + f"{inline(block)}</p>"
