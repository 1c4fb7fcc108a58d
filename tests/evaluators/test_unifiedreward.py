"""UnifiedReward: the questions' bytes, how answers are parsed, and what happens without an answer."""

import base64
import contextlib
import hashlib
import io
import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from alignbench.config import UserError
from alignbench.digests import content_id
from alignbench.evaluation.scoring import score_rows
from alignbench.evaluators import judges, unifiedreward
from alignbench.evaluators.unifiedreward import UnifiedReward
from alignbench.experiment.ids import score_content
from alignbench.prompts import Prompt
from alignbench.rehearsal import tiny_qwen
from alignbench.testing import EvaluatorContract
from alignbench.testing.evaluator_contract import random_image

SECRET = "sk-very-secret"
PATIENCE = 5.0  # seconds: what a good answer never takes, even on a busy machine


def prompts(*texts):
    return [Prompt(f"p{i}", text) for i, text in enumerate(texts)]


def images(n, size=(40, 64)):
    return [random_image(*size, seed) for seed in range(n)]


def columns(frame):
    """Return the numbers of a frame, as lists."""
    return frame.drop(columns=["raw", "error", "passing"]).to_numpy().tolist()


# -- a server ---------------------------------------------------------------------------------------------------------


def verdict(image, question):
    """Return the stub's answer: numbers of many digits that depend on the image and the caption."""
    red, green, blue = np.asarray(image, dtype=float).mean((0, 1)) / 255 * 4 + 1
    if "Final Score" in question:
        return f"circle (object): 1\nFinal Score: {(red if 'alignment' in question else green):.6f}"
    caption = question.rpartition("[")[2]
    alignment = 1 + (red - 1 + len(caption) % 7) % 4
    return f"Alignment Score (1-5): {alignment:.6f}\nCoherence Score (1-5): {green:.6f}\nStyle Score (1-5): {blue}"


class Stub(BaseHTTPRequestHandler):
    """A request handler of an OpenAI-compatible server; a caption that names a mishap gets it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        assert self.path == "/v1/models"
        self.server.keys.append(self.headers.get("Authorization"))
        self.reply(200, {"object": "list", "data": [{"id": name} for name in self.server.offered]})

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = body["messages"]
        image, question = message["content"]
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (image.format, image.mode) == ("PNG", "RGB")
        self.server.keys.append(self.headers.get("Authorization"))
        with self.server.counting:
            self.server.bodies.append(body)
            among_the_first = self.server.gate and len(self.server.bodies) <= self.server.gate.parties
            self.server.sizes.append(image.size)
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            if among_the_first:
                self.server.gate.wait(30)
            self.answer(question["text"], image)
        finally:
            with self.server.counting:
                self.server.busy -= 1

    def answer(self, question, image):
        mishap = next((name for name in MISHAPS if f"[{name}]" in question), self.server.bad.get(image.size))
        if mishap:
            MISHAPS[mishap](self)
            return
        self.say(verdict(image, question))

    def say(self, text, finish="stop"):
        self.reply(200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]})

    def reply(self, status, content, length=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has given up
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def flaky(handler):
    """Answer "busy" twice, then normally."""
    handler.server.tries += 1
    if handler.server.tries < 3:
        handler.reply(503, {"error": "loading"})
    else:
        handler.say("Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 4")


def drip(handler):
    """Send one byte at a time, so that no single read is slow."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(1000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.2)


def half(handler):
    """Send less than the header announces."""
    handler.reply(200, b'{"choices": [', length=500)
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_WR)


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


MISHAPS = {
    "flaky": flaky,
    "drip": drip,
    "hang up": hang_up,
    "slow": lambda handler: (time.sleep(PATIENCE + 1), handler.say("too late")),
    "down": lambda handler: handler.reply(500, {"error": "out of memory"}),
    "unknown": lambda handler: handler.reply(422, {"error": f"no such image, key {SECRET}"}),
    "gone": lambda handler: handler.reply(401, {"error": "key withdrawn"}),
    "away": lambda handler: handler.reply(503, {"error": "loading"}),
    "html": lambda handler: handler.reply(200, b"<html>\n<h1>proxy</h1>"),
    "other json": lambda handler: handler.reply(200, {"choices": []}),
    "no text": lambda handler: handler.say(None),
    "half": half,
    "endless": lambda handler: handler.reply(200, b" " * 2**21),
    "prose": lambda handler: handler.say("A lovely picture!"),
    "empty": lambda handler: handler.say(""),
    "no style": lambda handler: handler.say(
        "Alignment Score (1-5): 3.5\nCoherence Score (1-5): 2\nStyle Score (1-5): nan"
    ),
    "cut": lambda handler: handler.say("Alignment Score (1-5): 3.5\nCoherence Score (1-5): 2.", "length"),
    "too good": lambda handler: handler.say(
        "Alignment Score (1-5): 10\nCoherence Score (1-5): 2\nStyle Score (1-5): 0"
    ),
}


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # connections that may wait; five make clients try again after seconds

    def handle_error(self, *args):
        """Ignore clients that give up, which is part of the tests."""


@pytest.fixture
def server(monkeypatch):
    """The stub on its own port, with short waits between retries."""
    stub = Server(("127.0.0.1", 0), Stub)
    stub.url = f"http://127.0.0.1:{stub.server_port}"
    stub.counting, stub.gate, stub.bad = threading.Lock(), None, {}  # bad: size of an image -> its mishap
    stub.offered, stub.keys, stub.bodies, stub.sizes = ["UnifiedReward"], [], [], []
    stub.busy = stub.busiest = stub.tries = 0
    threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(judges, "PATIENCE", 0.01)
    monkeypatch.setattr(judges, "OUTAGE", 0.1)
    yield stub
    stub.shutdown()
    stub.server_close()


def asking(stub, **settings):
    return UnifiedReward(**{"server": stub.url, "revision": "0123abcd", "timeout": 20.0, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("template", ["acs", "acs_2", "final", "flowbp"])
class TestUnifiedReward(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _evaluator(self, server, template):
        self.evaluator = asking(server, template=template)


# -- questions ---------------------------------------------------------------------------------------------------------

DIGESTS = {
    "acs": "88d1d1c5f0fba9dc6f112022ffbabf86f6ad64df58047a7c7293814f91c39ea9",
    "acs_2": "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851",
    "final": "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b",
    "flowbp_align": "9a45873836d2feb9308af3863c67c2c580427e4c5cbe3d8952881b486dff3e5f",
    "flowbp_iq": "a4c59a21640df12c6d40f4fb30fadfb062f3ffdb962781fa08d94b6b8a30b356",
}


@pytest.mark.parametrize("file", DIGESTS)
def test_questions_are_verbatim(file):
    """Questions have the bytes of the sources in prompts/SOURCES.md, with the caption in brackets at the end."""
    data = (unifiedreward.PROMPTS / f"unifiedreward-{file}.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == DIGESTS[file]
    assert data.endswith(b"Text Caption: [{prompt}]")
    caption = 'a {braces} [brackets] "café" \\n \n %s'
    assert unifiedreward.text(file, caption) == data.decode().replace("{prompt}", caption)


def test_the_server_gets_image_then_question(server):
    """Requests are greedy, with the template's token limit, the served name, and the lossless image in its own size."""
    asking(server).score(images(1), prompts("a dog"))
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("UnifiedReward", 0, 4096)
    (message,) = body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][1]["text"] == unifiedreward.text("acs", "a dog")
    data = base64.b64decode(message["content"][0]["image_url"]["url"].partition(",")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(images(1)[0]))


def test_flowbp_asks_twice_about_a_square(server):
    """It asks for alignment, then quality, of the image at 512 x 512."""
    frame = asking(server, template="flowbp").score(images(1), prompts("a dog"))
    assert server.sizes == [(512, 512)] * 2
    asked = [body["messages"][0]["content"][1]["text"] for body in server.bodies]
    assert asked == [unifiedreward.text(file, "a dog") for file in ("flowbp_align", "flowbp_iq")]
    assert frame["raw"][0].count("Final Score") == 2


# -- answers ----------------------------------------------------------------------------------------------------------


def test_metrics_are_the_templates(server):
    """UR-Align is alignment, UR-IQ the mean of coherence and style, and the parts are columns too."""
    frame = asking(server).score(images(3), prompts("a", "bb", "ccc"))
    assert list(frame) == ["ur_align_acs", "ur_iq_acs", "ur_coherence_acs", "ur_style_acs", "raw", "error", "passing"]
    np.testing.assert_allclose(frame["ur_iq_acs"], (frame["ur_coherence_acs"] + frame["ur_style_acs"]) / 2)
    said = [verdict(image, f"[{text}]") for image, text in zip(images(3), ("a", "bb", "ccc"))]
    assert frame["raw"].tolist() == said
    assert frame["ur_align_acs"].tolist() == [float(text.splitlines()[0].split()[-1]) for text in said]
    assert frame["error"].isna().all()


# -- failures ---------------------------------------------------------------------------------------------------------

SAYS = {
    "drip": "no answer in 5 s",
    "slow": "no answer in 5 s",
    "hang up": "cannot be reached",
    "half": "closed within the answer",
    "endless": "more than 1048576 bytes",
    "down": "answers 500",
    "unknown": "answers 422",
    "away": "answers 503",
    "html": "not JSON: <html> <h1>proxy",
    "other json": "holds no text",
    "no text": "holds no text",
    "prose": "has no number behind 'Alignment Score'",
    "empty": "has no number behind 'Alignment Score'",
    "no style": "has no number behind 'Style Score'",
    "cut": "it was cut off",
    "too good": "'Alignment Score: 10' is not from 1 to 5",
}


@pytest.mark.slow
def test_every_mishap_marks_its_own_row(server, monkeypatch):
    """Sixteen ways to fail, each between two good rows, leave the good rows' scores as they are alone."""
    texts = [text for mishap in SAYS for text in (f"good {mishap}", mishap)]
    asked = images(len(texts))
    monkeypatch.setattr(judges, "TRIES", 1)
    with pytest.warns(UserWarning, match=r"16 of 32 images have no complete score"):
        frame = asking(server, timeout=PATIENCE).score(asked, prompts(*texts))
    alone = asking(server).score(asked[::2], prompts(*texts[::2]))
    assert columns(frame[::2]) == columns(alone)
    assert frame["error"][::2].isna().all()
    for text, error in zip(texts[1::2], frame["error"][1::2]):
        assert SAYS[text] in error, text
    assert set(SAYS) | {"flaky", "gone"} == set(MISHAPS)


def test_only_a_failed_part_is_missing(server):
    """Without style, alignment and coherence are kept, UR-IQ and style are NaN, and the answer is kept."""
    with pytest.warns(UserWarning, match="1 of 1"):
        frame = asking(server).score(images(1), prompts("no style"))
    align, iq, coherence, style = columns(frame)[0]
    assert (align, coherence) == (3.5, 2)
    assert math.isnan(iq)
    assert math.isnan(style)
    assert frame["raw"][0].endswith("nan")


def test_tables_keep_words_and_reasons(server):
    """A sweep stores a judge's numbers, whether all exist, the errors, and the answers."""
    with pytest.warns(UserWarning, match="2 of 3"):
        rows = score_rows(asking(server), images(3), prompts("a", "prose", "down"))
    assert list(rows)[-4:] == ["ok", "error", "passing", "raw"]
    assert rows["passing"].tolist() == [False, False, True]
    assert rows["ok"].tolist() == [True, False, False]
    assert rows["raw"][1] == "A lovely picture!"
    assert rows["error"][0] is None
    assert "no number" in rows["error"][1]
    assert "answers 500" in rows["error"][2]


def test_words_without_scores_are_kept(server):
    """An answer that cannot be parsed is kept in "raw"."""
    with pytest.warns(UserWarning, match="2 of 2"):
        frame = asking(server).score(images(2), prompts("prose", "empty"))
    assert frame["raw"].tolist() == ["A lovely picture!", ""]


def test_a_busy_server_is_asked_again(server):
    """Two temporary failures cost two more requests, and nothing else."""
    frame = asking(server).score(images(1), prompts("flaky"))
    assert columns(frame) == [[2, 3.5, 3, 4]]
    assert len(server.bodies) == 3


def test_tries_are_bounded(server):
    """A question on which the server fails is sent three times, one that it calls wrong once."""
    for mishap, tries in (("down", 3), ("unknown", 1), ("html", 1)):
        server.bodies.clear()
        with pytest.warns(UserWarning, match="1 of 2"):
            asking(server).score(images(2), prompts("a", mishap))
        assert len(server.bodies) == 1 + tries, mishap


@pytest.mark.parametrize("mishap", ["unknown", "down", "html"])
def test_one_bad_image_alone_is_marked(server, mishap):
    """Without any answer, a plain image is asked about: if it is answered, the failure is the image's own."""
    server.bad = {(40, 64): mishap}
    with pytest.warns(UserWarning, match="1 of 1"):
        frame = asking(server).score(images(1, (64, 40)), prompts("a"))
    assert SAYS[mishap] in frame["error"][0]
    assert frame["passing"][0] == (mishap != "unknown")


@pytest.mark.parametrize(("mishap", "says"), [("gone", f"401: .*set .* {unifiedreward.KEY}"), ("away", "answers 503")])
def test_a_server_that_answers_nothing_is_one_clear_line(server, mishap, says):
    """A withdrawn key or a server that loads for ever is one line, after few requests."""
    with pytest.raises(UserError, match=rf"none of 20 images was answered: .*{says}") as error:
        asking(server, concurrency=1).score(images(1) * 20, prompts(*[mishap] * 20))
    assert "\n" not in str(error.value)
    assert len(server.bodies) < 20


def test_answers_before_an_outage_are_kept(server):
    """Rows after it are marked as passing, without a request each."""
    with pytest.warns(UserWarning, match="18 of 20"):
        frame = asking(server, concurrency=1).score(images(1) * 20, prompts("a", "b", "gone", *"cdefghijklmnopqrs"))
    assert frame["ur_align_acs"].notna().tolist() == [True] * 2 + [False] * 18
    assert frame["passing"].tolist() == [False] * 2 + [True] * 18
    assert len(server.bodies) == 3


def test_a_missing_server_is_one_clear_line(server):
    """If nothing listens, the error comes at once, with the command that starts a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        absent = asking(server, server=f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot be reached: .*start it with `vllm serve CodeGoat24") as error:
            absent.score(images(1), prompts("a"))
    assert "\n" not in str(error.value)


def test_a_server_of_another_model_is_one_clear_line(server):
    """The error lists what the server offers, if anything, before any image is sent."""
    server.offered = ["llama", "qwen"]
    with pytest.raises(UserError, match="offers llama, qwen, not 'UnifiedReward'"):
        asking(server).score(images(1), prompts("a"))
    assert not server.bodies


def test_requests_run_side_by_side_and_rows_keep_their_order(server):
    """At most eight run at once, and answers in any order get to the rows of their images."""
    server.gate = threading.Barrier(8)  # the first eight are answered when all of them are there
    texts = [f"{'x' * (i % 7)}" for i in range(40)]
    together = asking(server, concurrency=8).score(images(40), prompts(*texts))
    assert server.busiest == 8
    server.gate = None
    assert columns(together) == columns(asking(server, concurrency=1).score(images(40), prompts(*texts)))
    assert len({tuple(row) for row in columns(together)}) == 40


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_nowhere_else(server, monkeypatch):
    """It goes from the environment into a header, never into settings, rows, warnings or errors, even if quoted."""
    monkeypatch.setenv(unifiedreward.KEY, SECRET)
    evaluator = asking(server)
    with pytest.warns(UserWarning, match="no such image") as warned:
        frame = evaluator.score(images(2), prompts("a", "unknown"))
    assert set(server.keys) == {f"Bearer {SECRET}"}
    shown = repr(evaluator) + frame.to_json() + "".join(str(warning.message) for warning in warned)
    assert SECRET not in shown
    assert "***" in frame["error"][1]
    with pytest.raises(UserError, match="not of the form http") as error:
        UnifiedReward(server=f"http://me:{SECRET}@host:1", revision="x")
    assert SECRET not in str(error.value)


def test_what_a_number_means_is_in_its_name(server, tmp_path):
    """Another template or revision changes the version, and another template the column."""
    first, second = asking(server), asking(server, template="acs_2", revision="refs/pr/1")
    assert (first.version, second.version) == ("2-acs-0123abcd", "2-acs_2-refs_pr_1")
    assert not {metric.name for metric in first.metrics} & {metric.name for metric in second.metrics}
    snapshot = tmp_path / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    assert UnifiedReward(weights=str(snapshot)).version == "2-acs-0123456789ab"
    assert UnifiedReward(weights=str(tmp_path)).version == "2-acs"

    assert score_content(first, Sources()) != score_content(second, Sources())


class Sources:
    """A registry in which every evaluator is built in."""

    def source(self, kind, name):
        return None


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"server": "https://elsewhere:30000/v1"}, True),
        ({"concurrency": 2}, True),
        ({"timeout": 5.0}, True),
        ({"dtype": "float32"}, True),  # of the model in this process
        ({"served_model": "another"}, False),  # a server may offer several
        ({"revision": "89ab"}, False),
        ({"max_new_tokens": 9}, False),
        ({"template": "final"}, False),
        ({"weights": "CodeGoat24/UnifiedReward-2.0-qwen-7b"}, False),
    ],
)
def test_how_a_server_is_reached_is_in_no_id(change, same):
    """Its address, the number of requests and the patience change no number; the model, its question and limit do."""
    about = {"server": "http://127.0.0.1:8000", "revision": "0123"}
    before, after = (score_content(UnifiedReward(**given), Sources()) for given in (about, about | change))
    assert (content_id(before) == content_id(after)) == same


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"revision": None}, "'revision' is missing"),
        ({"server": "localhost:8080"}, "not of the form"),
        ({"server": "http://host:port"}, "not of the form"),
        ({"server": "http://host:99999"}, "not of the form"),
        ({"concurrency": 0}, "must be positive"),
        ({"timeout": 0.0}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(server, settings, says):
    """They are refused before any request."""
    with pytest.raises(UserError, match=says):
        asking(server, **settings)


def test_a_prompt_with_an_image_token_is_refused(server):
    """The model would look for an image within the caption."""
    with pytest.raises(UserError, match=r"holds <\|image_pad\|>"):
        asking(server).check(prompts("a <|image_pad|>"))


# -- the local model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["Qwen2_5_VL", "Qwen3_VL"])
def local(request, tmp_path_factory):
    folder = tiny_qwen.qwen_vl_folder(tmp_path_factory.mktemp("judge"), request.param)
    return UnifiedReward(weights=str(folder), max_new_tokens=12)


def as_the_repository(folder, image, text, tokens):
    """Ask as UnifiedReward's own script: Pillow's resize, Qwen's processor, greedy generation, the new tokens."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    side = 2 * processor.image_processor.patch_size
    height, width = smart_resize(image.height, image.width, factor=side, min_pixels=3136, max_pixels=12845056)
    resized = image.convert("RGB").resize((width, height), Image.BICUBIC)
    question = unifiedreward.text("acs", text)
    chat = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    chat += f"<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[chat], images=[resized], padding=True, return_tensors="pt")
    with torch.no_grad():
        written = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answer = written[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.slow
def test_the_model_is_asked_as_in_the_repository(local):
    """Two checkpoint families give the script's answers for images of several shapes; random answers have no scores."""
    asked = [random_image(*size, seed) for seed, size in enumerate([(64, 64), (90, 50), (33, 120)])]
    with pytest.warns(UserWarning, match="3 of 3"):
        frame = local.score(asked, prompts("a dog", "x {y}", ""))
    theirs = [as_the_repository(local.folder, i, t, 12) for i, t in zip(asked, ("a dog", "x {y}", ""))]
    assert frame["raw"].tolist() == theirs
    assert len(set(theirs)) > 1
    assert frame["error"].str.contains("has no number").all()


def test_a_model_that_writes_scores_is_read(local, monkeypatch):
    """Generated tokens become columns; without the end token, the last number may lack digits and is not read."""
    said = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 4"
    ids = local._processor.tokenizer(said)["input_ids"]
    end = local._model.generation_config.eos_token_id[0]

    def generate(tail):
        return lambda input_ids, **rest: torch.cat([input_ids, torch.tensor([[*ids, *tail]])], 1)

    monkeypatch.setattr(local._model, "generate", generate([end]))
    assert columns(local.score(images(1), prompts("a"))) == [[2.5, 3.5, 3, 4]]
    monkeypatch.setattr(local._model, "generate", generate([]))
    with pytest.warns(UserWarning, match="cut off"):
        frame = local.score(images(1), prompts("a"))
    assert columns(frame)[0][::2] == [2.5, 3]
    assert math.isnan(columns(frame)[0][3])


def test_wrong_checkpoints_are_one_clear_line(local, tmp_path):
    """A folder without weights, an unfetched id, a LLaVA checkpoint and a missing tensor are one-line errors."""
    from safetensors.torch import load_file, save_file

    for name, says in [(str(tmp_path), "has no weights"), ("a/b", "hf download a/b")]:
        with pytest.raises(UserError, match=says):
            UnifiedReward(weights=name).files()
    for path in local.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    dropped = state.pop(next(name for name in state if name.endswith("q_proj.weight")))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert dropped.numel()
    wrong = UnifiedReward(weights=str(tmp_path))
    with pytest.raises(UserError, match=r"does not hold this model: .*q_proj"):
        wrong.score(images(1), prompts("a"))
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llava"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformers cannot load"):
        wrong.files()


def test_files_are_the_checkpoints(local, server):
    """They are weights, configuration, tokenizer and preprocessing; for a server, only the questions."""
    names = {path.name for path in local.files()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "merges.txt"} <= names
    assert [path.stem for path in asking(server, template="flowbp").files()] == [
        "unifiedreward-flowbp_align",
        "unifiedreward-flowbp_iq",
    ]
