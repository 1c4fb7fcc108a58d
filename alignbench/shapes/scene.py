"""Scenes of coloured shapes: the grammar of prompts, the layouts that satisfy them, and a renderer (numpy only).

An image has 32x32 pixels and a plain background. Objects sit in a 4x4 grid of 8-pixel cells, each one packed latent
token of the model; no two occupied cells touch, not even at a corner. Prompts and their metadata follow
GenEval (Ghosh et al. 2023, arXiv:2310.11513): the same six tasks, the same sentences, the same JSON fields.
"""

import itertools
import json
from dataclasses import dataclass

import numpy as np

SIZE = 32
CELL = 8
BACKGROUND = 0.94
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.28, 0.90),
    "yellow": (0.96, 0.82, 0.10),
    "purple": (0.60, 0.15, 0.72),
    "black": (0.06, 0.06, 0.06),
}
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Held-out sentences per task. Five shapes give only 5 + 20 + 15 sentences in the first three tasks, so those sets
# are small; the sizes favour the test set, whose intervals readers see.
TEST_SIZES = {"single_object": 2, "two_object": 6, "counting": 6, "colors": 12, "position": 20, "color_attr": 24}
VAL_SIZES = {"single_object": 1, "two_object": 4, "counting": 3, "colors": 8, "position": 16, "color_attr": 24}
TRAIN_CAP = {"color_attr": 120}  # otherwise 9 of 10 training prompts would be of this task
SPLIT_SEED = 20260101

# The checker inverts these: area = factor * radius**2, and the centroid's offset below the centre in radii.
AREA = {"circle": np.pi, "square": 4 * 0.85**2, "triangle": 2.0, "cross": 2.2576, "ring": np.pi * (1 - 0.44**2)}
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0, "ring": 0.0}


@dataclass(frozen=True)
class Shape:
    """Object in a scene: kind, colour name, centre in pixels (x right, y down) and radius in pixels."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float


# ---------------------------------------------------------------------------------------------------- images


def coverage(kind: str, radius, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the covered share of each pixel, from the signed distance to the outline; dx, dy: pixel - centre."""
    if kind == "circle":
        d = np.hypot(dx, dy) - radius
    elif kind == "ring":
        d = np.abs(np.hypot(dx, dy) - 0.72 * radius) - 0.28 * radius
    elif kind == "square":
        d = np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * radius
    elif kind == "triangle":
        d = np.maximum(dy - radius, (2 * np.abs(dx) - dy - radius) / np.sqrt(5))
    else:
        ax, ay, arm = np.abs(dx), np.abs(dy), 0.34 * radius
        d = np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))
    return np.clip(0.5 - d, 0, 1)


_AXIS = np.arange(SIZE) + 0.5


def render(scene) -> np.ndarray:
    """Draw a sequence of `Shape`s, later ones on top; return float32 [32, 32, 3] in [0, 1]."""
    image = np.full((SIZE, SIZE, 3), BACKGROUND)
    for s in scene:
        alpha = coverage(s.kind, s.radius, _AXIS[None, :] - s.x, _AXIS[:, None] - s.y)[..., None]
        image = image * (1 - alpha) + alpha * np.asarray(COLOURS[s.colour])
    return image.astype(np.float32)


# ---------------------------------------------------------------------------------------------------- layouts


def _apart(a, b) -> bool:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 2


_CELLS = list(itertools.product(range(4), range(4)))  # (row, column)
LAYOUTS = {
    n: [c for c in itertools.combinations(_CELLS, n) if all(_apart(a, b) for a, b in itertools.combinations(c, 2))]
    for n in (1, 2, 3, 4)
}


def _beside(relation: str):
    """Return the ordered pairs of cells (first object, second object) with the second clearly `relation` the first."""
    axis, sign = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}[relation]
    pairs = itertools.product(_CELLS, _CELLS)
    return [(a, b) for a, b in pairs if sign * (b[axis] - a[axis]) >= 2 and abs(b[1 - axis] - a[1 - axis]) <= 1]


_BESIDE = {relation: _beside(relation) for relation in RELATIONS}


def place(rng: np.random.Generator, kind: str, colour: str, cell) -> Shape:
    """Return a shape in a cell, jittered by up to 0.4 px, with a radius of 3.4 to 3.7 px."""
    jx, jy = rng.uniform(-0.4, 0.4, 2)
    return Shape(kind, colour, CELL * cell[1] + 4 + jx, CELL * cell[0] + 4 + jy, rng.uniform(3.4, 3.7))


def sample_scene(rng: np.random.Generator, metadata: dict) -> tuple[Shape, ...]:
    """Draw a scene that satisfies the metadata and holds nothing else; unspecified colours are random."""
    wanted = [(c["class"], c.get("color")) for c in metadata["include"] for _ in range(c["count"])]
    relation = metadata["include"][-1].get("position")
    if relation:
        cells = _BESIDE[relation[0]][rng.integers(len(_BESIDE[relation[0]]))]
    else:
        layouts = LAYOUTS[len(wanted)]
        cells = layouts[rng.integers(len(layouts))]
        cells = [cells[i] for i in rng.permutation(len(cells))]
    names = list(COLOURS)
    return tuple(place(rng, k, c or names[rng.integers(6)], cell) for (k, c), cell in zip(wanted, cells, strict=True))


def random_scene(rng: np.random.Generator, counts=(0, 1, 2, 3, 4)) -> tuple[Shape, ...]:
    """Draw a scene of unrelated shapes, for the autoencoder and the scorers."""
    n = counts[rng.integers(len(counts))]
    if n == 0:
        return ()
    cells = LAYOUTS[n][rng.integers(len(LAYOUTS[n]))]
    names = list(COLOURS)
    return tuple(place(rng, SHAPES[rng.integers(len(SHAPES))], names[rng.integers(6)], cell) for cell in cells)


# ---------------------------------------------------------------------------------------------------- prompts


def _noun(clause: dict) -> str:
    colour = f"{clause['color']} " if "color" in clause else ""
    shape = clause["class"] if clause["count"] == 1 else PLURALS[clause["class"]]
    return f"{NUMBERS[clause['count']]} {colour}{shape}"


def sentence(include: list[dict]) -> str:
    """Return GenEval's wording; a position names the second object first: 'a photo of a B left of a A'."""
    if len(include) == 1:
        return f"a photo of {_noun(include[0])}"
    if "position" in include[1]:
        return f"a photo of {_noun(include[1])} {include[1]['position'][0]} {_noun(include[0])}"
    return f"a photo of {_noun(include[0])} and {_noun(include[1])}"


def metadata(tag: str, include: list[dict]) -> dict:
    """Return one line of GenEval's `evaluation_metadata.jsonl`."""
    out = {"tag": tag, "include": include}
    if tag == "counting":
        out["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return out | {"prompt": sentence(include)}


def clause(shape: str, count: int = 1, colour: str | None = None, relation: str | None = None) -> dict:
    """Return one entry of `include`; a relation refers to the first entry."""
    out = {"class": shape, "count": count}
    if colour:
        out["color"] = colour
    if relation:
        out["position"] = [relation, 0]
    return out


def grammar() -> dict[str, list[dict]]:
    """Return every prompt of the six tasks, by task."""
    pairs = list(itertools.permutations(SHAPES, 2))
    shades = list(itertools.permutations(COLOURS, 2))
    return {
        "single_object": [metadata("single_object", [clause(s)]) for s in SHAPES],
        "two_object": [metadata("two_object", [clause(a), clause(b)]) for a, b in pairs],
        "counting": [metadata("counting", [clause(s, n)]) for s in SHAPES for n in (2, 3, 4)],
        "colors": [metadata("colors", [clause(s, 1, c)]) for s in SHAPES for c in COLOURS],
        "position": [metadata("position", [clause(a), clause(b, 1, None, r)]) for a, b in pairs for r in RELATIONS],
        "color_attr": [
            metadata("color_attr", [clause(a, 1, ca), clause(b, 1, cb)]) for a, b in pairs for ca, cb in shades
        ],
    }


def splits() -> dict[str, list[dict]]:
    """Return disjoint prompts: `train`, `val`, `test`, and `spare` (training sentences not in `train.jsonl`).

    Sentences are disjoint, scenes are not: 22 of `train` and 8 of `val` word a scene of `test` the other way round.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    out: dict[str, list[dict]] = {"train": [], "val": [], "test": [], "spare": []}
    for task, items in grammar().items():
        items = [items[i] for i in rng.permutation(len(items))]
        n_test, n_val = TEST_SIZES[task], VAL_SIZES[task]
        rest = items[n_test + n_val :]
        cap = TRAIN_CAP.get(task, len(rest))
        out["test"] += items[:n_test]
        out["val"] += items[n_test : n_test + n_val]
        out["train"] += rest[:cap]
        out["spare"] += rest[cap:]
    return out


def auxiliary() -> list[dict]:
    """Return coloured counts and coloured positions, used in pretraining only.

    They are not a GenEval task; with them no held-out combination of words is the only one of its kind ('two circles'
    is unseen, 'two red circles' is not).
    """
    counts = [metadata("counting", [clause(s, n, c)]) for s in SHAPES for n in (2, 3, 4) for c in COLOURS]
    sides = [
        metadata("position", [clause(a, 1, ca), clause(b, 1, cb, r)])
        for a, b in itertools.permutations(SHAPES, 2)
        for ca, cb in itertools.permutations(COLOURS, 2)
        for r in RELATIONS
    ]
    return counts + sides


def corrupt(rng: np.random.Generator, meta: dict) -> dict:
    """Return the metadata with one attribute changed, so that an image of the result makes the prompt false."""
    include = [dict(c) for c in meta["include"]]
    i = int(rng.integers(len(include)))
    one, other = include[i], include[1 - i] if len(include) == 2 else None
    move = _moves(include)[rng.integers(len(_moves(include)))]
    if move == "count":
        one["count"] = int(rng.choice([n for n in (one["count"] - 1, one["count"] + 1) if n <= 4]))
    elif move == "colour":
        one["color"] = str(rng.choice([c for c in COLOURS if c not in (one["color"], other and other["color"])]))
    elif move == "swap":
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
    elif move == "relation":
        include[1]["position"] = [str(rng.choice([r for r in RELATIONS if r != include[1]["position"][0]])), 0]
    elif move == "drop":
        include = [{k: v for k, v in include[1 - i].items() if k != "position"}]
    else:
        one["class"] = str(rng.choice([s for s in SHAPES if s not in (one["class"], other and other["class"])]))
    return metadata(meta["tag"], include)


def _moves(include: list[dict]) -> list[str]:
    """Return the possible changes, repeated by weight: relations and attributes fail more often than shapes."""
    moves = ["shape"]
    if len(include) == 1 and include[0]["count"] > 1:
        moves += ["count"] * 4
    if "color" in include[-1]:
        moves += ["colour"] * 2
    if len(include) == 2:
        moves += ["drop"]
        moves += ["swap"] * ("color" in include[-1])
        moves += ["relation"] * (4 if "position" in include[-1] else 0)
    return moves


def write_prompts(folder) -> None:
    """Write `train.jsonl`, `val.jsonl` and `test.jsonl`, one GenEval record per line."""
    for name, items in splits().items():
        if name != "spare":
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(m) + "\n" for m in items))
