"""Which image of a folder belongs to which prompt, what is left out, and what is refused."""

import json
import shutil

import pandas as pd
import pytest
from support.image_folders import TEXTS, draw

from alignbench.config import UserError
from alignbench.evaluation.folders import FILE_KEYS, folder_images, read_folder
from alignbench.prompts import prompt_id


def test_in_the_order_of_their_names(listed):
    """Six images for three prompts are two for each, by the numbers of prompt and image."""
    draw(listed / "images", [f"{i:03}_{j}.png" for i in range(3) for j in range(2)])
    images = folder_images(listed / "images", str(listed / "list.txt"))
    assert [(p.prompt.text, p.image_index) for p in images] == [(text, i) for text in TEXTS for i in range(2)]


def test_by_alignbenchs_own_names(listed):
    """Names are <prompt id>-<index>.png, in any order and number."""
    names = [f"{prompt_id(TEXTS[2])}-0.png", f"{prompt_id(TEXTS[0])}-1.png", f"{prompt_id(TEXTS[0])}-0.png"]
    draw(listed / "images", names)
    found = {
        p.file.name: (p.prompt.text, p.image_index) for p in folder_images(listed / "images", str(listed / "list.txt"))
    }
    assert found == dict(zip(names, [(TEXTS[2], 0), (TEXTS[0], 1), (TEXTS[0], 0)]))


def test_by_a_list_that_names_files(listed):
    """Every .jsonl line has a prompt and its file; a prompt may be repeated."""
    draw(listed / "images", ["a.png", "b.png", "c.png"])
    lines = [{"prompt": TEXTS[i], "file": f"{name}.png"} for i, name in ((0, "b"), (1, "a"), (0, "c"))]
    (listed / "named.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    images = folder_images(listed / "images", str(listed / "named.jsonl"))
    assert [(p.file.name, p.prompt.text, p.image_index) for p in images] == [
        ("b.png", TEXTS[0], 0),
        ("a.png", TEXTS[1], 0),
        ("c.png", TEXTS[0], 1),
    ]


def test_genevals_layout(listed):
    """With 00000/metadata.jsonl beside 00000/samples/*.png no list is needed."""
    for i, text in enumerate(TEXTS):
        draw(listed / "images", [f"{i:05}/samples/{j:04}.png" for j in range(2)])
        metadata = {"prompt": text, "tag": "colors", "include": []}
        (listed / "images" / f"{i:05}" / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    images = folder_images(listed / "images")
    assert [(p.prompt.text, p.prompt.tag, p.image_index) for p in images] == [
        (t, "colors", i) for t in TEXTS for i in range(2)
    ]
    assert images[0].prompt.metadata["include"] == []


@pytest.mark.parametrize(
    ("names", "prompts", "says"),
    [
        ([f"{i}.png" for i in range(5)], "list.txt", "5 images cannot be divided equally among the 3 prompts"),
        (["notes.pdf"], "list.txt", "the folder contains no images"),
        ([f"{'ab' * 6}-0.png"], "list.txt", "the name does not begin with the id of a prompt of"),
        (["a.png", "b.png", "grid.png"], "list.txt", "its name is formed unlike the others"),
        (["a.png"], None, "name the prompts with --prompts"),
    ],
)
def test_unclear_folders_are_refused(listed, names, prompts, says):
    """No image is assigned to a prompt by guesswork."""
    for name in names:
        (listed / "images" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=says):
        folder_images(listed / "images", prompts and str(listed / prompts))


def test_a_missing_file_of_a_list_is_refused(listed):
    """The error names the line of the list."""
    (listed / "named.jsonl").write_text(json.dumps({"prompt": "a", "file": "gone.png"}) + "\n")
    with pytest.raises(UserError, match=r"named.jsonl:1: .*gone.png is missing"):
        folder_images(listed / "images", str(listed / "named.jsonl"))


def test_other_files_are_no_images(listed):
    """Hidden files (macOS writes ._0.png), captions and what a system leaves behind are not looked at."""
    names = [f"{i}.PNG" for i in range(12)]
    draw(listed / "images", [*names, *(f"._{name}" for name in names)])
    for name in ("Thumbs.db", ".DS_Store", "0.txt", "grid.pdf"):
        (listed / "images" / name).write_bytes(b"x")
    images = folder_images(listed / "images", str(listed / "twelve.txt"))
    assert [(p.file.name, p.prompt.text) for p in images] == [(name, f"thing {i}") for i, name in enumerate(names)]


def write_list(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


@pytest.mark.parametrize("key", [*FILE_KEYS, "picture", "Image", "File Name"])
def test_a_list_may_name_its_images_under_other_keys(listed, key):
    """Known keys, and any whose values look like images, are read; lines need not be in the order of the names."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    named = write_list(listed / "n.jsonl", *({key: f"{2 - i}.png", "prompt": text} for i, text in enumerate(TEXTS)))
    images = folder_images(listed / "images", named)
    assert [(p.file.name, p.prompt.text) for p in images] == list(zip(["2.png", "1.png", "0.png"], TEXTS))


def test_names_in_a_list_are_absolute_or_relative_to_folder_or_list(listed):
    """All of them mean the same file."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    names = [str(listed / "images" / "2.png"), "images/0.png", "1.png"]
    named = write_list(listed / "n.jsonl", *({"file": n, "prompt": text} for n, text in zip(names, TEXTS)))
    images = folder_images(listed / "images", named)
    assert [p.file.resolve().name for p in images] == ["2.png", "0.png", "1.png"]


@pytest.mark.parametrize("form", ["n.csv", "n.tsv", "n.json"])
def test_other_lists_name_their_images_too(listed, form):
    """A table's column or a JSON list's key; with an empty field, the line is named."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    rows = [("image", "caption"), *((f"{2 - i}.png", text) for i, text in enumerate(TEXTS))]
    (listed / "n.csv").write_text("".join(f"{name},{text}\n" for name, text in rows))
    (listed / "n.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in rows))
    (listed / "n.json").write_text(json.dumps([dict(zip(rows[0], row)) for row in rows[1:]]))
    images = folder_images(listed / "images", str(listed / form))
    assert [(p.file.name, p.prompt.text) for p in images] == list(zip(["2.png", "1.png", "0.png"], TEXTS))
    (listed / form).write_text((listed / form).read_text().replace("1.png", ""))
    with pytest.raises(UserError, match=r"n\..*(3|\[1\]): \"image\": expected the name of an image"):
        folder_images(listed / "images", str(listed / form))


def test_links_are_images_of_their_folder(listed):
    """A folder of links to images elsewhere is read as one of images, by number or by a list."""
    draw(listed / "elsewhere", ["a.png", "b.png", "c.png"])
    for i, name in enumerate("cab"):
        (listed / "images" / f"{i}.png").symlink_to(listed / "elsewhere" / f"{name}.png")
    by_list = write_list(listed / "n.jsonl", *({"file": f"{i}.png", "prompt": text} for i, text in enumerate(TEXTS)))
    for prompts in (by_list, str(listed / "list.txt")):
        found = [(p.file.name, p.prompt.text) for p in folder_images(listed / "images", prompts)]
        assert found == list(zip(["0.png", "1.png", "2.png"], TEXTS))


def test_a_list_may_repeat_prompts(listed):
    """Numbered images follow the lines: those of a repeated prompt are further images of it."""
    draw(listed / "images", [f"{i}.png" for i in range(6)])
    images = folder_images(listed / "images", write_list(listed / "n.jsonl", *({"prompt": text} for text in TEXTS * 2)))
    assert [(p.prompt.text, p.image_index) for p in images] == [(text, j) for j in range(2) for text in TEXTS]


def test_a_list_may_have_other_files_beside_file(listed):
    """ "file" counts before other keys; lists of other models' images, as in HPDv2's files, are not of this folder."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    lines = [{"prompt": text, "file": f"{i}.png", "source": "x.png"} for i, text in enumerate(TEXTS)]
    assert len(folder_images(listed / "images", write_list(listed / "n.jsonl", *lines))) == 3
    lines = [{"prompt": text, "image_path": ["a.jpg", "b.jpg"]} for text in TEXTS]
    images = folder_images(listed / "images", write_list(listed / "n.jsonl", *lines))
    assert [p.file.name for p in images] == ["0.png", "1.png", "2.png"]


ORDERS = {  # of images 0, 1, 2 in lines 2, 1, 0: what else a line says of its image
    "a number": lambda i: {"id": i},
    "a padded number": lambda i: {"image_id": f"{i:04}"},
    "a number from 1": lambda i: {"n": i + 1},
    "a name without extension": lambda i: {"name": f"img_{i}"},
    "a name within an object": lambda i: {"meta": {"file": f"{i}.png"}},
    "a list of one name elsewhere": lambda i: {"images": [f"out/{i}.png"]},
    "an address": lambda i: {"url": f"https://host/{i}.png"},
}


@pytest.mark.parametrize("case", ORDERS)
def test_a_list_that_counts_otherwise_than_its_lines_is_refused(listed, case):
    """A number in a file name may then mean the line or what the line says; sorted lines have one reading."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    lines = [{"prompt": text, **ORDERS[case](2 - i)} for i, text in enumerate(TEXTS)]
    with pytest.raises(UserError, match=r"n.jsonl: \".*\" counts the prompts in another order than the lines"):
        folder_images(listed / "images", write_list(listed / "n.jsonl", *lines))
    images = folder_images(listed / "images", write_list(listed / "n.jsonl", *lines[::-1]))
    assert [p.prompt.text for p in images] == TEXTS[::-1]


def test_the_keys_of_a_json_file_count_its_prompts(listed):
    """Keys that are names of images pair them, keys in another order than the file are refused."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    file = listed / "n.json"
    file.write_text(json.dumps({f"{2 - i}.png": {"prompt": text} for i, text in enumerate(TEXTS)}))
    assert [p.file.name for p in folder_images(listed / "images", str(file))] == ["2.png", "1.png", "0.png"]
    file.write_text(json.dumps({str(2 - i): {"prompt": text} for i, text in enumerate(TEXTS)}))
    with pytest.raises(UserError, match='"key" counts the prompts in another order'):
        folder_images(listed / "images", str(file))


def test_a_parquet_file_names_its_images(listed):
    """Its columns of texts are read as those of a csv; images are not."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    rows = {"prompt": TEXTS, "file_name": ["2.png", "1.png", "0.png"], "jpg": [b"x"] * 3}
    pd.DataFrame(rows).to_parquet(listed / "n.parquet")
    images = folder_images(listed / "images", str(listed / "n.parquet"))
    assert [p.file.name for p in images] == ["2.png", "1.png", "0.png"]
    assert images[0].prompt.metadata == {"prompt": TEXTS[0], "file_name": "2.png"}


def test_a_text_list_with_file_names_is_refused(listed):
    """They would be scored as words of the prompts."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    (listed / "n.txt").write_text("".join(f"{2 - i}.png\t{text}\n" for i, text in enumerate(TEXTS)))
    with pytest.raises(UserError, match=r"n\.txt:1: the prompt begins with the name of an image"):
        folder_images(listed / "images", str(listed / "n.txt"))


def test_addresses_in_the_web_name_no_images_here(listed):
    """Pick-a-Pic's lines have addresses of other images; these are counted by their names."""
    draw(listed / "images", ["0.png", "1.png", "2.png"])
    lines = [{"caption": text, "image_0_url": "http://h/a.png", "image_1_url": "http://h/b.png"} for text in TEXTS]
    assert len(folder_images(listed / "images", write_list(listed / "n.jsonl", *lines))) == 3


A, B, C = ({"prompt": text, "image": f"{i}.png"} for i, text in enumerate(TEXTS))
LISTS = {  # mistake: (lines, error message)
    "a line without a name": (
        [A, {"prompt": "b"}, C],
        'n.jsonl:2: "image": expected the name of an image',
    ),
    "a name that is null": ([A, B | {"image": None}, C], 'n.jsonl:2: "image": expected the name of an image'),
    "a name that is a number": ([A, B | {"image": 1}], 'n.jsonl:2: "image": expected the name of an image.*got 1'),
    "data in place of a name": ([A | {"image": "iVBORw0KGgo" * 9999}], 'n.jsonl:1: "image": .* is missing$'),
    "a name of several": ([A, B | {"image": ["0.png"]}], r'n.jsonl:2: "image": expected the name of an image.*got \['),
    "another key in one line": (
        [A, {"prompt": "b", "img": "1.png"}, C],
        'images are named under "image" and "img"',
    ),
    "two keys": ([A | {"mask": "m.png"}, B, C], 'images are named under "image" and "mask"; name those of this folder'),
    "an image twice": ([A, B, C | {"image": "0.png"}], "n.jsonl:3: .*0.png is already the image of .*n.jsonl:1"),
    "an image twice, as two paths": ([A, B | {"image": "./0.png"}], "n.jsonl:2: .*0.png is already the image of"),
    "an image of another folder": ([A | {"image": "../other/0.png"}], "n.jsonl:1: .*other/0.png is not in .*images"),
    "an image in two places": ([A | {"image": "images/0.png"}], "n.jsonl:1: .* and .* exist; give the whole path"),
    "a prompt under two tasks": ([A | {"tag": "x"}, B | {"prompt": TEXTS[0], "tag": "y"}], "has the tag 'x' and 'y'"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_that_names_images_badly_is_refused(listed, case):
    """One line says where; images are never paired by order if the list names some."""
    draw(listed / "images", ["0.png", "1.png", "2.png", "images/0.png"])
    draw(listed / "other", ["0.png"])
    lines, says = LISTS[case]
    with pytest.raises(UserError, match=says) as caught:
        folder_images(listed / "images", write_list(listed / "n.jsonl", *lines))
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_said(listed):
    """Images that a list does not name, those in subfolders, and prompts without an image are in the remarks."""
    folder = listed / "images"
    draw(folder, ["0.png", "1.png", "2.png", "old/0.png", ".cache/1.png"])
    assert read_folder(folder, str(listed / "list.txt")).remarks == [
        "paired by the numbers in the names of the images: 0.png with 'a red circle', "
        "1.png with 'two blue squares', 2.png with 'a green ring'",
        "left out 1 image in subfolders: old/0.png",
    ]
    named = write_list(listed / "n.jsonl", A)
    assert read_folder(folder, named).remarks == [f"left out 2 images that {named} does not name: 1.png, 2.png"]
    draw(listed / "ours", [f"{prompt_id(TEXTS[1])}-0.png"])
    source = str(listed / "list.txt")
    assert read_folder(listed / "ours", source).remarks == [f"2 of the 3 prompts of {source} have no image"]


# ---- GenEval's layout


def write_geneval(folder, samples, texts=TEXTS, form="{:05}"):
    """Write a numbered folder for every prompt, with the images ``samples``."""
    for i, text in enumerate(texts):
        draw(folder / form.format(i), [f"samples/{name}" for name in samples])
        (folder / form.format(i) / "metadata.jsonl").write_text(json.dumps({"prompt": text, "tag": "colors"}))


def test_only_numbered_samples_count(listed):
    """As the official script, a contact sheet is not counted, in samples/ or beside it; a remark says so."""
    write_geneval(listed / "images", ["0000.png", "0001.png", "grid.png"])
    draw(listed / "images", ["00000/grid.png", "00000/samples/._0000.png"])
    images, remarks = read_folder(listed / "images")
    assert [(p.file.name, p.image_index) for p in images] == [("0000.png", 0), ("0001.png", 1)] * 3
    assert remarks == [
        "left out 3 images without a number for a name: "
        "00000/samples/grid.png, 00001/samples/grid.png, 00002/samples/grid.png"
    ]


def test_samples_and_folders_are_in_the_order_of_their_numbers(listed):
    """Without padding, folder 10 follows folder 9 and sample 10 sample 9."""
    write_geneval(listed / "images", [f"{i}.png" for i in range(11)], [f"thing {i}" for i in range(11)], form="{}")
    found = [(p.prompt.text, p.file.name, p.image_index) for p in folder_images(listed / "images")]
    assert found == [(f"thing {i}", f"{j}.png", j) for i in range(11) for j in range(11)]


def test_a_sample_keeps_its_place_where_another_is_missing(listed):
    """Image 2 is paired with image 2 of other rows, also where image 1 is missing; seeds as names are only ordered."""
    write_geneval(listed / "images", ["1.png", "2.png", "3.png"])
    (listed / "images/00001/samples/2.png").unlink()
    assert [p.image_index for p in folder_images(listed / "images")] == [0, 1, 2, 0, 2, 0, 1, 2]
    (listed / "images/00000/samples/3.png").rename(listed / "images/00000/samples/77.png")
    assert [p.image_index for p in folder_images(listed / "images")] == [0, 1, 2, 0, 1, 0, 1, 2]


LAYOUTS = {  # mistake: (what is done to the folder, error message)
    "no samples": (lambda f: shutil.rmtree(f / "00001/samples"), "00001: no images are in samples/"),
    "empty samples": (lambda f: (f / "00001/samples/0000.png").unlink(), "00001: no images are in samples/"),
    "no metadata": (
        lambda f: (f / "00001/metadata.jsonl").unlink(),
        "00001: there is no metadata.jsonl beside",
    ),
    "a copy": (lambda f: shutil.copytree(f / "00001", f / "00001 copy"), "00001 copy: GenEval's folders have numbers"),
    "two formats": (lambda f: draw(f, ["00001/samples/0000.jpg"]), "'two blue squares', image 0, appears twice"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_folder_of_genevals_layout_with_a_mistake_is_refused(listed, case):
    """The folder at fault is named: no prompt is left out of the score without a word."""
    change, says = LAYOUTS[case]
    write_geneval(listed / "images", ["0000.png"])
    change(listed / "images")
    with pytest.raises(UserError, match=says):
        folder_images(listed / "images")


def test_a_missing_folder_is_mentioned(listed):
    """A list of which some folders are absent is scored, with a remark: it may be a subset that was meant."""
    write_geneval(listed / "images", ["0000.png"])
    shutil.rmtree(listed / "images/00001")
    images, remarks = read_folder(listed / "images")
    assert len(images) == 2
    assert remarks == ["the numbers of the folders leave out 1: were all prompts made?"]


def test_flow_grpos_layout(listed):
    """A folder for every line, each prompt four times, gives four images of every prompt, whatever the order."""
    for name, texts in {"blocks": [t for t in TEXTS for _ in range(4)], "rounds": TEXTS * 4}.items():
        write_geneval(listed / name, ["00000.png"], texts)
        images = folder_images(listed / name)
        assert {(p.prompt.text, p.image_index) for p in images} == {(text, i) for text in TEXTS for i in range(4)}
        assert [p.file.parent.parent.name for p in images] == [f"{i:05}" for i in range(12)]


def test_two_files_of_one_image_are_refused(listed):
    """The same prompt id and index as .png and as .jpg: one of them is left over from something else."""
    name = f"{prompt_id(TEXTS[0])}-0"
    draw(listed / "images", [f"{name}.png", f"{name}.jpg"])
    with pytest.raises(UserError, match=r"'a red circle', image 0, appears twice; keep one of them"):
        folder_images(listed / "images", str(listed / "list.txt"))
