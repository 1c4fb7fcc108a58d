"""UnifiedReward (Wang et al. 2025, arXiv 2503.05236): a vision-language model writes scores in answer to a question.

UnifiedReward is more than one score: papers ask different questions of different checkpoints. So the question is a
setting, and part of every metric's name; the checkpoint's revision is part of the version:
- ``acs``: alignment, coherence and style, after a list of words (the UnifiedReward repository, for its 1.x models);
- ``acs_2``: the same without that list (for its 2.0 models);
- ``final``: one overall score (the UnifiedReward repository, MixGRPO);
- ``flowbp``: FlowBP's two questions about images resized to 512 x 512, meant for the 7b-v1.5 checkpoint.
UR-Align is the alignment score; UR-IQ of ``acs`` and ``acs_2`` is the mean of coherence and style.

Departures from those repositories:
1. Servers are sent PNG, not JPEG. Decoding is greedy; a checkpoint's repetition penalty stays in force.
2. An answer that does not say clearly which number from 1 to 5 it gives leaves a row without that score
   (`judges.read_score`): no default value enters a mean.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from alignbench import weights
from alignbench.config import Requirement, UserError
from alignbench.evaluator import NOTES, Evaluator, Metric, check_range, device, to_pil
from alignbench.evaluators.judges import Answer, Refused, Server, Unanswered, read_score

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

PROMPTS = Path(__file__).parent / "prompts"
KEY = "UNIFIEDREWARD_API_KEY"  # environment variable, since settings are stored and a secret must not be
IMAGE_TOKENS = ("<|image_pad|>", "<|video_pad|>")


class Question(NamedTuple):
    """Question asked about every image: a file of PROMPTS, and the label before each score in the answer."""

    file: str
    scores: dict[str, str]  # part -> its label


class Template(NamedTuple):
    """Questions and the metrics made from their answers. ``metrics``: each is the mean of these parts."""

    questions: tuple[Question, ...]
    metrics: dict[str, tuple[str, ...]]
    tokens: int  # in the longest answer
    side: int | None = None  # images are resized to squares of this side


ACS = {part: f"{part.capitalize()} Score" for part in ("alignment", "coherence", "style")}
ACS_METRICS = {
    "align": ("alignment",),
    "iq": ("coherence", "style"),
    "coherence": ("coherence",),
    "style": ("style",),
}
FINAL = "Final Score"
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


class UnifiedReward(Evaluator):
    """UnifiedReward. ``weights``: hub id or folder of a Qwen-VL checkpoint; with ``server``, the one that it serves.

    ``server``: an OpenAI-compatible server (vLLM, SGLang), as http://host:port. If it requires a key, it is read from
    the environment variable UNIFIEDREWARD_API_KEY. Besides the metrics, ``score`` gives the model's text (``raw``),
    the reason why a row lacks a score (``error``), and whether asking again may help (``passing``).
    """

    name: ClassVar[str] = "unifiedreward"
    seconds_per_image: ClassVar[float | None] = 8.0  # some 300 words, one by one, by 7 B parameters
    gigabytes: ClassVar[float | None] = 16.6

    template: Literal["acs", "acs_2", "final", "flowbp"] = "acs"
    weights: str = "CodeGoat24/UnifiedReward-qwen-7b"
    revision: str | None = None  # revision of the weights; required with a server, which does not report it
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on GPUs, else float32
    max_new_tokens: int | None = None  # None: the template's limit
    server: str | None = None  # None: run the model in this process, one image after another
    served_model: str = "UnifiedReward"  # the model's name on the server
    concurrency: int = 16  # simultaneous requests
    timeout: float = 120.0  # seconds for one answer

    def __post_init__(self) -> None:
        if self.server is None:
            return
        if not _is_address(self.server):
            raise UserError(f"unifiedreward.server: not of the form http://host:port; a key belongs in ${KEY}")
        if self.revision is None:
            what = "'revision' is missing: a server does not tell which weights it serves"
            raise UserError(f"unifiedreward.revision: {what}; start it with --revision and name the same here")
        if self.concurrency < 1 or self.timeout <= 0:
            raise UserError("unifiedreward: concurrency and timeout must be positive; the defaults are 16 and 120")

    @property
    def unhashed(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on where the model runs
        """Settings that change no score: how the server is reached, and those of the way that is not taken."""
        return "server", "concurrency", "timeout", "dtype" if self.server else "served_model"

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]  # depends on the template
        return tuple(Metric(f"ur_{part}_{self.template}", "1-5") for part in self._template.metrics)

    @cached_property
    def version(self) -> str:  # type: ignore[override]  # depends on the template and the checkpoint
        """Version of our code, the template, and the checkpoint's revision if known."""
        revision = self.revision
        if revision is None and self.folder.parent.name == "snapshots":  # in the hub's cache
            revision = self.folder.name
        return "-".join(["2", self.template, *([re.sub(r"[^\w.]", "_", revision)[:12]] if revision else [])])

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
        """Folder of the checkpoint; UserError if it cannot be found."""
        return self._checkpoint.path

    def files(self) -> list[Path]:
        """Return the checkpoint's files; with a server, whose weights the settings name, the questions alone."""
        if self.server:
            return [question_file(question.file) for question in self._template.questions]
        texts = [path for pattern in ("*.txt", "*.jinja") for path in self.folder.glob(pattern)]
        files = weights.model_files(self.folder, "unifiedreward.weights")
        kind = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
        if kind.startswith("llava"):
            what = f"{self.folder} is a {kind} checkpoint, which transformers cannot load"
            raise UserError(f"unifiedreward.weights: {what}; serve it (SGLang) and set server, or choose a qwen one")
        return sorted({*files, *weights.check(texts, "unifiedreward.weights")})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a prompt with an image token: the model would look for an image there."""
        for prompt in prompts:
            if token := next((token for token in IMAGE_TOKENS if token in prompt.text), None):
                raise UserError(f"unifiedreward: the prompt '{prompt.text[:60]}' holds {token}, which marks an image")

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: the metrics and the columns of NOTES.

        Raise UserError if no image was answered, and an empty one would not be either.
        """
        import pandas as pd
        from PIL import Image

        self.check(prompts)
        asked = [(image, prompt.text) for image, prompt in zip(images, prompts, strict=True)]
        answers = list(self._answers(asked))
        if asked and not any(isinstance(answer, Answer) for row in answers for answer in row):
            plain = next(iter(self._answers([(Image.new("RGB", (512, 512), "grey"), prompts[0].text)])))
            if reason := next((answer for answer in plain if isinstance(answer, Unanswered)), None):
                raise UserError(f"unifiedreward: none of {len(asked)} images was answered: {reason}")
        frame = pd.DataFrame([self._row(row) for row in answers], columns=[*self._columns, *NOTES])
        frame = frame.astype(dict.fromkeys(self._columns, "float64") | {"passing": bool})
        failed = frame["error"].dropna()
        if len(failed):
            what = f"{len(failed)} of {len(frame)} images have no complete score"
            warnings.warn(f"unifiedreward: {what}; the first: {failed.iloc[0]}", stacklevel=2)
        return frame

    def probe(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return the log-probabilities of five tokens as the answer's first, if the model runs in this process."""
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
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) scores of the first metric; not differentiable.

        Raise UserError for an image without this score: training on the others would not be the same.
        """
        frame = self.score([to_pil(image) for image in check_range(pixels)], prompts)
        rewards = frame[self._columns[0]]
        if rewards.isna().any():
            raise UserError(f"unifiedreward: an image has no reward: {frame['error'][rewards.isna()].iloc[0]}")
        return pixels.new_tensor(rewards.to_numpy())

    @property
    def _columns(self) -> list[str]:
        return [metric.name for metric in self.metrics]

    def _answers(self, asked: Sequence[tuple[Image, str]]) -> Iterator[list[Answer | Unanswered]]:
        """Yield for each image, in order, an answer to each question, or the reason why there is none."""
        if not asked:
            return
        if self.server is None:
            yield from (self._ask(self._generate, *pair) for pair in asked)
            return
        self._check_server()
        ask = partial(self._server.ask, tokens=self._tokens)
        yield from self._server.map(lambda pair: self._ask(ask, *pair), asked, self.concurrency)

    def _ask(self, ask: Callable[[Image, str], Answer], image: Image, prompt: str) -> list[Answer | Unanswered]:
        """Return the answers to all questions about one image."""
        rgb, side = image.convert("RGB"), self._template.side
        rgb = rgb.resize((side, side)) if side else rgb
        answers: list[Answer | Unanswered] = []
        for question in self._template.questions:
            try:
                answers.append(ask(rgb, text(question.file, prompt)))
            except Unanswered as error:
                answers.append(error)
        return answers

    def _row(self, answers: Sequence[Answer | Unanswered]) -> list[float | str | bool | None]:
        """Return the metrics and the values of NOTES: the answers, the errors, and whether asking again may help."""
        parts: dict[str, float] = {}
        errors: list[str] = []
        for question, answer in zip(self._template.questions, answers):
            if isinstance(answer, Unanswered):
                errors.append(str(answer))
                continue
            for part, label in question.scores.items():
                try:
                    parts[part] = read_score(answer, label)
                except ValueError as error:
                    errors.append(str(error))
        texts = [answer.text for answer in answers if isinstance(answer, Answer)]
        means = (_mean([parts.get(name, float("nan")) for name in names]) for names in self._template.metrics.values())
        passing = any(isinstance(answer, Unanswered) and answer.passing for answer in answers)
        return [*means, "\n\n".join(texts) if texts else None, "; ".join(errors) or None, passing]

    @property
    def _tokens(self) -> int:
        return self.max_new_tokens or self._template.tokens

    # -- a server -----------------------------------------------------------------------------------------------------

    @cached_property
    def _server(self) -> Server:
        return Server(str(self.server), self.served_model, KEY, self.timeout)

    def _check_server(self) -> None:
        """Raise UserError, with the command that starts it, unless the server answers and offers the model."""
        try:
            offered = [model["id"] for model in self._server.models()["data"]]
        except (Unanswered, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, Unanswered) else "its list of models is malformed"
            start = f"vllm serve {self.weights} --revision {self.revision} --served-model-name {self.served_model}"
            instead = "" if isinstance(error, Refused) else f"; start it with `{start}`"
            raise UserError(f"unifiedreward.server: {self.server}: {reason}{instead}") from None
        if self.served_model not in offered:
            what = f"{self.server} offers {', '.join(map(str, offered)) or 'no model'}, not '{self.served_model}'"
            raise UserError(f"unifiedreward.served_model: {what}; name one it offers")

    # -- the model in this process ------------------------------------------------------------------------------------

    def _inputs(self, image: Image, question: str) -> Any:
        """Return the model's inputs on its device."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        processor = self._processor
        settings = processor.image_processor
        side, size = settings.patch_size * settings.merge_size, settings.size
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        height, width = smart_resize(image.height, image.width, factor=side, **limits)
        resized = image.resize((width, height))  # by Pillow, as in the repository
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return processor(text=[chat], images=[resized], do_resize=False, return_tensors="pt").to(device())

    def _generate(self, image: Image, question: str) -> Answer:
        """Answer for one image at a time: padding a batch would change logits and, at times, a digit."""
        import torch

        model, inputs = self._model.to(device()), self._inputs(image, question)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=self._tokens, **greedy)
        written = tokens[0, inputs["input_ids"].shape[1] :]
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


def _is_address(server: str) -> bool:
    """Return whether ``server`` has the form http://host:port, without a name or key of a user."""
    try:
        url = urlsplit(server)
        return url.scheme in ("http", "https") and bool(url.hostname) and not url.username and url.port != 0
    except ValueError:  # a port that is none
        return False


def question_file(file: str) -> Path:
    return PROMPTS / f"unifiedreward-{file}.txt"


def text(file: str, prompt: str) -> str:
    """Return the question in ``file`` about an image made for ``prompt``."""
    return question_file(file).read_text(encoding="utf-8").replace("{prompt}", prompt)


def _ends(tokens: int | Sequence[int] | None) -> Sequence[int | None]:
    return tokens if isinstance(tokens, Sequence) else [tokens]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
