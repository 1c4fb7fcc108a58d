"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL reads image and rubric; a head scores a special token's state.

This is a port to today's transformers: the ``hpsv3`` package needs transformers 4.45 to 4.51. ``engine: official``
scores with the package's code, in a separate environment. The prompt is the package's, byte for byte
(prompts/hpsv3.txt). Two details of the package change every score, and are kept:
1. Positions are plain 0, 1, 2, ... on all three axes of Qwen2-VL's rotary embedding, also within the image: the
   package's forward never asks for the image's positions.
2. The rotary frequencies are rounded to bfloat16, as by the package's ``model.to(bfloat16)``, in training too.
Departures of the port from the package:
1. On CPUs it computes in float32, with exactly the published bfloat16 weights; the package cannot.
2. ``reward`` takes pixels in [0, 1]; the package's differentiable mode expects 0..255, and silently accepts others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignbench import official, weights
from alignbench.config import Requirement, UserError
from alignbench.evaluator import Evaluator, Metric, check_range, device, in_batches, to_tensor

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

CHECKPOINT = "HPSv3.safetensors"
BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
OFFICIAL_FILES = ("preprocessor_config.json", "chat_template.json", "vocab.json", "merges.txt")
RUBRIC = Path(__file__).parent / "prompts" / "hpsv3.txt"
REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"  # the token that is scored, and the one that the image replaces
BEFORE = (  # Qwen2-VL's chat template around one image and the rubric
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"<|vision_start|>{IMAGE}<|vision_end|>"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
PIXELS = 256 * 28 * 28  # every image is resized to about this many
PATCH, MERGE, FRAMES = 14, 2, 2  # pixels, patches per token and side, repetitions of a still image
RATIO = 200  # largest ratio of the sides
HEAD, UNUSED = "rm_head", "lm_head"
RENAMED = {"model": "model.language_model", "visual": "model.visual"}  # transformers 4.45's names -> today's


class HPSv3(Evaluator):
    """HPSv3. ``weights``: a hub id, a folder with HPSv3.safetensors, or that file; ``base``: Qwen2-VL's configuration.

    Scores are unbounded, mostly between -5 and 16. As a training reward, LeapAlign's margin is 13.5.
    """

    name: ClassVar[str] = "hpsv3"
    seconds_per_image: ClassVar[float | None] = 0.15
    gigabytes: ClassVar[float | None] = 15.5
    version: ClassVar[str] = "1.0-1"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("hpsv3", "mu"),)

    weights: str = "MizzenAI/HPSv3"
    revision: str | None = None
    base: str = "Qwen/Qwen2-VL-7B-Instruct"  # a hub id or a folder; its weights are not read
    base_revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on GPUs, as the package, else float32
    engine: Literal["alignbench", "official"] = "alignbench"  # official: for tables only, without gradient

    @property
    def differentiable(self) -> bool:  # type: ignore[override]  # depends on a setting here
        return self.engine == "alignbench"

    def requirements(self) -> list[Requirement]:
        files = [*BASE_FILES, *OFFICIAL_FILES] if self.engine == "official" else BASE_FILES
        return [
            weights.requirement(self.base, "hpsv3.base", revision=self.base_revision, files=files),
            weights.requirement(self.weights, "hpsv3.weights", revision=self.revision, files=[CHECKPOINT]),
        ]

    @cached_property
    def checkpoint(self) -> Path:
        """The weight file; UserError if it cannot be found."""
        path = self.requirements()[1].path
        return path / CHECKPOINT if path.is_dir() else path

    @cached_property
    def base_folder(self) -> Path:
        """Folder of Qwen2-VL's configuration and tokenizer; UserError if it cannot be found."""
        return self.requirements()[0].path

    def files(self) -> list[Path]:
        base = weights.check([self.base_folder / name for name in BASE_FILES], "hpsv3.base")
        return weights.check([self.checkpoint], "hpsv3.weights") + base

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a prompt with one of the rubric's tokens, which would change the question."""
        for prompt in prompts:
            if token := next((token for token in (REWARD, IMAGE) if token in prompt.text), None):
                raise UserError(f"hpsv3: the prompt '{prompt.text[:60]}' holds {token}, a token of HPSv3's own rubric")

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: mu, after the official preprocessing."""

        def batch(images: Sequence[Image], prompts: Sequence[Prompt]) -> Tensor:
            return self._mu([to_tensor(_resized(image.convert("RGB"))).to(device()) for image in images], prompts)

        self.check(prompts)
        if self.engine == "official":
            settings = {"base": self.base_folder, "dtype": self._dtype, "batch": 1, "differentiable": False}
            return official.score("hpsv3", self.metrics[0].name, self.checkpoint, images, prompts, **settings)
        return in_batches(batch, images, prompts, self.metrics[0].name)

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) mu; differentiable, since resized in floats, not in 8 bits."""
        official.refuse_reward(self.name, self.engine)
        return self._mu(list(_resized(check_range(pixels).float())), prompts)

    def _mu(self, images: Sequence[Tensor], prompts: Sequence[Prompt]) -> Tensor:
        """Map resized (3, h, w) images to (B,) scores; padding on the right has no effect on causal states."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        model = self._model.to(images[0].device)
        grids = [[1, image.shape[1] // PATCH, image.shape[2] // PATCH] for image in images]
        texts = [self._tokens(prompt.text, grid) for prompt, grid in zip(prompts, grids, strict=True)]
        ids = pad_sequence(texts, batch_first=True, padding_value=self._pad).to(images[0].device)
        lengths = torch.tensor([[len(text)] for text in texts], device=ids.device)
        positions = torch.arange(ids.shape[1], device=ids.device)
        states = model["model"](
            input_ids=ids,
            attention_mask=(positions < lengths).long(),
            position_ids=positions.expand(3, *ids.shape),
            pixel_values=torch.cat([patches(image) for image in images]),
            image_grid_thw=torch.tensor(grids, device=ids.device),
            use_cache=False,
        ).last_hidden_state
        return model[HEAD](states[ids == self._reward_id].float())[:, 0]

    def _tokens(self, text: str, grid: Sequence[int]) -> Tensor:
        """Return the ids of chat, rubric and prompt, with one image token per merged patch."""
        import torch

        if text not in self._texts:
            before, _, after = chat(text).partition(IMAGE)
            self._texts[text] = self._tokenizer(before)["input_ids"], self._tokenizer(after)["input_ids"]
        first, last = self._texts[text]
        return torch.tensor([*first, *[self._image_id] * (math.prod(grid) // MERGE**2), *last])

    @cached_property
    def _texts(self) -> dict[str, tuple[list[int], list[int]]]:
        return {}

    @cached_property
    def _dtype(self) -> str:
        automatic = "bfloat16" if device().type == "cuda" else "float32"
        return automatic if self.dtype == "auto" else self.dtype

    @cached_property
    def _tokenizer(self) -> Any:
        """Qwen2-VL's tokenizer, with the token that HPSv3 appends to its vocabulary."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base_folder, local_files_only=True)
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
        return tokenizer

    @cached_property
    def _reward_id(self) -> int:
        return self._tokenizer.convert_tokens_to_ids(REWARD)

    @cached_property
    def _image_id(self) -> int:
        return self._tokenizer.convert_tokens_to_ids(IMAGE)

    @cached_property
    def _pad(self) -> int:
        return self._tokenizer.pad_token_id

    @cached_property
    def _model(self) -> Any:
        import torch
        from safetensors.torch import load_file

        self.files()
        state = _renamed(load_file(self.checkpoint), getattr(torch, self._dtype))
        words = len(state.get("model.language_model.embed_tokens.weight", ()))
        if len(self._tokenizer) != words:
            what = f"has embeddings for {words} tokens, but the tokenizer of hpsv3.base has {len(self._tokenizer)}"
            raise UserError(f"hpsv3.weights: {self.checkpoint} {what}; choose base: Qwen/Qwen2-VL-7B-Instruct")
        model = _empty(self.base_folder, words)
        weights.fill(model, state, self.checkpoint, "hpsv3.weights", assign=True)
        for name, buffer in model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(buffer.bfloat16())
        return model.eval().requires_grad_(False)


def chat(text: str) -> str:
    """Return the model's input: Qwen2-VL's chat around the image and the rubric for the prompt ``text``."""
    return BEFORE + RUBRIC.read_text(encoding="utf-8").replace("{text_prompt}", text) + AFTER


def _resized(image: Any) -> Any:
    """Resize an image, or a batch of pixels, as the package does: to sides of whole tokens, about PIXELS in all."""
    from PIL.Image import Image, Resampling
    from torchvision.transforms.functional import InterpolationMode as Mode
    from torchvision.transforms.functional import resize

    if isinstance(image, Image):
        height, width = smart_size(image.height, image.width)
        return image.resize((width, height), Resampling.BICUBIC)
    return resize(image, list(smart_size(*image.shape[-2:])), Mode.BICUBIC, antialias=True)


def smart_size(height: int, width: int) -> tuple[int, int]:
    """Return the sides of Qwen's smart_resize for a fixed number of pixels: rounded, and scaled if that misses it.

    Raise ValueError for sides that differ too much, as the package does.
    """
    if max(height, width) > RATIO * min(height, width):
        raise ValueError(f"hpsv3: an image of {width} x {height} is too narrow; its sides may differ {RATIO}-fold")
    side = PATCH * MERGE
    rounded = [max(side, round(length / side) * side) for length in (height, width)]
    scale = math.sqrt(height * width / PIXELS)
    if math.prod(rounded) > PIXELS:
        rounded = [math.floor(length / scale / side) * side for length in (height, width)]
    elif math.prod(rounded) < PIXELS:
        scale = math.sqrt(PIXELS / (height * width))
        rounded = [math.ceil(length * scale / side) * side for length in (height, width)]
    return rounded[0], rounded[1]


def patches(image: Tensor) -> Tensor:
    """Map (3, h, w) in [0, 1] to (n, 3 * FRAMES * PATCH^2), normalised; the patches of a token are adjacent."""
    from torchvision.transforms.functional import normalize

    height, width = (length // (PATCH * MERGE) for length in image.shape[1:])
    blocks = normalize(image, MEAN, STD).reshape(3, height, MERGE, PATCH, width, MERGE, PATCH)
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5).expand(-1, -1, -1, -1, -1, FRAMES, -1, -1)
    return blocks.reshape(height * width * MERGE**2, -1)


def _renamed(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the checkpoint under today's names, in ``dtype`` except for the head, without unused tensors."""
    renamed = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part != UNUSED:
            renamed[f"{RENAMED.get(part, part)}.{rest}"] = tensor.float() if part == HEAD else tensor.to(dtype)
    return renamed


def _empty(base: Path, words: int) -> Any:
    """Return the model without weights: Qwen2-VL with ``words`` token embeddings, and a head of the package's shape."""
    from accelerate import init_empty_weights
    from torch.nn import Dropout, Linear, ModuleDict, ReLU, Sequential
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config: Any = Qwen2VLConfig.from_pretrained(base, local_files_only=True)
    config.text_config.vocab_size = words
    width = config.text_config.hidden_size
    with init_empty_weights():
        model = Qwen2VLModel(config)
        head = Sequential(Linear(width, 1024), ReLU(), Dropout(0.05), Linear(1024, 16), ReLU(), Linear(16, 2))
    return ModuleDict({"model": model, HEAD: head})
