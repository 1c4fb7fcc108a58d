"""The state of a training run: parameters, optimizer, EMA and records; how a batch changes it; saving and resuming."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from alignbench.training.batches import draw_batch, micro_batches
from alignbench.training.checkpoint import read_state, save_state, save_weights, saved_states
from alignbench.training.ema import EMA
from alignbench.training.fsdp import Shards, average_gradients, from_local, full_tensor, shard_like
from alignbench.training.meter import GRAD_SHARES, Meter, Watch
from alignbench.training.precision import Weights, total_norm
from alignbench.weights import check_shapes, copy_parameters

Record = dict[str, Any]


class TrainState:
    """Weights, optimizer, EMA, meter and counters: all that a checkpoint holds."""

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
        self.parameters = self.weights.parameters
        with torch.random.fork_rng(devices=[]):  # modules draw their initial weights from torch's global generator
            torch.manual_seed(seeded("modules", training.seed).initial_seed())
            self.modules = {name: module.to(accelerator.device) for name, module in method.modules(flow).items()}
        self.groups = {"flow": list(self.parameters.values())}
        self.groups |= {name: list(module.parameters()) for name, module in self.modules.items()}
        settings = training.optimizer
        self.optimizer = self.make_optimizer()
        self.ema = None
        if settings.ema is not None:
            self.ema = EMA(self.groups["flow"], settings.ema, training.ema_on_host)
        self.meter, self.watch = Meter(), Watch()
        self.step = self.update = 0  # batches and optimizer updates done
        self.drift: float | None = None  # from the base model, when it was last measured
        self.records: list[Record] = []

    def make_optimizer(self) -> torch.optim.Optimizer:
        settings, groups = self.training.optimizer, [{"params": group} for group in self.groups.values()]
        lr, betas, eps, decay = settings.lr, settings.betas, settings.eps, settings.weight_decay
        eight_bit = settings.moments == "8bit"
        if eight_bit or settings.weights == "stochastic":
            seed = self.training.seed
            return AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, seed=seed, eight_bit=eight_bit)
        fused = self.accelerator.device.type == "cuda" or None  # else temporaries as large as all weights
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=fused)

    @property
    def finished(self) -> bool:
        """Return whether the budget is spent. Valid only between batches."""
        last = self.records[-1] if self.records else {}
        return budget_share(self.training.budget, last, self.accelerator.num_processes) >= 1

    def train_batch(self, flow: Flow, reward: Reward, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """Train on one global batch, all micro-batches in step; yield a record per update that the method makes."""
        self.measure_drift(prompts)
        before = self.update
        parts, device = micro_batches(self.training, self.accelerator), self.accelerator.device
        clock = time.process_time if device.type == "cpu" else time.perf_counter  # other load slows a CPU's wall clock
        started = clock()
        batches = [draw_batch(flow, prompts, self.training, self.step, samples, device) for samples in parts]
        updates = [self.method.updates(flow, reward, batch) for batch in batches]
        self.meter.images += sum(map(len, batches))
        self.step += 1
        self.watch.scores.clear()
        while (losses := self.next_update(updates)) is not None:
            self.optimizer.zero_grad()
            self.weights.start_update()
            with self.located():
                means = self.backward(losses, batches)
            metrics, norms = self.average_over_ranks(means, reward), self.synchronize_gradients()
            self.require_finite_norms(norms)
            lr = self.optimizer_step()
            self.meter.update_peak_memory(self.accelerator.device)
            now = clock()
            self.meter.seconds, started = self.meter.seconds + now - started, now
            counters = {"step": self.step - 1, "update": self.update - 1}
            record = {**counters, **metrics, **norms, "drift": self.drift, "lr": lr, **self.costs()}
            self.records.append(record)
            if self.milestones is not None and self.update in self.training.milestones:
                self.save_weights(self.milestones / milestone_file(self.update))
                started = clock()  # saving weights does not count as the method's time
            yield record
        if self.update == before:
            raise self.error(f"method {self.method.name} made no update of a whole batch; yield at least one")

    def next_update(self, updates: Sequence[Updates]) -> Sequence[Iterable[Loss]] | None:
        """Return the next update's losses, by micro-batch, or None after the last. Answers every GatherBatch."""
        answer = None
        while True:
            with self.located():
                requests = self.next_requests(updates, answer)
            if not isinstance(requests[0], GatherBatch):
                return None if requests[0] is None else requests
            answer = self.accelerator.gather(torch.cat([request.values for request in requests]))

    def next_requests(self, updates: Sequence[Updates], answer: Tensor | None) -> list[Any]:
        """Return what each micro-batch yields next: all losses, all GatherBatch, or None once all have finished.

        Micro-batches of other ranks included, since all take part in the collectives that follow.
        """
        requests = [next(part, None) if answer is None else resume(part, answer) for part in updates]
        kinds = {GatherBatch if isinstance(item, GatherBatch) else item is None for item in requests}
        if len(set(gather_object([*kinds]))) > 1:
            raise UserError(f"method {self.method.name} makes different updates of different micro-batches")
        return requests

    def measure_drift(self, prompts: Sequence[Prompt]) -> None:
        """Measure how far the model has moved: |v - v_base|^2 / |v_base|^2 over four steps of the same four samples.

        Done every ``drift_every`` batches; records in between repeat the last value. NFE and seconds exclude it.
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

    def backward(self, losses: Sequence[Iterable[Loss]], batches: Sequence[Batch]) -> dict[str, float]:
        """Sum the gradients of one update over micro-batches; return their losses and metrics, weighted by samples."""
        total, mean, first = 0.0, defaultdict[str, Mean](Mean), True
        for inner, batch in zip(losses, batches):
            weight = len(batch) / sum(map(len, batches))
            for loss in inner:
                require_finite_loss(loss, batch)
                if not first:
                    self.weights.upcast_gradients()
                first = False
                self.watch.backward = True
                self.accelerator.backward(loss.value * weight)
                self.watch.backward = False
                total += weight * loss.value.item()
                for name, value in loss.metrics.items():
                    mean[name].add(float(value), weight)
        named = {"reward_mean" if name == "reward" else name: m.value for name, m in mean.items()}
        return {"loss": total, **named, **self.watch.gradient_sums()}

    def average_over_ranks(self, means: dict[str, float], reward: Reward) -> dict[str, float]:
        """Return means over ranks and the statistics of all scores of the batch; the gradient's sums become shares."""
        ranks = gather_object([(means, self.watch.scores)])
        if len({tuple(own) for own, _ in ranks}) > 1:
            raise self.error(f"method {self.method.name} records different metrics on different ranks")
        means = {name: statistics.fmean(own[name] for own, _ in ranks) for name in means}
        total = sum(means[name] for name in GRAD_SHARES) or 1.0
        shares = {name: means[name] / total for name in GRAD_SHARES}
        scores = [part for _, parts in ranks for part in parts]
        return {"loss": means["loss"], **self.watch.reward_means(reward, scores), **means, **shares}

    def synchronize_gradients(self) -> dict[str, float]:
        """Average gradients over ranks and clip each group by its own norm; return the norms before clipping."""
        norms = {}
        self.weights.gradients_to_masters()
        for name, group in self.groups.items():
            for p in group:
                if p.grad is None:  # so that all ranks reduce the same list
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            gradients = [p.grad for p in group if p.grad is not None]
            averaged = name == "flow" and self.shards  # by FSDP2
            if self.accelerator.num_processes > 1 and not averaged:
                average_gradients(gradients, self.accelerator)
            norm = total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if self.training.optimizer.clip is not None:
                nn.utils.clip_grads_with_norm_(group, self.training.optimizer.clip, norm)
            norms["grad_norm" if name == "flow" else f"grad_norm_{name}"] = norm.item()
        return norms

    def require_finite_norms(self, norms: dict[str, float]) -> None:
        """Raise UserError for a norm that is not finite: on every rank, as gradients have been averaged."""
        for name, value in norms.items():
            if not math.isfinite(value):
                raise self.error(f"{name} is {value}; lower optimizer.lr, or look at the reward")

    def optimizer_step(self) -> float:
        """Update the weights, then their EMA; return the learning rate used."""
        settings = self.training.optimizer
        lr = settings.lr * min(1.0, (self.update + 1) / max(1, settings.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.ema is not None:
            self.ema.wait()  # it may still read the weights
        self.optimizer.step()
        self.weights.masters_to_network()
        self.update += 1
        if self.shards is not None:
            self.shards.reshard()
        if self.ema is not None:
            self.ema.update()
        return lr

    def costs(self) -> dict[str, int | float]:
        """Return totals over ranks; for seconds and memory, the maximum over ranks."""
        names, largest = list(self.meter.state_dict()), {"seconds", "peak_memory_bytes"}
        values = torch.tensor(list(self.meter.state_dict().values()), dtype=torch.float64)
        rows = self.accelerator.gather(values.to(self.accelerator.device)[None])
        total = {name: (column.max() if name in largest else column.sum()) for name, column in zip(names, rows.T)}
        return {name: value.item() if name == "seconds" else int(value) for name, value in total.items()}

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Say in UserErrors at which step and update they occurred."""
        try:
            yield
        except UserError as error:
            raise self.error(str(error)) from error

    def any_rank(self, condition: Callable[[], bool]) -> bool:
        """Return whether ``condition()`` holds on any rank: the same on all, whose signals may arrive batches apart."""
        holds = torch.tensor(float(condition()), device=self.accelerator.device)
        return self.accelerator.reduce(holds, "sum").item() > 0

    def error(self, what: str) -> UserError:
        """Return a UserError that says at which step and update ``what`` happened."""
        return UserError(f"training, step {self.step - 1}, update {self.update}: {what}")

    # ---- saving and resuming

    def save(self, folder: Path) -> None:
        """Add a checkpoint. The main process writes it, and its content does not depend on the number of ranks."""
        moments = self.optimizer.state_dict()
        moments["state"] = {i: self.gather_shards(values) for i, values in moments["state"].items()}
        state = {
            "step": self.step,
            "update": self.update,
            "flow": self.gather_shards(self.parameters),
            "ema": self.gather_ema(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": moments,
            "method": self.method.state_dict(),
            "records": self.records,
        }
        if self.accelerator.is_main_process:
            save_state(folder, state, self.training.keep)
        self.accelerator.wait_for_everyone()  # nobody ends, or asks to end, while this is written

    def gather_shards(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return full tensors; in the place of sharded ones, None on all but the main process."""
        return {name: full_tensor(t.detach(), self.accelerator.is_main_process) for name, t in tensors.items()}

    def gather_ema(self) -> list[Any] | None:
        """Return the EMA's full tensors, as ``gather_shards`` does; None without an EMA."""
        if self.ema is None:
            return None
        pairs = zip(self.ema.tensors, self.groups["flow"])
        return [full_tensor(from_local(t, p), self.accelerator.is_main_process) for t, p in pairs]

    def resume(self, folder: Path) -> None:
        """Resume from the last checkpoint that is intact and fits; start from the beginning if there is none.

        Unusable checkpoints are named on stderr.
        """
        (paths,) = broadcast_object_list([saved_states(folder)])  # the main process's, in case a shared disk disagrees
        for path in paths:
            state, reason = self.try_read(path)
            reasons = [other for other in gather_object([reason]) if other is not None]
            if not reasons:
                assert state is not None
                self.load_state(state, path)
                return
            if self.accelerator.is_main_process:
                instead = "training starts from the beginning" if path == paths[-1] else "the one before it is tried"
                print(f"alignbench: {reasons[0]}; {instead}", file=sys.stderr, flush=True)

    def try_read(self, path: Path) -> tuple[Record | None, str | None]:
        """Return the state in ``path``, or why it is unusable. The main process verifies its hash for all ranks."""
        try:
            mapped = self.accelerator.device.type != "cpu"  # on a CPU mapped tensors would stay in the file
            state = read_state(path, verify=self.accelerator.is_main_process, mapped=mapped)
            self.check_fit(state, path)
        except (UserError, KeyError) as error:  # a key is missing if another version of this program wrote it
            return None, str(error) if isinstance(error, UserError) else f"{path}: has no {error}"
        return state, None

    def check_fit(self, state: Record, path: Path) -> None:
        """Raise UserError or KeyError unless ``load_state`` will succeed: it must not stop halfway."""
        check_shapes(self.parameters, state["flow"], path)
        check_shapes({} if self.ema is None else self.parameters, dict(zip(self.parameters, state["ema"] or ())), path)
        for name, module in self.modules.items():
            check_shapes(module.state_dict(), state["modules"][name], path)
        sizes = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        if sizes != [len(group) for group in self.groups.values()]:
            raise UserError(f"{path}: the optimizer's state is of other parameters")
        for name in ("step", "update", "method", "records"):
            state[name]

    def load_state(self, state: Record, path: Path) -> None:
        """Replace everything that a checkpoint holds by ``state``, read from ``path``."""
        flow = {name: shard_like(t, self.parameters[name]) for name, t in state["flow"].items()}
        copy_parameters(self.parameters, flow, path)
        self.weights.masters_to_network()
        if self.ema is not None:
            ema = zip(state["ema"], self.groups["flow"], strict=True)
            self.ema.reset([shard_like(t, p).to(p.device) for t, p in ema])
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        parameters = list(itertools.chain(*self.groups.values()))
        for i, values in state["optimizer"]["state"].items():
            values |= {name: shard_like(t, parameters[i]) for name, t in values.items() if name != "step"}
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.step, self.update, self.records = state["step"], state["update"], state["records"]
        self.drift = self.records[-1]["drift"] if self.records else None
        if self.accelerator.is_main_process and self.records:  # totals over ranks continue in the main process
            self.meter.load_state_dict({name: self.records[-1][name] for name in self.meter.state_dict()})

    def save_weights(self, path: Path) -> None:
        """Save the trained weights and their EMA, as they are now."""
        weights, ema = self.gather_shards(self.parameters), self.gather_ema()
        if self.accelerator.is_main_process:
            save_weights(weights, path, ema)
        self.accelerator.wait_for_everyone()


def require_finite_loss(loss: Loss, batch: Batch) -> None:
    """Raise UserError for a loss that is not finite, with the samples' values if they are known."""
    if torch.isfinite(loss.value):
        return
    values = [] if loss.per_sample is None or len(loss.per_sample) != len(batch) else loss.per_sample.tolist()
    bad = [f"{x} for prompt {p.id!r}" for p, x in zip(batch.prompts, values) if not math.isfinite(x)]
    listed = f" ({', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''})" if bad else ""
    raise UserError(f"the loss is {loss.value.item()}{listed}; lower optimizer.lr, or look at the reward")


class Mean:
    """A running weighted mean."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float, weight: float) -> None:
        self.total, self.weight = self.total + weight * value, self.weight + weight

    @property
    def value(self) -> float:
        return self.total / self.weight


def budget_share(budget: Budget, costs: Record, ranks: int = 1) -> float:
    """Return the share of ``budget`` that a record's totals have used: training ends at 1 or more."""
    used = {
        "images": costs.get("images", 0),
        "nfe": costs.get("nfe_forward", 0) + costs.get("nfe_grad", 0),
        "gpu_seconds": costs.get("seconds", 0.0) * ranks,
        "updates": costs.get("update", -1) + 1,
    }
    (kind,) = (name for name in used if getattr(budget, name) is not None)
    return used[kind] / getattr(budget, kind)
