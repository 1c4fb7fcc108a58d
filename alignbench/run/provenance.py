"""The code, packages, files and machine that made an artefact: recorded beside it, and part of no id.

Git is queried where a sweep is started (``code``), and the answer is passed to the workers as plain data, since they
may run from a copy of the code outside any checkout.
"""

from __future__ import annotations

import functools
import getpass
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignbench.digests import file_digest, fingerprint
from alignbench.plugins import Registry, digest
from alignbench.run import code_snapshot
from alignbench.store.files import read_json, write, write_json

FILE, PATCH = "provenance.json", "dirty.patch"  # in a run's folder
TRACKED = ("alignbench", "methods", "evaluators", "reports", "sweeps", "pyproject.toml")  # the code in a checkout
PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch"),
    *("flash_attn", "kernels", "sageattention", "xformers"),
    *("safetensors", "tokenizers", "numpy", "scipy", "pandas", "pyarrow", "pillow", "msgspec", "submitit"),
)
SLURM = {
    "job": "SLURM_JOB_ID",
    "array_job": "SLURM_ARRAY_JOB_ID",
    "array_task": "SLURM_ARRAY_TASK_ID",
    "partition": "SLURM_JOB_PARTITION",
    "restarts": "SLURM_RESTART_COUNT",
    "nodes": "SLURM_JOB_NODELIST",
}


# -- code -------------------------------------------------------------------------------------------------------------


def code(plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Return facts about the running code as plain data, computed once per process.

    ``digest`` of all its files; for a git checkout also ``revision``, ``diff`` (text, "" for none) and ``untracked``
    {file: sha256}, each None if git gives no answer; ``plugins`` {sha256: path as given}.
    """
    given = {digest(Path(path)): str(Path(path).resolve()) for path in plugins}
    return _code(Path(__file__).parents[2]) | {"plugins": given}


@functools.cache
def _code(root: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"digest": code_snapshot.digest(code_snapshot.package())}
    facts |= {"snapshot": code_snapshot.running(), "revision": None, "diff": None, "untracked": None}
    if (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or not this user's checkout
            facts["revision"] = _git(root, "rev-parse", "HEAD").strip()
            facts["diff"] = _git(root, "diff", "HEAD", "--no-ext-diff", "--no-color", "--", *_tracked(root))
            new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *_tracked(root))
            code_files = [name for name in new.split("\0") if name.endswith((".py", ".yaml"))]
            facts["untracked"] = {name: file_digest(root / name) for name in code_files}
    return facts


def _git(root: Path, *words: str) -> str:
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}  # ignores a repository further up
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True, env=environment)
    return done.stdout.decode("utf-8", "replace")


def _tracked(root: Path) -> list[str]:
    return [name for name in TRACKED if (root / name).exists()]


def installed(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- makers -----------------------------------------------------------------------------------------------------------


def made_by(code: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that are recorded beside every image set and score file. ``code``: as returned by ``code()``."""
    return {
        "time": _time(time.time()),
        "host": platform.node(),
        "alignbench": installed("alignbench"),
        "revision": code["revision"],
        "dirty": dirty(code),
        "code": code["digest"],
        "snapshot": code_snapshot.running() or code["snapshot"],
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "devices": devices(),
    }


def dirty(code: Mapping[str, Any]) -> bool | None:
    """Return whether the checkout differs from its revision; None if unknown or not a checkout."""
    return None if code["diff"] is None else bool(code["diff"] or code["untracked"])


def devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def weights(files: Iterable[Path]) -> dict[str, Any]:
    """Return, for files that determine a result, the digest used in ids, and the size and sha256 of each file."""
    paths = sorted(files)
    described = {str(path): {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in paths}
    return {"digest": fingerprint(paths), "files": described}


def machine(processes: int) -> dict[str, Any]:
    """Return facts about the machine of this process. ``processes``: number of ranks that train together."""
    import torch

    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "os": platform.platform(),
        "user": _user(),
        "driver": _driver(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "slurm": {name: os.environ[variable] for name, variable in SLURM.items() if os.environ.get(variable)},
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    try:
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return match and match[0]


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


# -- records of a run -------------------------------------------------------------------------------------------------


def begin(folder: Path, started: float, facts: Mapping[str, Any], code: Mapping[str, Any], registry: Registry) -> None:
    """Write provenance.json, dirty.patch and copies of the plug-ins to a run's folder, before anything is made.

    ``facts``: those of this attempt. Earlier attempts stay listed, since a run may resume on another machine.
    """
    earlier = read_json(folder / FILE) or {}
    attempt = {key: facts[key] for key in ("host", "devices", "slurm", "revision", "code")}
    attempts = [*earlier.get("attempts", []), {"started": _time(started), **attempt}]
    plugins = _copy_plugins(folder, code, registry)
    untracked = {"untracked": code["untracked"]}
    write_json(folder / FILE, {**facts, **untracked, "plugins": plugins, "attempts": attempts})
    (folder / PATCH).unlink(missing_ok=True)
    if code["diff"]:
        write(folder / PATCH, code["diff"])


def end(folder: Path, started: float) -> None:
    """Record when the last attempt ended."""
    record = read_json(folder / FILE) or {}
    record["attempts"][-1] |= {"ended": _time(time.time()), "wall_seconds": round(time.time() - started, 1)}
    write_json(folder / FILE, record)


def _copy_plugins(folder: Path, code: Mapping[str, Any], registry: Registry) -> list[dict[str, Any]]:
    """Copy every plug-in to ``plugins/`` and return a row for each. ``installed``: from a package, not a given file."""
    paths = list(dict.fromkeys(entry.path for entry in registry.entries.values() if entry.plugin))
    rows = []
    for path, name in zip(paths, code_snapshot.plugin_names([str(path) for path in paths])):
        write(folder / name, path.read_bytes())
        sha256 = digest(path)
        given = code["plugins"].get(sha256, str(path))
        rows.append({"path": given, "sha256": sha256, "copy": name, "installed": str(path) not in registry.plugins})
    return rows
