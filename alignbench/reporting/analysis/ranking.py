"""The order of a measure's rows, as far as their paired differences support one.

All statements rest on decisions about all pairs of rows, each "a is better", "b is better" or neither, whose
family-wise error is controlled by whoever made them. With a probability of 95 % none is false, and then every rank
interval holds and no row of equal quality to the leader is left out of the top group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ranking:
    """Order of the rows of one measure. A row without a mean is in none of the fields."""

    order: list[str] = field(default_factory=list)  # best mean first, over the prompts that all these rows have
    prompts: int = 0  # number of these prompts
    leader: str | None = None  # first of the order, unless another row is shown to be better
    top: list[str] = field(default_factory=list)  # the leader and all rows not separable from it
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)  # best and worst rank left open; jointly 95 %
    letters: dict[str, str] = field(default_factory=dict)  # rows that share a letter are not separable
    fewer: dict[str, int] = field(default_factory=dict)  # row -> its prompts, for rows scored on fewer, ranked or not


def rank(means: Mapping[str, float], wins: Sequence[tuple[str, str]], prompts: int, used: Mapping[str, int]) -> Ranking:
    """Return the ranking of rows by ``means``, larger is better, over ``prompts`` common prompts.

    ``wins``: pairs (a, b) of which a is shown to be better. ``used``: number of prompts that a row's own mean rests on.
    """
    order = sorted(means, key=lambda label: -means[label])
    wins = [pair for pair in wins if means.keys() >= {*pair}]  # without a common prompt there is no order at all
    won = {label: {b for a, b in wins if a == label} for label in order}
    lost = {label: {a for a, b in wins if b == label} for label in order}
    leader = order[0] if order and not lost[order[0]] else None
    return Ranking(
        order=order,
        prompts=prompts,
        leader=leader,
        top=[label for label in order if label == leader or leader not in lost[label]] if leader else [],
        ranks={label: (1 + len(lost[label]), len(order) - len(won[label])) for label in order},
        letters=_letters(order, set(wins)),
        fewer={label: count for label, count in used.items() if count < max(used.values())},
    )


def _letters(order: Sequence[str], wins: set[tuple[str, str]]) -> dict[str, str]:
    """Return a compact letter display: two rows share a letter if and only if they are not separable.

    Insert and absorb (Piepho 2004, An algorithm for a letter-based representation of all-pairwise comparisons).
    """
    groups = [set(order)] if order else []
    for a, b in sorted(wins, key=lambda pair: (order.index(pair[0]), order.index(pair[1]))):
        split = [group - {lost} for group in groups for lost in ((a, b) if {a, b} <= group else ("",))]
        unique = [group for i, group in enumerate(split) if group not in split[:i]]
        groups = [group for group in unique if not any(group < other for other in unique)]
    groups.sort(key=lambda group: sorted(order.index(label) for label in group))
    return {label: "".join(_letter(i) for i, group in enumerate(groups) if label in group) for label in order}


def _letter(i: int) -> str:
    """Return a, b, ..., z, then A, B, ...; all later ones are starred."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[i % len(letters)] + "*" * (i // len(letters))
