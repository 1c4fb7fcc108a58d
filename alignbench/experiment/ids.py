"""Ids of runs, image sets and scores, computed from their content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec import structs

from alignbench.config import UserError, did_you_mean, settings
from alignbench.digests import content_id, fingerprint
from alignbench.evaluator import Evaluator, Term
from alignbench.experiment.spec import Protocol, RunSpec
from alignbench.method import AlignMethod
from alignbench.plugins import Builder, Registry
from alignbench.prompts import Prompt
from alignbench.prompts import digest as prompts_digest


class Parts(NamedTuple):
    """Backend, method and rewards of a run, built from its settings."""

    backend: Any
    method: AlignMethod
    rewards: tuple[Term, ...]


def build(spec: RunSpec, registry: Registry | Builder) -> Parts:
    """Build the backend, the method and the rewards of a run."""
    rewards = (
        Term(registry.make("evaluator", part["evaluator"], "reward.evaluator"), part["margin"], part["weight"])
        for part in spec.rewards
    )
    backend = registry.make("backend", spec.backend, "backend")
    return Parts(backend, registry.make("method", spec.method, "method"), tuple(rewards))


def run_id(spec: RunSpec, parts: Parts, registry: Registry, prompts: Sequence[Prompt]) -> str:
    """Hash everything that determines the weights, so not the label. ``prompts``: those of ``spec.prompts``.

    All methods that train nothing and bring no files share one id per backend, because their weights are the same.
    """
    backend, method = parts.backend, parts.method
    described = {key: value for key, value in spec.backend.items() if key != "embeddings"}  # they change no result
    for name, default in (("compile", False), ("attention", "native")):  # omitted, so that older ids stay valid
        if described.get(name) == default:
            del described[name]
    files = method.files()
    brought: dict[str, Any] = {"method files": fingerprint(files)} if files else {}
    if not method.trains:
        training_only = set(getattr(backend, "training_only", ()))
        sampled = {key: value for key, value in described.items() if key not in training_only}
        if files:
            omitted = {name for name in getattr(method, "omitted_unset", ()) if spec.method.get(name) is None}
            brought["method"] = {key: value for key, value in spec.method.items() if key not in {"steps", *omitted}}
            brought["method source"] = registry.source("method", spec.method["name"])
        return content_id({"backend": sampled, "backend files": fingerprint(backend.files()), **brought})
    rewards = [
        {
            "reward": evaluator_content(term.evaluator, registry, term.evaluator.unhashed),
            "margin": term.margin,
            "weight": term.weight if len(parts.rewards) > 1 else 1.0,
        }
        for term in parts.rewards
    ]
    training = settings(spec.training)
    for name in ("checkpoint_every", "keep", "drift_every"):  # they change no weight
        del training[name]
    for name in (
        "milestones",
        "reward_slice",
        "ema_on_host",
    ):  # defaults are omitted, so that older ids stay valid
        if not training[name]:
            del training[name]
    for name in ("weights", "moments"):
        if training["optimizer"][name] == "float32":
            del training["optimizer"][name]
    content = {
        "backend": described,
        "backend files": fingerprint(backend.files()),
        "method": spec.method,
        "method source": registry.source("method", spec.method["name"]),
        "rewards": rewards,
        "prompts": prompts_digest(prompts),
        "training": training,
        **brought,
    }
    return content_id(content)


def image_set_id(
    run: str, trains: bool, protocol: Protocol, prompts: Sequence[Prompt], update: int | None = None
) -> str:
    """Hash the run id and everything else that determines the images. ``prompts``: those of ``protocol.prompts``.

    ``update``: the milestone at which the weights were kept; None: the end of training.
    """
    content = settings(protocol) | {"run": run, "prompts": prompts_digest(prompts)}
    if protocol.tuned_steps is None:  # the default is omitted, so that older ids stay valid
        del content["tuned_steps"]
    if update is not None:
        content["update"] = update
    if not trains:  # weights that never change have no average
        del content["weights"]
    return content_id(content)


BASE = "base"  # the method that trains nothing


def base_of(
    spec: RunSpec, parts: Parts, protocol: Protocol, registry: Registry | Builder
) -> tuple[RunSpec, Parts, Protocol]:
    """Return the untrained model's run (spec, parts) and the protocol of its images, paired with those of ``spec``."""
    method = registry.make("method", {"name": BASE}, "method")
    base = structs.replace(spec, label=BASE, method=settings(method))
    return base, parts._replace(method=method), structs.replace(protocol, tuned_steps=None)


def score_content(evaluator: Evaluator, registry: Registry) -> dict[str, Any]:
    """Return everything that determines an evaluator's scores of given images."""
    return evaluator_content(evaluator, registry, [*evaluator.unhashed, *evaluator.reward_only])


def evaluator_content(evaluator: Evaluator, registry: Registry, unhashed: Sequence[str]) -> dict[str, Any]:
    """Return an evaluator's settings and files. Settings in ``unhashed`` have their defaults: they change nothing."""
    plain = settings(evaluator)
    defaults = {field.name: None if field.required else field.default for field in structs.fields(evaluator)}
    if wrong := next((name for name in unhashed if name not in defaults), None):
        raise UserError(f"{evaluator.name}: unhashed: there is no setting '{wrong}'{did_you_mean(wrong, defaults)}")
    return {
        "settings": plain | {name: defaults[name] for name in unhashed},
        "version": evaluator.version,
        "files": fingerprint(evaluator.files()),
        "source": registry.source("evaluator", evaluator.name),
    }
