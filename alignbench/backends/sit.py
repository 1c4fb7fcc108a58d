"""SiT (class-conditional ImageNet) as a Flow, from its official checkpoint.

Latents are packed: (B, tokens, channels), fp32. For a 256 px image that is (B, 256, 16). SiT counts time from noise
(0) to image (1) and predicts image - noise, so v(x, t) = -network(x, 1 - t). What guidance does, the checkpoint's
layout, and that the autoencoder is sd-vae-ft-mse, with 0.18215 in front of it: github.com/willisma/SiT, models.py,
download.py and sample.py at a87098c3; time and sign: transport/ there. Departures:
1. N steps are N evaluations of an Euler grid. The official ``num_steps`` are its points, one more than its intervals;
   its default is the adaptive dopri5.
2. The branches of guidance are two calls, not one of twice the batch.
3. Where guidance leaves a channel alone, its velocity is v_neg + (v_pos - v_neg): v_pos up to rounding.
"""

from __future__ import annotations

import difflib
import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alignbench import weights
from alignbench.backends.cost.formulas import Model, SiTTransformer
from alignbench.backends.cost.published_configs import SIT_XL_2
from alignbench.backends.kernels import Network, check_attention
from alignbench.backends.pipeline import GuidedBackend, Pipeline, PipelineFlow, Text, pack, unpack
from alignbench.config import Requirement, UserError, read_text
from alignbench.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alignbench.flow import Cond

CHECKPOINT = "SiT-XL-2-256x256.pt"
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # by the width, of XL, L, B and S: no checkpoint says
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
FETCH = (
    "git clone https://github.com/willisma/SiT && cd SiT && "
    f"""python -c "import download; download.find_model('{CHECKPOINT}')\""""
)
PROMPT = re.compile(r"(?:class )?([0-9]+)")
Shapes = dict[str, tuple[int, ...]]


class SiT(GuidedBackend):
    """SiT-XL/2 by its checkpoint; every prompt is an ImageNet class. ``guidance``: of training, not evaluation."""

    name: ClassVar[str] = "sit"
    models: ClassVar[tuple[str, ...]] = ("transformer", "vae")
    published: ClassVar = {CHECKPOINT: SIT_XL_2}

    model: str = CHECKPOINT  # or another patch-2 SiT's, or a folder or hub id with a file of this name
    vae: str = "stabilityai/sd-vae-ft-mse"  # or -ema; or a folder
    classes: str | None = None  # a text file, a class's name per line from class 0: prompts may then be names
    heads: int | None = None  # of attention; None: as many as the official models of this width have
    size: int = 256  # pixels, square: that of the checkpoint
    guidance: float = 4.0  # classifier-free, where above 1; sample.py's
    guided_channels: Literal[3, 4] = 3  # of a latent's 4; 3: the official default, kept to repeat its numbers
    lora_targets: tuple[str, ...] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def requirements(self) -> list[Requirement]:
        return [self._checkpoint, weights.requirement(self.vae, "backend.vae", files=VAE_FILES)]

    @property
    def _checkpoint(self) -> Requirement:
        """The file or its folder, with the official command that fetches it."""
        if Path(self.model).name == CHECKPOINT and not Path(self.model).expanduser().exists():
            text = f"backend.model: there is no file '{self.model}'; fetch it once with `{FETCH}`"
            note = "it is then in SiT/pretrained_models; set backend.model to its path"
            return Requirement(CHECKPOINT, text, FETCH, note)
        return weights.requirement(self.model, "backend.model", revision=self.revision)

    @cached_property
    def checkpoint(self) -> Path:
        """The file. UserError, with the official command that fetches it, if there is none."""
        place = self._checkpoint.path
        return place / CHECKPOINT if place.is_dir() else place

    @cached_property
    def vae_folder(self) -> Path:
        return self.requirements()[1].path

    def files(self) -> list[Path]:
        """Every file that determines the model, its tensors' names and shapes checked. UserError for the first bad one.

        Unlike those of pipelines, this needs torch: nothing else reads the checkpoint's list of tensors.
        """
        check_attention(self.attention, self.name, self.dispatches)
        if self.embeddings == "stored":
            raise UserError("backend.embeddings: sit has no text encoder that could be left out; choose computed")
        found = weights.check([self.checkpoint], "backend.model") + weights.model_files(self.vae_folder, "backend.vae")
        config = self.read("transformer")
        self._refuse_shapes(expected(config))
        if (channels := self.read("vae").get("latent_channels")) != config["channels"]:
            what = f"{self.vae_folder} has latents of {channels} channels, and the checkpoint {config['channels']}"
            raise UserError(f"backend.vae: {what}; choose stabilityai/sd-vae-ft-mse or -ema")
        self.check_size(self.size, "backend.size")
        return [*found, Path(self.classes).expanduser()] if self.classes and self.names else found

    def check_size(self, size: int, where: str) -> None:
        """UserError unless it is the size whose positions the checkpoint has."""
        if size != (own := self.read("transformer")["side"] * self.patch):
            raise UserError(f"{where}: {size} pixels; this checkpoint has positions for {own}, and for nothing else")

    def read(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The configuration of a part; the network's is read off its tensors' shapes."""
        if part == "transformer":
            return architecture(self.shapes, self.heads, f"backend.model: {self.checkpoint}")
        path = self.vae_folder / file
        weights.check([path], "backend.vae")
        return json.loads(path.read_text())

    @property
    def measures(self) -> Model | None:
        """For plans, as for other backends; a checkpoint of the official name is known wherever it will lie."""
        return super().measures or (Model.read(SIT_XL_2) if Path(self.model).name == CHECKPOINT else None)

    @property
    def text_tokens(self) -> int:
        """None: a class is no sequence."""
        return 0

    # -- the checkpoint

    def state(self, device: str = "cpu") -> dict[str, Tensor]:
        """Its tensors by name: those of the average ("ema") where it is train.py's. On "meta": shapes alone."""
        import torch

        with torch.serialization.safe_globals([Namespace]):  # train.py's arguments: plain data
            found = weights.load(self.checkpoint, "backend.model", device)
        state = found.get("ema", found) if isinstance(found, Mapping) else None
        if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise UserError(f"backend.model: {self.checkpoint} holds no tensors by name; {self._needs}")
        return dict(state)

    @cached_property
    def shapes(self) -> Shapes:
        path = self.checkpoint
        if not path.is_file():
            raise UserError(f"backend.model: {path} is missing; {self._needs}")
        if path.name.startswith("DiT"):  # the same names and shapes
            raise UserError(f"backend.model: {path}: a DiT predicts noise; {self._needs}")
        return {name: tuple(tensor.shape) for name, tensor in self.state("meta").items()}

    @property
    def _needs(self) -> str:
        return f"{self.name} needs a SiT of patch size 2, as {CHECKPOINT}"

    def _refuse_shapes(self, wanted: Shapes) -> None:
        wrong = {
            "missing": sorted(wanted.keys() - self.shapes.keys()),
            "unexpected": sorted(self.shapes.keys() - wanted.keys()),
            "of another shape": sorted(n for n in wanted.keys() & self.shapes.keys() if wanted[n] != self.shapes[n]),
        }
        for what, names in wrong.items():
            if names:
                more = f" and {len(names) - 1} more" * (len(names) > 1)
                raise UserError(f"backend.model: {self.checkpoint}: {what}: {names[0]}{more}; {self._needs}")

    def _network(self, dtype: torch.dtype) -> Network:
        import torch

        from alignbench.backends.sit_network import SiTNetwork

        with torch.device("meta"):
            network = SiTNetwork(**{k: v for k, v in self.read("transformer").items() if k != "_class_name"})
        state = {name: tensor.to(dtype) for name, tensor in self.state().items()}
        weights.fill(network, state, self.checkpoint, "backend.model", assign=True)
        return network

    # -- prompts

    @cached_property
    def names(self) -> list[str]:
        """Of the classes, if there is a file of them."""
        if self.classes is None:
            return []
        path = Path(self.classes).expanduser()
        names = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
        count = self.read("transformer")["classes"]
        if len(names) != count:
            raise UserError(f"backend.classes: {path} has {len(names)} lines, and the checkpoint {count} classes")
        return names

    def label(self, text: str) -> int:
        """The class that a prompt means; the empty prompt means none, whose index is the last. UserError otherwise."""
        count = self.read("transformer")["classes"]
        if not text:
            return count
        if meant := [i for i, name in enumerate(self.names) if name == text]:
            if len(meant) > 1:
                raise UserError(f"{text!r} is the name of the classes {' and '.join(map(str, meant))}; give the index")
            return meant[0]
        number = PROMPT.fullmatch(text)
        if number and int(number[1]) < count:
            return int(number[1])
        near = [f"; did you mean {name!r}?" for name in difflib.get_close_matches(text, self.names, n=1)]
        names = f"a name in {self.classes}" if self.names else "a name in the file backend.classes"
        forms = f"write 0 to {count - 1}, alone or after 'class', or {names}"
        raise UserError(f"{text!r} is no class of this model; {forms}{''.join(near)}")

    def check_prompts(self, prompts: Sequence[Prompt], where: str) -> None:
        """UserError (``where:number``) for the first prompt that means no class."""
        for number, prompt in enumerate(prompts, 1):
            try:
                self.label(prompt.text)
            except UserError as error:
                raise UserError(f"{where}:{number}: {error}") from None

    # -- the model

    def text(self, pipeline: Pipeline, device: torch.device) -> SiTText:
        return SiTText(self, device)

    def flow(self, pipeline: Pipeline, text: Text, device: torch.device) -> SiTFlow:
        return SiTFlow(pipeline, self, text, device)

    def _pipeline(self, without: Sequence[str] = ()) -> Pipeline:
        import torch
        from diffusers import AutoencoderKL

        from alignbench.backends.sit_network import Parts

        frozen = getattr(torch, self.dtype)
        transformer = self._network(torch.float32 if self.tune == "full" else frozen)
        with weights.quiet():
            vae = AutoencoderKL.from_pretrained(self.vae_folder, dtype=frozen, local_files_only=True)
        return Parts(transformer, vae)

    def base(self, device: torch.device) -> Network:
        """The untouched network, read again from the checkpoint."""
        import torch

        return self._network(getattr(torch, self.dtype)).to(device).requires_grad_(False).eval()


class SiTFlow(PipelineFlow):
    """A loaded SiT as a ``Flow``."""

    @property
    def scale(self) -> float | Tensor:
        """Of guidance: 1 for the channels that it leaves alone. A token holds its patch channel by channel."""
        import torch

        channels, guided = self.transformer.config.channels, self._settings.guided_channels
        parts = [self.guidance if channel < guided else 1.0 for channel in range(channels) for _ in range(4)]
        return torch.tensor(parts, device=self.device)

    def _evaluate(self, network: Network, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        label = cond.tensors["class"].argmax(-1)
        return -pack(network(unpack(x, self.grid), 1 - time, label))

    def sigmas(self, steps: int) -> Tensor:
        """The official samplers' grid, linear and not shifted."""
        import torch

        return torch.linspace(1, 0, steps + 1)

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """n packed latents ~ N(0, I), sample i from ``generators[i]``, on the CPU."""
        import torch

        shape = self.transformer.config.channels, 2 * self.grid, 2 * self.grid
        return pack(torch.stack([torch.randn(shape, generator=generators[i]) for i in range(n)])).to(self.device)

    def decode(self, x0: Tensor) -> Tensor:
        """Packed latents -> pixels (B, 3, size, size) in [0, 1], fp32, differentiable."""
        return self._pixels(unpack(x0, self.grid) / self.vae.config.scaling_factor)


class SiTText(Text):
    """A class as "class" (classes + 1): one at its index, at the last for no class, zero elsewhere.

    Not the index itself: networks that a method trains beside the flow read it too.
    """

    def __init__(self, settings: SiT, device: torch.device) -> None:
        super().__init__(device)
        self.settings = settings

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        import torch

        count = self.settings.read("transformer")["classes"] + 1
        return {"class": torch.eye(count)[self.settings.label(prompt)]}


def architecture(shapes: Shapes, heads: int | None, where: str) -> dict[str, Any]:
    """The network's configuration by its tensors' shapes. UserError if they are no SiT's of patch size 2."""
    try:
        width, channels, *patch = shapes["x_embedder.proj.weight"]
        out, tokens = shapes["final_layer.linear.weight"][0], shapes["pos_embed"][1]
        classes = shapes["y_embedder.embedding_table.weight"][0] - 1
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where} is no checkpoint of SiT: {error} is missing or of another kind") from None
    if patch != [2, 2]:
        raise UserError(f"{where} is a SiT of patch size {patch[0]}; only those of 2 are supported")
    heads = HEADS.get(width) if heads is None else heads
    if heads is None or width % heads:
        raise UserError(f"{where}: how many heads {width} channels have is not known; set backend.heads")
    return {
        "_class_name": "SiTNetwork",
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "width": width,
        "heads": heads,
        "side": round(tokens**0.5),
        "channels": channels,
        "classes": classes,
        "learn_sigma": out == 2 * 4 * channels,
    }


def expected(config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every tensor that a network of this configuration has."""
    width, channels = config["width"], config["channels"]
    shapes: Shapes = {}
    for linear in SiTTransformer.read(config).linears():
        shapes[f"{linear.name}.weight"] = (linear.n_out, linear.n_in)
        shapes[f"{linear.name}.bias"] = (linear.n_out,)
    return shapes | {
        "x_embedder.proj.weight": (width, channels, 2, 2),  # a convolution whose patches do not overlap
        "y_embedder.embedding_table.weight": (config["classes"] + 1, width),
        "pos_embed": (1, config["side"] ** 2, width),
    }
