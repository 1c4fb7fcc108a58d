"""SiT (class-conditional ImageNet) as a Flow, from its official checkpoint.

Latents are packed: (B, tokens, channels), fp32. For a 256 px image that is (B, 256, 16). SiT counts time from noise
(0) to image (1) and predicts image - noise, so v(x, t) = -network(x, 1 - t). Guidance, the checkpoint's layout and the
autoencoder (sd-vae-ft-mse, scaled by 0.18215) follow github.com/willisma/SiT at a87098c3: models.py, download.py and
sample.py; time and sign follow its transport/. Departures:
1. N steps are N evaluations on an Euler grid. The official ``num_steps`` counts grid points, one more than intervals,
   and the official default is the adaptive dopri5.
2. The branches of guidance are two calls rather than one with twice the batch.
3. In channels that guidance leaves alone the velocity is v_neg + (v_pos - v_neg): v_pos up to rounding.
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
from alignbench.backends.pipeline import GuidedBackend, Pipeline, PipelineFlow, PromptEncoder, pack, unpack
from alignbench.config import Requirement, UserError, read_text
from alignbench.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alignbench.flow import Cond

CHECKPOINT = "SiT-XL-2-256x256.pt"
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # by the width of XL, L, B and S: checkpoints do not say
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
FETCH = (
    "git clone https://github.com/willisma/SiT && cd SiT && "
    f"""python -c "import download; download.find_model('{CHECKPOINT}')\""""
)
PROMPT = re.compile(r"(?:class )?([0-9]+)")
Shapes = dict[str, tuple[int, ...]]


class SiT(GuidedBackend):
    """SiT-XL/2, by its checkpoint; every prompt is an ImageNet class. ``guidance``: for training only."""

    name: ClassVar[str] = "sit"
    pipeline: ClassVar[str] = "SiTPipeline"  # none of diffusers'
    models: ClassVar[tuple[str, ...]] = ("transformer", "vae")
    published: ClassVar = {CHECKPOINT: SIT_XL_2}

    model: str = CHECKPOINT  # or that of another SiT of patch size 2; or a folder or hub id with a file of this name
    vae: str = "stabilityai/sd-vae-ft-mse"  # or -ema; or a folder
    classes: str | None = None  # a text file, one class name per line from class 0: prompts may then be names
    heads: int | None = None  # attention heads; None: as in the official models of this width
    size: int = 256  # pixels, square: must be the checkpoint's
    guidance: float = 4.0  # classifier-free if above 1; the value of sample.py
    guided_channels: Literal[3, 4] = 3  # of a latent's 4; 3 is the official default, and reproduces its numbers
    lora_targets: tuple[str, ...] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def requirements(self) -> list[Requirement]:
        return [self._checkpoint, weights.requirement(self.vae, "backend.vae", files=VAE_FILES)]

    @property
    def _checkpoint(self) -> Requirement:
        """The requirement for the file or its folder, with the official command that fetches it."""
        if Path(self.model).name == CHECKPOINT and not Path(self.model).expanduser().exists():
            text = f"backend.model: there is no file '{self.model}'; fetch it once with `{FETCH}`"
            note = "it is then in SiT/pretrained_models; set backend.model to its path"
            return Requirement(CHECKPOINT, text, FETCH, note)
        return weights.requirement(self.model, "backend.model", revision=self.revision)

    @cached_property
    def checkpoint(self) -> Path:
        """The path of the file. UserError, with the official command that fetches it, if there is none."""
        place = self._checkpoint.path
        return place / CHECKPOINT if place.is_dir() else place

    @cached_property
    def vae_folder(self) -> Path:
        return self.requirements()[1].path

    def files(self) -> list[Path]:
        """Return every file that determines the model, names and shapes checked. UserError for the first bad one.

        Unlike for pipelines this needs torch, which alone can read the checkpoint's list of tensors.
        """
        check_attention(self.attention, self.name, self.dispatches)
        if self.embeddings == "stored":
            raise UserError("backend.embeddings: sit has no text encoder to leave out; choose computed")
        paths = weights.check([self.checkpoint], "backend.model") + weights.model_files(self.vae_folder, "backend.vae")
        config = self.read("transformer")
        self._check_shapes(expected_shapes(config))
        if (channels := self.read("vae").get("latent_channels")) != config["channels"]:
            what = f"{self.vae_folder} has latents of {channels} channels, and the checkpoint {config['channels']}"
            raise UserError(f"backend.vae: {what}; choose stabilityai/sd-vae-ft-mse or -ema")
        self.check_size(self.size, "backend.size")
        return [*paths, Path(self.classes).expanduser()] if self.classes and self.names else paths

    def check_complete(self) -> None:
        """Raise UserError unless the autoencoder has all its weights; ``files`` has compared the network's."""
        weights.check_complete("diffusers", "AutoencoderKL", self.vae_folder, "backend.vae")

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the network's linear layers by name."""
        linears = SiTTransformer.read(self.read("transformer")).linears()
        return {linear.name: (linear.n_out, linear.n_in) for linear in linears if linear.name != "x_embedder.proj"}

    def check_size(self, size: int, where: str) -> None:
        """Raise UserError unless the checkpoint has the positions of this size."""
        if size != (own := self.read("transformer")["side"] * self.patch):
            raise UserError(f"{where}: {size} pixels; this checkpoint has positions for {own} only")

    def read(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """Return the configuration of a part; the network's is inferred from its tensors' shapes."""
        if part == "transformer":
            return infer_config(self.shapes, self.heads, f"backend.model: {self.checkpoint}")
        path = self.vae_folder / file
        weights.check([path], "backend.vae")
        return json.loads(path.read_text())

    @property
    def cost_model(self) -> Model | None:
        """Formulas for plans, as for other backends; a file with the official name is known before it is fetched."""
        return super().cost_model or (Model.read(SIT_XL_2) if Path(self.model).name == CHECKPOINT else None)

    @property
    def text_tokens(self) -> int:
        """Tokens per prompt: none, as a class is not a sequence."""
        return 0

    # -- the checkpoint

    def state(self, device: str = "cpu") -> dict[str, Tensor]:
        """Return the checkpoint's tensors by name, its "ema" if train.py wrote it. On "meta" they are shapes alone."""
        import torch

        with torch.serialization.safe_globals([Namespace]):  # train.py's arguments: plain data
            content = weights.load(self.checkpoint, "backend.model", device)
        state = content.get("ema", content) if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise UserError(f"backend.model: {self.checkpoint} does not hold tensors by name; {self._needs}")
        return dict(state)

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the checkpoint's tensors by name. UserError for a file that cannot be a SiT's."""
        path = self.checkpoint
        if not path.is_file():
            raise UserError(f"backend.model: {path} is missing; {self._needs}")
        if path.name.startswith("DiT"):  # its tensors have the same names and shapes
            raise UserError(f"backend.model: {path}: a DiT predicts noise; {self._needs}")
        return {name: tuple(tensor.shape) for name, tensor in self.state("meta").items()}

    @property
    def _needs(self) -> str:
        return f"{self.name} needs a SiT of patch size 2, as {CHECKPOINT}"

    def _check_shapes(self, wanted: Shapes) -> None:
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
        """Names of the classes; [] without a file of them."""
        if self.classes is None:
            return []
        path = Path(self.classes).expanduser()
        names = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
        count = self.read("transformer")["classes"]
        if len(names) != count:
            raise UserError(f"backend.classes: {path} has {len(names)} lines, and the checkpoint {count} classes")
        return names

    def label(self, text: str) -> int:
        """Return the class that a prompt names; for the empty prompt the last index, no class. UserError otherwise."""
        count = self.read("transformer")["classes"]
        if not text:
            return count
        if matches := [i for i, name in enumerate(self.names) if name == text]:
            if len(matches) > 1:
                indices = " and ".join(map(str, matches))
                raise UserError(f"{text!r} is the name of the classes {indices}; give the index")
            return matches[0]
        number = PROMPT.fullmatch(text)
        if number and int(number[1]) < count:
            return int(number[1])
        near = [f"; did you mean {name!r}?" for name in difflib.get_close_matches(text, self.names, n=1)]
        names = f"a name in {self.classes}" if self.names else "a name in the file backend.classes"
        forms = f"write 0 to {count - 1}, alone or after 'class', or {names}"
        raise UserError(f"{text!r} is not a class of this model; {forms}{''.join(near)}")

    def check_prompts(self, prompts: Sequence[Prompt], where: str) -> None:
        """Raise UserError (``where:number``) for the first prompt that does not name a class."""
        for number, prompt in enumerate(prompts, 1):
            try:
                self.label(prompt.text)
            except UserError as error:
                raise UserError(f"{where}:{number}: {error}") from None

    # -- the model

    def text(self, pipeline: Pipeline, device: torch.device) -> SiTPromptEncoder:
        return SiTPromptEncoder(self, device)

    def flow(self, pipeline: Pipeline, text: PromptEncoder, device: torch.device) -> SiTFlow:
        return SiTFlow(pipeline, self, text, device)

    def _pipeline(self, without: Sequence[str] = ()) -> Pipeline:
        import torch
        from diffusers import AutoencoderKL

        from alignbench.backends.sit_network import SiTPipeline

        frozen = getattr(torch, self.dtype)
        transformer = self._network(torch.float32 if self.tune == "full" else frozen)
        with weights.quiet():
            vae = AutoencoderKL.from_pretrained(self.vae_folder, dtype=frozen, local_files_only=True)
        return SiTPipeline(transformer, vae)

    def base(self, device: torch.device) -> Network:
        """Return the untrained network, read from the checkpoint again."""
        import torch

        return self._network(getattr(torch, self.dtype)).to(device).requires_grad_(False).eval()


class SiTFlow(PipelineFlow):
    """A loaded SiT as a ``Flow``."""

    @property
    def scale(self) -> float | Tensor:
        """The guidance per token channel, 1 where it has no effect. A token holds its patch channel by channel."""
        import torch

        channels, guided = self.transformer.config.channels, self._settings.guided_channels
        factors = [self.guidance if channel < guided else 1.0 for channel in range(channels) for _ in range(4)]
        return torch.tensor(factors, device=self.device)

    def _evaluate(self, network: Network, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        label = cond.tensors["class"].argmax(-1)
        return -pack(network(unpack(x, self.grid), 1 - time, label))

    def sigmas(self, steps: int) -> Tensor:
        """Return the official samplers' grid, linear and unshifted."""
        import torch

        return torch.linspace(1, 0, steps + 1)

    def noise(self, n: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return n packed latents ~ N(0, I), sample i drawn on the CPU from ``generators[i]``."""
        import torch

        shape = self.transformer.config.channels, 2 * self.grid, 2 * self.grid
        return pack(torch.stack([torch.randn(shape, generator=generators[i]) for i in range(n)])).to(self.device)

    def decode(self, x0: Tensor) -> Tensor:
        """Decode packed latents to pixels (B, 3, size, size) in [0, 1], fp32, differentiable."""
        return self._pixels(unpack(x0, self.grid) / self.vae.config.scaling_factor)


class SiTPromptEncoder(PromptEncoder):
    """Encoder of a class as one-hot vector "class" (classes + 1), whose last entry means no class.

    It is not the index, because networks that a method trains beside the flow read it too.
    """

    def __init__(self, settings: SiT, device: torch.device) -> None:
        super().__init__(device)
        self.settings = settings

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        import torch

        count = self.settings.read("transformer")["classes"] + 1
        return {"class": torch.eye(count)[self.settings.label(prompt)]}


def infer_config(shapes: Shapes, heads: int | None, where: str) -> dict[str, Any]:
    """Return the network's configuration by its tensors' shapes. UserError unless it is a SiT of patch size 2."""
    try:
        width, channels, *patch = shapes["x_embedder.proj.weight"]
        out, tokens = shapes["final_layer.linear.weight"][0], shapes["pos_embed"][1]
        classes = shapes["y_embedder.embedding_table.weight"][0] - 1
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where} is not a checkpoint of SiT: {error} is missing or of another kind") from None
    if patch != [2, 2]:
        raise UserError(f"{where} is a SiT of patch size {patch[0]}; only 2 is supported")
    heads = HEADS.get(width) if heads is None else heads
    if heads is None or width % heads:
        raise UserError(f"{where}: the number of heads for {width} channels is unknown; set backend.heads")
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


def expected_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return name and shape of every tensor of a network with this configuration."""
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
