"""GenEval's prompts (Ghosh et al. 2023, arXiv 2310.11513): its 553 test prompts, and 50,000 to train on.

A line has the official form: the task, the objects that the image must include, those that it must exclude, and the
prompt. No file is shipped. The test list is drawn as the official generator draws it, and its sha256 must be that of
the official file. The training list, in the proportions of Flow-GRPO (arXiv 2505.05470), is drawn with
``random.random`` only, hence the same in every version of Python. Departures from Flow-GRPO: its training file was
shuffled without a seed, so this is another draw of the same kind; and it leaves out the test prompts only, where this
leaves out their scenes, however they are worded.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from alignbench.config import UserError

CLASSES = tuple(  # of COCO, in its order, under GenEval's names
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,
knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,
dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MIRRORED = {"right of": "left of", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PROPORTIONS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
N, C = len(CLASSES), len(COLORS)
POOL = {  # number of different prompts of each task
    "position": N * (N - 1) * len(RELATIONS),
    "counting": N * len(NUMBERS),
    "color_attr": (N - 1) * (N - 2) * C * (C - 1),
    "colors": (N - 1) * C,
    "two_object": N * (N - 1),
}
TWICE = ("position", "color_attr", "two_object")  # tasks in which two prompts ask for one scene
TRAIN, SEED = 50_000, 0
OFFICIAL_SEED, OFFICIAL_COUNT = 43, 100  # draws per task, repetitions included
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of evaluation_metadata.jsonl

Line = dict[str, Any]
One = Callable[[int], int]  # n -> one of range(n)
Two = Callable[[int], tuple[int, int]]  # n -> two different ones of range(n)


def test() -> list[Line]:
    """Return the 553 lines of the official test list.

    Raise UserError if the installed numpy draws other numbers than the official generator did.
    """
    import numpy as np

    rng: Any = np.random.default_rng(OFFICIAL_SEED)
    lines = [_line("single_object", [_thing(i)], _a(CLASSES[i])) for i in rng.choice(N, size=N, replace=False)]
    for task in ("two_object", "counting", "colors", "position", "color_attr"):
        for _ in range(OFFICIAL_COUNT):
            lines.append(TASKS[task](rng.choice, lambda n: rng.choice(n, size=2, replace=False)))
    texts = list(dict.fromkeys(json.dumps(line) for line in lines))
    if hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest() != OFFICIAL_SHA256:
        raise UserError(
            f"geneval/test: numpy {np.__version__} draws other prompts than the official ones; use numpy 2.4"
        )
    return [json.loads(text) for text in texts]


def train(count: int = TRAIN, seed: int = SEED) -> list[Line]:
    """Return ``count`` lines in Flow-GRPO's proportions, shuffled, without the scenes of the test list.

    The prompts of a task are all different if it has enough of them; otherwise they are drawn with replacement.
    """
    rng, lines, test_list = random.Random(seed), list[Line](), test()
    for task, share in shares(count).items():
        held_out = {scene(line) for line in test_list if line["tag"] == task}
        lines += _draw(task, share, held_out, rng)
    return sorted(lines, key=lambda _: rng.random())


def scene(line: Line) -> tuple[str, ...]:
    """Return what a line asks for, the same for every wording: "a cow right of a dog" is "a dog left of a cow"."""
    things = [f"{thing['count']} {thing.get('color')} {thing['class']}" for thing in line["include"]]
    relation = next((thing["position"][0] for thing in line["include"] if "position" in thing), None)
    if relation is None:
        return line["tag"], *sorted(things)
    target, placed = things
    return (MIRRORED[relation], target, placed) if relation in MIRRORED else (relation, placed, target)


def shares(count: int) -> dict[str, int]:
    """Return the number of lines of each task: ``count`` divided in PROPORTIONS by largest remainders."""
    exact = {task: count * weight / sum(PROPORTIONS.values()) for task, weight in PROPORTIONS.items()}
    whole = {task: int(share) for task, share in exact.items()}
    for task in sorted(exact, key=lambda task: whole[task] - exact[task])[: count - sum(whole.values())]:
        whole[task] += 1
    return whole


def _draw(task: str, count: int, held_out: set[tuple[str, ...]], rng: random.Random) -> list[Line]:
    def one(n: int) -> int:
        return int(rng.random() * n)

    def two(n: int) -> tuple[int, int]:
        first, second = one(n), one(n - 1)
        return first, second + (second >= first)

    taken, lines = set[str](), list[Line]()
    enough = POOL[task] - len(held_out) * (1 + (task in TWICE)) >= count
    while len(lines) < count:
        line = TASKS[task](one, two)
        if line["prompt"] not in taken and scene(line) not in held_out:
            lines.append(line)
            taken |= {line["prompt"]} if enough else set()
    return lines


# -- one line of each task: the order of the draws is the official generator's -----------------------------------------


def _two_object(one: One, two: Two) -> Line:
    a, b = two(N)
    return _line("two_object", [_thing(a), _thing(b)], f"{_a(CLASSES[a])} and {_a(CLASSES[b])}")


def _counting(one: One, two: Two) -> Line:
    name, count = CLASSES[one(N)], 2 + int(one(len(NUMBERS)))
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    include, exclude = ([{"class": name, "count": n}] for n in (count, count + 1))
    return _line("counting", include, f"{NUMBERS[count]} {plural}", exclude=exclude)


def _colors(one: One, two: Two) -> Line:
    a, color = 1 + one(N - 1), COLORS[one(C)]  # from 1: persons have no colour
    return _line("colors", [_thing(a, color=color)], f"{_a(color)} {CLASSES[a]}")


def _position(one: One, two: Two) -> Line:
    (a, b), relation = two(N), RELATIONS[one(len(RELATIONS))]
    include = [_thing(b), _thing(a, position=[relation, 0])]
    return _line("position", include, f"{_a(CLASSES[a])} {relation} {_a(CLASSES[b])}")


def _color_attr(one: One, two: Two) -> Line:
    things, colors = [1 + i for i in two(N - 1)], [COLORS[i] for i in two(C)]
    include = [_thing(i, color=color) for i, color in zip(things, colors)]
    return _line("color_attr", include, " and ".join(f"{_a(c)} {CLASSES[i]}" for i, c in zip(things, colors)))


TASKS = {
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def _line(task: str, include: list[Line], what: str, **more: Any) -> Line:
    return {"tag": task, "include": include, **more, "prompt": f"a photo of {what}"}


def _thing(index: int, **more: Any) -> Line:
    return {"class": CLASSES[index], "count": 1, **more}


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
