"""Judges: models that answer in words, the server that runs one, and the scores in their answers.

A failure is *passing* if the same question may be answered later: the server was busy, or gone. Rows that failed so are
asked again by the next sweep; all others stay as they are.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import math
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Asked = TypeVar("Asked")

TRIES = 3  # requests for one answer if the server fails on it
PATIENCE = 2.0  # seconds before the second request, doubled before each further one
LONGEST_PAUSE = 60.0  # seconds between two requests, unless the server asks for more
OUTAGE = 300.0  # seconds for which a question is asked again while the server is away: it may load its model
LARGEST = 2**20  # bytes of the largest answer
TOO_LONG = ("length", "max_tokens", "model_length")  # what servers say of an answer at the limit of tokens ...
BROKEN_OFF = ("abort", "aborted", "cancelled", "error")  # ... and of one that they did not finish


class Answer(NamedTuple):
    """Text that the model wrote. ``cut``: it reached the limit of tokens before its end."""

    text: str
    cut: bool = False


class Unanswered(Exception):
    """No answer to a question; the text says why. ``passing``: the same question may be answered later."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        """Take the reason."""
        super().__init__(reason)
        self.passing = passing


class Busy(Unanswered):
    """No answer for now. ``pause``: seconds that the server asks to wait; ``away``: it answers nobody."""

    def __init__(self, reason: str, pause: float = 0.0, away: bool = True) -> None:
        """Take the reason."""
        super().__init__(reason, passing=True)
        self.pause, self.away = pause, away


class Refused(Unanswered):
    """No answer to any question before somebody corrects the settings or the server."""

    def __init__(self, reason: str) -> None:
        """Take the reason."""
        super().__init__(reason, passing=True)


# -- a server ---------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """An OpenAI-compatible server, asked by several threads.

    ``key``: the environment variable that holds its key, if it needs one. A busy server is asked again, as late as it
    says; one that answers nobody for OUTAGE seconds, or refuses us, is left alone until ``models`` is called again.
    """

    url: str
    model: str
    key: str
    timeout: float  # seconds for one answer
    _answered: float = -math.inf  # time of the latest answer
    _gone: str = ""  # why it is left alone
    _left: threading.Event = field(default_factory=threading.Event)

    def models(self) -> Any:
        """Return its list of models as it sends it; raise Unanswered, at once unless it has answered before."""
        known = self._answered > -math.inf and not self._gone
        self._gone = ""
        self._left.clear()
        return self._patiently("GET", "/v1/models") if known else self._call("GET", "/v1/models")

    def map(self, work: Callable[[Asked], T], asked: Sequence[Asked], threads: int) -> Iterator[T]:
        """Yield ``work`` of each item, in order, computed in ``threads``; it calls ``ask``."""
        with ThreadPoolExecutor(threads) as pool:
            try:
                yield from pool.map(work, asked)
            except BaseException:
                self._leave("interrupted")  # else threads would wait for their next try
                raise

    def ask(self, image: Image, question: str, tokens: int) -> Answer:
        """Return the model's answer to a question about an image, greedily decoded. Raise Unanswered if there is none.

        The image is sent as PNG, before the question.
        """
        data = io.BytesIO()
        image.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        greedy = {"temperature": 0, "max_tokens": tokens}
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **greedy}
        return _answer(self._patiently("POST", "/v1/chat/completions", body))

    def _leave(self, reason: str) -> None:
        self._gone = self._gone or reason
        self._left.set()

    def _patiently(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the server's answer; try again where that may help."""
        start, tries = monotonic(), 0
        while True:
            if self._gone:
                raise Unanswered(self._gone, passing=True)
            try:
                answer = self._call(method, path, body)
            except Refused as error:
                self._leave(str(error))
                raise
            except Busy as error:
                tries += 1
                waited = monotonic() - start
                if waited >= OUTAGE and self._answered < start:
                    self._leave(str(error))
                if waited >= OUTAGE or error.pause > OUTAGE or (tries >= TRIES and not error.away):
                    raise Unanswered(str(error), passing=True) from None
                own = min(PATIENCE * 2 ** (tries - 1), LONGEST_PAUSE)
                self._left.wait(max(own, error.pause))
            else:
                self._answered = monotonic()
                return answer

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send one request and return its JSON; raise Unanswered with the reason."""
        url = urlsplit(self.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(url.hostname), url.port, timeout=self.timeout)
        key = os.environ.get(self.key)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        place = url.path.rstrip("/").removesuffix("/v1") + path
        try:
            connection.request(method, place, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            data = _read(response, monotonic() + self.timeout)
        except TimeoutError:
            raise Busy(f"the server gave no answer in {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Busy(f"the server cannot be reached: {str(error) or type(error).__name__}") from None
        finally:
            connection.close()
        return self._decoded(response, data)

    def _decoded(self, response: http.client.HTTPResponse, data: bytes) -> Any:
        status = response.status
        quote = " ".join(data.decode("utf-8", "replace").split())[:200]
        quote = quote.replace(os.environ.get(self.key) or "\0", "***")  # some servers repeat the key
        says = f"the server answers {status}: {quote}"
        if status in (408, 409, 423, 425, 429, 498, 499) or status >= 500:
            raise Busy(says, _pause(response.headers.get("Retry-After")), away=status != 500)
        if status in (401, 402, 403):
            raise Refused(
                f"{says}; set the environment variable {self.key} to a key that it accepts and that has credit"
            )
        if 300 <= status < 400 or status in (404, 405, 407, 410):
            raise Refused(f"{says}; correct its address, or the name of the model")
        if status != 200:
            raise Unanswered(says)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Unanswered(f"the server's answer is not JSON: {quote}", passing=True) from None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return the body; raise TimeoutError if pieces still arrive after the deadline."""
    data = b""
    while piece := response.read1(2**16):
        data += piece
        if monotonic() > deadline:
            raise TimeoutError
        if len(data) > LARGEST:
            raise http.client.HTTPException(f"an answer of more than {LARGEST} bytes")
    if response.length:
        raise http.client.HTTPException("the connection was closed within the answer")
    return data


def _pause(header: str | None) -> float:
    """Return the seconds of a Retry-After header: a number or an HTTP date; 0 without one, or if it is neither."""
    text = (header or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return 0.0
        seconds = (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return 0.0 if math.isnan(seconds) else max(0.0, seconds)


def _answer(answer: Any) -> Answer:
    """Return the text in the server's JSON, whose content is a text or a list of parts."""
    try:
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, dict) and part.get("type") in ("text", "output_text")]
            content = "".join(part["text"] for part in parts)
        refusal = message.get("refusal")
        finish = str(finish or "").lower()
    except (KeyError, TypeError, AttributeError, IndexError):
        raise Unanswered("the server's answer holds no text", passing=True) from None
    if finish in BROKEN_OFF:
        raise Unanswered(f"the server broke the answer off: {finish}", passing=True)
    if refusal or finish == "content_filter":
        raise Unanswered(f"the model refuses to answer: {' '.join(str(refusal or finish).split())[:200]}")
    if not isinstance(content, str):
        raise Unanswered("the server's answer holds no text" + ", it was cut off" * (finish in TOO_LONG))
    return Answer(content, finish in TOO_LONG)


# -- the score in an answer -------------------------------------------------------------------------------------------

THOUGHTS = r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis)"
OPENED = rf"(?:[<\[◁](?:\w+:)?{THOUGHTS}[>\]▷]|<\|begin_of_{THOUGHTS}\|>|<\|channel\|>analysis<\|message\|>)"
CLOSED = rf"(?:[<\[◁]/(?:\w+:)?{THOUGHTS}[>\]▷]|<\|end_of_{THOUGHTS}\|>|<\|channel\|>final<\|message\|>)"
DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−﹘﹣－"), "-") | dict.fromkeys(map(ord, "⁄∕"), "/")
UNSEEN = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff*`#\\"))  # zero width; markdown's marks
FIGURE = r"\d+(?:\.\d+)?"
SPELT = {"five": "5", "six": "6", "seven": "7", "ten": "10", "twenty": "20", "hundred": "100"}  # of scales
SAID_SCALE = re.compile(rf"\bscale\b\W+(?:(?:of|from|is)\W+)*(?:0|1)\s*(?:-|to)\s*({FIGURE})", re.IGNORECASE)
SCALE = r"(?:\s*[(\[](?P<scale>[^()\[\]]*)[)\]])?"  # as in "Style Score (1-5)"
NUMBER = re.compile(rf"[\s\"'(\[]*(?P<number>-?{FIGURE})(?P<tail>.*)")
OTHER_SCALE = (  # what follows a number and tells its scale
    re.compile(rf"[\s\"']*(?:stars?|points?)?[\s(\[,]*(?:/|(?:out\s+)?of\b(?:\s+[a-z]+){{0,3}}?)\s*({FIGURE})", re.I),
    re.compile(rf"\s*[(\[]\s*{FIGURE}\s*-\s*({FIGURE})"),  # (1-10)
    re.compile(rf"\s*(?:points?)?\s*[(\[]\s*max[a-z.:= ]*({FIGURE})", re.I),  # (max. 10)
    re.compile(rf"\s*(?:points?)?\s*[(\[][a-z ]*?({FIGURE}) (?:is|being) (?:the )?(?:best|highest|max)", re.I),
    re.compile(rf"[\s\"']*\|[\s\"']*({FIGURE})\s*(?:\||$)"),  # the next cell of a table
)
LONE = re.compile(rf"\W*{FIGURE}\W*(?:(?:out\s+of|of)?\s*{FIGURE}\W*)?")  # a number alone, or with its scale
UNCLEAR = re.compile(  # what makes the number before it unclear: "4th", "4%", "4,5", "3 to 4"
    r"[^\W_]|\s*(?:%|per\s?cent)|[+^°]|[.,:]\d|\.\.|\s*(?:-?[-~±+&×→>]|(?:to|or|and|x|minus|plus|times|through|till)\b)?"
    r"(?:\s*(?:maybe|perhaps|possibly|even))?\s*\d",
    re.IGNORECASE,
)


def read_score(answer: Answer, label: str) -> float:
    """Return the number from 1 to 5 that the answer gives after ``label``, as "Style Score"; ValueError without one.

    What the model thought is not read. Markdown, tables, JSON, a scale in brackets and "4/5" are. A number that is not
    clearly one from 1 to 5 (another scale, a range, two different ones) or may lack digits is an error that says so.
    """
    spoken = unicodedata.normalize("NFKC", answer.text.translate(DASHES)).translate(DASHES)
    spoken = re.sub(rf"{OPENED}.*?{CLOSED}", "\n", spoken, flags=re.DOTALL | re.IGNORECASE)
    spoken = re.sub(rf"^.*{CLOSED}", "", spoken, flags=re.DOTALL | re.IGNORECASE)  # it was opened by the question
    spoken, *unfinished = re.split(OPENED, spoken, maxsplit=1, flags=re.IGNORECASE)
    if answer.cut:
        spoken = spoken[: max(map(spoken.rfind, ("\n", ", ", ". ", "; "))) + 1]  # the last clause may lack its end
    if other := next((scale for scale in SAID_SCALE.findall(spoken) if float(scale) != 5), None):
        raise ValueError(f"the answer is on another scale than 1 to 5: to {other}")
    found = sorted({number for rest in _after(label, spoken) if (number := _number(rest, label)) is not None})
    if not found:
        why = ", it ends within its thoughts" if unfinished else ", it was cut off" if answer.cut else ""
        why = why or ", it is empty" * (not spoken.strip())
        raise ValueError(f"the answer has no number behind '{label}'{why}")
    if len(found) > 1:
        raise ValueError(f"the answer has different numbers behind '{label}': {', '.join(map(str, found))}")
    if not 1 <= found[0] <= 5:
        raise ValueError(f"'{label}: {found[0]:g}' is not from 1 to 5")
    return found[0]


def _after(label: str, text: str) -> Iterator[str]:
    """Yield what follows ``label`` wherever a line of ``text`` has it; "Style: 4" as a line of its own counts, too."""
    lines = [line.translate(UNSEEN).replace("_", " ").strip() for line in [*_json(text), *_lines(text)]]
    name, short = (re.escape(words).replace(r"\ ", r"\s+") for words in (label, label.removesuffix(" Score")))
    sign = r"[\s\"']*(?:[:=|]+|->|\bis\b[\s\"']*:?|\bof\b|(?<=\s)-(?=\s))"
    long = re.compile(rf"(?<!\w){name}{SCALE}(?:{sign}|(?=\s+\d)|[\s\"']*$)", re.IGNORECASE)
    alone = re.compile(rf"\W*(?:\d+[.)])?\W*{short}{SCALE}[\s\"']*[:=|]", re.IGNORECASE)
    for i, line in enumerate(lines):
        for match in long.finditer(line):
            _check_scale(match["scale"] or "", label)
            rest = line[match.end() :]
            if not rest.strip(" \"'"):  # the number stands on a line of its own
                below = next(filter(None, lines[i + 1 :]), "")
                rest = below if LONE.fullmatch(below) and "|" not in below else ""
            yield rest
        brief = alone.match(line)
        if brief and LONE.fullmatch((rest := line[brief.end() :]).partition("|")[0]):
            _check_scale(brief["scale"] or "", label)
            yield rest


def _check_scale(said: str, label: str) -> None:
    """Raise ValueError if what stands in brackets behind a label is another scale than 1 to 5."""
    numbers = re.findall(FIGURE, said)
    if numbers and numbers not in (["1", "5"], ["5"]):
        raise ValueError(f"'{label} ({said})' is another scale than 1 to 5")


def _number(text: str, label: str) -> float | None:
    """Return the number that ``text`` begins with, None if it begins otherwise; ValueError if it is unclear."""
    match = NUMBER.match(text)
    if match is None:
        return None
    tail = re.sub(
        r"\b(" + "|".join(SPELT) + r")\b", lambda word: SPELT[word[0].lower()], match["tail"], flags=re.IGNORECASE
    )
    said = f"'{label}: {' '.join(text.split())[:40]}'"
    scales = [float(found[1]) for pattern in OTHER_SCALE if (found := pattern.match(tail))]
    if "scale" in tail.lower():
        scales += [float(number) for number in re.findall(FIGURE, tail) if float(number) != 1]
    if any(scale != 5 for scale in scales):
        raise ValueError(f"{said} is on another scale than 1 to 5")
    if not scales and UNCLEAR.match(tail):
        raise ValueError(f"{said} is not one number from 1 to 5")
    return float(match["number"])


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of ``text``, and "head: cell" for tables whose labels stand above the numbers."""
    lines = text.splitlines()
    yield from lines
    for head, rule, *rows in (lines[i:] for i in range(len(lines) - 2)):
        if re.fullmatch(r"[\s|:-]*-[\s|:-]*", rule) and "|" in rule:
            for row in rows:
                cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in (head, row)]
                if "|" not in row or len(cells[0]) != len(cells[1]):
                    break
                yield from (": ".join(pair) for pair in zip(*cells))


def _json(text: str) -> Iterator[str]:
    """Yield "key: value" for the values in an answer that holds a JSON object, in prose or not."""
    try:
        values = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return
    yield from _pairs(values, "")


def _pairs(values: dict[str, Any], above: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _pairs(value, key)
        else:
            yield f"{key}: {value}"
            yield f"{above} {key}: {value}"
