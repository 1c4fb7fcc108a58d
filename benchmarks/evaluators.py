"""Images per second: our HPSv2.1 and ImageReward against their packages' own calls, on the same random weights.

    python benchmarks/evaluators.py [--size small|real] [--repeats 3]

Each package runs in its own environment (installed if missing) and is timed inside its process, in the two ways that
people call it: once per image, and once per prompt with all its images. Times are given with and without loading.
``hpsv2`` loads in every call, because the package reads the checkpoint each time (only a few calls are timed, as all
take equally long); everything else loads once. "as it is" compares hpsv2 with its loading to ours without, as in a long
scoring run. ImageReward's only call for several prompts, ``inference_rank``, scores every prompt with every image;
"diagonal" counts only the matching pairs. Times include opening the PNG files, but not importing packages.

With a GPU both sides run there, each in its own precision: ``hpsv2`` in fp16 autocast, everything else in fp32. Results
go to benchmarks/results/evaluators-<size>.json and .md, with a GPU to evaluators-<size>-gpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from arguments import parse

HERE = Path(__file__).resolve().parent
SIDE = 512  # of the images
PROMPTS = {"small": (8, 4), "real": (2, 2), "gpu": (8, 4)}  # prompts, images per prompt
FEW = 2, 4  # prompts and images for the calls that each load a model
HPS = {  # small: a vision transformer of 12 M parameters; real: ViT-H, 632 M
    "small": {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 224, "layers": 6, "width": 400, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
    },
    "real": {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
}
IMAGEREWARD = {  # vision transformer and BERT; real: ViT-L and BERT-base, with a small vocabulary
    "small": {"width": 384, "depth": 8, "layers": 4, "inner": 3072},
    "real": {"width": 1024, "depth": 24, "layers": 12, "inner": 3072},
}


def seconds(work: Callable[[], Any]) -> float:
    """Return wall-clock seconds with a GPU, else CPU seconds of one thread, which other load hardly changes."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# -- inside an official environment: only its own packages are imported -----------------------------------------------


def engine_script(path: str) -> Any:
    """Import the engine's script, which prepares its package for timing as it does for scoring."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_prompt(request: dict) -> list[tuple[str, list[str]]]:
    """Return (prompt, its images) for every prompt."""
    texts = list(dict.fromkeys(request["prompts"]))
    pairs = list(zip(request["prompts"], request["images"]))
    return [(text, [image for prompt, image in pairs if prompt == text]) for text in texts]


def time_hpsv2(request: dict) -> tuple[dict[str, float], list[float]]:
    """Return seconds per image of ``hpsv2.score``, as it is and with the checkpoint already loaded, and the scores."""
    import torch

    read = torch.load
    engine = engine_script(request["script"])
    engine.prepare(Path(request["checkpoint"]))
    torch.load = read
    score = engine.img_score.score

    singles = list(zip(request["prompts"], request["images"]))
    lists = by_prompt(request)

    def per_image(calls: list) -> float:
        return seconds(lambda: [score(image, prompt, cp=request["checkpoint"]) for prompt, image in calls]) / len(calls)

    def per_prompt(calls: list) -> float:
        took = seconds(lambda: [score(images, prompt, cp=request["checkpoint"]) for prompt, images in calls])
        return took / sum(len(images) for _, images in calls)

    per_image(singles[:1])  # builds the model
    prompts, images = FEW
    times = {"per image, loading included": per_image(singles[:images])}
    times |= {"per prompt, loading included": per_prompt(lists[:prompts])}
    torch.load = lambda *arguments, **settings: {"state_dict": None}
    engine.img_score.model_dict["model"].load_state_dict = lambda state: None
    times |= {"per image": per_image(singles), "per prompt": per_prompt(lists)}
    return times, [float(score(image, prompt, cp=request["checkpoint"])[0]) for prompt, image in singles]


def time_imagereward(request: dict) -> tuple[dict[str, float], list[float]]:
    """Return seconds per image of ``ImageReward.score``, without gradient as in its README, and the scores."""
    import torch

    engine = engine_script(request["script"])
    models: list[Any] = []
    loading = seconds(lambda: models.append(engine.load(request)))
    (model,) = models

    def per_image() -> None:
        for prompt, image in zip(request["prompts"], request["images"]):
            model.score(prompt, image)

    def per_prompt() -> None:
        for prompt, images in by_prompt(request):
            model.score(prompt, images)

    def diagonal() -> None:
        _, scores = model.inference_rank(request["prompts"], request["images"])
        assert len(scores) == len(request["prompts"]) ** 2

    with torch.no_grad():
        model.score(request["prompts"][0], request["images"][0])
        times = {"per image": seconds(per_image), "per prompt": seconds(per_prompt)}
        square = seconds(diagonal)
        scores = [model.score(prompt, image) for prompt, image in zip(request["prompts"], request["images"])]
    times |= {f"{calls}, loading included": time + loading for calls, time in times.items()} | {"diagonal": square}
    return {calls: time / len(request["images"]) for calls, time in times.items()}, scores


INSIDE = {"hpsv2": time_hpsv2, "imagereward": time_imagereward}


# -- in our environment -----------------------------------------------------------------------------------------------


def time_ours(make: Callable[[], Any], request: dict) -> tuple[dict[str, float], list[float]]:
    """Return seconds per image of ``score``, by a loaded evaluator with new prompts and by a new one; and scores."""
    from PIL import Image

    from alignbench.prompts import Prompt

    def score(evaluator: Any, texts: list[str]) -> list[float]:
        prompts = [Prompt(text, text) for text in texts]
        return evaluator.score([Image.open(path) for path in request["images"]], prompts).iloc[:, 0].tolist()

    evaluator = make()
    score(evaluator, [f"warm {text}" for text in request["prompts"]])
    times = {"one call": seconds(lambda: score(evaluator, request["prompts"]))}
    scores = score(evaluator, request["prompts"])
    times["one call, loading included"] = seconds(lambda: score(make(), request["prompts"]))
    return {calls: time / len(request["images"]) for calls, time in times.items()}, scores


def time_theirs(engine: str, request: dict, folder: Path) -> tuple[dict[str, float], list[float]]:
    """Return what ``INSIDE[engine]`` measures in the engine's own environment."""
    import subprocess

    from alignbench import official

    python = official.install(f"{engine}-official", lambda line: None) / "bin" / "python"
    script = official.HERE / f"{engine}.py"
    (folder / "request.json").write_text(json.dumps({**request, "script": str(script)}))
    command = [python, "-I", HERE / "evaluators.py", "--inside", engine, folder / "request.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine}: the official package failed\n{done.stderr}")
    times, scores = json.loads(done.stdout.splitlines()[-1])
    return times, scores


def make_images(folder: Path, prompt_count: int, per_prompt: int) -> tuple[list[str], list[str]]:
    """Return the paths of prompt_count x per_prompt images, and the prompt of each image."""
    from alignbench.testing.evaluator_contract import random_image

    paths, prompts = [], []
    for i in range(prompt_count * per_prompt):
        paths.append(str(folder / f"{i}.png"))
        random_image(SIDE, SIDE, i).save(paths[-1])
        prompts.append(f"a red circle beside {i // per_prompt} blue squares, oil on canvas")
    return paths, prompts


def draw(name: str, shape: tuple[int, ...]) -> Any:
    """Return random numbers of mean 0 and variance 1, faster than ``random_weights.draw``: a billion are needed."""
    import torch

    return torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu").cpu()


def hps_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Save an HPSv2.1 of any size in the official layout."""
    import torch
    from open_clip import CLIP

    from alignbench.evaluators.hpsv2 import CHECKPOINT
    from alignbench.rehearsal import random_weights

    folder.mkdir()
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in CLIP(**config).state_dict().items()}
    state = random_weights.random_state({name: shape for name, shape in shapes.items() if shape})
    state |= {"logit_scale": torch.tensor(4.6)}
    torch.save({"state_dict": {name: tensor.half() for name, tensor in state.items()}}, folder / CHECKPOINT)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


def contestants(folder: Path, size: str) -> dict[str, tuple[Callable[[], Any], dict[str, str]]]:
    """Return {engine: (constructor of our evaluator, request for the official package)}."""
    from unittest import mock

    from alignbench.evaluators.hpsv2 import CHECKPOINT as HPS_CHECKPOINT
    from alignbench.evaluators.hpsv2 import HPSv2
    from alignbench.evaluators.imagereward import CHECKPOINT, CONFIG, ImageReward
    from alignbench.rehearsal import random_weights, tiny_imagereward

    with mock.patch.object(random_weights, "draw", draw):
        hps = hps_folder(folder / "hps", HPS[size])
        reward = tiny_imagereward.imagereward_folder(folder / "imagereward", **IMAGEREWARD[size])
    beside = {"med_config": str(reward / CONFIG), "tokenizer": str(reward)}
    return {
        "hpsv2": (lambda: HPSv2(weights=str(hps)), {"checkpoint": str(hps / HPS_CHECKPOINT)}),
        "imagereward": (
            lambda: ImageReward(weights=str(reward), tokenizer=str(reward)),
            {"checkpoint": str(reward / CHECKPOINT), **beside},
        ),
    }


def measure(size: str, repeats: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row per way of calling each engine, and how far our scores are from the official ones.

    Times are the best of the repeats, which alternate between the two sides, because other load may slow the machine.
    """
    import numpy as np

    gaps: dict[str, str] = {}
    best: dict[tuple[str, str, str], float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images, prompts = make_images(folder, *counts(size))
        for engine, (make, official) in contestants(folder, size).items():
            request = {"images": images, "prompts": prompts, **official}
            for repeat in range(repeats):
                print(f"{engine}: {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
                both = {"alignbench": time_ours(make, request), "official": time_theirs(engine, request, folder)}
                ours, theirs = (np.array(scores) for _, scores in both.values())
                gaps[f"scores of {engine}"] = (
                    f"at most {abs(ours - theirs).max():.1g} apart, of {abs(theirs).mean():.2g}"
                )
                for side, (times, _) in both.items():
                    for calls, taken in times.items():
                        key = (engine, side, calls)
                        best[key] = min(best.get(key, float("inf")), taken)
    rows = [{"evaluator": e, "engine": s, "calls": calls, "seconds_per_image": t} for (e, s, calls), t in best.items()]
    return [{**row, "images_per_second": 1 / row["seconds_per_image"]} for row in rows], gaps


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per official way of calling, with our speed-up: with loading on both sides, or on neither.

    For hpsv2 also as it is: its calls, which each load the model, against ours without loading.
    """
    ours = {(r["evaluator"], r["calls"]): r["images_per_second"] for r in rows if r["engine"] == "alignbench"}
    compared = []
    for row in rows:
        if row["engine"] == "official":
            loading = ", loading included"
            loads = row["calls"].endswith(loading)
            ways = [("one call" + loading * loads, row["calls"])]
            if loads and row["evaluator"] == "hpsv2":
                ways.append(("one call", row["calls"].removesuffix(loading) + ", as it is"))
            for our_calls, calls in ways:
                speed = ours[row["evaluator"], our_calls]
                ratio = speed / row["images_per_second"]
                compared.append({**row, "calls": calls, "alignbench": speed, "speedup": ratio})
    return compared


def counts(size: str) -> tuple[int, int]:
    """Return the numbers of prompts and of images per prompt."""
    import torch

    return PROMPTS["gpu" if torch.cuda.is_available() else size]


def machine(size: str) -> dict[str, Any]:
    import torch

    prompts, per_prompt = counts(size)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line for line in lines if line.startswith("model name")), ":").partition(":")[2]
    return {
        "date": date.today().isoformat(),
        "cpu": model.strip() or platform.processor(),
        "cores": os.cpu_count(),
        "time": "by the clock" if torch.cuda.is_available() else "of one CPU thread",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": "fp32, of the official hpsv2 fp16 autocast" if torch.cuda.is_available() else "fp32",
        "images": f"{prompts} prompts x {per_prompt}, {SIDE} x {SIDE}",
        "weights": "random, " + {"small": "far smaller than the real models", "real": "of the real sizes"}[size],
    }


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = ["# Evaluators: images per second", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += ["| evaluator | official calls | official | alignbench | speed-up |", "|---|---|---:|---:|---:|"]
    for row in rows:
        figures = f"{row['images_per_second']:.2f} | {row['alignbench']:.2f} | {row['speedup']:.2f}x"
        lines.append(f"| {row['evaluator']} | {row['calls']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=HPS, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parse(parser, free=["size", "inside"])  # each size has its own results
    if arguments.inside:
        engine, request = arguments.inside
        print(json.dumps(INSIDE[engine](json.loads(Path(request).read_text()))))
        return
    import torch

    measured, gaps = measure(arguments.size, arguments.repeats)
    about, rows = machine(arguments.size) | gaps, speedups(measured)
    name = f"evaluators-{arguments.size}{'-gpu' * torch.cuda.is_available()}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(table(about, rows))
    print(table(about, rows))


if __name__ == "__main__":
    main()
