"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): an object detector checks that an image shows what was asked for.

The verification is that of the official ``evaluation/evaluate_images.py``, as pure functions of detections. They come
from the exact checker of the shapes world, or from the official Mask2Former, with CLIP ViT-L/14 naming the colours.
``geneval_strict`` also forbids what was not asked for, since adding objects can raise the official score. Its rule
depends on the detector: `nothing_else` in the shapes world, `exact_counts` in photographs.

Departures from the official script, with Mask2Former:
1. fp32 everywhere; the official CLIP runs under fp16 autocast.
2. transformers instead of mmdet and open_clip: see mask2former.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from alignbench import weights
from alignbench.clip import HUB_FILES, Clip, processor_files
from alignbench.config import Missing, Requirement, UserError
from alignbench.evaluator import Evaluator, Metric, device, to_pil, to_tensor
from alignbench.evaluators.mask2former import Mask2Former
from alignbench.prompts.geneval import COLORS

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.prompts import Prompt

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection's score must exceed it
MAX_OBJECTS = 16  # per class
POSITION_THRESHOLD = 0.1  # share of the summed box sizes; closer objects have no relation
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GREY = "#999"  # replaces the surroundings of an object whose colour is to be named
URL = (
    "https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"
)


class Detection(Protocol):
    """Detected object: class label, colour name or None, box (left, top, right, bottom) in pixels, confidence."""

    @property
    def label(self) -> str: ...
    @property
    def color(self) -> str | None: ...
    @property
    def box(self) -> Sequence[float]: ...
    @property
    def score(self) -> float: ...


Objects = Mapping[str, Sequence[Detection]]


class GenEval(Evaluator):
    """GenEval's verification; ``detector`` is "shapes", or the .pth file, folder or hub id of mmdet's Mask2Former."""

    name: ClassVar[str] = "geneval"
    seconds_per_image: ClassVar[float | None] = 0.2
    gigabytes: ClassVar[float | None] = 2.0
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("geneval", "fraction", by_task=True),
        Metric("geneval_strict", "fraction", by_task=True),
    )

    detector: str  # without a default, because the score's meaning depends on it
    revision: str | None = None  # revision of a detector on the hub
    clip: str = "openai/clip-vit-large-patch14"  # names the colours for Mask2Former; a hub id or a folder
    clip_revision: str | None = None

    def requirements(self) -> list[Requirement]:
        if self.detector == "shapes":
            return []
        files = ["config.json", "model.safetensors", *HUB_FILES]
        clip = weights.requirement(self.clip, "geneval.clip", revision=self.clip_revision, files=files)
        return [self._detector, clip]

    @property
    def _detector(self) -> Requirement:
        """Mask2Former's weight file, or the folder that has it."""
        try:
            return weights.requirement(self.detector, "geneval.detector", revision=self.revision)
        except Missing as error:  # neither a path nor a hub id
            text = f"{error}, or 'shapes'; GenEval's own file: `curl -LO {URL}`"
            return Requirement(Path(URL).name, text, f"curl -LO {URL}")

    @cached_property
    def checkpoint(self) -> Path:
        """Mask2Former's weight file; UserError if it cannot be found."""
        path = self._detector.path
        files = sorted(path.glob("*.pth")) if path.is_dir() else [path]
        if len(files) != 1:
            raise UserError(
                f"geneval.detector: {path} has {len(files)} .pth files instead of one; name the file itself"
            )
        return files[0]

    @cached_property
    def clip_folder(self) -> Path:
        """Folder of the CLIPModel; UserError if it cannot be found."""
        return self.requirements()[1].path

    def files(self) -> list[Path]:
        if self.detector == "shapes":
            return []
        files = weights.check([self.checkpoint], "geneval.detector")
        files += weights.model_files(self.clip_folder, "geneval.clip")
        _check_activation(self.clip_folder / "config.json")
        return sorted({*files, *processor_files(self.clip_folder, "geneval.clip")})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError unless every prompt carries its GenEval metadata."""
        for prompt in prompts:
            _metadata(prompt)

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return one row per image: 1.0 if it is correct, else 0.0, by the official and by the strict rule."""
        import pandas as pd

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        self.check(prompts)
        rows = [self._verdicts(_upright(image), _metadata(prompt)) for image, prompt in zip(images, prompts)]
        return pd.DataFrame(rows, columns=[metric.name for metric in self.metrics], dtype="float64")

    def probe(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """Return Mask2Former's three highest scores in each image, and the image's cosines with COLORS (of a dog)."""
        import pandas as pd

        if self.detector == "shapes":
            return super().probe(images, prompts)
        return pd.DataFrame([self._probe_one(_upright(image)) for image in images])

    def _probe_one(self, image: Image) -> dict[str, float]:
        import numpy as np
        import torch

        highest = sorted((d.score for d in self._mask2former.detect(np.asarray(image))), reverse=True)[:3]
        with torch.no_grad():
            feature = self._colors.model.images(self._colors.prepare(image)[None].to(device()))[0]
        cosines = (self._colors.classifier("dog").to(feature.device) @ feature).tolist()
        return dict(zip(("first", "second", "third", *COLORS), (*highest, *cosines)))

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) pixels in [0, 1] to (B,) of 0.0 and 1.0 by the official rule; not differentiable."""
        verdicts = [self._verdicts(to_pil(image), _metadata(prompt))[0] for image, prompt in zip(pixels, prompts)]
        return pixels.new_tensor(verdicts)

    def _verdicts(self, image: Image, metadata: Mapping[str, Any]) -> tuple[bool, bool]:
        """Return the official and the strict verdict on an image."""
        import numpy as np

        if self.detector == "shapes":
            from alignbench.shapes import checker

            return self.judge_shapes(checker.detect(np.asarray(image)), metadata)
        objects = group(self._mask2former.detect(np.asarray(image), above=THRESHOLD), metadata["tag"])
        official = correct(objects, metadata, lambda detection: self._colors.name(image, detection))
        return official, official and exact_counts(objects, metadata)

    @staticmethod
    def judge_shapes(components: Sequence[Detection], metadata: Mapping[str, Any]) -> tuple[bool, bool]:
        """Return the official and the strict verdict on all components of an image of shapes, junk included."""
        official = correct(group(components, metadata["tag"]), metadata)
        return official, official and nothing_else(components, metadata)

    @cached_property
    def _mask2former(self) -> Mask2Former:
        self.files()
        return Mask2Former(self.checkpoint, "geneval.detector")

    @cached_property
    def _colors(self) -> Colors:
        return Colors(Clip(self.clip_folder, self.clip_folder, "geneval.clip"))


def _upright(image: Image) -> Image:
    """Return the image in RGB, rotated as its EXIF data say, as the official script and mmdet read files."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


def _check_activation(config: Path) -> None:
    """Raise UserError unless the CLIPModel has OpenAI's QuickGELU; with GELU the weights name other colours."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    for part in ("text_config", "vision_config"):
        activation = settings.get(part, {}).get("hidden_act", "quick_gelu")
        if activation != "quick_gelu":
            where = f"geneval.clip: {config}: {part}.hidden_act"
            raise UserError(f"{where} is '{activation}'; OpenAI's CLIP has 'quick_gelu'")


def _metadata(prompt: Prompt) -> dict[str, Any]:
    """Return the prompt's GenEval metadata; raise UserError if it has none."""
    if not prompt.metadata or "include" not in prompt.metadata or "tag" not in prompt.metadata:
        raise UserError(
            f"geneval: prompt '{prompt.text}' has no GenEval metadata (tag, include); use a GenEval prompt set"
        )
    return prompt.metadata


# -- colours ----------------------------------------------------------------------------------------------------------


class Colors:
    """Colour classifier of detected objects: zero-shot by ``model``, an OpenAI CLIP."""

    def __init__(self, model: Clip) -> None:
        self.model = model
        self._classifiers: dict[str, Tensor] = {}

    def name(self, image: Image, detection: Any) -> str:
        """Return the one of COLORS whose sentences are nearest to the object, cut out of the image."""
        import torch

        with torch.no_grad():
            feature = self.model.images(self.prepare(cut_out(image, detection))[None].to(device()))[0]
        return COLORS[int((self.classifier(detection.label).to(feature.device) @ feature).argmax())]

    def prepare(self, image: Image) -> Tensor:
        """Return (3, S, S) pixels, prepared as by open_clip; the hub's processor crops up to one pixel elsewhere."""
        from torchvision.transforms.functional import InterpolationMode as Mode
        from torchvision.transforms.functional import center_crop, normalize, resize

        processor = self.model.image_processor
        side = processor.crop_size["height"]
        image = center_crop(resize(image, [side], Mode.BICUBIC, antialias=True), [side])
        return normalize(to_tensor(image), processor.image_mean, processor.image_std)

    def classifier(self, label: str) -> Tensor:
        """Return (10, D) unit features: for each colour the mean over TEMPLATES."""
        import torch

        if label not in self._classifiers:
            sentences = [[t.format(color=color, label=label) for t in TEMPLATES] for color in COLORS]
            means = torch.stack([torch.stack([self.model.text(s) for s in row]).mean(0) for row in sentences])
            self._classifiers[label] = means / means.norm(dim=-1, keepdim=True)
        return self._classifiers[label]


def cut_out(image: Image, detection: Any) -> Image:
    """Return the image cropped to the object's box, with everything outside its mask grey."""
    from PIL import Image

    blank = Image.new("RGB", image.size, GREY)
    box = tuple(round(edge) for edge in detection.box)
    return Image.composite(image, blank, Image.fromarray(detection.mask)).crop(box)


# -- the official verification ----------------------------------------------------------------------------------------


def group(detections: Iterable[Detection], tag: str) -> Objects:
    """Return detections above the threshold of task ``tag`` by class, at most 16 of each, most confident first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold and len(objects.setdefault(detection.label, [])) < MAX_OBJECTS:
            objects[detection.label].append(detection)
    return objects


def correct(
    objects: Objects, metadata: Mapping[str, Any], color_of: Callable[[Detection], str | None] = lambda d: d.color
) -> bool:
    """Return the official verdict: whether every include clause holds and no exclude clause is violated."""
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        matched.append(_match(objects, clause, matched, color_of))
    excluded = metadata.get("exclude", ())
    extra = any(len(objects.get(clause["class"], ())) >= clause["count"] for clause in excluded)
    return not extra and all(match is not None for match in matched)


def exact_counts(objects: Objects, metadata: Mapping[str, Any]) -> bool:
    """Return whether each requested class appears exactly as often as requested; other classes are not looked at.

    This is the strict rule for photographs, which rightly show more than the prompt names: a table under the cup.
    """
    wanted: Counter[str] = Counter()
    for clause in metadata["include"]:
        wanted[clause["class"]] += clause["count"]
    return all(len(objects.get(label, ())) == count for label, count in wanted.items())


def nothing_else(components: Sequence[Detection], metadata: Mapping[str, Any]) -> bool:
    """Return whether the image has as many components as objects were requested, and each of them is an object.

    This is the strict rule of the shapes world, whose background is plain: it also forbids other classes, and junk.
    """
    wanted = sum(clause["count"] for clause in metadata["include"])
    return len(components) == wanted and all(component.score > THRESHOLD for component in components)


def _match(
    objects: Objects,
    clause: Mapping[str, Any],
    earlier: Sequence[Sequence[Detection] | None],
    color_of: Callable[[Detection], str | None],
) -> Sequence[Detection] | None:
    """Return the clause's ``count`` most confident objects, or None if too few, of another colour or misplaced."""
    match = objects.get(clause["class"], ())[: clause["count"]]
    if len(match) < clause["count"]:
        return None
    if "color" in clause and [color_of(detection) for detection in match].count(clause["color"]) < clause["count"]:
        return None
    if "position" in clause:
        relation, target = clause["position"]
        others = earlier[target]
        if others is None or not all(relation in relations(a.box, b.box) for a in match for b in others):
            return None
    return match


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Return how box ``a`` lies relative to box ``b``: left of, right of, above, below; empty if they are too close.

    As in the official rule, the centres' offset less a margin is divided by the *whole* distance.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    reach = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - POSITION_THRESHOLD * r, 0), o) for o, r in zip(offset, reach)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    dx, dy = (b / math.hypot(*offset) for b in beyond)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def overall(scores: Mapping[str, Iterable[float]]) -> float:
    """Return GenEval's headline number: the unweighted mean of the task means, not the mean over images."""
    means = [sum(values) / len(values) for values in map(list, scores.values())]
    return sum(means) / len(means)
