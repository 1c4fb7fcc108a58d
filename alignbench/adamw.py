"""torch's AdamW, one tensor at a time in float32: for bfloat16 weights that are rounded stochastically."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from alignbench.flow import seeded
from alignbench.halves import rounded, wide


class AdamW(torch.optim.Optimizer):
    """Weights in bfloat16 are updated in float32 and rounded stochastically; others as by ``torch.optim.AdamW``.

    Update u of weight tensor i is rounded by a generator on its device, from (``seed``, u, i): two runs on the same
    kind of device are bitwise equal, and a resumed one needs no generator's state.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        index = itertools.count()
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, next(index), group)

    def _update(self, p: Tensor, index: int, group: Mapping[str, Any]) -> None:
        assert p.grad is not None
        weight, gradient = wide(p), wide(p.grad)
        state = self.state[p]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}
            state["exp_avg_sq"] = torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            foreach=False, fused=False, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        if p.dtype == torch.bfloat16:
            seed = seeded("rounding", self.seed, int(state["step"]), index).initial_seed()
            p.copy_(rounded(weight, torch.Generator(p.device).manual_seed(seed)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``'s, which would also cast the moments to the type of the weights."""
        super().load_state_dict(state_dict | {"state": {}})
        everything = list(itertools.chain(*(group["params"] for group in self.param_groups)))
        for i, values in state_dict["state"].items():
            p = everything[i]
            self.state[p] = {name: t if name == "step" else t.to(p.device) for name, t in values.items()}
