"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does the picture hold what the prompt says, by an object detector.

The verification is the official benchmark's ``evaluation/evaluate_images.py``, as pure functions over detections. The
detector is a part: the exact one of the shapes world, or the official Mask2Former, whose objects CLIP ViT-L/14 names
the colours of. ``geneval_strict``, beside it, also forbids what was not asked for, because the official rule can be
raised by adding objects: anything else in the shapes world, further objects of the classes asked for in photographs.

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
POSITION_THRESHOLD = 0.1  # of the summed box sizes: how far apart counts as apart
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GREY = "#999"  # around an object whose colour is looked at
URL = (
    "https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"
)


class Detection(Protocol):
    """One object: class label, colour name (or None), box (left, top, right, bottom) in pixels, confidence."""

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
    """GenEval's verification. ``detector``: "shapes", or mmdet's Mask2Former: its .pth file, its folder or a hub id."""

    name: ClassVar[str] = "geneval"
    seconds_per_image: ClassVar[float | None] = 0.2
    gigabytes: ClassVar[float | None] = 2.0
    version: ClassVar[str] = "1"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("geneval", "fraction", by_task=True),
        Metric("geneval_strict", "fraction", by_task=True),
    )

    detector: str  # no default: the detector decides what the number means
    revision: str | None = None  # of a detector on the hub
    clip: str = "openai/clip-vit-large-patch14"  # names colours for Mask2Former; a hub id or a folder
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
        """Mask2Former's weight file. UserError if there is none."""
        path = self._detector.path
        found = sorted(path.glob("*.pth")) if path.is_dir() else [path]
        if len(found) != 1:
            raise UserError(
                f"geneval.detector: {path} has {len(found)} .pth files instead of one; name the file itself"
            )
        return found[0]

    @cached_property
    def clip_folder(self) -> Path:
        """Where the CLIPModel lies. UserError if nowhere."""
        return self.requirements()[1].path

    def files(self) -> list[Path]:
        if self.detector == "shapes":
            return []
        found = weights.check([self.checkpoint], "geneval.detector")
        found += weights.model_files(self.clip_folder, "geneval.clip")
        _check_activation(self.clip_folder / "config.json")
        return sorted({*found, *processor_files(self.clip_folder, "geneval.clip")})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt must carry its GenEval line."""
        for prompt in prompts:
            _metadata(prompt)

    def score(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row per image: 1.0 if the picture is right, else 0.0, by the official and by the strict rule."""
        import pandas as pd

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        self.check(prompts)
        rows = [self._verdicts(_upright(image), _metadata(prompt)) for image, prompt in zip(images, prompts)]
        return pd.DataFrame(rows, columns=[metric.name for metric in self.metrics], dtype="float64")

    def probe(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> pd.DataFrame:
        """With Mask2Former: its highest scores in each image, and the image's cosines with COLORS (of a dog)."""
        import pandas as pd

        if self.detector == "shapes":
            return super().probe(images, prompts)
        return pd.DataFrame([self._seen(_upright(image)) for image in images])

    def _seen(self, image: Image) -> dict[str, float]:
        import numpy as np
        import torch

        highest = sorted((found.score for found in self._mask2former.detect(np.asarray(image))), reverse=True)[:3]
        with torch.no_grad():
            feature = self._colors.model.images(self._colors.prepare(image)[None].to(device()))[0]
        cosines = (self._colors.classifier("dog").to(feature.device) @ feature).tolist()
        return dict(zip(("first", "second", "third", *COLORS), (*highest, *cosines)))

    def reward(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> (B,) of 0.0 and 1.0 by the official rule. Not differentiable."""
        verdicts = [self._verdicts(to_pil(image), _metadata(prompt))[0] for image, prompt in zip(pixels, prompts)]
        return pixels.new_tensor(verdicts)

    def _verdicts(self, image: Image, metadata: dict[str, Any]) -> tuple[float, float]:
        """By the official and by the strict rule."""
        import numpy as np

        if self.detector == "shapes":
            from alignbench.shapes import checker

            objects = group(checker.detect(np.asarray(image)), metadata["tag"])
            return float(correct(objects, metadata)), float(checker.strict(np.asarray(image), metadata))
        objects = group(self._mask2former.detect(np.asarray(image), above=THRESHOLD), metadata["tag"])
        right = correct(objects, metadata, lambda found: self._colors.name(image, found))
        return float(right), float(right and exact(objects, metadata))

    @cached_property
    def _mask2former(self) -> Mask2Former:
        self.files()
        return Mask2Former(self.checkpoint, "geneval.detector")

    @cached_property
    def _colors(self) -> Colors:
        return Colors(Clip(self.clip_folder, self.clip_folder, "geneval.clip"))


def _upright(image: Image) -> Image:
    """RGB, turned as its EXIF data say: as the official script and mmdet read files."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


def _check_activation(config: Path) -> None:
    """UserError unless the CLIPModel has QuickGELU, as OpenAI's have: with GELU their weights give other colours."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    for part in ("text_config", "vision_config"):
        used = settings.get(part, {}).get("hidden_act", "quick_gelu")
        if used != "quick_gelu":
            raise UserError(f"geneval.clip: {config}: {part}.hidden_act is '{used}'; OpenAI's CLIP has 'quick_gelu'")


def _metadata(prompt: Prompt) -> dict[str, Any]:
    """The prompt's GenEval line. UserError if it has none."""
    if not prompt.metadata or "include" not in prompt.metadata or "tag" not in prompt.metadata:
        raise UserError(
            f"geneval: prompt '{prompt.text}' has no GenEval metadata (tag, include); use a GenEval prompt set"
        )
    return prompt.metadata


# -- colours ----------------------------------------------------------------------------------------------------------


class Colors:
    """Names an object's colour by ``model``, an OpenAI CLIP."""

    def __init__(self, model: Clip) -> None:
        self.model = model
        self._classifiers: dict[str, Tensor] = {}

    def name(self, image: Image, found: Any) -> str:
        """The one of COLORS whose sentences are nearest to the object, cut out of the image."""
        import torch

        with torch.no_grad():
            feature = self.model.images(self.prepare(cut_out(image, found))[None].to(device()))[0]
        return COLORS[int((self.classifier(found.label).to(feature.device) @ feature).argmax())]

    def prepare(self, image: Image) -> Tensor:
        """(3, S, S) as open_clip prepares it. The hub's processor crops up to one pixel beside that."""
        from torchvision.transforms.functional import InterpolationMode as Mode
        from torchvision.transforms.functional import center_crop, normalize, resize

        processor = self.model.image_processor
        side = processor.crop_size["height"]
        image = center_crop(resize(image, [side], Mode.BICUBIC, antialias=True), [side])
        return normalize(to_tensor(image), processor.image_mean, processor.image_std)

    def classifier(self, label: str) -> Tensor:
        """(10, D) unit features: a row per colour, the mean over TEMPLATES."""
        import torch

        if label not in self._classifiers:
            sentences = [[t.format(color=color, label=label) for t in TEMPLATES] for color in COLORS]
            means = torch.stack([torch.stack([self.model.text(s) for s in row]).mean(0) for row in sentences])
            self._classifiers[label] = means / means.norm(dim=-1, keepdim=True)
        return self._classifiers[label]


def cut_out(image: Image, found: Any) -> Image:
    """The object inside its mask, everything else grey, cropped to its box."""
    from PIL import Image

    blank = Image.new("RGB", image.size, GREY)
    return Image.composite(image, blank, Image.fromarray(found.mask)).crop(tuple(round(edge) for edge in found.box))


# -- the official verification ----------------------------------------------------------------------------------------


def group(detections: Iterable[Detection], tag: str) -> Objects:
    """Detections above the threshold of task ``tag``, by class, most confident first, at most 16 of each."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda detection: -detection.score):
        if found.score > threshold and len(objects.setdefault(found.label, [])) < MAX_OBJECTS:
            objects[found.label].append(found)
    return objects


def correct(
    objects: Objects, metadata: Mapping[str, Any], color_of: Callable[[Detection], str | None] = lambda d: d.color
) -> bool:
    """Whether every include clause holds and no exclude clause is violated."""
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        matched.append(_match(objects, clause, matched, color_of))
    excluded = metadata.get("exclude", ())
    extra = any(len(objects.get(clause["class"], ())) >= clause["count"] for clause in excluded)
    return not extra and all(found is not None for found in matched)


def exact(objects: Objects, metadata: Mapping[str, Any]) -> bool:
    """Whether every class asked for appears exactly as often as asked."""
    wanted: Counter[str] = Counter()
    for clause in metadata["include"]:
        wanted[clause["class"]] += clause["count"]
    return all(len(objects.get(label, ())) == count for label, count in wanted.items())


def _match(
    objects: Objects,
    clause: Mapping[str, Any],
    earlier: Sequence[Sequence[Detection] | None],
    color_of: Callable[[Detection], str | None],
) -> Sequence[Detection] | None:
    """The clause's ``count`` most confident objects, or None if they are too few, of other colours or elsewhere."""
    found = objects.get(clause["class"], ())[: clause["count"]]
    if len(found) < clause["count"]:
        return None
    if "color" in clause and [color_of(each) for each in found].count(clause["color"]) < clause["count"]:
        return None
    if "position" in clause:
        relation, target = clause["position"]
        others = earlier[target]
        if others is None or not all(relation in relations(a.box, b.box) for a in found for b in others):
            return None
    return found


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box ``a`` lies seen from box ``b``: left of, right of, above, below; none where they are too close.

    The distance of the centres less a margin, divided by the *whole* distance: the official rule, in both places.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    reach = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    revised = [math.copysign(max(abs(o) - POSITION_THRESHOLD * r, 0), o) for o, r in zip(offset, reach)]
    if all(abs(r) < 1e-3 for r in revised):
        return set()
    dx, dy = (r / math.hypot(*offset) for r in revised)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def overall(scores: Mapping[str, Iterable[float]]) -> float:
    """GenEval's headline from scores by task: the unweighted mean of the task means, not the mean over images."""
    means = [sum(values) / len(values) for values in map(list, scores.values())]
    return sum(means) / len(means)
