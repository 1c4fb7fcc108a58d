"""The state of a training run: parameters, optimizer, EMA and records, and what one update does to them."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignbench.config import UserError
from alignbench.evaluator import Reward
from alignbench.experiment.spec import Budget, Training
from alignbench.flow import Batch, Flow, euler, seeded
from alignbench.method import AlignMethod, GatherBatch, Loss, Updates, resume
from alignbench.prompts import Prompt
from alignbench.store.artefacts import milestone_file
from alignbench.training.adamw import AdamW
from alignbench.training.batches import draw_batch, shares
from alignbench.training.checkpoint import read_state, save_state, save_weights, states
from alignbench.training.ema import Average
from alignbench.training.fsdp import Shards, as_part, average, shard_like, whole
from alignbench.training.meter import GRAD_SHARES, Meter, Watch
from alignbench.training.precision import Weights, total_norm
from alignbench.weights import check_shapes, copy_parameters

T = TypeVar("T")
Record = dict[str, Any]


# ---- a run


class TrainState:
    """Weights, optimizer, average, meter and counters: all that a checkpoint holds."""

    def __init__(
        self,
        method: AlignMethod,
        flow: Flow,
        training: Training,
        accelerator: Accelerator,
        sharded: bool = False,
        milestones: Path | None = None,
    ) -> None:
        self.method, self.training, self.accelerator = method, training, accelerator
        self.flow, self.milestones = flow, milestones
        self.shards = Shards(flow, accelerator) if sharded and accelerator.num_processes > 1 else None
        self.weights = Weights(flow, training.optimizer.weights)
        self.parameters = self.weights.held
        with torch.random.fork_rng(devices=[]):  # modules draw their first weights from torch's global generator
            torch.manual_seed(seeded("modules", training.seed).initial_seed())
            self.modules = {name: module.to(accelerator.device) for name, module in method.modules(flow).items()}
        self.groups = {"flow": list(self.parameters.values())}
        self.groups |= {name: list(module.parameters()) for name, module in self.modules.items()}
        settings = training.optimizer
        self.optimizer = self.made_optimizer()
        self.ema = None
        if settings.ema is not None:
            self.ema = Average(self.groups["flow"], settings.ema, training.ema_on_host)
        self.meter, self.watch = Meter(), Watch()
        self.step = self.update = 0  # batches and optimizer updates done
        self.drift: float | None = None  # from the base model, at the last look
        self.records: list[Record] = []

    def made_optimizer(self) -> torch.optim.Optimizer:
        settings, groups = self.training.optimizer, [{"params": group} for group in self.groups.values()]
        lr, betas, eps, decay = settings.lr, settings.betas, settings.eps, settings.weight_decay
        eight = settings.moments == "8bit"
        if eight or settings.weights == "stochastic":
            return AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, seed=self.training.seed, eight=eight)
        fused = self.accelerator.device.type == "cuda" or None  # others make temporary tensors as large as all weights
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=fused)

    @property
    def finished(self) -> bool:
        """Is the budget spent? Only asked between batches."""
        last = self.records[-1] if self.records else {}
        return spent(self.training.budget, last, self.accelerator.num_processes) >= 1

    def advance(self, flow: Flow, reward: Reward, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """One global batch: as many updates as the method makes of it, micro-batches in step with one another."""
        self.look_at_drift(prompts)
        before = self.update
        started = time.perf_counter()
        parts, device = shares(self.training, self.accelerator), self.accelerator.device
        batches = [draw_batch(flow, prompts, self.training, self.step, samples, device) for samples in parts]
        updates = [self.method.updates(flow, reward, batch) for batch in batches]
        self.meter.images += sum(map(len, batches))
        self.step += 1
        self.watch.scores.clear()
        while (losses := self.next_update(updates)) is not None:
            self.optimizer.zero_grad()
            self.weights.begin()
            sums = self.together(functools.partial(self.backward, losses, batches, reward))
            metrics, norms = self.average(sums), self.synchronise()
            self.require_finite(norms)
            lr = self.descend()
            self.meter.see_memory(self.accelerator.device)
            now = time.perf_counter()
            self.meter.seconds, started = self.meter.seconds + now - started, now
            place = {"step": self.step - 1, "update": self.update - 1}
            record = {**place, **metrics, **norms, "drift": self.drift, "lr": lr, **self.costs()}
            self.records.append(record)
            if self.milestones is not None and self.update in self.training.milestones:
                self.save_weights(self.milestones / milestone_file(self.update))
                started = time.perf_counter()  # keeping weights is no part of a method's time
            yield record
        if self.update == before:
            raise self.error(f"method {self.method.name} made no update of a whole batch; yield at least one")

    def next_update(self, updates: Sequence[Updates]) -> Sequence[Iterable[Loss]] | None:
        """The losses of the next update, by micro-batch. What the micro-batches pool before it is exchanged."""
        answer = None
        while True:
            asked = self.together(functools.partial(self.resumed, updates, answer))
            if not isinstance(asked[0], GatherBatch):
                return None if asked[0] is None else asked
            answer = self.accelerator.gather(torch.cat([pool.values for pool in asked]))

    def resumed(self, updates: Sequence[Updates], answer: Tensor | None) -> list[Any]:
        """What every micro-batch asks for next: the same kind of thing, or None once all are through."""
        asked = [next(part, None) if answer is None else resume(part, answer) for part in updates]
        if len({GatherBatch if isinstance(item, GatherBatch) else item is None for item in asked}) > 1:
            raise UserError(f"method {self.method.name} makes different updates of different micro-batches")
        return asked

    def look_at_drift(self, prompts: Sequence[Prompt]) -> None:
        """How far the model has moved: |v - v_base|^2 / |v_base|^2 over four steps of the same four samples.

        Every ``drift_every`` batches; records in between repeat the last look. Neither NFE nor seconds count it.
        """
        every = self.training.drift_every
        if every is None or self.step % every:
            return
        grid = self.flow.sigmas(self.method.steps)
        t = torch.cat([grid[: -1 : max(1, self.method.steps // 4)][:4], grid[-1:]])
        samples = range(min(4, self.training.batch))
        batch = draw_batch(self.flow, prompts, self.training, 0, samples, self.accelerator.device)
        x, moved, base = batch.noise, 0.0, 0.0
        with torch.no_grad():
            for at, to in itertools.pairwise(t):
                v = self.flow.velocity(x, at, batch.cond)
                v_base = self.flow.velocity(x, at, batch.cond, reference=True)
                moved, base = moved + (v - v_base).square().sum().item(), base + v_base.square().sum().item()
                x = euler(x, v, at, to)
        self.drift = moved / base

    def backward(self, losses: Sequence[Iterable[Loss]], batches: Sequence[Batch], reward: Reward) -> dict[str, float]:
        """Gradients of one update, summed over micro-batches; their losses and metrics, weighted by samples."""
        total, mean, first = 0.0, defaultdict[str, Mean](Mean), True
        for inner, batch in zip(losses, batches):
            weight = len(batch) / sum(map(len, batches))
            for loss in inner:
                require_finite_loss(loss, batch)
                if not first:
                    self.weights.widen()
                first = False
                self.watch.backward = True
                self.accelerator.backward(loss.value * weight)
                self.watch.backward = False
                total += weight * loss.value.item()
                for name, value in loss.metrics.items():
                    mean[name].add(float(value), weight)
        named = {"reward_mean" if name == "reward" else name: m.value for name, m in mean.items()}
        return {"loss": total, **self.watch.reward_means(reward), **named, **self.watch.gradient_sums()}

    def average(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over ranks; of the gradient's sums, shares."""
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.accelerator.device)
        means = dict(zip(sums, self.accelerator.reduce(values, "mean").tolist()))
        total = sum(means[name] for name in GRAD_SHARES) or 1.0
        return {name: mean / total if name in GRAD_SHARES else mean for name, mean in means.items()}

    def synchronise(self) -> dict[str, float]:
        """Average gradients over ranks, clip each group by its own norm; the norms before clipping."""
        norms = {}
        self.weights.hand_over()
        for name, group in self.groups.items():
            for p in group:
                if p.grad is None:  # so that all ranks reduce the same list
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            gradients = [p.grad for p in group if p.grad is not None]
            if self.accelerator.num_processes > 1 and not (
                name == "flow" and self.shards
            ):  # FSDP2 has averaged its own
                average(gradients, self.accelerator)
            norm = total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if self.training.optimizer.clip is not None:
                nn.utils.clip_grads_with_norm_(group, self.training.optimizer.clip, norm)
            norms["grad_norm" if name == "flow" else f"grad_norm_{name}"] = norm.item()
        return norms

    def require_finite(self, norms: dict[str, float]) -> None:
        """The same verdict on every rank: gradients have been averaged."""
        for name, value in norms.items():
            if not math.isfinite(value):
                raise self.error(f"{name} is {value}; lower optimizer.lr, or look at the reward")

    def descend(self) -> float:
        """One optimizer update, then the average follows; the learning rate used."""
        settings = self.training.optimizer
        lr = settings.lr * min(1.0, (self.update + 1) / max(1, settings.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.ema is not None:
            self.ema.wait()  # for what it still reads
        self.optimizer.step()
        self.weights.follow()
        self.update += 1
        if self.shards is not None:
            self.shards.give_up()
        if self.ema is not None:
            self.ema.follow()
        return lr

    def costs(self) -> dict[str, int | float]:
        """Totals over ranks; seconds and memory: of the rank with most."""
        names, largest = list(self.meter.state_dict()), {"seconds", "peak_memory_bytes"}
        values = torch.tensor(list(self.meter.state_dict().values()), dtype=torch.float64)
        rows = self.accelerator.gather(values.to(self.accelerator.device)[None])
        total = {name: (column.max() if name in largest else column.sum()) for name, column in zip(names, rows.T)}
        return {name: value.item() if name == "seconds" else int(value) for name, value in total.items()}

    def together(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank. A failure on one ends all of them, rather than leaving the others to wait."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # any: it is raised again below
            failure = error
        failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum") == 0:
            return result  # type: ignore[return-value]  # None only if that is what work() gave
        said = None if failure is None else str(failure) if isinstance(failure, UserError) else repr(failure)
        reasons = [f"rank {n}: {why}" for n, why in enumerate(gather_object([said])) if why is not None]
        if failure is None:
            raise self.error(f"another rank failed ({reasons[0]})")
        raise self.error(str(failure)) if isinstance(failure, UserError) else failure

    def anywhere(self, asked: Callable[[], bool]) -> bool:
        """Does any rank say yes? The same answer on all of them, whose signals may not come in the same batch."""
        yes = torch.tensor(float(self.together(asked)), device=self.accelerator.device)
        return self.accelerator.reduce(yes, "sum").item() > 0

    def error(self, what: str) -> UserError:
        """``what``, with the place in training where it happened."""
        return UserError(f"training, step {self.step - 1}, update {self.update}: {what}")

    # ---- saved and resumed

    def save(self, folder: Path) -> None:
        """Add a checkpoint. Written by the first rank alone; it is the same however many there are."""
        moments = self.optimizer.state_dict()
        moments["state"] = {i: self.whole(values) for i, values in moments["state"].items()}
        state = {
            "step": self.step,
            "update": self.update,
            "flow": self.whole(self.parameters),
            "ema": self.whole_ema(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": moments,
            "method": self.method.state_dict(),
            "records": self.records,
        }
        if self.accelerator.is_main_process:
            save_state(folder, state, self.training.keep)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Of every rank's parts; only on the first rank."""
        return {name: whole(t.detach(), self.accelerator.is_main_process) for name, t in tensors.items()}

    def whole_ema(self) -> list[Any] | None:
        if self.ema is None:
            return None
        kept = zip(self.ema.tensors, self.groups["flow"])
        return [whole(as_part(t, p), self.accelerator.is_main_process) for t, p in kept]

    def resume(self, folder: Path) -> None:
        """Continue from the last checkpoint that is whole and fits; from the start if there is none.

        One that does not serve is named on stderr.
        """
        (found,) = broadcast_object_list([states(folder)])  # the first rank's, should a shared disk not agree
        for path in found:
            state, reason = self.readable(path)
            reasons = [told for told in gather_object([reason]) if told is not None]
            if not reasons:
                assert state is not None
                self.take_up(state, path)
                return
            if self.accelerator.is_main_process:
                instead = "training starts from the beginning" if path == found[-1] else "the one before it is tried"
                print(f"alignbench: {reasons[0]}; {instead}", file=sys.stderr, flush=True)

    def readable(self, path: Path) -> tuple[Record | None, str | None]:
        """The state in ``path``, or why it cannot be resumed from. The first rank verifies its hash for all."""
        try:
            mapped = self.accelerator.device.type != "cpu"  # where tensors are copied; else they would stay in the file
            state = read_state(path, verify=self.accelerator.is_main_process, mapped=mapped)
            self.check_fit(state, path)
        except (UserError, KeyError) as error:  # a key that is absent: of another version of this program
            return None, str(error) if isinstance(error, UserError) else f"{path}: has no {error}"
        return state, None

    def check_fit(self, state: Record, path: Path) -> None:
        """UserError or KeyError unless ``take_up`` can take the state: it must not stop half-way."""
        check_shapes(self.parameters, state["flow"], path)
        check_shapes({} if self.ema is None else self.parameters, dict(zip(self.parameters, state["ema"] or ())), path)
        for name, module in self.modules.items():
            check_shapes(module.state_dict(), state["modules"][name], path)
        sizes = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        if sizes != [len(group) for group in self.groups.values()]:
            raise UserError(f"{path}: the optimizer's state is of other parameters")
        for name in ("step", "update", "method", "records"):
            state[name]

    def take_up(self, state: Record, path: Path) -> None:
        flow = {name: shard_like(t, self.parameters[name]) for name, t in state["flow"].items()}
        copy_parameters(self.parameters, flow, path)
        self.weights.follow()
        if self.ema is not None:
            ema = zip(state["ema"], self.groups["flow"], strict=True)
            self.ema.restart([shard_like(t, p).to(p.device) for t, p in ema])
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        everything = list(itertools.chain(*self.groups.values()))
        for i, values in state["optimizer"]["state"].items():
            values |= {name: shard_like(t, everything[i]) for name, t in values.items() if name != "step"}
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.step, self.update, self.records = state["step"], state["update"], state["records"]
        self.drift = self.records[-1]["drift"] if self.records else None
        if self.accelerator.is_main_process and self.records:  # totals over ranks continue in the first one
            self.meter.load_state_dict({name: self.records[-1][name] for name in self.meter.state_dict()})

    def save_weights(self, path: Path) -> None:
        """The trained weights and their average, as they are now."""
        weights, ema = self.whole(self.parameters), self.whole_ema()

        def write() -> None:
            if self.accelerator.is_main_process:
                save_weights(weights, path, ema)

        self.together(write)


def require_finite_loss(loss: Loss, batch: Batch) -> None:
    """UserError, with the samples and their values where they are known."""
    if torch.isfinite(loss.value):
        return
    each = [] if loss.per_sample is None or len(loss.per_sample) != len(batch) else loss.per_sample.tolist()
    bad = [f"{x} for prompt {p.id!r}" for p, x in zip(batch.prompts, each) if not math.isfinite(x)]
    told = f" ({', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''})" if bad else ""
    raise UserError(f"the loss is {loss.value.item()}{told}; lower optimizer.lr, or look at the reward")


class Mean:
    """A weighted mean, as it grows."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float, weight: float) -> None:
        self.total, self.weight = self.total + weight * value, self.weight + weight

    @property
    def value(self) -> float:
        return self.total / self.weight


def spent(budget: Budget, costs: Record, ranks: int = 1) -> float:
    """Share of ``budget`` that a record's totals have used up: 1 or more means that training ends."""
    used = {
        "images": costs.get("images", 0),
        "nfe": costs.get("nfe_forward", 0) + costs.get("nfe_grad", 0),
        "gpu_seconds": costs.get("seconds", 0.0) * ranks,
        "updates": costs.get("update", -1) + 1,
    }
    (kind,) = (name for name in used if getattr(budget, name) is not None)
    return used[kind] / getattr(budget, kind)
