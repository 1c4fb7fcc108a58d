"""The shapes world: images of coloured shapes, a small FLUX that draws them, two scorers, and an exact checker."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MAX_TEXT = 16  # T5 tokens in the small FLUX's training; pass it as FluxPipeline's max_sequence_length
