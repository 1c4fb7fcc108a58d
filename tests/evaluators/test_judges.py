"""Judges: which number an answer gives, and how patient we are with a server that does not answer."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from PIL import Image

from alignbench.evaluators import judges
from alignbench.evaluators.judges import Answer, Busy, Refused, Server, Unanswered, read_score

LABEL = "Alignment Score"
THREE_HEADS = "| Alignment Score (1-5) | Coherence Score (1-5) | Style Score (1-5) |\n"

# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Alignment Score (1-5): 3.25", 3.25),
        ("---\nWord-wise Scores: [['a', 0.1]]\n\nAlignment Score (1-5):4\nStyle Score (1-5): 2", 4),
        ("alignment score (1-5): 2.694700002670288", 2.694700002670288),
        ("Alignment Score (1-5): X\nAlignment Score (1-5): 5.", 5),
        ("**Alignment Score (1-5):** 4", 4),
        ("**Alignment Score (1-5)**: **4**", 4),
        ("### Alignment Score\n\n4/5", 4),
        ("Alignment Score: 4", 4),
        ("Alignment Score (1–5)： ４ ／ ５", 4),
        ("Alignment Score (out of 5): 4.5 / 5.0", 4.5),
        ("The alignment score is 4 out of 5.", 4),
        ("Alignment Score (1-5): 4, because 3 of 4 objects are there", 4),
        ("Alignment Score (1-5): 4 - good, on a scale of 1 to 5", 4),
        ("1. **Alignment**: 4/5", 4),
        ("| Alignment | 4 |", 4),
        (THREE_HEADS + "|---|:-:|---|\n| 4 | 3 | 5 |", 4),
        ('{"alignment": 4, "coherence": 3}', 4),
        ('```json\n{"scores": {"alignment_score": "4/5", "style_score": 2}}\n```', 4),
        ('{"alignment": {"score": 4, "reason": "2 of 10 are missing"}}', 4),
        ("<think>Alignment Score: 2</think>Alignment Score (1-5): 4", 4),
        ("Alignment Score: 2, or more?</think>\nAlignment Score (1-5): 4", 4),
        ("<thinking>\nAlignment Score: 1\n</thinking>\nAlignment Score: 4", 4),
        ("Alignment Score (1-5): ٤", 4),
        ("The alignment score is: 4 out of five", 4),
        ("<|begin_of_thought|>Alignment Score: 2<|end_of_thought|>Alignment Score: 4", 4),
        ("<seed:think>Alignment Score: 2</seed:think>Alignment Score: 4", 4),
        (f"<|channel|>analysis<|message|>{LABEL}: 2<|end|><|channel|>final<|message|>{LABEL}: 4", 4),
    ],
)
def test_numbers_are_read(answer, value):
    """Whatever surrounds it: markdown, a table, JSON, thoughts, wide or foreign digits, no scale or "out of 5"."""
    assert read_score(Answer(answer), LABEL) == value


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "it is empty"),
        ("I'm sorry, but I can't help with that.", "has no number"),
        ("Alignment Score (1-5): X", "has no number"),
        ("Alignment Score (1-5): nan", "has no number"),
        ("Alignment Score: four", "has no number"),
        ("Alignment: 2 objects are missing", "has no number"),
        ("Style Score (1-5): 4", "has no number"),
        (THREE_HEADS.replace("Alignment", "Overall") + "|---|---|---|\n| 4 | 3 | 5 |", "has no number"),
        ("<think>\nAlignment Score (1-5): 2\n", "ends within its thoughts"),
        ("Alignment Score (1-5): 0.9", "not from 1 to 5"),
        ("Alignment Score (1-5): -3", "not from 1 to 5"),
        ("Alignment Score (1-5): 10", "not from 1 to 5"),
        ("Alignment Score (1-5): 5.01", "not from 1 to 5"),
        ("Alignment Score (1-5): 1 Alignment Score (1-5): 5", "different numbers .*: 1.0, 5.0"),
        ("Alignment Score: 4/10", "another scale"),
        ("Alignment Score: 4 out of a possible 10", "another scale"),
        ("Alignment Score: 4 (out of 10)", "another scale"),
        ("Alignment Score: 4 points of 7", "another scale"),
        ("Alignment Score: 4 on a scale of 1-10", "another scale"),
        ("Alignment Score (1-10): 4", "another scale"),
        *((f"Alignment Score: 4{text}", "another scale") for text in ("/ten", " out of ten", " on a ten-point scale")),
        *(
            (f"Alignment Score: 4{text}", "another scale")
            for text in (" (max 10)", " points (max. 10)", " (10 is best)")
        ),
        ("On a scale of 1 to 10:\nAlignment Score: 4", "another scale than 1 to 5: to 10"),
        ("Alignment Score (0-5): 4", "another scale"),
        ("| Alignment Score | 4 | 10 |", "another scale"),
        ('{"alignment": "4/10"}', "another scale"),
        ("Alignment Score: 3½", "another scale"),
        *((f"Alignment Score: {text}", "not one number") for text in ("3-4", "3 – 4", "3 to 4", "3 or 4", "4~5")),
        *((f"Alignment Score: {text}", "not one number") for text in ("5 -> 4", "5 → 4", "5 minus 1", "2 x 2")),
        *((f"Alignment Score: {text}", "not one number") for text in ("3 or maybe 4", "3 through 4", "3 & 4")),
        *((f"Alignment Score: {text}", "not one number") for text in ("4%", "4 percent", "4,5", "4th", "4+", "4..5")),
    ],
)
def test_other_answers_are_errors(answer, says):
    """No number, one on another scale, a range, or two different ones is an error that says which."""
    with pytest.raises(ValueError, match=says):
        read_score(Answer(answer), LABEL)


@pytest.mark.parametrize("end", ["", ".", " out", ".5"])
def test_a_number_that_may_lack_digits_is_not_read(end):
    """What an answer that was cut off ends with may go on; what a new line or clause follows is complete."""
    with pytest.raises(ValueError, match="cut off"):
        read_score(Answer(f"Style Score: 2.\nAlignment Score: 4{end}", cut=True), LABEL)
    assert read_score(Answer(f"Alignment Score: 4\nStyle Score: 4{end}", cut=True), LABEL) == 4
    assert read_score(Answer(f"Alignment Score: 4, Style Score: 4{end}", cut=True), LABEL) == 4


@pytest.mark.parametrize(
    ("message", "finish", "says"),
    [
        ({"content": None, "refusal": "I cannot judge this."}, "stop", "refuses to answer: I cannot judge this."),
        ({"content": ""}, "content_filter", "refuses to answer: content_filter"),
        ({"content": None, "reasoning_content": "Well, 3?"}, "length", "holds no text, it was cut off"),
    ],
)
def test_an_answer_without_text_is_final(message, finish, says):
    """Refusals and answers that are all thought are errors of their row, which is not asked again."""
    with pytest.raises(Unanswered, match=says) as error:
        judges._answer({"choices": [{"message": message, "finish_reason": finish}]})
    assert not error.value.passing


@pytest.mark.parametrize("finish", ["abort", "error", "cancelled"])
def test_an_answer_that_the_server_broke_off_is_asked_for_again(finish):
    """Its last number may lack digits."""
    with pytest.raises(Unanswered, match=f"broke the answer off: {finish}") as error:
        judges._answer({"choices": [{"message": {"content": "Score: 3"}, "finish_reason": finish}]})
    assert error.value.passing


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS"])
def test_servers_name_the_limit_of_tokens_differently(finish):
    """All of these names say that the answer was cut off."""
    assert judges._answer({"choices": [{"message": {"content": "4"}, "finish_reason": finish}]}) == Answer("4", True)


def test_content_may_be_a_list_of_parts():
    """Text parts are joined; thoughts and parts of other types are left out."""
    parts = [{"type": "thinking", "thinking": "2?"}, {"type": "text", "text": "Score: "}, {"type": "text", "text": "4"}]
    assert judges._answer({"choices": [{"message": {"content": parts}}]}) == Answer("Score: 4")


# -- patience ---------------------------------------------------------------------------------------------------------


class Scripted(Server):
    """A server that gives the answers of a script, on a clock of its own."""

    def __init__(self, monkeypatch, *script):
        super().__init__("http://host:1", "model", "KEY", 1.0)
        self.script, self.now, self.pauses, self.calls = list(script), 0.0, [], 0
        self._left = self
        monkeypatch.setattr(judges, "monotonic", lambda: self.now)

    def _call(self, method, path, body=None):
        self.calls += 1
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(said, Exception):
            raise said
        return {"choices": [{"message": {"content": said}}]}

    def wait(self, seconds):
        """Stand in for the event's wait, without waiting."""
        self.pauses.append(seconds)
        self.now += seconds

    def set(self):
        """Stand in for the event's set."""

    def asked(self):
        return self.ask(Image.new("RGB", (4, 4)), "?", 9)


def test_a_server_that_comes_back_within_five_minutes_costs_nothing(monkeypatch):
    """Pauses double up to a minute; four minutes without any answer are waited for."""
    server = Scripted(monkeypatch, *[Busy("refused")] * 8, "4")
    assert server.asked() == Answer("4")
    assert server.pauses == [2, 4, 8, 16, 32, 60, 60, 60]


def test_a_server_that_stays_away_is_left_alone(monkeypatch):
    """After five minutes without any answer the row is to be asked again, and no other question is sent."""
    server = Scripted(monkeypatch, Busy("the server answers 503"))
    for _ in range(3):
        with pytest.raises(Unanswered, match="answers 503") as error:
            server.asked()
        assert error.value.passing
    assert server.calls == 10
    assert sum(server.pauses) == 302


def test_a_question_on_which_the_server_fails_costs_three_tries(monkeypatch):
    """A 500 may be about this image: it is tried three times, and the next question is sent."""
    server = Scripted(monkeypatch, *[Busy("500", away=False)] * 3, "4")
    with pytest.raises(Unanswered, match="500") as error:
        server.asked()
    assert error.value.passing
    assert server.asked() == Answer("4")


def test_a_server_that_refuses_us_is_asked_once(monkeypatch):
    """A wrong key or address is no question of patience."""
    server = Scripted(monkeypatch, Refused("401"), "4")
    for _ in range(2):
        with pytest.raises(Unanswered, match="401"):
            server.asked()
    assert (server.calls, server.pauses) == (1, [])


def test_retry_after_is_kept(monkeypatch):
    """We wait as long as the server says, no less than we would; if it says too long, the row is asked another day."""
    server = Scripted(monkeypatch, Busy("429", pause=90.0), Busy("429", pause=1.0), "4", Busy("429", pause=1e9), "4")
    assert server.asked() == Answer("4")
    assert server.pauses == [90, 4]
    with pytest.raises(Unanswered) as error:
        server.asked()
    assert error.value.passing
    assert server.asked() == Answer("4")
    assert server.pauses == [90, 4]


def test_retry_after_is_a_number_or_a_date():
    """Seconds and HTTP dates are read; what is neither, negative or past counts as nothing."""
    soon = datetime.now(UTC) + timedelta(seconds=100)
    assert judges._pause("7") == 7
    assert judges._pause(" 1.5 ") == 1.5
    assert 95 < judges._pause(format_datetime(soon, usegmt=True)) <= 100
    for nothing in (None, "", "soon", "-3", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "99 Foo 2026"):
        assert judges._pause(nothing) == 0


def test_statuses_are_told_apart():
    """What may pass is asked again, what is about us stops all questions, what is about the image is final."""

    class Response:
        def __init__(self, status):
            self.status, self.headers = status, {}

    def kind(status):
        with pytest.raises(Unanswered) as error:
            Server("http://host:1", "model", "KEY", 1.0)._decoded(Response(status), b"sorry")
        return type(error.value), error.value.passing

    assert {kind(status) for status in (408, 409, 425, 429, 499, 500, 502, 503, 504, 529)} == {(Busy, True)}
    assert {kind(status) for status in (301, 307, 401, 402, 403, 404, 405)} == {(Refused, True)}
    assert {kind(status) for status in (400, 413, 415, 422)} == {(Unanswered, False)}
    assert kind(200) == (Unanswered, True)  # not JSON: something else answers there
