"""torch's AdamW, one tensor at a time in float32: for bfloat16 weights without masters, and for moments in 8 bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from alignbench.flow import seeded
from alignbench.training.precision import stochastic_round, upcast
from alignbench.training.quantization import SMALL, dequantize, quantize

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments, by torch's names


class AdamW(torch.optim.Optimizer):
    """AdamW that updates bfloat16 weights in float32 and rounds them stochastically; others as ``torch.optim.AdamW``.

    Update u of weight tensor i is rounded with a generator on its device, seeded by (``seed``, u, i): two runs on the
    same kind of device are bitwise equal, and a resumed run needs no generator state.

    ``eight_bit``: between updates, the moments of tensors with at least 4,096 elements are kept in 8 bits
    (``quantization``).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, seed: int, eight_bit: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed, self.eight_bit = seed, eight_bit

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        index = itertools.count()
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, next(index), group)

    def _update(self, p: Tensor, index: int, group: Mapping[str, Any]) -> None:
        assert p.grad is not None
        weight, gradient = upcast(p), upcast(p.grad)
        state = self.state[p]
        step = state.setdefault("step", torch.tensor(0.0))
        moments = {name: self._moment(state, name, weight) for name in SIGNED}
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], [moments["exp_avg"]], [moments["exp_avg_sq"]], [], [step],
            foreach=False, fused=False, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for name, moment in moments.items():
            if self.eight_bit and p.numel() >= SMALL:
                state[name], state[f"{name}_scale"] = quantize(moment, SIGNED[name])
            else:
                state[name] = moment
        if p.dtype == torch.bfloat16:
            seed = seeded("rounding", self.seed, int(step), index).initial_seed()
            p.copy_(stochastic_round(weight, torch.Generator(p.device).manual_seed(seed)))

    @staticmethod
    def _moment(state: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
        """Return a moment in the dtype of ``weight``; zeros before the first update."""
        if name not in state:
            return torch.zeros_like(weight)
        scale = state.get(f"{name}_scale")
        return state[name] if scale is None else dequantize(state[name], scale, SIGNED[name], weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without casting the moments to the dtype of the weights, as ``torch.optim.Optimizer`` would."""
        super().load_state_dict(state_dict | {"state": {}})
        parameters = list(itertools.chain(*(group["params"] for group in self.param_groups)))
        for i, values in state_dict["state"].items():
            p = parameters[i]
            self.state[p] = {name: t if name == "step" else t.to(p.device) for name, t in values.items()}
