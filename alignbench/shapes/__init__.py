"""The embedded world: pictures of coloured shapes, a small FLUX that draws them, two scorers, and an exact checker."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MAX_TEXT = 16  # T5 tokens the small FLUX was trained with: pass it as FluxPipeline's max_sequence_length
