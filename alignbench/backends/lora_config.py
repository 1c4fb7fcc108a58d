"""The strength of adapters, from what stands beside them and in their header: every key is honoured or refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from alignbench.config import UserError

METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's configuration in a safetensors header
STATE = "say the strength on the row: method.alpha, or method.scale (1 adds B A as it stands)"
# Keys of peft's LoraConfig. The first have a meaning here; the second change nothing once adapters are trained; the
# third must be off.
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias", "peft_type")
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
INERT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of the start, which init_lora_weights names
)
OFF = (
    *("fan_in_fan_out", "modules_to_save", "megatron_config", "trainable_token_indices", "use_dora", "velora_config"),
    *("alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "lora_bias"),
    *("target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying"),
)
KEEP_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # starts that leave the base as it is
TRAINER = {"lora_rank": "r", "lora_r": "r", "rank": "r", "alpha": "lora_alpha", "lora_target_modules": "target_modules"}
# Keys of a header, as trainers write them; sd-scripts' own only where there are no alphas among the tensors.
PLAIN = {"lora_alpha": "lora_alpha", "alpha": "lora_alpha", "network_alpha": "lora_alpha"}
PLAIN |= dict.fromkeys(("lora_rank", "rank", "r", "network_dim"), "r")
SD_SCRIPTS = {"ss_network_alpha": "lora_alpha", "ss_network_dim": "r"}
NO_STRENGTH = re.compile(r"(ss_|sshs_|modelspec\.).*")
STRENGTH = re.compile(r"alpha|scal|strength|multiplier|rank|lora|adapter|config", re.IGNORECASE)
DATA = (".json", ".yaml", ".yml", ".toml", ".ini", ".cfg")
TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
HARMLESS = (".index.json", "trainer_state.json")
STATES = re.compile(  # what trainers keep beside their adapters in order to resume
    r"(.*_)?(optimizer|scheduler|scaler|random_states|rng_state|sampler|training_args)([._-].*)?"
)


class Source(NamedTuple):
    """Statements of one place about adapters, under peft's keys. ``name``: the place, for errors."""

    name: str
    settings: Mapping[str, Any]


class Strength(NamedTuple):
    """The factor of B A for every layer, and whether anything says it."""

    factors: dict[str, float]
    stated: bool


def strengths(
    sources: Sequence[Source],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    path: Path,
    alpha: float | None = None,
    scale: float | None = None,
) -> Strength:
    """Return the factor of B A by layer: alpha / rank, or 1 if no place says alpha, as in diffusers.

    ``ranks``, ``alphas``: by layer, from the tensors in ``path``. ``alpha``, ``scale``: the row's, which decide. Raise
    UserError where places contradict each other or the tensors.
    """
    rooted = {bool(source.settings.get("use_rslora")) for source in sources}
    if len(rooted) > 1 and scale is None:
        raise UserError(f"{path}: {_both(sources)} differ in use_rslora; {STATE.replace('method.alpha, or ', '')}")
    if alpha is None and scale is None:
        _check_patterns(sources, ranks)
    root = rooted == {True}
    factors = {}
    for layer, rank in ranks.items():
        said = dict(_alphas(sources, layer, rank, required=alpha is None and scale is None))
        if layer in alphas:
            said[f"{layer}.alpha"] = alphas[layer]
        if alpha is None and scale is None:
            _check_agreement(path, layer, said, bool(alphas))
        value = alpha if alpha is not None else next(iter(said.values()), None)
        divisor = math.sqrt(rank) if root else rank
        factors[layer] = scale if scale is not None else 1.0 if value is None else value / divisor
    return Strength(factors, bool(sources or alphas) or alpha is not None or scale is not None)


def _check_patterns(sources: Sequence[Source], layers: Collection[str]) -> None:
    """Raise UserError for a pattern that fits no layer: whoever wrote it meant one."""
    for name, settings in sources:
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in settings.get(key) or ():
                if not any(_fits(pattern, layer) for layer in layers):
                    raise UserError(f"{name}: {key}: '{pattern}' fits no layer of the file; correct or remove it")


def _check_agreement(path: Path, layer: str, said: Mapping[str, float], others: bool) -> None:
    """Raise UserError if two places say different alphas for a layer, or none does while tensors of others have one."""
    if len(set(said.values())) > 1:
        detail = " and ".join(f"{value:g} in {name}" for name, value in said.items())
        raise UserError(f"{path}: the alpha of {layer} is {detail}; {STATE}")
    if not said and others:
        raise UserError(f"{path}: {layer} has no alpha while other layers have one; {STATE}")


def _both(sources: Sequence[Source]) -> str:
    return " and ".join(source.name for source in sources)


def _alphas(sources: Sequence[Source], layer: str, rank: int, required: bool) -> Iterator[tuple[str, float]]:
    """Yield what each source says is a layer's alpha. UserError for another rank than that of the tensors."""
    for name, settings in sources:
        said = _pattern(settings, "rank_pattern", layer, settings.get("r"))
        if said is not None and said != rank:
            raise UserError(f"{name}: the rank of {layer} is {said:g}, and its tensors have {rank}; is it their file?")
        value = _pattern(settings, "alpha_pattern", layer, settings.get("lora_alpha"))
        if value is not None:
            yield name, value
        elif required:
            raise UserError(f"{name}: there is no alpha in it; {STATE}")


def _pattern(settings: Mapping[str, Any], key: str, layer: str, default: Any) -> Any:
    """Return a layer's value in one of peft's patterns, found as peft does."""
    patterns = settings.get(key) or {}
    found = next((name for name in patterns if _fits(name, layer)), None)
    return default if found is None else patterns[found]


def _fits(pattern: str, layer: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def check_targets(source: Source, adapted: Collection[str], layers: Collection[str]) -> None:
    """Raise UserError unless the adapted layers are those of ``layers`` that a configuration's targets mean."""
    settings = source.settings
    if not settings.get("target_modules"):
        return
    try:
        meant = {layer for layer in layers if _targets(settings)(layer)}
    except (re.error, TypeError, ValueError) as error:
        said = {key: settings[key] for key in TARGETS if settings.get(key)}
        raise UserError(f"{source.name}: {_short(said)} cannot be read: {error}; correct it, or leave it out") from None
    if lacking := sorted(meant - set(adapted)):
        what = f"target_modules mean {lacking[0]} and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        what = what or f"target_modules mean {lacking[0]}"
        raise UserError(f"{source.name}: {what}, for which the file has no adapters; is the file complete?")
    if more := sorted(set(adapted) - meant):
        raise UserError(f"{source.name}: the file has adapters of {more[0]}, which target_modules do not mean")


def _targets(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return peft's own decision whether a configuration means a layer."""
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen = dict.fromkeys(TARGETS) | {key: settings.get(key) for key in TARGETS}
    if chosen["target_modules"] == "all-linear":
        chosen["target_modules"] = ".*"
    config = SimpleNamespace(**chosen, target_parameters=None)
    return lambda layer: bool(check_target_module_exists(config, layer))


# -- where it is said -------------------------------------------------------------------------------------------------


def sources(
    files: Sequence[Path], path: Path, metadata: Mapping[str, str], tensors_say: bool, decided: bool
) -> list[Source]:
    """Return what the files beside the adapters in ``path`` and its header say. UserError for what cannot be honoured.

    ``tensors_say``: alphas are among the tensors. ``decided``: the row says the strength.
    """
    found = []
    for file in files:
        if file.name in ("adapter_config.json", "lora_config.json"):
            content = _mapping(file.read_text(encoding="utf-8"), str(file))
            found.append(
                Source(str(file), _trainers(content, str(file)) if file.name == "lora_config.json" else content)
            )
    if METADATA in metadata:
        place = f"{path}: {METADATA}"
        settings = _mapping(metadata[METADATA], place)
        if others := sorted(key for key in settings if key.startswith("text_encoder")):
            raise UserError(f"{place}: {others[0]}: {TEXT_ENCODER}")
        found.append(Source(place, _renamed(settings.items(), lambda key: key.removeprefix("transformer."), place)))
    plain = {} if decided else PLAIN if tensors_say else PLAIN | SD_SCRIPTS
    said = {key: _number(path, key, value) for key, value in metadata.items() if key in plain}
    rank = _renamed([item for item in said.items() if plain[item[0]] == "r"], lambda _: "r", f"{path}: its header")
    alphas = [key for key in said if plain[key] == "lora_alpha"]
    found += [Source(f"{path}: its header's {key}", {"lora_alpha": said[key], **rank}) for key in alphas]
    for source in found:
        _check_keys(source, decided)
    return found


TEXT_ENCODER = "adapters of a text encoder are not loaded; every row has the base model's prompts encoded alike"


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected keys and values, got a {type(content).__name__}")
    return content


def _trainers(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a trainer's lora_config.json under peft's keys; unknown ones stay as they are, to be refused."""
    inner = content.get("lora_params", {})
    if not isinstance(inner, dict):
        raise UserError(f"{where}: lora_params is {_short(inner)}, not keys and values")
    outer = {key: value for key, value in content.items() if key not in ("step", "lora_params")}
    return _renamed([*outer.items(), *inner.items()], lambda key: TRAINER.get(key, key), where)


def _renamed(settings: Iterable[tuple[str, Any]], name: Callable[[str], str], where: str) -> dict[str, Any]:
    """Return settings under other names. UserError if two of them say different things under one."""
    renamed: dict[str, Any] = {}
    for key, value in settings:
        if (other := renamed.setdefault(name(key), value)) != value:
            raise UserError(f"{where}: {name(key)} is {_short(other)} and, again, {_short(value)}; keep one of them")
    return renamed


def _number(path: Path, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{path}: {key} in its header is {value!r}, not a number; {STATE}") from None


def _check_keys(source: Source, decided: bool) -> None:
    """Raise UserError for the first key that cannot be honoured. ``decided``: alphas are not needed."""
    name, settings = source
    for key, value in settings.items():
        if key in OFF and value:
            raise UserError(f"{name}: {key} is {_short(value)}, which is not read; merge these adapters into the model")
        if key not in (*READ, *TARGETS, *INERT, *OFF) and value is not None:
            raise UserError(f"{name}: the key {key} ({_short(value)}) is unknown; remove it if it changes nothing")
    if (kind := settings.get("peft_type") or "LORA") != "LORA":
        raise UserError(f"{name}: peft_type is {kind}; only LORA is read; merge these adapters into the model")
    if (bias := settings.get("bias") or "none") != "none":
        raise UserError(f"{name}: bias is {bias}: the model's biases were trained, too; merge these adapters into it")
    start = settings.get("init_lora_weights")
    if str(start).lower() not in KEEP_BASE:
        raise UserError(
            f"{name}: init_lora_weights is {start}, which changes the base model as well; save the adapters with "
            "peft's path_initial_model_for_weight_conversion, or merge them into the model"
        )
    if (rooted := settings.get("use_rslora")) not in (None, True, False):
        raise UserError(f"{name}: use_rslora is {_short(rooted)}, neither true nor false; write one of them")
    numbers = {key: settings.get(key) for key in ("r", "lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{name}: {key} is {_short(pattern)}, not values by layer")
        for layer in pattern:
            _check_regex(name, key, layer)
        numbers |= {f"{key}.{layer}": value for layer, value in pattern.items()}
    for key, value in numbers.items():
        fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if value is not None and not fine and not (decided and "alpha" in key.split(".")[0]):
            raise UserError(f"{name}: {key} is {_short(value)}, not a positive number; {STATE}")


def _check_regex(name: str, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name}: {key}: {pattern!r} is not a regular expression: {error}") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def check_companions(
    folder: Path, files: Sequence[Path], metadata: Mapping[str, str], named: bool, decided: bool
) -> None:
    """Raise UserError for data beside adapters, or in their header, that may concern them and is not read.

    ``named``: the row names their file, so that other weights in the folder are not its. ``decided``: the row says the
    strength.
    """
    for path in sorted(folder.iterdir()):
        read = path in files and not _of_trainer(path)
        if read or not path.is_file() or path.name.startswith(".") or path.name.endswith(HARMLESS):
            continue
        if path.suffix.lower() in DATA and not decided and not _sweep(path):
            what = "is unknown, and may say how strong they are"
            raise UserError(f"{path} stands beside adapters and {what}; {STATE}, or remove it")
        if path.suffix.lower() in TENSORS and not STATES.fullmatch(path.name) and not named:
            raise UserError(f"{path} stands beside adapters and is not read; name their file as method.file")
    for key in metadata:
        known = key in (*PLAIN, METADATA) or NO_STRENGTH.fullmatch(key)
        if not known and STRENGTH.search(key):
            what = f"its header has the unknown key {key} ({_short(metadata[key])})"
            raise UserError(f"{folder}: {what}, which may say how strong the adapters are; {STATE}")


def _sweep(path: Path) -> bool:
    """Return True for a sweep file of this package."""
    yaml = path.suffix in (".yaml", ".yml")
    return yaml and bool(
        re.search(r"^(cases|extends):", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    )


def _of_trainer(path: Path) -> bool:
    """Return True for a config.json that is not a transformer's, whose settings ``check_config`` compares."""
    return path.name == "config.json" and "_class_name" not in _mapping(path.read_text(encoding="utf-8"), str(path))
