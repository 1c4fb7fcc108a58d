"""What a model costs, counted by torch: the default for a backend whose model ``cost`` has no arithmetic of.

The backend lays its model out on the meta device, without weights; torch's FlopCounterMode then sees one call of the
network, and one of the decoder, at every size that is asked for. FLUX.1-dev gets the FLOPs of the
arithmetic to the last digit, but in seconds and with diffusers imported, and only where its configurations are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.backends.cost.formulas import FLASH_BACKWARD, meant
from alignbench.config import Missing, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


class Outline(NamedTuple):
    """A model whose modules are on the meta device. ``network`` is what training trains."""

    flow: Any  # a Flow, with ``at``
    network: nn.Module
    frozen: Sequence[nn.Module] = ()  # everything else that is loaded while it trains ...
    before: Sequence[nn.Module] = ()  # ... and what is not, as prompts are encoded before

    @property
    def modules(self) -> list[nn.Module]:
        return [self.network, *self.frozen, *self.before]


class Call(NamedTuple):
    """One call, forward, of one sample: its FLOPs, and the bytes that autograd keeps of it."""

    products: int  # FLOPs of matrix products and convolutions
    attention: int  # FLOPs of attention in one kernel
    kept: int
    inputs: int  # of the blocks that checkpointing computes again: what it keeps in place of all that
    block: int  # what is kept of the largest of them

    @property
    def flops(self) -> float:
        return float(self.products + self.attention)


class Shape(NamedTuple):
    """One sample: the side of its image in pixels, and the tokens of its prompt."""

    size: int
    text: int


class Counted:
    """A model that stands where a ``cost.Model`` does."""

    def __init__(self, make: Callable[[], Outline], dtype: str) -> None:
        """Lay out the model that ``make`` makes; ``dtype`` is that of its weights and its computation."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.outline = make()
        self._memoryless = FakeTensorMode(allow_non_fake_inputs=True)
        with self._memoryless:
            for module in self.outline.modules:
                _to_cpu(module, getattr(torch, dtype))
        self.outline.network.requires_grad_(True)
        self.frozen = sum(map(parameters, self.outline.frozen))
        self.transformer, self.decoder = CountedNetwork(self), CountedDecoder(self)
        self.velocity, self.decode = functools.cache(self._velocity), functools.cache(self._decode)

    def tokens(self, size: int, text: int) -> Shape:
        return Shape(size, text)

    def encode(self, text: int) -> float:
        """Return the FLOPs of one prompt, of as many tokens as the backend makes of it."""
        return 0.0 if self.outline.before else self.prompt[1].flops

    @functools.cached_property
    def prompt(self) -> tuple[Any, Call]:
        """The embedding of a prompt, and what it costs."""
        import torch

        made: list[Any] = []
        with self._memoryless, torch.no_grad():
            call = count(lambda: made.append(self.outline.flow.encode(["a photo"])), ())
        return made[0], call

    def _velocity(self, size: int) -> Call:
        cond = self.prompt[0]
        with self._at(size) as (flow, x):
            return count(lambda: flow.velocity(x, 0.5, cond), [self.outline.network])

    def _decode(self, size: int) -> Call:
        with self._at(size) as (flow, x):
            return count(lambda: flow.decode(x), self.outline.frozen)

    @contextmanager
    def _at(self, size: int) -> Iterator[tuple[Any, Any]]:
        """Yield the flow at a size, without a second branch of guidance, and one latent of it."""
        import torch

        with self._memoryless:
            flow = self.outline.flow.at(size=size, guidance=1.0)
            yield flow, flow.noise(1, [torch.Generator()]).requires_grad_()


class CountedNetwork(NamedTuple):
    """What is trained; stands where a ``cost.Transformer`` does."""

    model: Counted

    @property
    def parameters(self) -> int:
        return parameters(self.model.outline.network)

    @property
    def text(self) -> int:
        """The width of a prompt's states."""
        return max((tensor.shape[-1] for tensor in self.model.prompt[0].tensors.values() if tensor.ndim > 2), default=0)

    def adapters(self, targets: Sequence[str], rank: int) -> int:
        """Return the parameters of LoRA adapters on the linear layers that peft finds for ``targets``."""
        from torch.nn import Linear

        layers = self.model.outline.network.named_modules()
        found = [layer for name, layer in layers if isinstance(layer, Linear) and meant(name, targets)]
        return sum(rank * (layer.in_features + layer.out_features) for layer in found)

    def forward(self, shape: Shape) -> float:
        return self.model.velocity(shape.size).flops

    def backward(self, shape: Shape, full: bool) -> float:
        call = self.model.velocity(shape.size)
        return (2 if full else 1) * call.products + FLASH_BACKWARD * call.attention

    def kept(self, shape: Shape, itemsize: int, checkpointing: bool) -> float:
        call = self.model.velocity(shape.size)
        return float(call.inputs if checkpointing else call.kept)

    def block(self, shape: Shape, itemsize: int) -> float:
        return float(self.model.velocity(shape.size).block)


class CountedDecoder(NamedTuple):
    """What makes pixels of latents; stands where a ``cost.Decoder`` does."""

    model: Counted

    def forward(self, size: int) -> float:
        return self.model.decode(size).flops

    def kept(self, size: int, itemsize: int, checkpointing: bool) -> float:
        call = self.model.decode(size)
        return float(call.inputs + call.block if checkpointing else call.kept)


@functools.cache
def _known() -> dict[tuple[type, str], Counted]:
    return {}


def counted(backend: Any) -> Counted | None:
    """Return the model that ``backend`` lays out; None if it cannot, or a file is missing. UserError if it fails."""
    make, key = getattr(backend, "outline", None), (type(backend), repr(backend))
    if make is None:
        return None
    if key not in _known():
        try:
            found = Counted(make, backend.dtype)
            found.velocity(backend.size)
            found.decode(backend.size)
        except Missing:
            return None
        except UserError:
            raise
        except Exception as error:  # whatever a plug-in's code raises on tensors without memory
            what = f"its model does not run without weights ({type(error).__name__}: {error})"
            raise UserError(f"backend {backend.name}: {what}") from error
        _known()[key] = found
    return _known()[key]


def _to_cpu(module: nn.Module, dtype: torch.dtype) -> None:
    """Put tensors of a CPU in the place of those of the meta device: code may ask for a device, and move to it."""
    import torch

    made: dict[int, torch.nn.Parameter] = {}  # tied ones stay tied
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            new = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            each._parameters[name] = made.setdefault(id(parameter), new)
        for name, buffer in each.named_buffers(recurse=False):
            each._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count(work: Callable[[], Any], roots: Sequence[nn.Module]) -> Call:
    """Return what ``work`` costs, which calls blocks of ``roots``."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    keeper = _Keeper(roots)
    counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
    with keeper.watching(), torch.autograd.graph.saved_tensors_hooks(keeper.keep, lambda tensor: tensor), counter:
        work()
    flops = counter.get_flop_counts().get("Global", {})
    attention = sum(n for operation, n in flops.items() if "attention" in str(operation))
    return Call(sum(flops.values()) - attention, attention, keeper.total, sum(keeper.inputs.values()), keeper.largest)


def _cpu_attention() -> dict[Any, Any]:
    """Return how a CPU's attention is counted: as every other kernel, where torch 2.11 leaves it out."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {kernel: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}


class _Keeper:
    """A look at what autograd keeps: bytes of storages, those of weights left out."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        weights = [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._blocks = [block for root in roots for block in _blocks(root)]
        self._kept: dict[int, int] = {}
        self._before = self.total = self.largest = 0
        self.inputs: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no storage's number is given twice

    def keep(self, tensor: Any) -> Any:
        self.total += self._note(tensor, self._kept)
        return tensor

    def _note(self, tensor: Any, seen: dict[int, int]) -> int:
        """Return the bytes of its storage if they are new, and no weight's."""
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
        for each in tree_leaves((arguments, named)):
            if isinstance(each, torch.Tensor):
                self._note(each, self.inputs)

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
    """Yield the members of the outermost lists of modules: what checkpointing computes again one by one."""
    from torch.nn import ModuleList

    for child in module.children():
        yield from child.children() if isinstance(child, ModuleList) else _blocks(child)
