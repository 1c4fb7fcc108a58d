"""Numbers in file names: each name has one reading, or is refused."""

import random
from pathlib import Path

import pytest

from alignbench.config import UserError
from alignbench.evaluation.file_numbers import places


def paired(names, prompts):
    """Return {name: (position of its prompt, image index)}; the names are given in a random order."""
    files = [Path("images", name) for name in names]
    random.Random(0).shuffle(files)
    return {file.name: (place, index) for file, place, index in places(files, prompts, "list.txt")}


ONE_EACH = {  # names of twelve images, in the order of their prompts
    "unpadded": "{}.png",
    "padded": "{:05}.png",
    "a prefix": "img_{}.png",
    "a suffix": "{}_final.jpg",
    "a model's name": "sd3.5-step500-{}.webp",
    "an upper-case extension": "IMG{}.PNG",
    "a prompt and one seed": "prompt-{}_seed-42.png",
    "a seed and a prompt": "seed7_prompt{}.png",
}


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("form", ONE_EACH)
def test_names_are_read_by_their_number(form, start):
    """Image 10 belongs to the prompt after that of image 9, whether names count from 0 or from 1."""
    names = [ONE_EACH[form].format(start + i) for i in range(12)]
    assert paired(names, 12) == {name: (i, 0) for i, name in enumerate(names)}


def test_padding_may_differ():
    """Names of two programs in one folder: 001.png, 2.png and 10.png are the numbers 1, 2 and 10."""
    names = ["001.png", "2.png", "03.png", *(f"{i}.png" for i in range(4, 11))]
    assert paired(names, 10) == {name: (i, 0) for i, name in enumerate(names)}


SEVERAL = {  # names of images of twelve prompts, two each: of prompt i and image j
    "prompt and image": "{i}_{j}.png",
    "FlowBP's": "{i:05}_{j:02}.png",
    "UniRL's": "p{i:05}_s{j}.png",
    "words": "prompt-{i}_seed-{j}.png",
    "seeds first": "seed{j}_prompt{i}.png",
    "seeds first, and a bare number": "seed{j}_{i}.png",
    "ranks and a counter of their own": "rank{j}_{i}.png",
    "large seeds": "{i}-{seed}.png",
    "large seeds first": "{seed}-{i}.png",
}


@pytest.mark.parametrize("form", SEVERAL)
def test_the_number_of_the_prompt_is_found(form):
    """Of two numbers, that called a prompt, or else the first that counts and is not a seed, is the prompt's."""
    places = {(i, j): {"i": i, "j": j, "seed": 3_000_000_000 - 1000 * i + j} for i in range(12) for j in range(2)}
    names = {SEVERAL[form].format(**values): place for place, values in places.items()}
    assert paired(names, 12) == names


def test_as_many_images_as_prompts_in_a_square():
    """Where both numbers have as many values as there are prompts, a word has to say which of them is the prompt's."""
    square = [(i, j) for i in range(3) for j in range(3)]
    for form in ("p{i}_{j}.png", "seed{j}_{i}.png", "{i}_seed{j}.png"):
        names = {form.format(i=i, j=j): (i, j) for i, j in square}
        assert paired(names, 3) == names


def test_a_list_of_one_prompt_has_all_images():
    """Any numbers will do, in their order."""
    assert paired(["42.png", "7.png", "123.png"], 1) == {"7.png": (0, 0), "42.png": (0, 1), "123.png": (0, 2)}
    assert paired(["cat.png"], 1) == {"cat.png": (0, 0)}


REFUSED = {  # mistake: (names, number of prompts, error message)
    "a gap": (["0.png", "1.png", "3.png"], 3, "images: the numbers in the names of the images leave out 2"),
    "another start": (["5.png", "6.png", "7.png"], 3, "leave out 1, so they do not say which prompt is whose"),
    "times": (["img-1714560000.png", "img-1714560007.png"], 2, "leave out 1"),
    "names": (["a_cat.png", "a_dog.png"], 2, "formed unlike the others"),
    "hashes": (["0a1b.png", "77fe.png", "c001.png"], 3, "formed unlike the others"),
    "a contact sheet": (
        ["0.png", "1.png", "grid.png"],
        3,
        r"grid.png: its name is formed unlike the others' \(0.png\)",
    ),
    "a sheet of one prompt": (["0.png", "1.png", "grid.png"], 1, "grid.png: its name is formed unlike"),
    "a copy": (["0.png", "1.png", "1 (1).png"], 3, r"1 \(1\).png: its name is formed unlike"),
    "two formats": (["0.png", "0.jpg", "1.png", "1.jpg"], 2, "images: 0.jpg and 0.png have the same numbers; keep one"),
    "two paddings": (["0.png", "00.png", "1.png", "01.png"], 2, "0.png and 00.png have the same numbers"),
    "too many": (
        [f"{i}.png" for i in range(13)],
        12,
        "13 images cannot be divided equally among the 12 prompts of list",
    ),
    "too few": ([f"{i}.png" for i in range(11)], 12, "11 images cannot be divided equally among the 12 prompts"),
    "one image missing": (["0_0.png", "0_1.png", "1_0.png"], 2, "3 images cannot be divided equally among the 2"),
    "uneven": (
        ["0_0.png", "0_1.png", "0_2.png", "1_0.png"],
        2,
        "in their names prompts have 1 to 3 images",
    ),
    "another list": ([f"{i}_{j}.png" for i in range(4) for j in (0, 1)], 2, "count 4 prompts, but list.txt has 2"),
    "the prompts of another list": ([f"prompt{i}_seed{j}.png" for i in range(4) for j in (0, 1)], 2, "count 4 prompts"),
    "epochs": (
        [f"epoch{i}_{j}.png" for i in (0, 1) for j in (0, 1)],
        2,
        "epoch0_0.png and epoch1_0.png differ in 'epoch'",
    ),
    "checkpoints": ([f"p{i}_step{j}.png" for i in (0, 1) for j in (100, 200)], 2, "p0_step100.png and p0_step200.png"),
    "settings": (
        [f"{i}_cfg3.{j}.png" for i in (0, 1) for j in (0, 5)],
        2,
        "differ in 'cfg'; put images that were made",
    ),
    "images that are only counted": ([f"{i}.png" for i in range(24)], 12, "may follow each other, or come in rounds"),
    "a square": ([f"{i}_{j}.png" for i in range(3) for j in range(3)], 3, "either number in the names .* may count"),
    "two counters": (["0_0.png", "1_1.png", "2_0.png", "3_1.png"], 2, "count 4 prompts, but list.txt has 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_without_one_reading_are_refused(case):
    """The error names the folder or the file, and how to say which prompt is whose."""
    names, prompts, says = REFUSED[case]
    with pytest.raises(UserError, match=says) as caught:
        paired(names, prompts)
    assert "\n" not in str(caught.value)
