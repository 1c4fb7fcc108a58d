"""With what code, packages, files and machine a thing was made: recorded beside it, and part of no id.

What git knows is taken where a sweep is started (``code``) and handed to its workers as plain data: they may run from
a copy of the code that is no checkout.
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

from alignbench.digests import WHOLE, file_digest, fingerprint
from alignbench.plugins import Registry, digest
from alignbench.run import code_snapshot
from alignbench.store.files import read_json, write, write_json

FILE, PATCH = "provenance.json", "dirty.patch"  # in a run's folder
TRACKED = ("alignbench", "methods", "evaluators", "reports", "sweeps", "pyproject.toml")  # of a checkout: the code
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
    """Of the running code, as plain data, looked at once for a process: ``digest`` of all its files; of a source
    checkout also what git says: ``revision``, ``diff`` (text, "" for none) and ``untracked`` {file: sha256}; None each
    where it says nothing. ``plugins``: {sha256: path as it was given}.
    """
    given = {digest(Path(path)): str(Path(path).resolve()) for path in plugins}
    return _code(Path(__file__).parents[2]) | {"plugins": given}


@functools.cache
def _code(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"digest": code_snapshot.digest(code_snapshot.package())}
    found |= {"snapshot": code_snapshot.running(), "revision": None, "diff": None, "untracked": None}
    if (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or not this user's checkout
            found["revision"] = _git(root, "rev-parse", "HEAD").strip()
            found["diff"] = _git(root, "diff", "HEAD", "--no-ext-diff", "--no-color", "--", *_tracked(root))
            new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *_tracked(root))
            code_files = [name for name in new.split("\0") if name.endswith((".py", ".yaml"))]
            found["untracked"] = {name: file_digest(root / name) for name in code_files}
    return found


def _git(root: Path, *words: str) -> str:
    here = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}  # not a repository further up
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True, env=here)
    return done.stdout.decode("utf-8", "replace")


def _tracked(root: Path) -> list[str]:
    return [name for name in TRACKED if (root / name).exists()]


def installed(package: str) -> str | None:
    """Its version; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- what made it -----------------------------------------------------------------------------------------------------


def made_by(code: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that stand beside every image set and score file. ``code``: as ``code()`` gives it."""
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
    """Did the checkout differ from its revision? None: not known, or not a checkout."""
    return None if code["diff"] is None else bool(code["diff"] or code["untracked"])


def devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def weights(files: Iterable[Path]) -> dict[str, Any]:
    """Of files that determine a result: the digest that ids use, and of each file its bytes and sha256.

    Of a large file, in place of sha256, the digest of its size, head, middle and tail.
    """
    paths, found = sorted(files), {}
    for path in paths:
        size = path.stat().st_size
        found[str(path)] = {"bytes": size, "sha256" if size <= WHOLE else "sampled": file_digest(path)}
    return {"digest": fingerprint(paths), "files": found}


def machine(processes: int) -> dict[str, Any]:
    """Where a process runs. ``processes``: how many train together."""
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
    """The NVIDIA driver's version; None without one."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return found and found[0]


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


# -- a run's ----------------------------------------------------------------------------------------------------------


def begin(folder: Path, started: float, facts: Mapping[str, Any], code: Mapping[str, Any], registry: Registry) -> None:
    """Write provenance.json, dirty.patch and copies of the plug-ins into a run's folder, before anything is made.

    ``facts``: those of this attempt. What earlier attempts had of it is kept: a run may go on elsewhere.
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
    """Say when the last attempt ended."""
    found = read_json(folder / FILE) or {}
    found["attempts"][-1] |= {"ended": _time(time.time()), "wall_seconds": round(time.time() - started, 1)}
    write_json(folder / FILE, found)


def _copy_plugins(folder: Path, code: Mapping[str, Any], registry: Registry) -> list[dict[str, Any]]:
    """Every plug-in as it was read, below ``plugins/``. ``installed``: of a package, not a file that was named."""
    paths = list(dict.fromkeys(entry.path for entry in registry.entries.values() if entry.plugin))
    rows = []
    for path, name in zip(paths, code_snapshot.plugin_names([str(path) for path in paths])):
        write(folder / name, path.read_bytes())
        sha256 = digest(path)
        given = code["plugins"].get(sha256, str(path))
        rows.append({"path": given, "sha256": sha256, "copy": name, "installed": str(path) not in registry.plugins})
    return rows
