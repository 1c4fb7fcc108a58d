"""Weight files: finding them by name (packaged, folder, file, hub cache), checking and loading them.

Checks read headers only, without torch, so that a broken file is found before any model is loaded. ``where`` arguments
name the setting in errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import Config, Missing, Requirement, UserError

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


def _safetensors(path: Path) -> None:
    """Raise ValueError unless the header is complete and the file is as long as the header says."""
    _readable(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("not a safetensors file, or a truncated one")
        header = json.loads(file.read(length))
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ValueError("its header does not list tensors") from None
    if size != 8 + length + max(ends, default=0):
        raise ValueError(f"truncated: {size} bytes instead of {8 + length + max(ends, default=0)}")


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


_CHECKS = {".json": _json, ".safetensors": _safetensors, ".pt": _torch_zip, ".pth": _torch_zip, ".bin": _torch_zip}


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
    """Return the files that an index names. Raise UserError if it names none."""
    try:
        return {index.parent / shard for shard in json.loads(index.read_text())["weight_map"].values()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: {index} lists no weight files (weight_map); fetch it again") from None


CONFIGS = ("config.json", "adapter_config.json")  # of a transformer, of peft's adapters


def published(name: str, where: str, *, revision: str | None = None, subfolder: str | None = None) -> list[Path]:
    """Return the safetensors files of one network with its configuration, checked.

    ``name``: as for ``locate``; a file, or a folder with the one file or the shards of a network. ``subfolder``: below
    it. Raise UserError for no network, for several, and for a file that cannot be read.
    """
    place = locate(name, where, shapes="model", revision=revision)
    if subfolder is not None:
        place /= subfolder
    folder = place.parent if place.is_file() else place
    weights = {place} if place.is_file() else _one_network(place, where)
    if odd := [path.name for path in weights if path.suffix != ".safetensors"]:
        raise UserError(f"{where}: {odd[0]} is not a safetensors file; convert it, nothing else is read")
    return check(weights | {folder / config for config in CONFIGS if (folder / config).is_file()}, where)


def _one_network(folder: Path, where: str) -> set[Path]:
    """Return the weight files in a folder. Raise UserError unless they are those of exactly one network."""
    indices = check(folder.glob("*.safetensors.index.json"), where)
    shards = set[Path]().union(*(_shards(index, where) for index in indices))
    alone = set(folder.glob("*.safetensors")) - shards
    if len(indices) + len(alone) == 1:
        return shards | alone
    if alone or indices:
        names = ", ".join(sorted(path.name for path in [*indices, *alone]))
        raise UserError(f"{where}: {folder} has the weights of several networks ({names}); name one file")
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


def copy_parameters(into: Mapping[str, Tensor], stored: dict[str, Tensor], where: Path) -> None:
    """Copy ``stored`` into the tensors of ``into``, in place. Raise UserError unless names and shapes are equal."""
    import torch

    check_shapes(into, stored, where)
    with torch.no_grad():
        for name, p in into.items():
            p.copy_(stored[name])


def check_shapes(into: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: Path) -> None:
    """Raise UserError unless names and shapes are equal. ``where``: the file, for the error."""
    model = {name: tuple(p.shape) for name, p in into.items()}
    file = {name: tuple(t.shape) for name, t in stored.items()}
    if odd := sorted(name for name in model.keys() | file.keys() if model.get(name) != file.get(name)):
        detail = f"{odd[0]} is {file.get(odd[0], 'absent')} in the file and {model.get(odd[0], 'absent')} in the model"
        raise UserError(f"{where}: {len(odd)} parameters do not fit the model ({detail}); is it the same backend?")
