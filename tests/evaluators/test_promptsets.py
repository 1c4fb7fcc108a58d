"""Public prompt sets: read only from the hub cache, the same list from the same file, one-line errors if missing."""

import json

import pytest

from alignbench.config import UserError
from alignbench.prompts import Prompt, check_vocabulary, digest, load_prompts, public
from alignbench.prompts.public import SETS

REVISION = "0" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that stores a text in the hub's cache as a set's file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(name, text):
        chosen = SETS[name]
        folder = tmp_path / f"datasets--{chosen.repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        path = folder / "snapshots" / REVISION / chosen.file
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")

    return put


def test_hpdv2_is_its_whole_test_split_in_order(hub):
    """The list has the prompts of test.json, each one line of plain text."""
    texts = [f"prompt  {i}\n of a list" for i in range(400)]
    hub("hpdv2/test", json.dumps([{"prompt": text, "rank": [1]} for text in texts]))
    assert [p.text for p in load_prompts("hpdv2/test")] == [f"prompt {i} of a list" for i in range(400)]


def mjhq(order):
    items = [(f"{i:05}", {"category": f"c{i % 10}", "prompt": f" prompt {i} "}) for i in range(3000)]
    return json.dumps(dict(items[::order]))


def test_mjhq_is_fifty_of_each_category_whatever_the_files_order(hub, tmp_path):
    """It has 500 distinct prompts, 50 of each of ten categories, the same for any order of the file."""
    hub("mjhq/500", mjhq(1))
    first = load_prompts("mjhq/500")
    assert len({p.id for p in first}) == 500
    assert {tag: sum(p.tag == tag for p in first) for tag in {p.tag for p in first}} == {f"c{i}": 50 for i in range(10)}
    path = next(tmp_path.rglob("meta_data.json"))
    path.write_text(mjhq(-1))
    assert digest(load_prompts("mjhq/500")) == digest(first)


@pytest.mark.slow
def test_mjhq_train_holds_no_prompt_of_the_test(hub):
    """It has 25,000 distinct prompts, none of mjhq/500 even with other spaces, the same for any order of the file."""
    items = [(f"{i:05}", {"category": f"c{i % 10}", "prompt": f" prompt  {i % 26000}"}) for i in range(30000)]
    hub("mjhq/train", json.dumps(dict(items)))
    first = load_prompts("mjhq/train")
    assert len({p.id for p in first}) == len(first) == 25_000
    assert not {p.id for p in first} & {p.id for p in load_prompts("mjhq/500")}
    (path,) = {public.cached(SETS["mjhq/train"], "here")}
    path.write_text(json.dumps(dict(items[::-1])))
    assert digest(load_prompts("mjhq/train")) == digest(first)


def test_drawbench_and_parti(hub):
    """DrawBench is a list of texts; Parti a table with categories and quotes, where a repeated line counts once."""
    hub("drawbench", json.dumps([f"text {i}" for i in range(200)]))
    assert len(load_prompts("drawbench")) == 200
    lines = ["Prompt\tCategory\tChallenge\tNote", *(f'a "sign" {i}\tArts\tBasic\t' for i in range(1631))]
    hub("partiprompts", "\n".join([*lines, lines[5]]) + "\n")
    found = load_prompts("partiprompts")
    assert len(found) == 1631
    assert (found[0].text, found[0].tag) == ('a "sign" 0', "Arts")


@pytest.mark.parametrize("name", SETS)
def test_a_missing_set_says_how_to_get_it(name, hub):
    """The error is one line with the command and the licence; nothing is downloaded."""
    with pytest.raises(UserError, match=r"not in the hub cache; fetch it once with `hf download .*licence") as caught:
        load_prompts(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '[{"text": "a"}]'])
def test_another_file_is_refused(text, hub):
    """A list of another length or form is not accepted as the set."""
    hub("hpdv2/test", text)
    with pytest.raises(UserError, match=r"HPDv2|instead of 400"):
        load_prompts("hpdv2/test")


@pytest.mark.slow
def test_hpdv2_train_is_fifty_thousand_readable_prompts(hub):
    """They are distinct, the same for any order of the comparisons, without Chinese or control characters."""
    texts = [f"prompt  {i}" for i in range(50_400)]
    odd = ["一只猫", "a\x07bell", "é and ~ are fine"]
    hub("hpdv2/train", json.dumps([{"prompt": text, "human_preference": [1, 0]} for text in [*texts, *odd, *texts]]))
    first = load_prompts("hpdv2/train")
    assert len({p.id for p in first}) == len(first) == 50_000
    assert not {p.text for p in first} & {"一只猫", "a\x07bell"}
    (path,) = {public.cached(SETS["hpdv2/train"], "here")}
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    assert digest(load_prompts("hpdv2/train")) == digest(first)


def test_a_prompt_is_refused_only_where_no_encoder_reads_it(tmp_path):
    """T5 has no token for '{': an error if T5 is alone, but not beside an encoder of bytes, as FLUX.1's CLIP is."""
    from support.tiny import t5_tokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers

    t5_tokenizer().save_pretrained(tmp_path)
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    Tokenizer(models.BPE(vocab=alphabet, merges=[])).save(str(tmp_path / "bytes.json"))
    prompts = [Prompt("1", "a photo of a {circle}")]
    with pytest.raises(UserError, match="no token for"):
        check_vocabulary(prompts, "shapes/test", [tmp_path / "tokenizer.json"])
    check_vocabulary(prompts, "shapes/test", [tmp_path / "tokenizer.json", tmp_path / "bytes.json"])
