"""Weight files: finding them by name (packaged, folder, file, hub cache), checking and loading them.

Checks read headers only, without torch, so that a broken file is found before any model is loaded. ``where`` arguments
name the setting in errors.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.config import Config, Missing, Requirement, UserError, cache, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


TRUST = "ALIGNBENCH_TRUST"  # environment variable: the sha256 of a file whose pickled code may run
SHAPES = Path(__file__).parent / "shapes" / "assets"
STABLE, SINGLE = "Stability AI Community", "`--exclude '*.fp16*' 'sd3*.safetensors' 'text_encoders/*'`"
BLACK_FOREST, KLEIN = "FLUX non-commercial", "`--exclude 'flux-2-klein*.safetensors'`"
GATED = {  # repositories that ask for consent on their page before anything can be fetched
    name: f"gated: accept the {licence} licence at https://huggingface.co/{name}, then `hf auth login`; {spare}"
    for name, licence, spare in (
        (
            "black-forest-labs/FLUX.1-dev",
            "FLUX.1 [dev] non-commercial",
            "`--exclude flux1-dev.safetensors` saves 24 GB that are not read",
        ),
        ("stabilityai/stable-diffusion-3-medium-diffusers", STABLE, f"{SINGLE} skips what is not read"),
        ("stabilityai/stable-diffusion-3.5-medium", STABLE, f"{SINGLE} skips what is not read"),
        ("stabilityai/stable-diffusion-3.5-large", STABLE, f"{SINGLE} skips what is not read"),
        ("black-forest-labs/FLUX.2-klein-base-9B", BLACK_FOREST, f"{KLEIN} saves 18 GB that are not read"),
        ("black-forest-labs/FLUX.2-klein-9B", BLACK_FOREST, f"{KLEIN} saves 18 GB that are not read"),
    )
}
BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of torch.save's format before 1.6 (OpenMMLab)


def absent(config: Config) -> list[Requirement]:
    """Return the requirements of ``config`` that are not on this machine."""
    return [required for required in config.requirements() if required.found is None]


def locate(
    name: str, where: str, *, shapes: str | None = None, revision: str | None = None, files: Sequence[str] = ()
) -> Path:
    """Return the folder or file that ``name`` means; arguments as for ``requirement``. Raise UserError if absent."""
    return requirement(name, where, shapes=shapes, revision=revision, files=files).path


def requirement(
    name: str, where: str, *, shapes: str | None = None, revision: str | None = None, files: Sequence[str] = ()
) -> Requirement:
    """Return the requirement that ``name`` stands for: a path, a hub id, or the alias "shapes".

    ``shapes``: the packaged folder or file that the alias means; None: there is no alias. A hub id is looked up in the
    hub's cache and never downloaded; ``revision``: of it; ``files``: those to fetch, if the repository holds much else.
    Raise UserError for a name that is none of these.
    """
    path = SHAPES / shapes if name == "shapes" and shapes else Path(name).expanduser()
    if _exists(path):
        return Requirement(name, found=path)
    if name == "shapes" and shapes:
        raise UserError(
            f"{where}: the packaged file {path} is missing; make it with `python -m alignbench.shapes.build`"
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        choices = "a path, a hub id, or 'shapes'" if shapes else "a path or a hub id"
        raise Missing(f"{where}: there is no file or folder '{name}'; give {choices}")
    command = " ".join(["hf download", name, *files, *(["--revision", revision] if revision else [])])
    text = f"{where}: '{name}' is neither a path nor in the hub cache; fetch it once with `{command}`, or give a folder"
    return Requirement(name, text, command, GATED.get(name, ""), _cached(name, revision))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the repository's folder in the hub's cache; None if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is both, HFValidationError a ValueError
        return None


def check(files: Iterable[Path], where: str) -> list[Path]:
    """Return ``files``, sorted. Raise UserError for the first that is missing or not what its suffix says.

    .json files are parsed; .safetensors, .pt, .pth and .bin files are checked for truncation; others must not be empty.
    """
    ordered = sorted(files)
    for path in ordered:
        try:
            _CHECKS.get(path.suffix, _readable)(path)
        except FileNotFoundError:
            raise Missing(f"{where}: {path} is missing") from None
        except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{where}: {path} cannot be read: {reason}") from None
    return ordered


def _readable(path: Path) -> None:
    with path.open("rb") as file:
        if not file.read(1):
            raise ValueError("the file is empty")


def _json(path: Path) -> None:
    _readable(path)
    json.loads(path.read_text(encoding="utf-8"))


class Header(NamedTuple):
    """The header of a safetensors file: its tensors by name, and free text by key."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


class Stored(NamedTuple):
    """A tensor in a file: safetensors' name of its dtype ("F32", "BF16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


def header(path: Path) -> Header:
    """Return the header of a safetensors file. Raise ValueError unless it is complete and the file is as long as it."""
    _readable(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("not a safetensors file, or a truncated one")
        entries = json.loads(file.read(length))
    try:
        metadata = entries.pop("__metadata__", {})
        tensors = {name: Stored(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError("its header is not that of a safetensors file") from None
    if size != end:
        raise ValueError(f"truncated: {size} bytes instead of {end}")
    return Header(tensors, metadata)


def stored(files: Iterable[Path], where: str) -> dict[str, Stored]:
    """Return the tensors of checked weight files by name, from their headers; others are skipped.

    Raise UserError for a name that two files have.
    """
    found: dict[str, Stored] = {}
    for path in sorted(files):
        if path.suffix not in (".safetensors", ".bin"):
            continue
        tensors = header(path).tensors if path.suffix == ".safetensors" else _pickled(path, where)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{where}: {path}: {twice[0]} is in another file, too; keep one of them")
        found |= tensors
    return found


def _pickled(path: Path, where: str) -> dict[str, Stored]:
    """Return the tensors of a torch.save file, whose data is not read."""
    return {name: Stored(str(t.dtype), tuple(t.shape)) for name, t in load(path, where, "meta").items()}


def _torch_zip(path: Path) -> None:
    """Raise ValueError for a truncated torch.save file: a zip archive has its directory at the end.

    The format before torch 1.6 is known by its first bytes; its end shows nothing.
    """
    _readable(path)
    with path.open("rb") as file:
        if file.read(len(BEFORE_ZIP)) == BEFORE_ZIP:
            return
    if not zipfile.is_zipfile(path):
        raise ValueError("not a torch.save zip archive, or a truncated one")
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise ValueError("a zip archive without data.pkl is not a torch.save file")


_CHECKS = {".json": _json, ".safetensors": header, ".pt": _torch_zip, ".pth": _torch_zip, ".bin": _torch_zip}


def model_files(folder: Path, where: str) -> list[Path]:
    """Return configuration and weights of one transformers or diffusers folder, checked.

    Every shard that an index names is included. Raise UserError if there are no weights, or a file cannot be read.
    """
    weights = {path for path in folder.glob("*.safetensors") if ".fp16" not in path.name} or set(folder.glob("*.bin"))
    for index in check(folder.glob("*.index.json"), where):
        weights |= _shards(index, where)
    if not weights:
        raise UserError(f"{where}: {folder} has no weights (*.safetensors)")
    return check({folder / "config.json"} | set(folder.glob("*.json")) | weights, where)


def _shards(index: Path, where: str) -> set[Path]:
    """Return the files that an index names, checked.

    Raise UserError if it names none, or if a file has fewer or more tensors than the index says. Not so for
    transformers' index, which may list tied weights that no file has: there the model's class decides.
    """
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
        files = {name: index.parent / name for name in places.values()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{where}: {index} lists no weight files (weight_map); fetch it again") from None
    check(files.values(), where)
    for name, path in sorted(files.items()):
        if path.suffix != ".safetensors" or index.name == "model.safetensors.index.json":
            continue
        listed, present = {tensor for tensor, file in places.items() if file == name}, header(path).tensors.keys()
        if lacking := sorted(listed - present):
            raise UserError(f"{where}: {path} lacks {_named(lacking)}, which {index.name} says it has; fetch it again")
        if more := sorted(present - listed):
            raise UserError(f"{where}: {path} has {_named(more)}, which {index.name} does not list; fetch both again")
    return set(files.values())


def _named(tensors: Sequence[str]) -> str:
    """Return the first tensor's name, with the number of the others."""
    return tensors[0] + f" and {len(tensors) - 1} more" * (len(tensors) > 1)


CONFIGS = ("config.json", "adapter_config.json", "lora_config.json")  # of a transformer, of peft's and trainers' LoRA


def published(
    name: str, where: str, *, revision: str | None = None, subfolder: str | None = None, file: str | None = None
) -> list[Path]:
    """Return the safetensors files of one network with its configuration, checked.

    ``name``: as for ``locate``; a file, or a folder with the one file or the shards of a network. ``subfolder``: below
    it. ``file``: the one of several, or their index. Raise UserError for no network, for several, and for a file that
    cannot be read.
    """
    place = locate(name, where, shapes="model", revision=revision)
    if subfolder is not None:
        place /= subfolder
    if file is not None:
        place = _one_file(place, file, where)
    folder = place.parent if place.is_file() else place
    if place.name.endswith(".safetensors.index.json"):
        return check(_shards(place, where) | _configs(folder), where)
    weights = {place} if place.is_file() else _one_network(place, where)
    if odd := [path.name for path in weights if path.suffix != ".safetensors"]:
        raise UserError(f"{where}: {odd[0]} is not a safetensors file; convert it, nothing else is read")
    return check(weights | _configs(folder), where)


def _configs(folder: Path) -> set[Path]:
    """Return the configurations in a folder."""
    return {folder / config for config in CONFIGS if (folder / config).is_file()}


def _one_file(folder: Path, file: str, where: str) -> Path:
    """Return a file in a folder. Raise UserError, with the folder's weights, if there is none."""
    if not (folder / file).is_file():
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
        raise Missing(f"{where}: {folder} has no file '{file}'{did_you_mean(file, names, 'weights')}")
    return folder / file


def _one_network(folder: Path, where: str) -> set[Path]:
    """Return the weight files in a folder. Raise UserError unless they are those of exactly one network."""
    indices = check(folder.glob("*.safetensors.index.json"), where)
    shards = set[Path]().union(*(_shards(index, where) for index in indices))
    alone = set(folder.glob("*.safetensors")) - shards
    if len(indices) + len(alone) == 1:
        return shards | alone
    if alone or indices:
        names = ", ".join(sorted(path.name for path in [*indices, *alone]))
        what = f"{folder} has the weights of several networks ({names})"
        raise UserError(f"{where}: {what}; name one file, for instance as method.file")
    below = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    known = f"choose the subfolder {' or '.join(below)}" if below else "name the folder or the file that has them"
    raise UserError(f"{where}: {folder} has no weights (*.safetensors); {known}")


def load(path: Path, where: str, device: str = "cpu") -> dict[str, Any]:
    """Return the content of a torch.save file: tensors and plain data.

    ``device``: where tensors go; on "meta" they have shapes but no data, and are not read.

    Raise UserError if the file holds other objects, since loading them can run code. Setting the environment variable
    ALIGNBENCH_TRUST to the file's sha256 allows it for this one file.
    """
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if os.environ.get(TRUST) == digest:
        return torch.load(path, map_location=device, weights_only=False)
    what = f"holds more than tensors and plain data, and reading that runs its code; if you trust it: {TRUST}={digest}"
    raise UserError(f"{where}: {path} {what}")


def fill(model: Any, state: Mapping[str, Any], path: Path, where: str, assign: bool = False) -> None:
    """Load ``state`` into ``model``. Raise UserError that names missing, unexpected and misshapen entries.

    ``path``: the file of ``state``, for the error. ``assign``: as in ``load_state_dict``.
    """
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise UserError(f"{where}: {path} is not this architecture: {' '.join(str(error).split())}") from None


def pretrained(cls: Any, folder: Path, where: str, dtype: Any) -> Any:
    """Return a frozen transformers model of class ``cls`` in evaluation mode, with every weight from ``folder``.

    Raise UserError if a weight is missing or left over.
    """
    with quiet():
        model, info = cls.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    wrong = {what: sorted(info[what]) for what in ("missing_keys", "unexpected_keys") if info[what]}
    if wrong:  # transformers would continue with random weights
        raise UserError(f"{where}: {folder} does not hold this model: {wrong}")
    return model.eval().requires_grad_(False)


def check_complete(library: str, name: str, folder: Path, where: str) -> None:
    """Raise UserError, with file and tensor, unless ``folder`` has exactly the tensors of a network, in their shapes.

    ``library``, ``name``: the module and the class that would load it, as in ``model_index.json``. Decided by the class
    itself, on the meta device, without reading data: it knows old names, and what may be absent because it is tied.
    What was found complete is noted in the cache, so that it is built once for all.
    """
    files = model_files(folder, where)
    tensors = stored(files, where)
    if odd := sorted(n for n, t in tensors.items() if t.dtype in INTEGERS and n.endswith((".weight", ".bias"))):
        what = f"{_named(odd)} is {tensors[odd[0]].dtype}"
        raise UserError(f"{where}: {folder}: {what}: quantized weights are not read; fetch the original ones")
    versions = [version(package) for package in ("diffusers", "transformers")]
    text = json.dumps([library, name, versions, sorted(tensors.items())])
    text += (folder / "config.json").read_text(encoding="utf-8")
    mark = cache() / "complete" / hashlib.sha256(text.encode()).hexdigest()[:20]
    if mark.exists():
        return
    wrong = _misfits(library, name, folder, tensors)
    if wrong:
        indices = [path for path in files if path.name.endswith(".index.json")]
        file = next(iter([*indices, *(path for path in files if path.suffix in (".safetensors", ".bin"))]))
        raise UserError(f"{where}: {file}: {wrong}; {name} would be used with other weights; fetch the file again")
    with suppress(OSError):  # a cache that cannot be written costs time only
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")


def _misfits(library: str, name: str, folder: Path, tensors: Mapping[str, Stored]) -> str:
    """Return which tensors are missing, unexpected or misshapen; "" if none."""
    import torch

    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    dtype = kinds.get(next((tensor.dtype for tensor in tensors.values()), ""), torch.float32)
    everywhere: Any = "meta" if library == "transformers" else {"": "meta"}
    chosen = {"device_map": everywhere, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    chosen |= {"ignore_mismatched_sizes": True} if library == "transformers" else {}  # then they are listed
    try:
        with quiet(), unheard():
            _, info = getattr(importlib.import_module(library), name).from_pretrained(folder, **chosen)
    except (RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        shape = r"([\[(][\d, ]*[\])])"
        found = re.search(rf"because (\S+) expected shape .*?{shape}.*?got .*?{shape}", text)
        return f"has {found[1]} in the shape {found[3]} instead of {found[2]}" if found else text
    reshaped = [
        f"{key} in the shape {list(has)} instead of {list(needs)}" for key, has, needs in info["mismatched_keys"]
    ]
    wrong = {"lacks": info["missing_keys"], "has the unknown": info["unexpected_keys"], "has": reshaped}
    return next((f"{what} {_named(sorted(keys))}" for what, keys in wrong.items() if keys), "")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers within a ``with`` block; they would bury our own."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    shown = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@contextmanager
def unheard() -> Iterator[None]:
    """Hide the warnings of diffusers and transformers within a ``with`` block; what they say becomes our error."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [(library, library.get_verbosity()) for library in (diffusers, transformers)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)


def copy_parameters(into: Mapping[str, Tensor], stored: dict[str, Tensor], where: Path) -> None:
    """Copy ``stored`` into the tensors of ``into``, in place. Raise UserError unless names and shapes are equal."""
    import torch

    check_shapes(into, stored, where)
    with torch.no_grad():
        for name, p in into.items():
            p.copy_(stored[name])


def check_published(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless the headers of published weights have exactly the tensors of a network.

    ``shapes``: of the network's tensors by name.
    """
    path = next(path for path in files if path.suffix == ".safetensors")
    found = stored(files, "method.weights")
    if any(".lora_" in name or "lora_unet" in name for name in found):
        raise UserError(f"{path}: these are adapters, not a transformer; choose method.kind: lora")
    if beside := [path for path in files if path.name in CONFIGS[1:]]:
        raise UserError(f"{beside[0]} stands beside these weights, as beside adapters; choose method.kind: lora")
    if quantized := sorted(name for name, tensor in found.items() if tensor.dtype in INTEGERS):
        raise UserError(f"{path}: {quantized[0]} is {found[quantized[0]].dtype}: quantized weights are not read")
    _compare({name: tensor.shape for name, tensor in found.items()}, shapes, path)


def _compare(file: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise UserError unless names and shapes are equal."""
    if odd := sorted(name for name in model.keys() | file.keys() if model.get(name) != file.get(name)):
        detail = f"{odd[0]} is {file.get(odd[0], 'absent')} in the file and {model.get(odd[0], 'absent')} in the model"
        advice = next((advice for part, advice in ELSEWHERE.items() if any(part in name for name in file)), "")
        advice = advice or "is it the same backend?"
        raise UserError(f"{where}: {len(odd)} parameters do not fit the model ({detail}); {advice}")


SINGLE_FILE = "convert the file with diffusers: from_single_file(FILE).save_pretrained(FOLDER)"
ELSEWHERE = {  # parts of names in single files, as Black Forest Labs and Stability AI publish them
    "double_blocks.": f"these are Black Forest Labs' own names; {SINGLE_FILE}",
    "joint_blocks.": f"these are Stability AI's own names; {SINGLE_FILE}",
    "base_model.model.": "these are peft's names; merge the adapters (merge_and_unload) and save the model",
}


def check_shapes(into: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: Path) -> None:
    """Raise UserError unless names and shapes are equal. ``where``: the file, for the error."""
    model = {name: tuple(p.shape) for name, p in into.items()}
    _compare({name: tuple(t.shape) for name, t in stored.items()}, model, where)
