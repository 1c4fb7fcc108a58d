"""Numbers and intervals as text: fixed decimals, words where there is no interval, never nan."""

from __future__ import annotations

import math

ABSENT = "—"
UNKNOWN, NO_SPREAD = "unknown", "no spread"
DECIMALS = {"fraction": 3, "cosine": 3, "logit": 2}  # by unit of a metric; 3 for any other


def number(value: float | None, decimals: int = 3, signed: bool = False) -> str:
    """Return the value with fixed decimals and thousands separators, never -0.000; a dash for None and nan."""
    if value is None or not math.isfinite(value):
        return ABSENT
    rounded = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:{'+' if signed and rounded else ''},.{decimals}f}"


def significant(value: float, digits: int = 2) -> str:
    """Return the value with its sign and so many significant digits, at most six decimals: ``+0.0012``, ``+1.7``."""
    text = f"{float(f'{value:.{digits}g}'):+,.6f}".rstrip("0").rstrip(".")
    return text if text.strip("+-0.") else "0"


def limits(lo: float | None, hi: float | None, decimals: int = 3, signed: bool = False) -> str:
    """Return ``[0.279, 0.283]``; words for an interval that is unknown or, as nothing varies, a point.

    An interval that is narrower than the decimals show has its width: ``[within 0.001]``.
    """
    if lo is None or hi is None or not (math.isfinite(lo) and math.isfinite(hi)):
        return f"[{UNKNOWN}]"
    if hi - lo <= 1e-12 * max(abs(lo), abs(hi)):
        return f"[{NO_SPREAD}]"
    ends = [number(limit, decimals, signed) for limit in (lo, hi)]
    return f"[within {10.0**-decimals:.{decimals}f}]" if ends[0] == ends[1] else f"[{', '.join(ends)}]"


def interval(value: float | None, lo: float | None, hi: float | None, decimals: int = 3, signed: bool = False) -> str:
    """Return ``0.281 [0.279, 0.283]``, or ``0.281 [unknown]`` for a mean without an interval."""
    mean = number(value, decimals, signed)
    return ABSENT if mean == ABSENT else f"{mean} {limits(lo, hi, decimals, signed)}"
