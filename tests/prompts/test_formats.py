"""A list of prompts is the same in every format: the same texts, tags and ids, however the file spells them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alignbench.config import UserError
from alignbench.prompts import evaluation_prompts, load_prompts, longer_than, prompt_id

TEXTS = ["a photo of a circle", 'a sign that says "hello, world"', "a  cat; a dog", "été"]
TAGS = ["one", "two", "", "four"]


def written(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(folder: Path, name: str, text: str = "prompt", tag: str = "tag", **options: Any) -> str:
    pd.DataFrame({"n": range(4), tag: TAGS, text: TEXTS}).to_csv(folder / name, index=False, **options)
    return str(folder / name)


FORMATS = {
    "objects": lambda folder: written(
        folder, "a.json", json.dumps([{"prompt": text, "tag": tag} for text, tag in zip(TEXTS, TAGS)])
    ),
    "objects by id": lambda folder: written(
        folder, "a.json", json.dumps({f"{i}": {"category": TAGS[i], "prompt": TEXTS[i]} for i in range(4)})
    ),
    "lines of objects": lambda folder: written(
        folder, "a.jsonl", "".join(json.dumps({"prompt": a, "tag": b}) + "\r\n" for a, b in zip(TEXTS, TAGS))
    ),
    "comma-separated": lambda folder: table(folder, "a.csv"),
    "as DrawBench": lambda folder: table(folder, "a.csv", "Prompts", "Category"),
    "every field in quotes": lambda folder: table(folder, "a.CSV", quoting=1),
    "semicolons": lambda folder: table(folder, "a.csv", "Caption", sep=";"),
    "with a byte-order mark": lambda folder: table(folder, "a.csv", encoding="utf-8-sig"),
    "tab-separated, with quotes": lambda folder: table(folder, "a.tsv", "Prompt", "Category", sep="\t"),
    "tab-separated, all in quotes": lambda folder: table(folder, "a.tsv", sep="\t", quoting=1),
    "as PartiPrompts": lambda folder: written(
        folder, "a.tsv", "".join(f"{a}\t{b}\t\n" for a, b in [("Prompt", "Category"), *zip(TEXTS, TAGS)])
    ),
    "as Pick-a-Pic": lambda folder: (
        pd.DataFrame({"caption": TEXTS, "category": TAGS, "jpg_0": [b""] * 4}).to_parquet(folder / "a.parquet"),
        str(folder / "a.parquet"),
    )[1],
}  # fmt: skip


def test_space_after_a_comma_does_not_hide_quotes(tmp_path):
    """``x, "a, b"`` is the tag x and the prompt a, b."""
    (prompt,) = load_prompts(written(tmp_path, "a.csv", 'tag, prompt\nx, "a, b"\n'))
    assert (prompt.text, prompt.tag) == ("a, b", "x")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"prompt": "a dog"}\n{"prompt": "a cat"}\n', r"a.txt:1: .* is JSON, not a prompt; name the file .jsonl"),
        ("prompt,tag\na dog,x\n", "a.txt:1: 'prompt,tag' names columns"),
        ("id\tCaption\n1\ta dog\n", "a.txt:1: .* names columns"),
        ("a dog\n\u200b\n", "a.txt:2: the prompt is empty"),
    ],
)
def test_a_text_that_is_no_list_of_prompts_is_refused(tmp_path, content, line):
    """Objects and tables with the suffix of a text, lines without anything to see; but braces and commas are text."""
    with pytest.raises(UserError, match=line):
        load_prompts(written(tmp_path, "a.txt", content))
    fine = ["{a cat, a dog}", "text, a poster"]
    assert [prompt.text for prompt in load_prompts(written(tmp_path, "b.txt", "\n".join(fine)))] == fine


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_prompts(tmp_path, kind):
    """Texts, tags and ids are those of the list, whatever its format; an id is that of the text."""
    prompts = load_prompts(FORMATS[kind](tmp_path))
    assert [(prompt.text, prompt.tag) for prompt in prompts] == list(zip(TEXTS, TAGS))
    assert [prompt.id for prompt in prompts] == list(map(prompt_id, TEXTS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeff" + "\r\n".join(TEXTS) + "\r\n\r\n"),
        ("a.txt", "\n".join(f"\t{text} \u00a0" for text in TEXTS)),
        ("a.txt", "\n".join(TEXTS).replace(" of ", "\tof\u2028")),
        ("a.txt", "\n\ufeff".join(TEXTS)),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", json.dumps({"prompts": TEXTS})),
        ("a.csv", "\n\nprompt\n" + "\n".join(f'" {text.replace(chr(34), 2 * chr(34))}\n"' for text in TEXTS)),
        ("a.jsonl", "".join(json.dumps({"text": text.replace("of", "\nof")}) + "\n" for text in TEXTS)),
    ],
)
def test_space_and_marks_are_no_part_of_a_prompt(tmp_path, name, content):
    """Space around a prompt, a byte-order mark and blank lines at the end are left out; a tab or break is a space."""
    assert [prompt.text for prompt in load_prompts(written(tmp_path, name, content))] == TEXTS


def test_a_quoted_text_of_a_table_with_tabs_stays_quoted(tmp_path):
    """Only a table that needs quotes has them: elsewhere they belong to the prompt, as in PartiPrompts.tsv."""
    lines = ["Prompt\tCategory", '"hello"\tWords', '"a" and "b"\tWords', 'a "c"\tWords']
    found = load_prompts(written(tmp_path, "a.tsv", "\n".join(lines)))
    assert [prompt.text for prompt in found] == ['"hello"', '"a" and "b"', 'a "c"']
    assert [p.text for p in load_prompts(written(tmp_path, "a.tsv", "\n".join(lines[:2])))] == ['"hello"']


def test_a_repeated_prompt_is_drawn_more_often_and_evaluated_once(tmp_path):
    """Training keeps every line, as the weight of its prompt; evaluation has each prompt once, in order."""
    name = written(tmp_path, "a.txt", "a circle\na square \n  a circle\na cross\na square")
    assert [prompt.text for prompt in load_prompts(name)].count("a square") == 2
    assert [prompt.text for prompt in evaluation_prompts(name)] == ["a circle", "a square", "a cross"]


WRONG = {  # what is wrong: (name, content, the error)
    "two columns of prompts": ("a.csv", "prompt,caption\na,b\n", r"a.csv:1: prompts may be in 'prompt' or 'caption'"),
    "one name in two cases": ("a.csv", "Prompt,prompt\na,b\n", r"a.csv:1: prompts may be in 'Prompt' or 'prompt'"),
    "no column of prompts": ("a.csv", "id,words\n1,b\n", r"a.csv:1: nothing here is called prompt, .*: id, words"),
    "no first line": ("a.csv", "a red cat\na blue dog\n", r"a.csv:1: nothing here is called prompt"),
    "commas without quotes": ("a.csv", "prompt\na cat, red\n", r"a.csv:2: 2 fields, where the first line names 1; put"),
    "a row that ends early": ("a.csv", "id,prompt\n1\n", r"a.csv:2: 1 fields, where the first line names 2"),
    "an open quote": ("a.csv", 'prompt\n"a cat\n', r"a.csv:\d: not a table: unexpected end of data"),
    "a quote within quotes": ("a.csv", 'prompt\n"a "red" cat"\n', r"a.csv:2: not a table: .*quotes within it twice"),
    "an empty cell": ("a.csv", "prompt,tag\n ,x\n", r"a.csv:2: the prompt is empty"),
    "an empty line": ("a.txt", "a\n\nb\n", r"a.txt:2: the prompt is empty"),
    "a control character": ("a.txt", "a\nb\x07c\n", r"a.txt:2: the control character U\+0007"),
    "no objects": ("a.jsonl", "[1]\n", r"a.jsonl:1: expected an object"),
    "another key": ("a.jsonl", '{"words": "a"}\n', r"a.jsonl:1: nothing here is called prompt"),
    "two keys": ("a.jsonl", '{"caption": "a", "text": "b"}\n', r"a.jsonl:1: prompts may be in 'caption' or 'text'"),
    "a number": ("a.json", '[{"prompt": 3}]', r"a.json: \[0\]: expected an object with a text"),
    "a single text": ("a.json", '"a cat"', r"a.json: expected a list of prompts"),
    "settings": ("a.json", '{"name": "x", "size": 3}', r"a.json: nothing here is called prompt"),
    "brackets": ("a.json", "[" * 100_000, r"a.json: not JSON: "),
    "not JSON": ("a.jsonl", "a cat\n", r"a.jsonl:1: not JSON"),
    "not parquet": ("a.parquet", b"PAR1 or not", r"a.parquet: cannot be read"),
    "nothing": ("a.csv", "", r"a.csv: the file is empty"),
    "only a first line": ("a.csv", "prompt\n", r"a.csv: the file has no prompts"),
    "only space": ("a.txt", " \n\n", r"a.txt:1: the prompt is empty"),
    "UTF-16": ("a.txt", "a cat".encode("utf-16"), r"a.txt: not UTF-8 text"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_unusable_list_is_one_line(tmp_path, what):
    """The setting that names the list, the file, the line, and what is wrong there."""
    name, content, line = WRONG[what]
    with pytest.raises(UserError, match=f"^x.yaml: prompts: .*{line}") as error:
        load_prompts(written(tmp_path, name, content), "x.yaml: prompts")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["none.txt", "a\0b.txt", "folder.txt", f"{'a' * 300}.txt", "a.docx", "", "~.csv"])
def test_a_list_that_is_not_there_names_the_setting(tmp_path, monkeypatch, name):
    """A missing file, a folder in its place and a name that cannot be a file: each with the key that says it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"^x.yaml: prompts: .*(cannot be read|is not a prompt file)") as error:
        load_prompts(name, "x.yaml: prompts")
    assert "\n" not in str(error.value)


def test_prompts_beyond_a_limit_are_counted_by_tokens(tmp_path):
    """Lengths are the tokenizer's own, its special tokens included; a text of few bytes is not even tokenized."""
    from support.tiny import t5_tokenizer

    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    prompts = load_prompts(
        written(tmp_path, "a.txt", "a circle\na photo of a circle\na photo of a circle and a square")
    )
    lengths = [len(tokenizer(prompt.text).input_ids) for prompt in prompts]
    for limit in range(max(lengths) + 1):
        expected = [prompt for prompt, length in zip(prompts, lengths) if length > limit]
        assert longer_than(limit, prompts, tmp_path) == expected
    assert longer_than(40, prompts, tmp_path / "nowhere") == []
