"""torch's AdamW, one tensor at a time in float32: for weights in bfloat16 alone, and for moments in 8 bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from alignbench.flow import seeded
from alignbench.training.precision import stochastic_round, upcast
from alignbench.training.quantization import SMALL, dequantize, quantised

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments, by torch's names


class AdamW(torch.optim.Optimizer):
    """Weights in bfloat16 are updated in float32 and rounded stochastically; others as by ``torch.optim.AdamW``.

    Update u of weight tensor i is rounded by a generator on its device, from (``seed``, u, i): two runs on the same
    kind of device are bitwise equal, and a resumed one needs no generator's state.

    ``eight``: between updates the moments of tensors of 4,096 numbers and more are kept in 8 bits (``blockwise``).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, seed: int, eight: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed, self.eight = seed, eight

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
            if self.eight and p.numel() >= SMALL:
                state[name], state[f"{name}_scale"] = quantised(moment, SIGNED[name])
            else:
                state[name] = moment
        if p.dtype == torch.bfloat16:
            seed = seeded("rounding", self.seed, int(step), index).initial_seed()
            p.copy_(stochastic_round(weight, torch.Generator(p.device).manual_seed(seed)))

    @staticmethod
    def _moment(state: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
        """In the type of ``weight``; zero at first."""
        if name not in state:
            return torch.zeros_like(weight)
        scale = state.get(f"{name}_scale")
        return state[name] if scale is None else dequantize(state[name], scale, SIGNED[name], weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``'s, which would also cast the moments to the type of the weights."""
        super().load_state_dict(state_dict | {"state": {}})
        everything = list(itertools.chain(*(group["params"] for group in self.param_groups)))
        for i, values in state_dict["state"].items():
            p = everything[i]
            self.state[p] = {name: t if name == "step" else t.to(p.device) for name, t in values.items()}
