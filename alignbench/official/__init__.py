"""Official engines: evaluators' own packages, each in an environment of its own, to prove or replace our ports.

``<engine>.py`` beside this file is a script of that environment, never imported: ``python -I hpsv2.py request.json``,
where the request is ``{"checkpoint": path, "images": [png paths], "prompts": [text], "output": path, ...}``. It writes
``{"scores": [...], "versions": {package: version}}`` to ``output``. ``requirements-<engine>.txt`` pins its packages.

An environment is a virtual environment that holds the pinned packages alone (``pip install --no-deps``) and sees those
of the running one behind them, so that torch is shared and an old transformers shadows the new one.
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
    """Every environment that can be installed, by name, and where it lies; None: not installed."""
    engines = sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.txt"))
    return {engine + SUFFIX: _folder(engine) if _python(engine).exists() else None for engine in engines}


def install(name: str, progress: Callable[[str], Any] = print) -> Path:
    """Make the environment ``name``, whole or not at all, unless it is there. Returns its folder."""
    known = environments()
    if name not in known:
        raise UserError(f"--install: there is no environment '{name}'{did_you_mean(name, known, 'environments')}")
    if folder := known[name]:
        progress(f"{name}: already installed in {folder}")
        return folder
    engine = name.removesuffix(SUFFIX)
    folder = _folder(engine)
    shutil.rmtree(folder, ignore_errors=True)  # one whose interpreter is gone
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
    """One row per image: the official package's score of it and its prompt. ``more``: further entries of the request.

    Loading the official model is part of every call.
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
    """UserError if the evaluator ``name``, asked for a training reward, is set to its official engine."""
    if engine == "official":
        raise UserError(f"{name}.engine: 'official' gives no training reward; choose alignbench")


def run(engine: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the engine's script answers to ``request``; both files are written to ``folder``."""
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
    """Run it to its end, offline as far as the hub goes. UserError with its last words if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise UserError(f"{where}: failed with exit code {done.returncode}: {lines[-1]}")


def _shared() -> list[str]:
    """The running environment's package folders, in its own order."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _requirements(engine: str) -> Path:
    return HERE / f"requirements-{engine}.txt"


def _folder(engine: str) -> Path:
    """Where the environment lies. Its name hashes what it is made of: another torch or pin is another environment."""
    content = "\n".join([sys.version, *_shared(), _requirements(engine).read_text(encoding="utf-8")])
    key = hashlib.sha256(content.encode()).hexdigest()[:8]
    return cache() / "environments" / f"{engine}{SUFFIX}-{key}"


def _python(engine: str) -> Path:
    return _python_of(_folder(engine))


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"
