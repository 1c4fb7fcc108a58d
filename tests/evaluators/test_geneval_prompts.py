"""GenEval's prompts: the byte-identical official test list, and a training list without its scenes."""

import hashlib
import json
import random
from collections import Counter

import pytest

from alignbench.config import UserError
from alignbench.evaluators.geneval import GenEval
from alignbench.prompts import geneval, load_prompts

OFFICIAL = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # evaluation_metadata.jsonl's sha256


@pytest.fixture(scope="module")
def test_list():
    return load_prompts("geneval/test")


@pytest.fixture(scope="module")
def train_list():
    return load_prompts("geneval/train")


def read(text: str) -> tuple:
    """Parse a prompt's words alone into ((class, count, colour, relation to the first), ...)."""
    what = text.removeprefix("a photo of ")
    first, _, rest = what.partition(" ")
    if first in geneval.NUMBERS.values():
        count = next(n for n, word in geneval.NUMBERS.items() if word == first)
        (name,) = (c for c in geneval.CLASSES if rest in (f"{c}s", f"{c}es"))
        return ((name, count, None, None),)
    for relation in geneval.RELATIONS:
        if f" {relation} a" in what:
            a, b = what.split(f" {relation} ")
            return noun(b), (*noun(a)[:3], relation)
    return tuple(noun(part) for part in what.split(" and "))


def noun(words: str) -> tuple:
    article, _, rest = words.partition(" ")
    assert article == ("an" if rest[0] in "aeiou" else "a")
    color, _, name = rest.partition(" ")
    coloured = color in geneval.COLORS and name in geneval.CLASSES
    assert coloured or rest in geneval.CLASSES
    return (name, 1, color, None) if coloured else (rest, 1, None, None)


def says(line: dict) -> tuple:
    """Return the same for a line's include clauses."""
    clauses = line["include"]
    assert all(clause["position"][1] == 0 for clause in clauses if "position" in clause)
    return tuple((c["class"], c["count"], c.get("color"), c.get("position", [None])[0]) for c in clauses)


def test_the_test_list_is_the_official_file(test_list):
    """Written like the official generator's, it has 85,209 bytes and the official sha256."""
    written = "".join(f"{json.dumps(prompt.metadata)}\n" for prompt in test_list).encode()
    assert (len(written), hashlib.sha256(written).hexdigest()) == (85209, OFFICIAL)
    tasks = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(prompt.tag for prompt in test_list) == tasks
    assert len({prompt.id for prompt in test_list}) == 553


def test_other_draws_are_refused(monkeypatch):
    """If numpy drew other numbers, there would be an error and no list."""
    monkeypatch.setattr(geneval, "OFFICIAL_SEED", 44)
    with pytest.raises(UserError, match="draws other prompts than the official ones"):
        geneval.test()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "train"])
def test_metadata_match_the_prompt(split, request):
    """Parsing a prompt gives the classes, counts, colours and relation of its metadata; counting excludes one more."""
    prompts = request.getfixturevalue(f"{split}_list")
    GenEval(detector="shapes").check(prompts)
    for prompt in prompts:
        line = prompt.metadata
        assert read(prompt.text) == says(line), prompt
        beyond = [{"class": c["class"], "count": c["count"] + 1} for c in line["include"]]
        assert line.get("exclude") == (beyond if prompt.tag == "counting" else None)


def test_the_training_list(train_list, test_list):
    """It has 50,000 lines in the proportions 7:5:3:1:1:0, no test prompt, and no repeats where there are enough."""
    by_task = {task: [p.text for p in train_list if p.tag == task] for task in geneval.PROPORTIONS}
    counts = {"position": 20588, "counting": 14706, "color_attr": 8824, "colors": 2941, "two_object": 2941}
    assert {task: len(texts) for task, texts in by_task.items()} == counts
    assert not {p.text for p in train_list} & {p.text for p in test_list}
    distinct = {task: len(set(texts)) for task, texts in by_task.items()}
    assert {task for task in counts if distinct[task] < counts[task]} == {"counting", "colors"}
    assert distinct["counting"] == 80 * 3 - 80  # every one that is not a test prompt
    assert len({p.tag for p in train_list[:20]}) > 2  # shuffled


def asked(prompt):
    """Return what a prompt's words ask for, whatever their order: of two things, or of the first beside the second."""
    (a, *more), mirror = read(prompt.text), {"right of": "left of", "below": "above"}
    if not more:
        return prompt.tag, a
    b, relation = more[0][:3], more[0][3]
    if relation is None:
        return prompt.tag, frozenset({a[:3], b})
    return (mirror[relation], a[:3], b) if relation in mirror else (relation, b, a[:3])


@pytest.mark.slow
def test_no_scene_of_the_test_list_is_trained_on(train_list, test_list):
    """Neither with its objects swapped nor with its position mirrored, as strings alone would let pass.

    Of the 50,000 lines that are not test prompts, 131 ask for one of the 552 test scenes.
    """
    scenes = {asked(prompt) for prompt in test_list}
    assert len(scenes) == 552  # a laptop left of a cow and a cow right of a laptop are one
    assert not scenes & {asked(prompt) for prompt in train_list}


def test_a_scene_is_the_same_for_every_wording():
    """Objects swapped, positions mirrored; another colour, relation or object is another scene."""

    def drawn(task, things):
        """Return the scene of a prompt whose draws are ``things``: pairs, then one of four."""
        pairs = iter(things)
        return geneval.scene(geneval.TASKS[task](lambda n: next(pairs), lambda n: next(pairs)))

    left, right, above, below = range(4)
    assert drawn("two_object", [(3, 5)]) == drawn("two_object", [(5, 3)]) != drawn("two_object", [(5, 4)])
    assert drawn("position", [(3, 5), left]) == drawn("position", [(5, 3), right])
    assert drawn("position", [(3, 5), above]) == drawn("position", [(5, 3), below])
    assert drawn("position", [(3, 5), left]) != drawn("position", [(5, 3), left])
    assert drawn("position", [(3, 5), left]) != drawn("position", [(3, 5), above])
    assert drawn("color_attr", [(3, 5), (0, 1)]) == drawn("color_attr", [(5, 3), (1, 0)])
    assert drawn("color_attr", [(3, 5), (0, 1)]) != drawn("color_attr", [(5, 3), (0, 1)])


def test_the_training_list_is_the_same_everywhere(train_list):
    """Its sha256 is fixed for all versions of Python and numpy; another seed gives another list."""
    texts = "\n".join(prompt.text for prompt in train_list)
    assert hashlib.sha256(texts.encode()).hexdigest() == (
        "cabc8d05def101c2f2475e37169e583539e8b6c2f0fbdc0f9ca94f61ee586e30"
    )
    assert geneval.train(20, seed=1) != geneval.train(20, seed=2)
    assert geneval.train(20, seed=1) == geneval.train(20, seed=1)


def test_shares_are_largest_remainders():
    """They sum to the count, and none is off its exact share by one or more; the remainders rounded up are largest."""
    for count in range(300):
        shares = geneval.shares(count)
        exact = {task: count * weight / 17 for task, weight in geneval.PROPORTIONS.items()}
        assert sum(shares.values()) == count
        assert all(abs(shares[task] - exact[task]) < 1 for task in exact)
        up = [exact[task] % 1 for task in exact if shares[task] > exact[task]]
        down = [exact[task] % 1 for task in exact if shares[task] <= exact[task] and exact[task] % 1]
        assert not up or not down or min(up) >= max(down) - 1e-9


@pytest.mark.slow
def test_the_pools_are_counted_right():
    """POOL is a task's number of distinct prompts: enough draws find all of them."""
    rng = random.Random(0)
    for task in ("counting", "colors", "two_object"):
        found = {line["prompt"] for line in geneval._draw(task, 20 * geneval.POOL[task], set(), rng)}
        assert len(found) == geneval.POOL[task]


def test_generated_lists_by_name(tmp_path, monkeypatch):
    """The error for a misspelt name lists both; a folder of that name is an ordinary path."""
    with pytest.raises(UserError, match=r"no prompts 'geneval/tets'; did you mean 'geneval/test'"):
        load_prompts("geneval/tets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "mine.txt").write_text("a dog\n")
    assert [prompt.text for prompt in load_prompts("geneval/mine.txt")] == ["a dog"]
