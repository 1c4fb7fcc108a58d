"""Remake every file under assets/ from fixed seeds.

    python -m alignbench.shapes.build [stage ...] [--work DIR]

Stages run in the order below and leave their results for later stages in the work folder, so any one can be run again.
On one machine the results are deterministic; another CPU may round differently, which changes weights but not
conclusions.
"""

import argparse
import time
from pathlib import Path

import torch

from alignbench.shapes import build_model, build_scorers

STAGES = {
    "prompts": build_model.prompts,
    "text": build_model.text,
    "autoencoder": build_model.autoencoder,
    "latents": build_model.latents,
    "flow": build_model.flow,
    "model": build_model.export,
    "hpsv2": build_scorers.hpsv2,
    "pickscore": build_scorers.pickscore,
    "report": build_scorers.report,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of {', '.join(STAGES)}; all by default")
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="intermediate files")
    args = parser.parse_args()
    unknown = [s for s in args.stages if s not in STAGES]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; stages are {', '.join(STAGES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stages or STAGES:
        start = time.perf_counter()
        torch.manual_seed(0)  # library constructors initialise weights from the global generator; our code never does
        STAGES[name](args.work)
        print(f"[{name}] {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
