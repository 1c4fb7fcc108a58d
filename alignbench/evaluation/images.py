"""Generate evaluation images, each a function of (weights, protocol, prompt, index) and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from alignbench.config import UserError
from alignbench.evaluator import to_pil
from alignbench.flow import integrate, seeded

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from alignbench.experiment.spec import Protocol
    from alignbench.prompts import Prompt

# Matrix kernels round differently for different batch shapes, so the shape is fixed by the image size alone: last and
# resumed batches are padded to it. (At a fixed shape, a row's bits depend on neither its position nor its neighbours.)
VALUES_PER_PASS = 2**18  # latent values: one 1024 px image of FLUX.1, four of 512 px
IMAGES_PER_PASS = 16


def generate(
    flow: Any,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    done: Collection[tuple[str, int]] = (),
    *,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Prompt, int, Image]]:
    """Yield (prompt, index, image), prompt by prompt, skipping the (prompt id, index) pairs in ``done``.

    ``flow`` carries the weights to evaluate; its ``at(size=, guidance=)`` returns the view that generates the images.
    ``shard`` = (rank, ranks) selects every ranks-th missing image, so all ranks must pass the same ``done``. Noise is
    drawn on the CPU from (seed, prompt id, index).
    """
    flow = flow.at(size=protocol.size, guidance=protocol.guidance)
    wanted = [(prompt, index) for prompt in prompts for index in range(protocol.images_per_prompt)]
    missing = [item for item in wanted if (item[0].id, item[1]) not in done][shard[0] :: shard[1]]
    sigmas = flow.sigmas(protocol.steps)
    size = _images_per_pass(flow)
    for start in range(0, len(missing), size):
        items = missing[start : start + size]
        pixels = _pixels(flow, items + items[-1:] * (size - len(items)), protocol, sigmas)
        yield from ((prompt, index, to_pil(image)) for (prompt, index), image in zip(items, pixels))


def _images_per_pass(flow: Any) -> int:
    values = math.prod(flow.noise(1, [torch.Generator()]).shape)
    return max(1, min(IMAGES_PER_PASS, VALUES_PER_PASS // values))


def _pixels(flow: Any, items: Sequence[tuple[Prompt, int]], protocol: Protocol, sigmas: Tensor) -> Tensor:
    """Return pixels (B, 3, H, W) for B = len(items)."""
    noise = flow.noise(len(items), [seeded(protocol.seed, prompt.id, index) for prompt, index in items])
    tuned = protocol.steps if protocol.tuned_steps is None else protocol.tuned_steps
    cond = flow.encode([prompt.text for prompt, _ in items])
    x, finite = noise, []
    with torch.no_grad():
        for i in range(protocol.steps):
            x = integrate(flow, x, sigmas[i : i + 2], cond, reference=i >= tuned)
            finite.append(x.isfinite().flatten(1).all(1))
        pixels = flow.decode(x)
    finite.append(pixels.isfinite().flatten(1).all(1))
    _require_finite(torch.stack(finite).cpu(), items)
    return pixels


def _require_finite(finite: Tensor, items: Sequence[tuple[Prompt, int]]) -> None:
    """Raise UserError for the first image with a value that is not finite; it would be saved as a black image.

    ``finite`` (N + 1, B): one row after each of the N steps, and one after decoding.
    """
    if finite.all():
        return
    row = int(finite.all(0).logical_not().int().argmax())
    step, steps = int(finite[:, row].logical_not().int().argmax()), len(finite) - 1
    (prompt, index) = items[row]
    cause = (
        f"latents are not finite after step {step + 1} of {steps}" if step < steps else "decoded pixels are not finite"
    )
    instead = "set backend.dtype: float32 if bfloat16 overflows, or check whether the training run diverged"
    raise UserError(f"image {index} of the prompt {prompt.text!r}: its {cause}; {instead}")
