"""Official engines: the evaluators' original packages, each in its own environment, to verify or replace our ports.

``<engine>.py`` beside this file is a script for that environment, never imported: ``python -I hpsv2.py request.json``.
The request is ``{"checkpoint": path, "images": [png paths], "prompts": [text], "output": path, ...}``. It writes
``{"scores": [...], "versions": {package: version}}`` to ``output``. ``requirements-<engine>.txt`` pins its packages.

An environment is a virtual environment that holds only the pinned packages (``pip install --no-deps``). Behind them it
sees the packages of the running environment, so that torch is shared and an old transformers shadows the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.config import UserError, cache, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from alignbench.prompts import Prompt

HERE = Path(__file__).parent
SUFFIX = "-official"  # of an environment's name: hpsv2-official runs hpsv2.py


def environments() -> dict[str, Path | None]:
    """Return the folder of every environment that can be installed, by name; None: not installed."""
    engines = sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.txt"))
    return {engine + SUFFIX: _folder(engine) if _python(engine).exists() else None for engine in engines}


def install(name: str, progress: Callable[[str], Any] = print) -> Path:
    """Install the environment ``name`` unless it is there, completely or not at all. Return its folder.

    ``progress``: called with lines of text. Raise UserError for an unknown name, or if pip fails.
    """
    known = environments()
    if name not in known:
        raise UserError(f"--install: there is no environment '{name}'{did_you_mean(name, known, 'environments')}")
    if folder := known[name]:
        progress(f"{name}: already installed in {folder}")
        return folder
    engine = name.removesuffix(SUFFIX)
    folder = _folder(engine)
    shutil.rmtree(folder, ignore_errors=True)  # left over, without an interpreter
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        _make(made, _requirements(engine), lambda text: progress(f"{name}: {text}"))
        try:
            made.rename(folder)
        except OSError:
            if not _python(engine).exists():  # else another process was faster, with the same content
                raise
    progress(f"{name}: installed in {folder}")
    return folder


def score(
    engine: str, column: str, checkpoint: Path, images: Sequence[Image], prompts: Sequence[Prompt], **more: Any
) -> pd.DataFrame:
    """Return a data frame with one row per image and one column, ``column``: the official package's scores.

    ``checkpoint``: the weights; ``more``: further entries of the request. Every call starts the engine and loads the
    official model. Raise UserError if the environment is not installed or the engine fails.
    """
    import pandas as pd

    with tempfile.TemporaryDirectory(prefix=f"alignbench-{engine}-") as temporary:
        folder = Path(temporary)
        files = [folder / f"{i}.png" for i in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.convert("RGB").save(file)
        texts = [prompt.text for prompt in prompts]
        request = {"checkpoint": checkpoint, "images": files, "prompts": texts, **more}
        scores = run(engine, request, folder)["scores"] if files else []
    if len(scores) != len(prompts):
        raise UserError(f"{engine}{SUFFIX}: made {len(scores)} scores for {len(prompts)} prompts")
    return pd.DataFrame({column: scores}, dtype="float64")


def refuse_reward(name: str, engine: str) -> None:
    """Raise UserError if the evaluator ``name`` is set to its official engine, which has no training reward."""
    if engine == "official":
        raise UserError(f"{name}.engine: 'official' gives no training reward; choose alignbench")


def run(engine: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the engine's script on ``request`` and return its answer; both files are written to ``folder``.

    Raise UserError if the environment is not installed or the script fails.
    """
    python = _python(engine)
    if not python.exists():
        name = engine + SUFFIX
        raise UserError(f"{name}: not installed; run `alignbench doctor --install {name}`")
    output = folder / "answer.json"
    (folder / "request.json").write_text(json.dumps({**request, "output": output}, default=str))
    _call([python, "-I", HERE / f"{engine}.py", folder / "request.json"], f"{engine}{SUFFIX}")
    return json.loads(output.read_text())


def _make(folder: Path, requirements: Path, progress: Callable[[str], Any]) -> None:
    progress("creating a virtual environment")
    venv.create(folder, with_pip=True, symlinks=True)
    python = _python_of(folder)
    progress(f"installing {requirements.name} (without dependencies: torch and the rest are shared)")
    _call([python, "-m", "pip", "install", "--no-deps", "--quiet", "-r", requirements], requirements.name)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(_shared()) + "\n")  # .pth lines come last: what is pinned wins


def _call(command: Sequence[Any], where: str) -> None:
    """Run a command without access to the hub. Raise UserError with the last line of its output if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise UserError(f"{where}: failed with exit code {done.returncode}: {lines[-1]}")


def _shared() -> list[str]:
    """Return the package folders of the running environment, in its order."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _requirements(engine: str) -> Path:
    return HERE / f"requirements-{engine}.txt"


def _folder(engine: str) -> Path:
    """Return the folder of an environment, whose name hashes Python's version, the shared folders and the pins."""
    content = "\n".join([sys.version, *_shared(), _requirements(engine).read_text(encoding="utf-8")])
    key = hashlib.sha256(content.encode()).hexdigest()[:8]
    return cache() / "environments" / f"{engine}{SUFFIX}-{key}"


def _python(engine: str) -> Path:
    return _python_of(_folder(engine))


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"
