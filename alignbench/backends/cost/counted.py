"""The cost of a model, counted by torch: the default for backends whose model has no formulas (``formulas``).

The backend outlines its model on the meta device, without weights; torch's FlopCounterMode then counts one call of the
network and one of the decoder, at each size. For FLUX.1-dev the FLOPs equal those of the formulas to the last digit,
but take seconds, diffusers, and the model's configuration files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.backends.cost.formulas import FLASH_BACKWARD, is_target
from alignbench.config import Missing, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


class Outline(NamedTuple):
    """A model whose modules are on the meta device. ``network``: the part that is trained."""

    flow: Any  # a Flow, with ``at``
    network: nn.Module
    frozen: Sequence[nn.Module] = ()  # everything else that is loaded during training
    before: Sequence[nn.Module] = ()  # text encoders that are used before training alone

    @property
    def modules(self) -> list[nn.Module]:
        return [self.network, *self.frozen, *self.before]


class CallCost(NamedTuple):
    """The cost of one forward call for one sample: FLOPs, and bytes that autograd saves for the backward."""

    products: int  # FLOPs of matrix products and convolutions
    attention: int  # FLOPs of fused attention
    saved: int
    inputs: int  # of the checkpointed blocks, which is what checkpointing saves instead
    block: int  # saved in the largest block

    @property
    def flops(self) -> float:
        return float(self.products + self.attention)


class SampleShape(NamedTuple):
    """The shape of one sample: the side of its image in pixels, and the tokens of its prompt."""

    size: int
    text: int


class CountedModel:
    """A model with the interface of ``formulas.Model``."""

    def __init__(self, make: Callable[[], Outline], dtype: str) -> None:
        """Build the outline with ``make``; ``dtype``: that of weights and computation."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.outline = make()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            for module in self.outline.modules:
                _to_cpu(module, getattr(torch, dtype))
        self.outline.network.requires_grad_(True)
        self.frozen = sum(map(parameters, self.outline.frozen))
        self.transformer, self.decoder = CountedNetwork(self), CountedDecoder(self)
        self.velocity, self.decode = functools.cache(self._velocity), functools.cache(self._decode)

    def tokens(self, size: int, text: int) -> SampleShape:
        return SampleShape(size, text)

    def encode(self, text: int) -> float:
        """Return the FLOPs of encoding one prompt, of as many tokens as the backend makes of it."""
        return 0.0 if self.outline.before else self.prompt[1].flops

    @functools.cached_property
    def prompt(self) -> tuple[Any, CallCost]:
        """The embedding of a prompt, and its cost."""
        import torch

        embeddings: list[Any] = []
        with self._fake, torch.no_grad():
            call = count(lambda: embeddings.append(self.outline.flow.encode(["a photo"])), ())
        return embeddings[0], call

    def _velocity(self, size: int) -> CallCost:
        cond = self.prompt[0]
        with self._at(size) as (flow, x):
            return count(lambda: flow.velocity(x, 0.5, cond), [self.outline.network])

    def _decode(self, size: int) -> CallCost:
        with self._at(size) as (flow, x):
            return count(lambda: flow.decode(x), self.outline.frozen)

    @contextmanager
    def _at(self, size: int) -> Iterator[tuple[Any, Any]]:
        """Yield the flow at a size, without guidance in two branches, and one latent."""
        import torch

        with self._fake:
            flow = self.outline.flow.at(size=size, guidance=1.0)
            yield flow, flow.noise(1, [torch.Generator()]).requires_grad_()


class CountedNetwork(NamedTuple):
    """The trained network, with the interface of ``formulas.Transformer``."""

    model: CountedModel

    @property
    def parameters(self) -> int:
        return parameters(self.model.outline.network)

    @property
    def text(self) -> int:
        """The width of a prompt's hidden states."""
        return max((tensor.shape[-1] for tensor in self.model.prompt[0].tensors.values() if tensor.ndim > 2), default=0)

    def adapters(self, targets: Sequence[str], rank: int) -> int:
        """Return the parameters of LoRA adapters on the linear layers that peft finds for ``targets``."""
        from torch.nn import Linear

        layers = self.model.outline.network.named_modules()
        targeted = [layer for name, layer in layers if isinstance(layer, Linear) and is_target(name, targets)]
        return sum(rank * (layer.in_features + layer.out_features) for layer in targeted)

    def forward(self, shape: SampleShape) -> float:
        return self.model.velocity(shape.size).flops

    def backward(self, shape: SampleShape, full: bool) -> float:
        call = self.model.velocity(shape.size)
        return (2 if full else 1) * call.products + FLASH_BACKWARD * call.attention

    def activation_bytes(self, shape: SampleShape, itemsize: int, checkpointing: bool) -> float:
        call = self.model.velocity(shape.size)
        return float(call.inputs if checkpointing else call.saved)

    def block_bytes(self, shape: SampleShape, itemsize: int) -> float:
        return float(self.model.velocity(shape.size).block)


class CountedDecoder(NamedTuple):
    """The decoder of latents, with the interface of ``formulas.Decoder``."""

    model: CountedModel

    def forward(self, size: int) -> float:
        return self.model.decode(size).flops

    def activation_bytes(self, size: int, itemsize: int, checkpointing: bool) -> float:
        call = self.model.decode(size)
        return float(call.inputs + call.block if checkpointing else call.saved)


@functools.cache
def _cache() -> dict[tuple[type, str], CountedModel]:
    return {}


def count_model(backend: Any) -> CountedModel | None:
    """Return the counted model of ``backend``; None if it has no outline or lacks a file. UserError if it fails."""
    make, key = getattr(backend, "outline", None), (type(backend), repr(backend))
    if make is None:
        return None
    if key not in _cache():
        try:
            model = CountedModel(make, backend.dtype)
            model.velocity(backend.size)
            model.decode(backend.size)
        except Missing:
            return None
        except UserError:
            raise
        except Exception as error:  # plug-in code may raise anything on tensors without memory
            why = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
            what = f"its model does not run without weights ({why})"
            raise UserError(f"backend {backend.name}: {what}") from error
        _cache()[key] = model
    return _cache()[key]


def _to_cpu(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace meta tensors by fake CPU tensors: code may ask for a tensor's device, and move others to it."""
    import torch

    replaced: dict[int, torch.nn.Parameter] = {}  # tied parameters stay tied
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            new = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            child._parameters[name] = replaced.setdefault(id(parameter), new)
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count(work: Callable[[], Any], roots: Sequence[nn.Module]) -> CallCost:
    """Return the cost of ``work()``, which calls blocks of ``roots``."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    saved = _SavedTensors(roots)
    counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
    with saved.watching(), torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor), counter:
        work()
    flops = counter.get_flop_counts().get("Global", {})
    attention = sum(n for operation, n in flops.items() if "attention" in str(operation))
    return CallCost(sum(flops.values()) - attention, attention, saved.total, sum(saved.inputs.values()), saved.largest)


def _cpu_attention() -> dict[Any, Any]:
    """Return a counter for the CPU's attention kernel, which torch 2.11 does not count."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {kernel: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}


class _SavedTensors:
    """The bytes of storages that autograd saves, excluding those of weights."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        weights = [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._blocks = [block for root in roots for block in _blocks(root)]
        self._seen: dict[int, int] = {}
        self._before = self.total = self.largest = 0
        self.inputs: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no address is reused by another storage

    def add(self, tensor: Any) -> Any:
        self.total += self._note(tensor, self._seen)
        return tensor

    def _note(self, tensor: Any, seen: dict[int, int]) -> int:
        """Return the bytes of the tensor's storage; 0 for one seen before or of a weight."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._weights or storage._cdata in seen:
            return 0
        self._alive.append(tensor)
        seen[storage._cdata] = storage.nbytes()
        return storage.nbytes()

    def _enter(self, block: nn.Module, arguments: Any, named: Any) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        self._before = self.total
        for leaf in tree_leaves((arguments, named)):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, self.inputs)

    def _leave(self, *_: Any) -> None:
        self.largest = max(self.largest, self.total - self._before)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for block in self._blocks:
                hooks.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(self._leave).remove)
            yield


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost module lists: the blocks that checkpointing recomputes one by one."""
    from torch.nn import ModuleList

    for child in module.children():
        yield from child.children() if isinstance(child, ModuleList) else _blocks(child)
