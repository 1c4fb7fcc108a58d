"""UnifiedReward (Wang et al. 2025, arXiv 2503.05236): a vision-language model is asked, and writes its scores.

There is no one UnifiedReward score: papers ask different questions of different checkpoints. So the question is a
setting, and part of every metric's name; the checkpoint's revision is part of the version:
- ``acs``: alignment, coherence and style, after a list of words (the UnifiedReward repository, for its 1.x models);
- ``acs_2``: the same without that list (for its 2.0 models);
- ``final``: one score for everything (the UnifiedReward repository, MixGRPO);
- ``flowbp``: two questions of FlowBP's own, of pictures resized to 512 x 512, meant for the 7b-v1.5 checkpoint.
UR-Align is the alignment score; UR-IQ of ``acs`` and ``acs_2`` is the mean of coherence and style.

Departures from those repositories:
1. Servers are sent PNG, not JPEG. Decoding is greedy; a checkpoint's repetition penalty stays in force.
2. A number outside 1 to 5, or none, is a row without a score, and stays one: no stand-in enters a mean.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from alignbench import weights
from alignbench.config import Requirement, UserError
from alignbench.evaluator import Evaluator, Metric, check_range, device, to_pil

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

PROMPTS = Path(__file__).parent / "prompts"
KEY = "UNIFIEDREWARD_API_KEY"  # environment variable: settings are stored, a secret must not be
TRIES, PATIENCE = 3, 2.0  # requests per answer; seconds before the second, doubled before the third
LARGEST = 2**20  # bytes of an answer
IMAGE_TOKENS = ("<|image_pad|>", "<|video_pad|>")
NUMBER = r"\s*(-?\d+(?:\.\d+)?)"


class Question(NamedTuple):
    """One thing asked about every image: a file of PROMPTS, and what stands before each score in the answer."""

    file: str
    scores: dict[str, str]  # part -> its label


class Template(NamedTuple):
    """What a metric's number means. ``metrics``: which parts each is the mean of."""

    questions: tuple[Question, ...]
    metrics: dict[str, tuple[str, ...]]
    tokens: int  # of the longest answer
    side: int | None = None  # images are resized to squares of it


ACS = {part: f"{part.capitalize()} Score (1-5):" for part in ("alignment", "coherence", "style")}
ACS_METRICS = {
    "align": ("alignment",),
    "iq": ("coherence", "style"),
    "coherence": ("coherence",),
    "style": ("style",),
}
FINAL = "Final Score:"
TEMPLATES = {
    "acs": Template((Question("acs", ACS),), ACS_METRICS, 4096),
    "acs_2": Template((Question("acs_2", ACS),), ACS_METRICS, 4096),
    "final": Template((Question("final", {"final": FINAL}),), {"overall": ("final",)}, 512),
    "flowbp": Template(
        (Question("flowbp_align", {"align": FINAL}), Question("flowbp_iq", {"iq": FINAL})),
        {"align": ("align",), "iq": ("iq",)},
        256,
        side=512,
    ),
}


class Answer(NamedTuple):
    """What the model wrote. ``cut``: it was not done when its tokens ran out."""

    text: str
    cut: bool = False


class Unanswered(Exception):
    """A question got no answer. The text says why."""


class Busy(Unanswered):
    """No answer this time; another time there may be one."""


class UnifiedReward(Evaluator):
    """UnifiedReward. ``weights``: a hub id or a folder of a Qwen-VL checkpoint; with ``server``, what it serves.

    ``server``: an OpenAI-compatible one (vLLM, SGLang), as http://host:port. A key, if it asks for one, is read from
    the environment variable UNIFIEDREWARD_API_KEY. Besides the metrics, ``score`` gives the columns ``raw``, the
    model's own words, and ``error``, why a row has no score.
    """

    name: ClassVar[str] = "unifiedreward"
    seconds_per_image: ClassVar[float | None] = 8.0  # some 300 words, one by one, of 7 B parameters
    gigabytes: ClassVar[float | None] = 16.6

    template: Literal["acs", "acs_2", "final", "flowbp"] = "acs"
    weights: str = "CodeGoat24/UnifiedReward-qwen-7b"
    revision: str | None = None  # of the weights; needed with a server, which does not tell
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on GPUs, else float32
    max_new_tokens: int | None = None  # None: the template's
    server: str | None = None  # None: the model runs here, one image after another
    served_model: str = "UnifiedReward"  # the name under which the server offers it
    concurrency: int = 16  # requests under way at once
    timeout: float = 120.0  # seconds for one answer

    def __post_init__(self) -> None:
        if self.server is None:
            return
        url = urlsplit(self.server)
        if url.scheme not in ("http", "https") or not url.hostname or url.username:
            raise UserError(f"unifiedreward.server: not of the form http://host:port; a key belongs in ${KEY}")
        if self.revision is None:
            what = "'revision' is missing: a server does not tell which weights it serves"
            raise UserError(f"unifiedreward.revision: {what}; start it with --revision and name the same here")
        if self.concurrency < 1 or self.timeout <= 0:
            raise UserError("unifiedreward: concurrency and timeout must be positive; the defaults are 16 and 120")

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]  # depends on the template
        return tuple(Metric(f"ur_{part}_{self.template}", "1-5") for part in self._template.metrics)

    @cached_property
    def version(self) -> str:  # type: ignore[override]  # depends on the template and the checkpoint
        """Of our code, the template and the checkpoint, as far as it has a revision."""
        revision = self.revision
        if revision is None and self.folder.parent.name == "snapshots":  # of the hub's cache
            revision = self.folder.name
        return "-".join(["1", self.template, *([re.sub(r"[^\w.]", "_", revision)[:12]] if revision else [])])

    @property
    def _template(self) -> Template:
        return TEMPLATES[self.template]

    def requirements(self) -> list[Requirement]:
        return [] if self.server else [self._checkpoint]

    @property
    def _checkpoint(self) -> Requirement:
        return weights.requirement(self.weights, "unifiedreward.weights", revision=self.revision)

    @cached_property
    def folder(self) -> Path:
        """Where the checkpoint lies. UserError if nowhere."""
        return self._checkpoint.path

    def files(self) -> list[Path]:
        """The checkpoint's; with a server, whose weights ``weights`` and ``revision`` name, the questions alone."""
        if self.server:
            return [question_file(question.file) for question in self._template.questions]
        beside = [path for pattern in ("*.txt", "*.jinja") for path in self.folder.glob(pattern)]
        found = weights.model_files(self.folder, "unifiedreward.weights")
        kind = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
        if kind.startswith("llava"):
            what = f"{self.folder} is a {kind} checkpoint, which transformers cannot load"
            raise UserError(f"unifiedreward.weights: {what}; serve it (SGLang) and set server, or choose a qwen one")
        return sorted({*found, *weights.check(beside, "unifiedreward.weights")})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """UserError for a prompt that holds an image's token: the model would look for an image there."""
        for prompt in prompts:
            if token := next((token for token in IMAGE_TOKENS if token in prompt.text), None):
                raise UserError(f"unifiedreward: the prompt '{prompt.text[:60]}' holds {token}, which marks an image")

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row per image: the metrics, then ``raw`` and ``error``. UserError if not one image was answered."""
        import pandas as pd

        self.check(prompts)
        asked = [(image, prompt.text) for image, prompt in zip(images, prompts, strict=True)]
        rows = [self._row(answers) for answers in self._answers(asked)]
        columns = [*(metric.name for metric in self.metrics), "raw", "error"]
        frame = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[:-2], "float64"))
        self._report(frame)
        return frame

    def probe(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Of a model here: the log-probabilities of five tokens as the first of its answer."""
        import pandas as pd
        import torch

        if self.server is not None:
            return super().probe(images, prompts)
        rows = []
        for image, prompt in zip(images, prompts, strict=True):
            question = text(self._template.questions[0].file, prompt.text)
            with torch.no_grad():
                logits = self._model.to(device())(**self._inputs(image.convert("RGB"), question)).logits[0, -1]
            rows.append(logits.float().log_softmax(-1)[[*range(5)]].tolist())
        return pd.DataFrame(rows, columns=[f"token {i}" for i in range(5)])

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> (B,) scores, the first metric's. Not differentiable: they are text."""
        images = [to_pil(image) for image in check_range(pixels)]
        return pixels.new_tensor(self.score(images, prompts)[self.metrics[0].name].to_numpy())

    def _answers(self, asked: Sequence[tuple[Image, str]]) -> Iterator[list[Answer | Unanswered]]:
        """Per image, an answer to each question, or why there is none; in the order of the images."""
        if not asked:
            return
        if self.server is None:
            yield from (self._each(self._generate, *pair) for pair in asked)
            return
        self._reach()
        with ThreadPoolExecutor(self.concurrency) as pool:
            yield from pool.map(lambda pair: self._each(self._request, *pair), asked)

    def _each(self, ask: Callable[[Image, str], Answer], image: Image, prompt: str) -> list[Answer | Unanswered]:
        """The answers to all questions about one image."""
        picture, side = image.convert("RGB"), self._template.side
        picture = picture.resize((side, side)) if side else picture
        answers: list[Answer | Unanswered] = []
        for question in self._template.questions:
            try:
                answers.append(ask(picture, text(question.file, prompt)))
            except Unanswered as error:
                answers.append(error)
        return answers

    def _row(self, answers: Sequence[Answer | Unanswered]) -> list[float | str | None]:
        """Metrics, raw answers, and what went wrong."""
        parts: dict[str, float] = {}
        errors: list[str] = []
        for question, answer in zip(self._template.questions, answers):
            if isinstance(answer, Unanswered):
                errors.append(str(answer))
                continue
            for part, label in question.scores.items():
                try:
                    parts[part] = parse(answer, label)
                except ValueError as error:
                    errors.append(str(error))
        said = [answer.text for answer in answers if isinstance(answer, Answer)]
        means = (_mean([parts.get(name, float("nan")) for name in names]) for names in self._template.metrics.values())
        return [*means, "\n\n".join(said) if said else None, "; ".join(errors) or None]

    def _report(self, frame: pd.DataFrame) -> None:
        """A warning that counts the rows without a score. UserError if not one model's answer came."""
        failed = frame[frame["error"].notna()]
        if len(frame) and frame["raw"].isna().all():
            raise UserError(f"unifiedreward: not one of {len(frame)} images was answered: {failed['error'].iloc[0]}")
        if len(failed):
            what = f"{len(failed)} of {len(frame)} images have no complete score"
            warnings.warn(f"unifiedreward: {what}; the first: {failed['error'].iloc[0]}", stacklevel=3)

    @property
    def _tokens(self) -> int:
        return self.max_new_tokens or self._template.tokens

    # -- a server -----------------------------------------------------------------------------------------------------

    def _reach(self) -> None:
        """UserError, with how to start it, if the server does not answer or does not offer the model."""
        try:
            offered = [model["id"] for model in self._call("GET", "/v1/models")["data"]]
        except (Unanswered, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, Unanswered) else "its list of models is not one"
            start = f"vllm serve {self.weights} --revision {self.revision} --served-model-name {self.served_model}"
            raise UserError(f"unifiedreward.server: {self.server}: {reason}; start it with `{start}`") from None
        if self.served_model not in offered:
            what = f"{self.server} offers {', '.join(map(str, offered)) or 'no model'}, not '{self.served_model}'"
            raise UserError(f"unifiedreward.served_model: {what}; name one it offers")

    def _request(self, image: Image, question: str) -> Answer:
        data = io.BytesIO()
        image.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": self.served_model, "messages": [{"role": "user", "content": content}]}
        answer = self._patiently("/v1/chat/completions", {**body, "temperature": 0, "max_tokens": self._tokens})
        with contextlib.suppress(KeyError, TypeError, ValueError):
            (choice,) = answer["choices"]
            if isinstance(said := choice["message"]["content"], str):
                return Answer(said, choice.get("finish_reason") == "length")
        raise Unanswered("the server's answer holds no text")

    def _patiently(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers to ``body``, asked again where that may help."""
        for i in range(TRIES):
            try:
                return self._call("POST", path, body)
            except Busy as error:
                if i == TRIES - 1:
                    raise Unanswered(f"{error}; tries: {TRIES}") from None
            time.sleep(PATIENCE * 2**i)
        raise AssertionError

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request. Unanswered says why there is no JSON; Busy, a kind of it, that it may work another time."""
        url = urlsplit(str(self.server))
        secure = url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(str(url.hostname), url.port, timeout=self.timeout)
        key = os.environ.get(KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        place = url.path.rstrip("/").removesuffix("/v1") + path
        try:
            connection.request(method, place, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            data = _read(response, time.monotonic() + self.timeout)
        except TimeoutError:
            raise Busy(f"the server gave no answer in {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Busy(f"the server cannot be reached: {str(error) or type(error).__name__}") from None
        finally:
            connection.close()
        return _decoded(response.status, data)

    # -- the model, here ----------------------------------------------------------------------------------------------

    def _inputs(self, image: Image, question: str) -> Any:
        """What the model reads, on its device."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        processor = self._processor
        settings = processor.image_processor
        side, size = settings.patch_size * settings.merge_size, settings.size
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        height, width = smart_resize(image.height, image.width, factor=side, **limits)
        picture = image.resize((width, height))  # by Pillow, as the repository does it
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return processor(text=[chat], images=[picture], do_resize=False, return_tensors="pt").to(device())

    def _generate(self, image: Image, question: str) -> Answer:
        """One image at a time: padding a batch would change the numbers, and with them, now and then, a digit."""
        import torch

        model, inputs = self._model.to(device()), self._inputs(image, question)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=self._tokens, **greedy)
        written = found[0, inputs["input_ids"].shape[1] :]
        cut = written[-1].item() not in _ends(model.generation_config.eos_token_id)
        return Answer(self._processor.decode(written, skip_special_tokens=True), cut)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def _model(self) -> Any:
        import torch
        from transformers import AutoModelForImageTextToText

        self.files()
        automatic = "bfloat16" if device().type == "cuda" else "float32"
        dtype = getattr(torch, automatic if self.dtype == "auto" else self.dtype)
        return weights.pretrained(AutoModelForImageTextToText, self.folder, "unifiedreward.weights", dtype)


def question_file(file: str) -> Path:
    return PROMPTS / f"unifiedreward-{file}.txt"


def text(file: str, prompt: str) -> str:
    """The question in ``file`` about an image made for ``prompt``."""
    return question_file(file).read_text(encoding="utf-8").replace("{prompt}", prompt)


def parse(answer: Answer, label: str) -> float:
    """The number behind the first ``label``. ValueError if there is none from 1 to 5, or if it may lack digits."""
    complete = re.sub(r"[\d.]+$", "", answer.text) if answer.cut else answer.text
    found = re.search(re.escape(label) + NUMBER, complete, re.IGNORECASE)
    if found is None:
        raise ValueError(f"the answer has no number behind '{label}'{', it was cut off' if answer.cut else ''}")
    if not 1 <= float(found[1]) <= 5:
        raise ValueError(f"'{label} {found[1]}' is not from 1 to 5")
    return float(found[1])


def _ends(tokens: int | Sequence[int] | None) -> Sequence[int | None]:
    return tokens if isinstance(tokens, Sequence) else [tokens]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, whose pieces may not drip in beyond the deadline."""
    data = b""
    while piece := response.read1(2**16):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > LARGEST:
            raise http.client.HTTPException(f"an answer of more than {LARGEST} bytes")
    if response.length:
        raise http.client.HTTPException("the connection was closed within the answer")
    return data


def _decoded(status: int, data: bytes) -> Any:
    said = " ".join(data.decode("utf-8", "replace").split())[:200]
    said = said.replace(os.environ.get(KEY) or "\0", "***")  # some servers quote it back
    if status == 429 or status >= 500:
        raise Busy(f"the server answers {status}: {said}")
    if status != 200:
        raise Unanswered(f"the server answers {status}: {said}")
    try:
        return json.loads(data)
    except ValueError:
        raise Unanswered(f"the server's answer is not JSON: {said}") from None
