"""Lists of prompts: finding, reading and checking them.

Two file formats: ``.txt`` (one prompt per line) and ``.jsonl`` (one object per line with "prompt", and optionally "tag"
for its task; the whole object is kept as metadata). GenEval's lists and that of ImageNet's classes are generated on
demand.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignbench.config import UserError, did_you_mean, read_text
from alignbench.evaluator import Prompt
from alignbench.prompts import geneval, public
from alignbench.prompts.public import SETS

SHAPES = Path(__file__).parents[1] / "shapes" / "assets" / "prompts"
SPLITS = ("train", "val", "test")
CLASSES = 1000  # classes of ImageNet


def classes() -> list[dict[str, Any]]:
    """Return a prompt for every class of ImageNet: its index, as text."""
    return [{"prompt": str(index), "tag": ""} for index in range(CLASSES)]


GENERATED = {"geneval/train": geneval.train, "geneval/test": geneval.test, "imagenet/classes": classes}


def prompt_id(text: str) -> str:
    """Return the id of a prompt: twelve hex digits of the sha256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def locate(name: str, where: str) -> Path:
    """Return the file that ``name`` means: that of a packaged list, of a public set, or the path itself.

    A list that is generated on demand has no file; its name is returned as a path. ``where``: the setting to name in
    errors. Raise UserError for a name that means nothing, and Missing for a public set that is not on this machine.
    """
    if name in SETS and not Path(name).exists():
        return public.cached(SETS[name], where)
    world, _, split = name.partition("/")
    if world in ("geneval", "imagenet") and not Path(name).exists():
        if name not in GENERATED:
            raise UserError(f"{where}: there are no prompts '{name}'{did_you_mean(name, GENERATED)}")
        return Path(name)
    if world == "shapes" and not Path(name).exists():
        if split not in SPLITS:
            raise UserError(f"{where}: there are no prompts '{name}'{did_you_mean(split, SPLITS, 'shapes/')}")
        return SHAPES / f"{split}.jsonl"
    if Path(name).suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"{where}: '{name}' is not a prompt file; give a .txt or .jsonl file, shapes/train, /val, /test, "
            f"{', '.join([*GENERATED, *SETS])}"
        )
    return Path(name)


def load_prompts(name: str, where: str = "prompts") -> list[Prompt]:
    """Return the prompts of the list ``name``, in order.

    Raise UserError ("file:line: ...") for the first line that is empty, malformed or repeated, and as ``locate`` does.
    """
    if name in SETS and not Path(name).exists():
        return [Prompt(prompt_id(text), _checked(text, name), tag) for text, tag in public.rows(name, where)]
    path = locate(name, where)
    if name in GENERATED and not path.exists():
        return list(_generate(name))
    text = read_text(path)
    return list(_parse(path, text))


@functools.cache
def _generate(name: str) -> tuple[Prompt, ...]:
    """Return a generated list. A prompt may occur more than once in a training list: that is its weight there."""
    return tuple(Prompt(prompt_id(line["prompt"]), line["prompt"], line["tag"], line) for line in GENERATED[name]())


@functools.lru_cache(maxsize=16)  # a sweep asks for the same few lists once per run
def _parse(path: Path, text: str) -> tuple[Prompt, ...]:
    lines = text.removesuffix("\n").split("\n")  # not splitlines(): it also splits at U+2028 and others
    if lines == [""]:
        raise UserError(f"{path}: the file is empty; write one prompt per line")
    prompts, seen = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        spot = f"{path}:{number}"
        prompt = (parse_prompt if path.suffix == ".jsonl" else _from_text)(line.removesuffix("\r"), spot)
        if prompt.id in seen:
            first = seen[prompt.id]
            raise UserError(f"{spot}: the prompt {prompt.text!r} is already on line {first}; keep one of them")
        seen[prompt.id] = number
        prompts.append(prompt)
    return tuple(prompts)


def _from_text(line: str, spot: str) -> Prompt:
    return Prompt(prompt_id(line), _checked(line, spot))


def parse_prompt(line: str, spot: str) -> Prompt:
    """Return the prompt on a line of a .jsonl file. Raise UserError for a line that is unusable.

    ``spot``: file and line number, for errors.
    """
    if not line.strip():
        raise UserError(f"{spot}: the line is empty; remove it")
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UserError(f"{spot}: not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise UserError(f'{spot}: expected an object with a text "prompt"')
    tag = data.get("tag", "")
    if not isinstance(tag, str):
        raise UserError(f'{spot}: "tag" is {tag!r}; it must be text')
    text = _checked(data["prompt"], spot)  # first: half a surrogate pair has no id
    return Prompt(prompt_id(text), text, tag, data)


def _checked(text: str, spot: str) -> str:
    if not text.strip():
        raise UserError(f"{spot}: the prompt is empty; remove the line")
    if text != text.strip():
        raise UserError(f"{spot}: the prompt {text!r} has space at its start or end; remove it")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            name = {"\n": "a line break", "\t": "a tab"}.get(character, f"the control character U+{ord(character):04X}")
            raise UserError(f"{spot}: {name} inside the prompt {text!r}; put every prompt on one line of plain text")
    return text


def digest(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 of a list: texts, tags and metadata, in order; all that training and scoring see of it."""
    plain = json.dumps([prompt[1:] for prompt in prompts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def check_vocabulary(prompts: Sequence[Prompt], name: str, tokenizers: Sequence[Path], where: str = "prompts") -> None:
    """Raise UserError for the first prompt that the model's text encoders cannot read in full. Loads no model.

    ``name``: of the list; ``tokenizers``: the encoders' ``tokenizer.json`` files. A byte-level tokenizer can represent
    every text. If a model has one (FLUX.1's CLIP), no prompt is refused, although another encoder (T5) may lack tokens
    for '{' or '~'.
    """
    if any(_reads_bytes(file) for file in tokenizers):
        return
    for file in tokenizers:
        unknown = _unknown_pieces(file)
        for number, prompt in enumerate(prompts, 1):
            if piece := unknown(prompt.text):
                spot = f"{locate(name, where)}:{number}"
                raise UserError(
                    f"{spot}: the model's text encoder has no token for {piece!r} in {prompt.text!r}; "
                    "write the prompt without it"
                )


BYTES = 256


def _reads_bytes(file: Path) -> bool:
    """Return whether a tokenizer has a token for each of the 256 characters that stand for bytes."""
    vocabulary = json.loads(read_text(file))["model"].get("vocab")
    return isinstance(vocabulary, dict) and sum(len(token) == 1 for token in vocabulary) >= BYTES


def _unknown_pieces(file: Path) -> Callable[[str], str]:
    """Return a function: text -> its first piece that becomes the unknown token, or ""."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    model = json.loads(read_text(file))["model"]
    unk = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")

    def first(text: str) -> str:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        spans = (span for token, span in zip(encoded.ids, encoded.offsets) if token == unk)
        return next((text[a:b].strip() for a, b in spans), "")

    return first
